"""One model more and one less by `serve deploy`, while streams run on others.

    python -m tests.cluster.change [--models 8]

Starts a Serve with so many light pt models, opens a long stream on three of them, deploys one model more, asks it,
and deploys the first file again. Prints one JSON object: which replicas' processes are the same before and after, what
became of the streams, and the seconds until the new model answered.
"""

import argparse
import asyncio
import json
import re
import signal
import sys
import time
from typing import Any

import aiohttp

from tests.cluster.serve_run import ServeRun

STREAMS = 3


def config(models: int) -> dict[str, Any]:
    """A router and so many models."""
    router = {"name": "router", "import_path": "serve_app.app:router", "route_prefix": "/"}
    args = {"model": "serve-app/demo", "infer_backend": "pt", "device": "cpu", "dtype": "float32", "num_cpus": 0.5}
    applications = [
        {
            "name": f"m{number}",
            "import_path": "serve_app.app:model",
            "route_prefix": f"/models/m{number}",
            "args": {**args, "max_model_len": 1024, "max_num_seqs": 4},
        }
        for number in range(models)
    ]
    return {"applications": [router, *applications]}


def replicas(serve: ServeRun) -> dict[str, int]:
    """The pid of each model's replica."""
    found = {}
    for pid, command in serve.processes().items():
        if match := re.search(r"ServeReplica:(m\d+):Model", command):
            found[match[1]] = pid
    return found


class LongStream:
    """Streams of one model, one after the other for as long as it is wanted; each is read to its end."""

    def __init__(self, session: aiohttp.ClientSession, model: str):
        self.model = model
        self.texts: list[str] = []
        self._session = session
        self._wanted = True
        self._task = asyncio.create_task(self._run())

    async def _run(self) -> None:
        body = {"model": self.model, "prompt": "Tell me", "max_tokens": 900, "ignore_eos": True, "temperature": 0}
        while self._wanted:
            text = ""
            async with self._session.post("/v1/completions", json={**body, "stream": True}) as reply:
                async for line in reply.content:
                    if line.startswith(b"data: {"):
                        event = json.loads(line[6:])
                        text += "".join(choice["text"] for choice in event["choices"]) if "choices" in event else "?"
            self.texts.append(text)

    async def end(self) -> list[str]:
        """The texts of all."""
        self._wanted = False
        await self._task
        return self.texts


async def change(serve: ServeRun, models: int) -> dict[str, Any]:
    """One more, and one less."""
    timeout = aiohttp.ClientTimeout(total=300)
    async with aiohttp.ClientSession(serve.url, timeout=timeout) as session:
        streams = [LongStream(session, f"m{number}") for number in range(STREAMS)]
        await asyncio.sleep(3)
        before = replicas(serve)
        start = time.monotonic()
        await asyncio.to_thread(serve.deploy, config(models + 1))
        name = f"m{models}"
        await asyncio.to_thread(serve.wait_until, lambda told: told.get(name, {}).get("status") == "ready", 300)
        async with session.post("/v1/completions", json={"model": name, "prompt": "x", "max_tokens": 4}) as reply:
            status, seconds = reply.status, time.monotonic() - start
        between = replicas(serve)
        await asyncio.to_thread(serve.deploy, config(models))
        await asyncio.to_thread(serve.wait_until, lambda told: name not in told, 300)
        texts = [await stream.end() for stream in streams]
        after = replicas(serve)
    return {
        "models": models,
        "same_processes_with_one_more": before == {name: pid for name, pid in between.items() if name in before},
        "same_processes_with_one_less": before == after,
        "new_model_status": status,
        "new_model_ready_s": round(seconds, 1),
        "streams": sum(map(len, texts)),
        "whole_and_equal": len({text for several in texts for text in several}) == 1,
    }


def main() -> None:
    """Prints what came of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=int, default=8)
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped"))  # So that what was started is stopped too.
    serve = ServeRun(config(options.models), cpus=16)
    try:
        serve.wait_until(lambda told: sum(model["status"] == "ready" for model in told.values()) == options.models)
        print(json.dumps(asyncio.run(change(serve, options.models))))
    finally:
        serve.stop(signal.SIGTERM)
        serve.clean_up()


if __name__ == "__main__":
    main()
