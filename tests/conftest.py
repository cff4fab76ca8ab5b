"""Tests keep what they measure to themselves, and each computes on one processor."""

import atexit
import os
import shutil
import tempfile

# Before any test imports torch. The tests' models are so small that a second thread costs more than it computes, and
# ten times more where the other processor works on other tests.
os.environ["OMP_NUM_THREADS"] = "1"

# Before any test reads it, and for the processes that tests start.
os.environ["SERVE_APP_CACHE"] = tempfile.mkdtemp(prefix="serve-app-test-cache-")
atexit.register(shutil.rmtree, os.environ["SERVE_APP_CACHE"], ignore_errors=True)
