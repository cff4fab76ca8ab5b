"""The pt engine: transformers and accelerate, for any causal LM on any device map."""
