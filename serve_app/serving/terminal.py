"""Lines for the person who watches `serve run`."""

import sys


def say(text: str) -> None:
    """Prints one line that Ray forwards to the terminal of `serve run`, with the application's name before it.

    Serve may turn `sys.stdout` into its log file (throughput mode does); `sys.__stdout__` is the process's own.
    """
    print(text, file=sys.__stdout__, flush=True)
