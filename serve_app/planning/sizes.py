"""Writes sizes for people."""

from serve_app.planning.memory import GIB


def gib(size: float) -> str:
    """Returns bytes as people read them: 1.25 GiB or 120 MiB."""
    return f"{size / GIB:.2f} GiB" if abs(size) >= GIB else f"{size / 2**20:.1f} MiB"
