"""Reads what a cluster runs, for `serve-app status` and for the console."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ray

from serve_app.adapters.records import Found, RecordReader, Records
from serve_app.ray_serve import available_by_node, serve_details, waiting_bundles
from serve_app.replica.report import read_reports
from serve_app.router.model_status import untold
from serve_app.status.cluster_status import ClusterStatus, cluster_status

# The controller has this many seconds to answer.
STATUS_TIMEOUT_S = 30.0


def read_cluster_status(timeout_s: float = STATUS_TIMEOUT_S) -> ClusterStatus:
    """Returns the status of the cluster to which this process is connected, for which it blocks.

    Raises ValueError if no Serve runs there, and RayError if Serve's controller does not answer.
    """
    applications = serve_details(timeout_s)["applications"]
    reader = RecordReader()
    records = reader.read()
    found = reader.found(untold(applications, records))
    return status_of(applications, records, found).cluster


@dataclass(frozen=True)
class Reading:
    """This is what a cluster runs, with the nodes as `ray.nodes()` has them."""

    cluster: ClusterStatus
    nodes: Sequence[Mapping[str, Any]]


def status_of(applications: Mapping[str, Any], records: Records, found: Found) -> Reading:
    """Returns what runs, where Serve's applications and the records of adapters were read already. It blocks for some
    milliseconds. Raises RayError or RuntimeError while Ray's head does not answer."""
    nodes, left, reports, asked = ray.nodes(), available_by_node(), read_reports(), waiting_bundles()
    return Reading(cluster_status(applications, nodes, left, reports, time.time(), asked, records, found), nodes)
