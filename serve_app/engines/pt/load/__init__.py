"""A model on its devices: its map, its weights, and what it can do."""
