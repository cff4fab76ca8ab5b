"""pt's generation: which sequences run in a step, how a step runs, and what it keeps."""
