"""Defines how an engine tells of an adapter that it took while it was away and could not load since."""

from collections.abc import Callable

# This is called with the adapter's name, the reason, and whether the version before it is still served.
LostAdapter = Callable[[str, str, bool], None]
