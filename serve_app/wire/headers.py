"""Reads the headers of a request or an answer, which are pairs of bytes as in ASGI, with names in lower case."""

from collections.abc import Sequence

Headers = Sequence[tuple[bytes, bytes]]


def header(headers: Headers, name: bytes) -> bytes | None:
    """Returns the value of the first header of that name, or None if there is none."""
    return next((value for key, value in headers if key == name), None)


def declared_bytes(headers: Headers) -> int:
    """Returns the length of the body in bytes that the headers declare, or 0 if they declare none."""
    declared = header(headers, b"content-length") or b""
    return int(declared) if declared.isdigit() else 0
