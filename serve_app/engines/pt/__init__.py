"""This package is the pt engine, which runs any causal LM on any device map with transformers and accelerate."""
