"""Runs `serve-app` so that it ends when the process that started it ends, even by SIGKILL.

    python -m serve_app.tuning.tied PARENT run FILE

The kernel sends SIGTERM to it then, upon which `serve-app run` stops its Ray and all models.
"""

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1  # This is from <sys/prctl.h>. It stays set over an exec.


def main() -> None:
    """Ties this process to its parent, whose pid is the first argument, and becomes `serve-app` with the others."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    parent, *arguments = sys.argv[1:]
    if os.getppid() != int(parent):  # It has ended before.
        sys.exit(1)
    code = "import sys; from serve_app.cli.main import main; sys.exit(main())"
    os.execv(sys.executable, [sys.executable, "-c", code, *arguments])  # noqa: S606 — our own arguments.


if __name__ == "__main__":
    main()
