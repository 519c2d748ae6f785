"""Distilled data sets: networks on one flat vector, hypergradients of unrolled training, expert trajectories, synthetic sets, and what methods share.

Notation: M synthetic images, C classes, P parameters, T inner steps; images are what a network takes (whitened or standardised, never clipped).
"""
