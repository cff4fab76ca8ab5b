"""This package turns tokens into text that is certain."""
