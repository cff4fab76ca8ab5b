"""This package solves how vLLM splits a model over stages of unequal cards."""
