"""Tests keep what they measure to themselves, and workers of pytest-xdist leave each other their processors."""

import atexit
import os
import shutil
import tempfile

# Before any test imports torch, and for the processes that tests start: two workers with threads for each processor
# wait for each other at every step.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

# Before any test reads it, and for the processes that tests start.
os.environ["SERVE_APP_CACHE"] = tempfile.mkdtemp(prefix="serve-app-test-cache-")
atexit.register(shutil.rmtree, os.environ["SERVE_APP_CACHE"], ignore_errors=True)
