"""Tests keep what they measure to themselves."""

import atexit
import os
import shutil
import tempfile

# Before any test reads it, and for the processes that tests start.
os.environ["SERVE_APP_CACHE"] = tempfile.mkdtemp(prefix="serve-app-test-cache-")
atexit.register(shutil.rmtree, os.environ["SERVE_APP_CACHE"], ignore_errors=True)
