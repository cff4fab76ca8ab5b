"""From tokens to text that is certain."""
