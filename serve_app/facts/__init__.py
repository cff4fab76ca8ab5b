"""Reads the world, returns frozen values."""
