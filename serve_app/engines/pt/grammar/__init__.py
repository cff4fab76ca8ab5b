"""Output formats: checked, compiled and followed in processes that can be ended."""
