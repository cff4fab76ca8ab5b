"""Requests made from the OpenAPI documents, right ones and wrong ones, sent to a Serve that runs.

    python -m tests.cluster.contract [--cases 300]

Starts a Serve with one model of each backend and sends so many cases of either kind to each operation of the router's
document and of the pt model's own. Prints the number of answers by document and status; what breaks the documents, is
a 5xx or takes longer than a minute ends it with an error that shows the request.
"""

import argparse
import json
import signal
import sys
from collections import Counter
from typing import Any

import requests
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis import GenerationMode
from schemathesis.checks import CHECKS, load_all_checks

from tests.cluster.serve_run import ServeRun

TIMEOUT_S = 60
# Long answers show nothing that short ones do not, and there are thousands.
MOST_TOKENS = 8
CHECKED = ["not_a_server_error", "status_code_conformance", "content_type_conformance", "response_schema_conformance"]


def bounded(document: dict[str, Any], models: list[str], is_open: bool) -> dict[str, Any]:
    """The document with these models and answers of a few tokens; with unknown fields too where it `is_open`."""
    for name, schema in document["components"]["schemas"].items():
        fields = schema.get("properties", {})
        if "model" not in fields:
            continue
        fields["model"] = {"type": "string", "enum": models}
        schema["additionalProperties"] = is_open
        if "max_tokens" in fields:
            fields["max_tokens"] = {"type": "integer", "minimum": 1, "maximum": MOST_TOKENS}
            fields["n"] = {"type": "integer", "minimum": 1, "maximum": 2}
            fields.pop("max_completion_tokens", None)
            schema["required"] = [*schema.get("required", []), "max_tokens"]
        assert name != "Error"
    return document


def run_cases(url: str, document: dict[str, Any], cases: int, headers: dict[str, str] | None = None) -> Counter[int]:
    """Sends right and wrong requests to every operation. Returns how many got which status."""
    seen: Counter[int] = Counter()
    load_all_checks()
    checks = CHECKS.get_by_names(CHECKED)
    for found in schemathesis.openapi.from_dict(document).get_all_operations():
        operation = found.ok()
        takes = bool(operation.body or operation.path_parameters)
        for mode in GenerationMode if operation.body else [GenerationMode.POSITIVE]:  # Any name is a string.

            @settings(
                max_examples=cases if takes else 5, deadline=None, database=None, derandomize=True,
                phases=[Phase.generate], suppress_health_check=list(HealthCheck),
            )  # fmt: skip
            @given(case=operation.as_strategy(generation_mode=mode))
            def send(case: schemathesis.Case) -> None:
                answer = case.call(base_url=url, headers=headers, timeout=TIMEOUT_S)
                seen[answer.status_code] += 1
                case.validate_response(answer, checks=checks)

            send()
    return seen


def config() -> dict[str, Any]:
    """A router and one model of each backend."""
    router = {"name": "router", "import_path": "serve_app.app:router", "route_prefix": "/"}
    models = [
        {
            "name": name,
            "import_path": "serve_app.app:model",
            "route_prefix": f"/models/{name}",
            "args": {"model": "serve-app/demo", "infer_backend": name, "device": "cpu", "dtype": "float32"},
        }
        for name in ("pt", "vllm")
    ]
    return {"applications": [router, *models]}


def main() -> None:
    """Prints the numbers of answers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=100)
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped"))  # So that what was started is stopped too.
    serve = ServeRun(config(), cpus=4)
    try:
        serve.wait_until(lambda models: all(model["status"] == "ready" for model in models.values()) and bool(models))
        for route, names in (("", ["pt"]), ("", ["vllm"]), ("/models/pt", ["pt"])):
            for is_open in (False, True):
                url = serve.url + route
                document = requests.get(f"{url}/openapi.json", timeout=TIMEOUT_S).json()
                seen = run_cases(url, bounded(document, names, is_open), options.cases)
                row = {"document": route or "/", "model": names[0], "unknown_fields": is_open, "cases": seen.total()}
                print(json.dumps(row | {"statuses": dict(sorted(seen.items()))}), flush=True)
    finally:
        serve.stop(signal.SIGTERM)
        serve.clean_up()


if __name__ == "__main__":
    main()
