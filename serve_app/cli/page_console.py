"""Prints pages to stdout by rich, for commands whose output may go through a pipe."""

import sys

from rich.console import Console


class PageConsole(Console):
    """This is a console on stdout whose error for a reader that has gone away is Python's own."""

    def __init__(self, width: int | None = None):
        super().__init__(file=sys.stdout, highlight=False, width=width)

    def on_broken_pipe(self) -> None:
        """Raises BrokenPipeError, which `serve-app` turns into an exit code. rich would exit with 1."""
        raise BrokenPipeError
