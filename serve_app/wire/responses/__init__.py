"""Translates OpenAI's Responses API into that of chat completions and back. It is pure."""
