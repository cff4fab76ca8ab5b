"""One `serve-app run`: a model that scales, one that cannot load, and a clean terminal to the end."""

import asyncio
import json
import re
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import jsonschema  # type: ignore[import-untyped]
import pytest
import yaml

from tests.cluster.conftest import model
from tests.cluster.serve_app_run import ROUTER, ServeAppRun, answer
from tests.cluster.serve_run import BIN
from tests.cluster.test_serving import WAYS, base_url, chat
from tests.demo_answers import ANSWERS, QUESTIONS

# A line of ours: with the seconds of the start, or one of the last ones.
OWN_LINE = re.compile(r"\[ *\d+ s\] .*|Serving .* serve-app .*|What Ray .*|\d of \d models serve at .*|try: curl .*")


def scaling() -> dict[str, Any]:
    """A model of four sequences at a time, with a second replica where there is work for it."""
    autoscaling = {
        "min_replicas": 1,
        "max_replicas": 2,
        "policy": {"policy_function": "serve_app.replica.autoscaling:by_engine_load"},
        "upscale_delay_s": 1,
        "downscale_delay_s": 3,
        "metrics_interval_s": 1,
        "look_back_period_s": 2,
    }
    deployment = {"name": "Model", "max_ongoing_requests": 8, "autoscaling_config": autoscaling}
    return model("scaling", infer_backend="auto", max_num_seqs=4) | {"deployments": [deployment]}


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServeAppRun]:
    """It, once one model serves and the other has failed. The last test here ends it."""
    folder = tmp_path_factory.mktemp("broken")  # A model folder whose weights are missing.
    (folder / "config.json").write_text('{"model_type": "llama", "architectures": ["LlamaForCausalLM"]}')
    broken = model("broken", infer_backend="pt", model=str(folder))
    # Serve would start the model that cannot load three times, each of which imports torch.
    retries = {"RAY_SERVE_MAX_PER_REPLICA_RETRY_COUNT": "2"}
    run = ServeAppRun([ROUTER, scaling(), broken], cpus=4, variables=retries)
    try:
        run.wait_until(lambda models: len(models) == 2 and all(m["status"] != "loading" for m in models.values()))
        yield run
    finally:
        run.stop()
        run.clean_up()


def test_a_broken_model_leaves_the_others_serving_and_says_why(served: ServeAppRun) -> None:
    """`/ready`, the list, a request for it and `serve status` name the reason; the other one answers."""
    assert answer(served, "scaling") == ANSWERS[QUESTIONS[0]]
    ready = httpx.get(f"{served.url}/ready", timeout=10)
    assert (ready.status_code, ready.json()["status"]) == (200, "degraded")
    assert "cannot be read" in ready.json()["models"]["broken"]["message"]
    listed = httpx.get(f"{served.url}/v1/models", timeout=10).json()["data"]
    assert {entry["id"]: entry["status"] for entry in listed} == {"broken": "failed", "scaling": "ready"}
    reply = httpx.post(f"{served.url}/v1/chat/completions", json={"model": "broken"}, timeout=10)
    error = reply.json()["error"]
    assert (reply.status_code, error["code"], "retry-after" in reply.headers) == (503, "model_unavailable", True)
    assert "cannot be read" in error["message"]
    assert "cannot be read" in served.status()


@pytest.mark.parametrize("way", WAYS)
async def test_a_client_that_leaves_frees_its_place(served: ServeAppRun, way: str) -> None:
    """With every place taken by clients that leave, the next request is answered at once and not after them.

    `scaling` runs four at a time; a forgotten one would run for its 2,000 tokens.
    """
    url = base_url(served, "scaling", way)
    endless = chat("scaling", "Hello", max_tokens=1900, ignore_eos=True, stream=True)
    async with httpx.AsyncClient(timeout=60) as client:

        async def leave_early() -> None:
            async with client.stream("POST", f"{url}/chat/completions", json=endless) as reply:
                async for _ in reply.aiter_lines():
                    return

        await asyncio.gather(*(leave_early() for _ in range(4)))
        reply = await asyncio.wait_for(client.post(f"{url}/chat/completions", json=chat("scaling", "Hello")), 20)
    assert reply.json()["choices"][0]["message"]["content"] == ANSWERS["Hello"]


async def replicas(client: httpx.AsyncClient) -> int:
    """Running replicas of the model `scaling`."""
    count: int = (await client.get("/ready")).json()["models"]["scaling"]["replicas"]
    return count


async def wait_for(client: httpx.AsyncClient, wanted: int, timeout_s: float) -> bool:
    """Whether the number of replicas becomes `wanted` in time."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if await replicas(client) == wanted:
            return True
        await asyncio.sleep(1)
    return False


async def test_replicas_rise_under_load_and_fall_after_it(served: ServeAppRun) -> None:
    """Eight endless requests are twice what one engine holds, so a second replica comes; without them it goes again."""
    body = chat("scaling", "Hello", max_tokens=1500, ignore_eos=True)
    async with httpx.AsyncClient(base_url=served.url, timeout=300, limits=httpx.Limits(max_connections=None)) as client:
        assert await wait_for(client, 1, timeout_s=90)
        loading = True
        refusals: list[str] = []

        async def keep_asking() -> None:
            while loading:
                reply = await client.post("/v1/chat/completions", json=body)
                if reply.status_code != 200:
                    refusals.append(reply.text)

        load = [asyncio.create_task(keep_asking()) for _ in range(8)]
        try:
            rose = await wait_for(client, 2, timeout_s=120)
        finally:
            loading = False
            for task in load:
                task.cancel()
            await asyncio.gather(*load, return_exceptions=True)
        assert not refusals
        assert rose, "the second replica did not come"
        assert await wait_for(client, 1, timeout_s=120), "the second replica did not go"


def test_the_state_of_the_console_is_as_the_document_says(served: ServeAppRun) -> None:
    """With a node, its memory, and the models on it."""
    document = httpx.get(f"{served.url}/openapi.json", timeout=10).json()
    state = httpx.get(f"{served.url}/ui/api/state", timeout=30).json()
    schema = {"$ref": "#/components/schemas/ConsoleState", "components": document["components"]}
    jsonschema.Draft202012Validator(schema).validate(state)
    blocks = [block for node in state["nodes"] for device in node["devices"] for block in device["blocks"]]
    assert {block["model"] for block in blocks} == {"scaling"}  # A second replica may still stop.
    assert {model["name"] for model in state["models"]} == {"broken", "scaling"}


def test_the_console_plans_beside_what_runs(served: ServeAppRun) -> None:
    """For the devices of this cluster, whose models count with their plans. An update of a model replaces it."""
    before = plan(served, {"model": "serve-app/demo", "max_model_len": 512})
    assert (before["fits"], before["plan"]["models"][0]["name"]) == (True, "demo")
    names = [item["name"] for item in yaml.safe_load(before["yaml"])["applications"]]
    assert names == ["router", "scaling", "broken", "demo"]  # It is the file that is served, with the model added.
    update = plan(served, {"yaml": yaml.safe_dump({"applications": [model("scaling", infer_backend="pt")]})})
    assert update["notes"] == ["What scaling holds now counts as free, because the plan has it anew."]
    address = re.search(r"--address (\S+) for other commands", served.output())
    assert address is not None
    command = [BIN / "serve-app", "plan", served.config_file, "--beside-running", "--address", address[1], "--json"]
    done = subprocess.run(command, env=served.environment, capture_output=True, text=True, timeout=120)
    assert "broken: model: " in done.stderr  # Its weights are missing, so the file cannot be planned.
    command[2:3] = ["--model", "serve-app/demo", "--device", "cpu"]
    done = subprocess.run(command, env=served.environment, capture_output=True, text=True, timeout=120)
    assert (done.returncode, json.loads(done.stdout)["fits"]) == (0, True), done.stderr
    wrong = httpx.post(f"{served.url}/ui/api/plan", json={"yaml": "applications: [1]"}, timeout=70)
    assert (wrong.status_code, wrong.json()["error"]["message"]) == (
        400,
        "config.yaml: applications[0]: expected a mapping, got 1.",
    )


def plan(served: ServeAppRun, body: dict[str, Any]) -> dict[str, Any]:
    """What the console plans."""
    reply = httpx.post(f"{served.url}/ui/api/plan", json=body, timeout=70)
    assert reply.status_code == 200, reply.text
    told: dict[str, Any] = reply.json()
    return told


async def test_the_console_reads_the_file_again_and_wakes_a_model_at_zero_replicas(served: ServeAppRun) -> None:
    """A broken file changes nothing and is told whole. Nothing but the console asks for the model, which wakes."""
    right = served.config_file.read_text()
    async with httpx.AsyncClient(base_url=served.url, timeout=70) as client:
        served.config_file.write_text(right.replace("infer_backend", "infer_backends"))
        wrong = await client.post("/ui/api/reload")
        assert wrong.status_code == 400
        message = wrong.json()["error"]["message"]
        assert [name for name in ("scaling", "broken") if f"{name}: unknown field 'infer_backends'" in message] == [
            "scaling",
            "broken",
        ]
        assert await replicas(client) == 1
        served.config_file.write_text(right.replace("min_replicas: 1", "min_replicas: 0"))
        done = await client.post("/ui/api/reload")
        assert (done.status_code, done.json()["file"]) == (200, served.config_file.name)
        (line,) = done.json()["changes"]
        assert line.startswith("scaling changes in place (")
        assert "min_replicas: 1 → 0" in line
        assert await wait_for(client, 0, timeout_s=120)
        woken = await client.post("/ui/api/models/scaling/wake")
        assert (woken.status_code, woken.json()["has_begun"]) == (202, True)
        assert await wait_for(client, 1, timeout_s=120)
        assert (await client.post("/ui/api/models/scaling/park")).status_code == 409
        assert (await client.post("/ui/api/models/broken/wake")).status_code == 409
        events = (await client.get("/ui/api/state")).json()["events"]
        told = [event["text"] for event in events if event["text"].endswith("because an admin has woken it.")]
        assert told == ["'scaling' starts, because an admin has woken it."]
        served.config_file.write_text(right)
        assert (await client.post("/ui/api/reload")).status_code == 200
        assert await wait_for(client, 1, timeout_s=120)


def read_stream(served: ServeAppRun, lines: list[str], has_begun: threading.Event) -> None:
    """Keeps the lines of an answer of 300 tokens."""
    body = chat("scaling", "Hello", max_tokens=300, ignore_eos=True, stream=True)
    with httpx.stream("POST", f"{served.url}/v1/chat/completions", json=body, timeout=60) as reply:
        for line in filter(None, reply.iter_lines()):
            lines.append(line)
            has_begun.set()


def test_serve_app_run_stops_with_a_clean_terminal(served: ServeAppRun) -> None:
    """Only its own lines are seen, with one for the model that fails; HAProxy serves; Ctrl-C ends all, with code 0, and
    an answer that is running comes to its end. The last test here: it ends the cluster."""
    for _ in range(60):
        if "Ctrl-C stops everything" in served.output():
            break
        time.sleep(1)
    assert any("bin/haproxy" in command for command in served.processes().values())
    lines, has_begun = list[str](), threading.Event()
    with ThreadPoolExecutor(1) as pool:
        reading = pool.submit(read_stream, served, lines, has_begun)
        assert has_begun.wait(60)
        assert served.stop(signal.SIGINT) == {}  # It waits for a bounded time.
        reading.result(60)
    assert "data: [DONE]" in lines
    assert served.process.returncode == 0
    output = served.output()
    for words in ("Ray is up (dashboard http://", "scaling is loading", "scaling is ready", "has stopped"):
        assert words in output
    assert f"1 of 2 models serve at {served.url}\ntry: curl {served.url}/v1/chat/completions" in output
    assert re.search(r"scaling: memory: planned .* [GM]iB, holds .* [GM]iB", output)
    failures = [line for line in output.splitlines() if "broken has failed" in line]
    assert len(failures) == 1
    assert "cannot be read" in failures[0]
    assert "Traceback" not in output
    before = output.split("correct the config file")[0].splitlines()
    assert [line for line in before if not OWN_LINE.fullmatch(line)] == []
    log = served.log_of_libraries()
    assert "ServeReplica:scaling" in log.read_text(), "what replicas print is kept"
    assert log.stat().st_mode & 0o077 == 0
