"""Methods whose artefact is a classifier."""
