"""A Serve with API keys and one model of two replicas, in which faults can be made (`faults.py`).

Beside it are the applications of `counting.py`, on which no test waits but those that ask them.
"""

import time
from pathlib import Path
from typing import Any

from tests.cluster import counting, faults
from tests.cluster.contract import HEADERS, KEY
from tests.cluster.serve_run import ServeRun
from tests.cluster.storm import config, serving_pids

NAME = "mortal"
REPLICAS = 2
SETTLE_TIMEOUT_S = 120.0
# Three failures of it end a replica whose engine has died. The usual two seconds are only waited for.
HEALTH_CHECK_PERIOD_S = 1.0


def mortal_config(folder: Path) -> dict[str, Any]:
    """The router and the model, whose replicas tell in that folder what has happened to them, and two that count."""
    made = config(variables=faults.environment(folder))
    (deployment,) = made["applications"][1]["deployments"]
    deployment["health_check_period_s"] = HEALTH_CHECK_PERIOD_S
    made["applications"] += counting.applications()
    return made


class MortalServe(ServeRun):
    """It, once both replicas serve."""

    def __init__(self, faults_folder: Path):
        self._faults_folder = faults_folder
        super().__init__(
            mortal_config(faults_folder), cpus=4, controller={"SERVE_APP_API_KEYS": KEY}, headers=HEADERS, start=False
        )
        self.environment = counting.importable(self.environment)
        self._run()

    def config(self) -> dict[str, Any]:
        """A copy of what it was started with."""
        return mortal_config(self._faults_folder)

    def wait_for_both(self) -> None:
        """Until two replicas serve whose engines live, and Serve has ended those whose engines do not."""
        self.wait_until(lambda models: models[NAME]["replicas"] == REPLICAS)
        deadline = time.monotonic() + SETTLE_TIMEOUT_S
        while len(pids := set(serving_pids(self, NAME))) != REPLICAS or pids & self.dead():
            assert time.monotonic() < deadline, self.output()[-3000:]
            time.sleep(0.2)

    def living(self) -> set[int]:
        """The processes of the replicas that serve and whose engines live."""
        return set(serving_pids(self, NAME)) - self.dead()

    def dead(self) -> set[int]:
        """Processes whose engine's thread has died by a fault."""
        return faults.happened(self._faults_folder, "died")
