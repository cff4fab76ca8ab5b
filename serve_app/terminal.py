"""Prints lines for the person who watches `serve run`."""

import sys


def say(text: str) -> None:
    """Prints one line that Ray forwards to the terminal of `serve run`, with the application's name before it.

    Serve may turn `print` and `sys.stderr` into its log file (RAY_SERVE_LOG_TO_STDERR=0 does), so the process's own
    stream is written to. Not stdout: where `serve run` writes into a pipe or a file, Python holds that back.
    """
    stream = sys.__stderr__
    if stream is not None:
        stream.write(text + "\n")
        stream.flush()
