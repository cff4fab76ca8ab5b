"""Prints lines for the person who watches `serve run`."""

import sys

# This begins the lines that `serve-app run` picks out of all that workers print. The rest goes to its log file.
MARK = "serve-app: "


def say(text: str) -> None:
    """Prints one line that Ray forwards to the terminal of `serve run`, with the application's name before it.

    Serve may turn `print` and `sys.stderr` into its log file (RAY_SERVE_LOG_TO_STDERR=0 does), so this writes to the
    process's own stderr. It does not use stdout, which Python buffers if `serve run` writes into a pipe or a file.
    """
    stream = sys.__stderr__
    if stream is not None:
        stream.write(text + "\n")
        stream.flush()


def notify(text: str) -> None:
    """Does what `say` does, for lines that `serve-app run` shows too. It reads only the models' states by itself."""
    say("\n".join(MARK + line for line in text.splitlines()))
