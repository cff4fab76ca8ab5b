"""Reads from Serve what each application is deployed with, so a model knows the names that others have."""

import asyncio
import logging
from collections.abc import Mapping
from typing import Any

from ray.exceptions import RayError

from serve_app.adapters.configured import MODEL_PATH, watched_folder_of
from serve_app.adapters.records import Found, RecordReader, Records
from serve_app.ray_serve import running_replicas, serve_details

logger = logging.getLogger("ray.serve")

# Serve's controller has this many seconds to answer.
DETAILS_TIMEOUT_S = 10.0


def deployed_applications() -> dict[str, Mapping[str, Any]]:
    """Returns the applications by name as their config file has them, also those that are being built. It blocks for
    some milliseconds. There are none if Serve's controller does not answer, which is logged, because commands check
    names too.

    One that Serve could not build takes no name from others. If it is an update that failed, the model's replicas run
    on, so it is there without its config.
    """
    try:
        details = serve_details(DETAILS_TIMEOUT_S)["applications"]
        refused = {name for name, item in details.items() if _was_refused(item)}
        running = asyncio.run(running_replicas(refused)) if refused else {}
    except (RayError, ValueError, AttributeError) as error:
        logger.warning("The names of other models cannot be read: %s", error)
        return {}
    return {
        name: {"import_path": MODEL_PATH} if name in refused else item["deployed_app_config"] or {}
        for name, item in details.items()
        if name not in refused or running[name]
    }


def told_adapters(applications: Mapping[str, Mapping[str, Any]]) -> tuple[Records, Found]:
    """Returns what replicas have of adapters, and what was found last in the watched folders of these applications. It
    blocks for some milliseconds. There is nothing if Ray's head does not answer, which is logged."""
    reader = RecordReader()
    folders = {name: folder for name, item in applications.items() if (folder := watched_folder_of(item)) is not None}
    try:
        records, found = reader.read(), reader.found(folders)
        return records, {name: last for name, last in found.items() if last.folder == folders[name]}
    except (RayError, RuntimeError) as error:
        logger.warning("Which adapters the replicas have cannot be read: %s", error)
        return {}, {}


def _was_refused(item: Mapping[str, Any]) -> bool:
    status = item["status"]
    return str(getattr(status, "value", status)) == "DEPLOY_FAILED" and not item["deployments"]
