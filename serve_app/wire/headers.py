"""The headers of a request or an answer: pairs of bytes, as ASGI has them, with names in lower case."""

from collections.abc import Sequence

Headers = Sequence[tuple[bytes, bytes]]


def header(headers: Headers, name: bytes) -> bytes | None:
    """Returns the value of the first header of that name, or None where there is none."""
    return next((value for key, value in headers if key == name), None)


def declared_bytes(headers: Headers) -> int:
    """Returns what the headers say of the body's length; 0 where they say nothing."""
    declared = header(headers, b"content-length") or b""
    return int(declared) if declared.isdigit() else 0
