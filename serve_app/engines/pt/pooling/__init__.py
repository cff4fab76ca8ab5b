"""Serves models that make vectors or scores of texts: embedding models and cross-encoders."""
