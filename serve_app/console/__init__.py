"""Shows people what runs: the console, which the router serves at /ui."""
