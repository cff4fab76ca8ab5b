"""Ray Serve around the engines: replicas, the router, and what both speak."""
