"""The ways from the router to a model's replicas."""
