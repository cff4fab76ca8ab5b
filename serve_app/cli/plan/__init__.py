"""This package is the command `serve-app plan`."""
