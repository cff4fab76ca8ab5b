"""Reads from Serve what each application is deployed with, so a model knows the names that others have."""

import logging
from collections.abc import Mapping
from typing import Any

from ray.exceptions import RayError

from serve_app.ray_serve import serve_details

logger = logging.getLogger("ray.serve")

# Serve's controller has this many seconds to answer.
DETAILS_TIMEOUT_S = 10.0


def deployed_applications() -> dict[str, Mapping[str, Any]]:
    """Returns the applications by name as their config file has them, also those that are being built. It blocks for
    some milliseconds. There are none if Serve's controller does not answer, which is logged, because commands check
    names too."""
    try:
        details = serve_details(DETAILS_TIMEOUT_S)["applications"]
    except (RayError, ValueError) as error:
        logger.warning("The names of other models cannot be read: %s", error)
        return {}
    return {name: item["deployed_app_config"] or {} for name, item in details.items()}
