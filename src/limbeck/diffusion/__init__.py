"""Diffusion: noise schedules, denoisers and their conversions, guidance, samplers, generators, and the parts that distillation methods share.

Notation: x0 data, x_t = α_t x0 + σ_t ε with ε ~ N(0, I); t is continuous, float64, data at small t. A noise *level* is σ_t/α_t: what a denoiser of
x_t/α_t depends on, whatever the schedule.
"""
