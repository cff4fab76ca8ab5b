"""`serve-app tune`: the command, what it shows meanwhile, and what it writes."""
