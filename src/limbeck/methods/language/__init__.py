"""Methods that make language models, and encoders that learn from encoders."""
