"""Modules here may have an event loop whose clock jumps."""

from tests.virtual_clock import pytest_asyncio_loop_factories

__all__ = ["pytest_asyncio_loop_factories"]
