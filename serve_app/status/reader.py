"""Reads what a cluster runs, for `serve-app status` and for the console."""

import time

import ray

from serve_app.adapters.records import RecordReader
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
    nodes, left, reports, asked = ray.nodes(), available_by_node(), read_reports(), waiting_bundles()
    reader = RecordReader()
    records = reader.read()
    found = reader.found(untold(applications, records))
    return cluster_status(applications, nodes, left, reports, time.time(), asked, records, found)
