"""Writes sizes for people."""

from serve_app.planning.memory import GIB, MIB

# A smaller size would be shown as 0.0 MiB.
LEAST_MIB = MIB / 20


def gib(size: float) -> str:
    """Returns bytes as people read them: 1.25 GiB, 120.0 MiB, or 300 bytes where MiB would round to zero."""
    if abs(size) >= GIB:
        return f"{size / GIB:.2f} GiB"
    if size == 0 or abs(size) >= LEAST_MIB:
        return f"{size / MIB:.1f} MiB"
    return f"{size:.0f} byte{'' if round(size) == 1 else 's'}"
