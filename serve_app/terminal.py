"""Prints lines for the person who watches `serve run`."""

import sys

# Begins the lines that `serve-app run` picks out of all that workers print. The rest goes to its log file.
MARK = "serve-app: "


def say(text: str) -> None:
    """Prints one line that Ray forwards to the terminal of `serve run`, with the application's name before it.

    Serve may turn `print` and `sys.stderr` into its log file (RAY_SERVE_LOG_TO_STDERR=0 does), so the process's own
    stream is written to. Not stdout: where `serve run` writes into a pipe or a file, Python holds that back.
    """
    stream = sys.__stderr__
    if stream is not None:
        stream.write(text + "\n")
        stream.flush()


def notify(text: str) -> None:
    """As `say`, for what `serve-app run` shows too: it reads the models' states itself, and nothing else."""
    say("\n".join(MARK + line for line in text.splitlines()))
