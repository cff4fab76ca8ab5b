"""This package puts a model on its devices: it makes its map, loads its weights, and finds out what it can do."""
