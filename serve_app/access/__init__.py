"""Who may come in: keys, limits, and the door that asks for them before a body is read."""
