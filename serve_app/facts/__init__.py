"""Reads the world and returns frozen values. Nothing here writes."""
