"""This package runs vLLM as an engine."""
