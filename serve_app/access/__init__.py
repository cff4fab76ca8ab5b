"""This package decides who may come in: it has keys, limits, and the door that checks them before a body is read."""
