"""This package is the command `serve-app from-llama-swap`."""
