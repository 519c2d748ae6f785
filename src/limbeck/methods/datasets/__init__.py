"""Methods that make data sets: few images (or pairs, or shared patterns) on which a fresh network trains as on the whole."""
