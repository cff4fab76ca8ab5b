"""Memory by index with a real Ray: the plan and Ray's books agree on what is taken and on what does not fit."""

import json
import os
import subprocess
import sys
import tempfile

GIB = 2**30


def test_ray_counts_what_the_plan_counts() -> None:
    """A node with 8 and 24 GiB advertised: three replicas run at once, a fourth is refused by the plan and waits."""
    with tempfile.TemporaryDirectory(prefix="sa-") as folder:
        run = subprocess.run(
            [sys.executable, "-m", "tests.cluster.by_index_script", folder],
            capture_output=True,
            text=True,
            timeout=150,
            check=False,
            env={**os.environ, "RAY_ADDRESS": "", "RAY_USAGE_STATS_ENABLED": "0"},
        )
    assert run.returncode == 0, run.stderr[-2000:]
    answer = json.loads(run.stdout.strip().splitlines()[-1])
    assert answer["devices"] == [["n1:0", 8 * GIB], ["n1:1", 24 * GIB]]
    assert answer["fits"]
    assert len(answer["fourth"]) == 1
    assert answer["left"] == {"vram_gib_0": 0.5, "vram_gib_1": 1.0}
    assert answer["fourth_waits"]
