"""Requests made from the OpenAPI documents, right ones and wrong ones, sent to a Serve that runs.

    python -m tests.cluster.contract [--cases 300]

Starts a Serve with an API key and one model of each backend. First every operation of every document is called without
the key. Then so many cases of either kind go to each operation of the router's document and of the pt model's own.
Prints the number of answers by document and status; what breaks the documents, is a 5xx or takes longer than a minute
ends it with an error that shows the request.
"""

import argparse
import json
import re
import signal
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import requests
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis import GenerationMode
from schemathesis.checks import CHECKS, load_all_checks

from serve_app.access.keys import sha256_of
from tests.cluster.serve_run import ServeRun

KEY = "sk-test-of-the-cluster"
HEADERS = {"authorization": f"Bearer {KEY}"}
TIMEOUT_S = 60
# Long answers show nothing that short ones do not, and there are thousands.
MOST_TOKENS = 8
METHODS = {"get", "head", "post", "put", "patch", "delete", "options"}
CHECKED = ["not_a_server_error", "status_code_conformance", "content_type_conformance", "response_schema_conformance"]


def document_of(url: str) -> Any:
    """The OpenAPI document that the address tells who has a key."""
    return requests.get(f"{url}/openapi.json", headers=HEADERS, timeout=TIMEOUT_S).json()


def bounded(document: dict[str, Any], models: list[str], is_open: bool) -> dict[str, Any]:
    """The document with these models and answers of a few tokens; with unknown fields too where it `is_open`. The
    console's stream has no end, so it is left out."""
    document["paths"].pop("/ui/api/stream", None)
    for name, schema in document["components"]["schemas"].items():
        fields = schema.get("properties", {})
        if "model" not in fields:
            continue
        fields["model"] = {"type": "string", "enum": models}
        schema["additionalProperties"] = is_open
        if "n" in fields:
            fields["n"] = {"type": "integer", "minimum": 1, "maximum": 2}
        fields.pop("max_completion_tokens", None)
        for limit in fields.keys() & {"max_tokens", "max_output_tokens"}:
            fields[limit] = {"type": "integer", "minimum": 1, "maximum": MOST_TOKENS}
            schema["required"] = sorted({*schema.get("required", []), limit})
        assert name not in ("Error", "MessagesError")
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


def without_key(url: str, document: dict[str, Any]) -> dict[str, int]:
    """The status of every operation that the document lists, called without a key."""
    seen = {}
    for path, operations in document["paths"].items():
        filled = re.sub(r"\{[^}]*\}", "x", path)
        for method in METHODS & operations.keys():
            body = None if method in ("get", "head") else {"model": "x", "prompt": "x", "messages": []}
            answer = requests.request(method, f"{url}{filled}", json=body, timeout=TIMEOUT_S)
            seen[f"{method.upper()} {path}"] = answer.status_code
    return seen


def config(backends: Sequence[str] = ("pt", "vllm")) -> dict[str, Any]:
    """A router and one model of each backend, named like it."""
    router = {"name": "router", "import_path": "serve_app.app:router", "route_prefix": "/"}
    models = [
        {
            "name": name,
            "import_path": "serve_app.app:model",
            "route_prefix": f"/models/{name}",
            "args": {"model": "serve-app/demo", "infer_backend": name, "device": "cpu", "dtype": "float32"},
        }
        for name in backends
    ]
    return {"applications": [router, *models]}


def main() -> None:
    """Prints the numbers of answers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=100)
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped"))  # So that what was started is stopped too.
    with tempfile.TemporaryDirectory() as folder:
        _run(options.cases, Path(folder) / "keys.yaml")


def _run(cases: int, keys: Path) -> None:
    """Prints the numbers of answers to so many cases of each kind. The key is an admin's, so that it may do all."""
    keys.write_text(f"keys: [{{name: contract, sha256: {sha256_of(KEY)}, role: admin}}]\n")
    serve = ServeRun(config(), cpus=4, controller={"SERVE_APP_API_KEYS_FILE": str(keys)}, headers=HEADERS)
    try:
        serve.wait_until(lambda models: all(model["status"] == "ready" for model in models.values()) and bool(models))
        for route in ("", "/models/pt", "/models/vllm"):
            seen = without_key(serve.url + route, document_of(serve.url + route))
            open_ones = {operation: status for operation, status in seen.items() if status != 401}
            print(json.dumps({"document": route or "/", "without_key": len(seen), "open": open_ones}), flush=True)
            assert open_ones == {"GET /health": 200}
        for route, names in (("", ["pt"]), ("", ["vllm"]), ("/models/pt", ["pt"])):
            for is_open in (False, True):
                url = serve.url + route
                document = bounded(document_of(url), names, is_open)
                seen = run_cases(url, document, cases, HEADERS)
                row = {"document": route or "/", "model": names[0], "unknown_fields": is_open, "cases": seen.total()}
                print(json.dumps(row | {"statuses": dict(sorted(seen.items()))}), flush=True)
    finally:
        serve.stop(signal.SIGTERM)
        serve.clean_up()


if __name__ == "__main__":
    main()
