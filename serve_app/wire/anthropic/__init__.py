"""Translates Anthropic's Messages API into that of chat completions and back. It is pure."""
