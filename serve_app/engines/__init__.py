"""This package has the engines. Each is an ASGI application with a start, a health and a stop."""
