"""This package has the ways from the router to a model's replicas."""
