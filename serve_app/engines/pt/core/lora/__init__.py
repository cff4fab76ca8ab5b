"""This package has rows of several LoRA adapters, and of none, share one forward pass."""
