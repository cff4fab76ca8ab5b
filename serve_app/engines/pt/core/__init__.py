"""This package generates: it decides which sequences run in a step, runs the step, and keeps its cache."""
