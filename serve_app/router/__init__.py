"""The deployment that finds a model by its name, and a request's way there and back."""
