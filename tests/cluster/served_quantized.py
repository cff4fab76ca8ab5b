"""A Serve with quantised models of pt, by name, with and without speculation.

    python -m tests.cluster.served_quantized [--only bnb-nf4]

prints a line of JSON for each model: how many of its answers to 32 clients at once, half of them streams, were the ones
that it was trained to give, by name and by route, and its weights as planned and as measured. A last line has the
drafted and the accepted tokens of each model. It exits with 1 if any answer is another one.
"""

import argparse
import asyncio
import json
import re
import shutil
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import aiohttp
import torch
from transformers import AutoModelForCausalLM

from serve_app.demo import MODEL_DIR
from serve_app.model_fields import PT_QUANTIZATIONS
from serve_app.replica.replica_plan import plan_replica
from tests.builders import model_config
from tests.cluster.conftest import model
from tests.cluster.serve_run import ServeRun
from tests.cluster.storm import ask
from tests.demo_answers import ANSWERS, QUESTIONS

AT_ONCE = 32
TIMEOUT_S = 300.0
# Ray exports a metric after so many seconds at most, as the replica's memory watch sets it.
EXPORT_S = 40.0


def write_draft(folder: Path) -> None:
    """Writes the demo model with other weights by a small share of each one's size, so that most of its drafts hold."""
    shutil.copytree(MODEL_DIR, folder)
    draft = AutoModelForCausalLM.from_pretrained(folder)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in draft.parameters():
            parameter += 0.05 * parameter.std() * torch.randn_like(parameter)
    draft.save_pretrained(folder)


def models_of(methods: list[str], draft: Path) -> dict[str, dict[str, Any]]:
    """The fields of each model, by its name."""
    speculations: dict[str, dict[str, Any]] = {
        "plain": {},
        "ngram": {"speculative": {"method": "ngram", "num_speculative_tokens": 3}},
        "draft": {"speculative": {"model": str(draft), "num_speculative_tokens": 3, "quantization": "bnb-nf4"}},
    }
    return {
        f"{method}-{name}": {"infer_backend": "pt", "quantization": method, "num_cpus": 1, **fields}
        for method in methods
        for name, fields in speculations.items()
    }


async def outcome(session: aiohttp.ClientSession, url: str, name: str, question: str, is_streamed: bool) -> str:
    """ "right", or what the client saw instead."""
    message = {"role": "user", "content": question}
    body = {"model": name, "messages": [message], "temperature": 0, "max_tokens": 200, "stream": is_streamed}
    if is_streamed:
        seen = await ask(session, url, "/v1/chat/completions", body)
        text = seen["error"] or seen["text"]
    else:
        async with session.post(f"{url}/v1/chat/completions", json=body) as reply:
            told = await reply.json(content_type=None)
            text = told["choices"][0]["message"]["content"] if reply.status == 200 else f"{reply.status} {told}"
    return "right" if text == ANSWERS[question] else str(text)[:300]


async def at_once(url: str, name: str) -> dict[str, int]:
    """What AT_ONCE clients see together: outcome to count."""
    timeout = aiohttp.ClientTimeout(total=TIMEOUT_S)
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), timeout=timeout) as session:
        asked = [QUESTIONS[number % len(QUESTIONS)] for number in range(AT_ONCE)]
        seen = await asyncio.gather(
            *(outcome(session, url, name, question, number % 2 == 0) for number, question in enumerate(asked))
        )
    return dict(Counter(seen))


def drafted(serve: ServeRun, name: str) -> dict[str, float]:
    """What Prometheus reads of the model's drafts now: drafted and accepted tokens."""
    found: dict[str, float] = {}
    for line in serve.metrics():
        match = re.match(r"ray_vllm_spec_decode_num_(draft|accepted)_tokens_total\{(.*)\} (\S+)$", line)
        if match and f'"{name}"' in match[2]:
            found[match[1]] = found.get(match[1], 0) + float(match[3])
    return found


def weights(serve: ServeRun, name: str, fields: dict[str, Any]) -> list[int]:
    """The weights of the model, as planned and as its replica has measured them."""
    plan = plan_replica(model_config(**model(name, **fields)["args"]), [])
    assert plan is not None
    (told,) = [each for each in serve.status_of_ours()["models"] if each["name"] == name]
    report = told["replicas"][0]["report"]
    return [plan.ranks[0].weights.bytes, report["devices"][0]["weights"] if report else 0]


def main() -> int:
    """Prints the lines, and returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", choices=PT_QUANTIZATIONS, default=list(PT_QUANTIZATIONS))
    options = parser.parse_args()
    status = 0
    with tempfile.TemporaryDirectory(prefix="serve-app-draft-") as folder:
        write_draft(Path(folder) / "model")
        models = models_of(options.only, Path(folder) / "model")
        router = {"name": "router", "import_path": "serve_app.app:router", "route_prefix": "/"}
        applications = [router, *(model(name, **fields) for name, fields in models.items())]
        serve = ServeRun({"applications": applications}, cpus=len(models) + 2, is_set_before_ray=True)
        try:
            serve.wait_until(
                lambda told: len(told) == len(models) and all(m["status"] != "loading" for m in told.values())
            )
            for name, fields in models.items():
                ways = {"by name": serve.url, "by route": f"{serve.url}/models/{name}"}
                answers = {way: asyncio.run(at_once(url, name)) for way, url in ways.items()}
                print(json.dumps({"model": name, **answers, "weights": weights(serve, name, fields)}), flush=True)
                status |= any(seen != {"right": AT_ONCE} for seen in answers.values())
            time.sleep(EXPORT_S)
            print(json.dumps({"tokens": {name: drafted(serve, name) for name in models}}))
        finally:
            serve.stop()
            serve.clean_up()
    return status


if __name__ == "__main__":
    sys.exit(main())
