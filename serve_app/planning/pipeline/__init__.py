"""This package solves how vLLM splits a model over stages of unequal cards. No field of a config asks for them yet."""
