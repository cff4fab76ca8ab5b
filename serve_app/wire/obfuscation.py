"""Pads the events of a stream, as OpenAI's `stream_options.include_obfuscation` asks for.

Who sees only the encrypted bytes of a stream could guess its words by the lengths of its events.
"""

import secrets

# Text and padding together have a multiple of this many bytes, which most tokens are shorter than.
BLOCK_BYTES = 32


def obfuscation(text: str) -> str:
    """Returns random characters that make the text's event as long as those of most other texts."""
    return secrets.token_hex(BLOCK_BYTES)[: -len(text.encode()) % BLOCK_BYTES]
