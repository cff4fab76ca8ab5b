"""Both engines in a real cluster: the same known answers by every way, and honest refusals."""

import asyncio
import json
import signal
import time
from typing import Any

import httpx
import openai
import pytest

from tests.cluster.serve_run import ServeRun
from tests.demo_answers import ANSWERS, QUESTIONS

ENGINES = ["tiny-pt", "tiny-vllm"]
WAYS = ["by name", "by route"]


def base_url(run: ServeRun, model: str, way: str) -> str:
    """The address for OpenAI's client."""
    return f"{run.url}/v1" if way == "by name" else f"{run.url}/models/{model}/v1"


def chat(model: str, question: str, **fields: Any) -> dict[str, Any]:
    """A greedy chat request."""
    return {"model": model, "messages": [{"role": "user", "content": question}], "temperature": 0, **fields}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("model", ENGINES)
def test_the_openai_client_gets_the_known_answer(run: ServeRun, model: str, way: str) -> None:
    """Whole and streamed, by name and by route, both engines give the trained answer word for word."""
    question = QUESTIONS[0]
    client = openai.OpenAI(base_url=base_url(run, model, way), api_key="none", timeout=60)
    with client:
        whole = client.chat.completions.create(
            model=model, messages=[{"role": "user", "content": question}], temperature=0
        )
        assert whole.choices[0].message.content == ANSWERS[question]
        assert whole.choices[0].finish_reason == "stop"
        assert whole.usage is not None
        assert whole.usage.total_tokens == whole.usage.prompt_tokens + whole.usage.completion_tokens

        chunks = list(
            client.chat.completions.create(
                model=model,
                messages=[{"role": "user", "content": question}],
                temperature=0,
                stream=True,
                stream_options={"include_usage": True},
            )
        )
    texts = [chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices]
    assert "".join(texts) == ANSWERS[question]
    assert sum(bool(text) for text in texts) > 5, "a stream comes in pieces"
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    assert chunks[-1].usage.total_tokens == whole.usage.total_tokens


def test_both_engines_count_the_same_tokens(run: ServeRun) -> None:
    """The prompt goes through the same template, and the answer has the same tokens."""
    usages = []
    for model in ENGINES:
        reply = httpx.post(f"{run.url}/v1/chat/completions", json=chat(model, QUESTIONS[1]), timeout=60).json()
        usages.append({key: reply["usage"][key] for key in ("prompt_tokens", "completion_tokens", "total_tokens")})
    assert usages[0] == usages[1]


@pytest.mark.parametrize("model", ENGINES)
def test_text_completions_continue_a_prompt(run: ServeRun, model: str) -> None:
    """/v1/completions with the template written out gives the same answer, cut at max_tokens and at stop."""
    question = QUESTIONS[0]
    prompt = f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"
    with openai.OpenAI(base_url=f"{run.url}/v1", api_key="none", timeout=60) as client:
        whole = client.completions.create(model=model, prompt=prompt, temperature=0, max_tokens=200)
        short = client.completions.create(model=model, prompt=prompt, temperature=0, max_tokens=3)
        stop = ANSWERS[question].split()[4]
        stopped = client.completions.create(model=model, prompt=prompt, temperature=0, max_tokens=200, stop=[stop])
    assert whole.choices[0].text == ANSWERS[question]
    assert short.choices[0].finish_reason == "length"
    assert short.usage is not None
    assert short.usage.completion_tokens == 3
    assert ANSWERS[question].startswith(short.choices[0].text)
    assert stopped.choices[0].text == ANSWERS[question][: ANSWERS[question].index(stop)]
    assert stopped.choices[0].finish_reason == "stop"


@pytest.mark.parametrize("model", ENGINES)
async def test_a_seed_repeats_a_sampled_text(run: ServeRun, model: str) -> None:
    """The same seed gives the same text while other requests run; another seed gives another."""
    # Without the chat template, the text is none of those that the model knows by heart.
    body = {"model": model, "prompt": "Tell me something", "temperature": 2.0, "max_tokens": 24}
    async with httpx.AsyncClient(base_url=run.url, timeout=60) as client:
        seeds = [7, 7, 8, 9, 7]
        replies = await asyncio.gather(*(client.post("/v1/completions", json={**body, "seed": seed}) for seed in seeds))
    texts = [reply.json()["choices"][0]["text"] for reply in replies]
    assert texts[0] == texts[1] == texts[4]
    assert len({texts[0], texts[2], texts[3]}) > 1


async def stream_answer(client: httpx.AsyncClient, model: str, question: str) -> str:
    """The text of one streamed chat."""
    text = ""
    async with client.stream("POST", "/v1/chat/completions", json=chat(model, question, stream=True)) as reply:
        assert reply.status_code == 200
        async for line in reply.aiter_lines():
            if line.startswith("data: ") and line != "data: [DONE]":
                event = json.loads(line[6:])
                assert "error" not in event, event
                text += "".join(choice["delta"].get("content") or "" for choice in event["choices"])
    return text


@pytest.mark.parametrize("model", ENGINES)
async def test_32_concurrent_streams_all_finish_and_are_all_correct(run: ServeRun, model: str) -> None:
    """Nothing leaks from one stream into another."""
    questions = [QUESTIONS[number % len(QUESTIONS)] for number in range(32)]
    async with httpx.AsyncClient(base_url=run.url, timeout=300, limits=httpx.Limits(max_connections=None)) as client:
        texts = await asyncio.gather(*(stream_answer(client, model, question) for question in questions))
    assert texts == [ANSWERS[question] for question in questions]


def test_the_list_shows_every_model(run: ServeRun) -> None:
    """Failed models too, with their state."""
    entries = httpx.get(f"{run.url}/v1/models", timeout=10).json()
    assert entries["object"] == "list"
    assert {entry["id"]: entry["status"] for entry in entries["data"]} == {
        "homeless": "failed",
        "tiny-pt": "ready",
        "tiny-vllm": "ready",
    }
    assert httpx.get(f"{run.url}/v1/models/tiny-pt", timeout=10).json()["id"] == "tiny-pt"
    assert httpx.get(f"{run.url}/v1/models/nobody", timeout=10).status_code == 404


def test_a_model_without_room_leaves_the_others_serving_and_says_why(run: ServeRun) -> None:
    """`/ready`, the terminal and `serve status` name the reason; the others answered in the tests above."""
    ready = httpx.get(f"{run.url}/ready", timeout=10)
    assert ready.status_code == 200
    assert ready.json()["status"] == "degraded"
    models = ready.json()["models"]
    assert "needs 2 GPUs" in models["homeless"]["message"]
    assert "8 CPUs, 0 GPUs" in models["homeless"]["message"]
    assert "needs 2 GPUs" in run.status()


def test_the_terminal_tells_a_line_to_try(run: ServeRun) -> None:
    """Progress, the address, a curl line and each failure in one line; no traceback for a model without room."""
    output = run.output()
    assert f"2 of 3 models serve at {run.url}" in output
    assert f"try: curl {run.url}/v1/chat/completions" in output
    assert "homeless: A replica needs 2 GPUs" in output
    builder = [line for line in output.splitlines() if "build_homeless" in line or "(build_serve_application" in line]
    assert not any("Traceback" in line for line in builder)
    assert sum("Importing application 'homeless'" in line for line in output.splitlines()) <= 1, "one attempt"


@pytest.mark.parametrize(
    ("body", "status", "code", "words"),
    [
        (b'{"model": "nobody"}', 404, "model_not_found", "homeless, tiny-pt, tiny-vllm"),
        (b'{"model": "homeless"}', 503, "model_unavailable", "needs 2 GPUs"),
        (b'{"model": ', 400, None, "not valid JSON"),
        (b'{"messages": []}', 400, None, "'model' is missing"),
        (b'{"model": 5}', 400, None, "must be a string"),
        (b"[]", 400, None, "must be a JSON object"),
        (b" " * 100_001, 413, "request_too_large", "100000 bytes"),
    ],
)
def test_the_router_refuses_in_openais_envelope(
    run: ServeRun, body: bytes, status: int, code: str | None, words: str
) -> None:
    """Every refusal has the same shape and says what to do."""
    reply = httpx.post(f"{run.url}/v1/chat/completions", content=body, timeout=10)
    error = reply.json()["error"]
    assert (reply.status_code, error["code"]) == (status, code)
    assert words in error["message"]
    assert set(error) == {"message", "type", "param", "code"}
    assert ("retry-after" in reply.headers) == (status == 503)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("model", ENGINES)
def test_an_engines_refusal_passes_unchanged(run: ServeRun, model: str, way: str) -> None:
    """A 400 of the engine reaches the client with status and envelope, by both ways."""
    url = base_url(run, model, way)
    reply = httpx.post(f"{url}/chat/completions", json=chat(model, "hi", max_tokens=100_000), timeout=30)
    assert reply.status_code == 400
    assert "2048" in reply.json()["error"]["message"]


def test_a_format_that_the_request_contradicts_is_its_own_error(run: ServeRun) -> None:
    """vLLM's scheduler ends it, and vLLM says 500. A request beside it goes on."""
    contradiction = {"structured_outputs": {"regex": "[ab]{1,4}"}, "allowed_token_ids": [5, 6]}
    body = {"model": "tiny-vllm", "prompt": [1, 5, 7], "max_tokens": 2}
    reply = httpx.post(f"{run.url}/v1/completions", json=body | contradiction, timeout=60)
    assert (reply.status_code, "output format" in reply.text) == (400, True), reply.text
    assert httpx.post(f"{run.url}/v1/completions", json=body, timeout=60).status_code == 200


@pytest.mark.parametrize("model", ENGINES)
def test_vllm_and_pt_answer_unknown_endpoints_with_404(run: ServeRun, model: str) -> None:
    """By name, an endpoint that the engine does not have is the engine's own 404."""
    reply = httpx.post(f"{run.url}/v1/nothing", json={"model": model}, timeout=30)
    assert reply.status_code == 404


def test_every_endpoint_of_vllm_works_by_name(run: ServeRun) -> None:
    """The router knows no schema, so /tokenize is reached without the router knowing of it."""
    reply = httpx.post(f"{run.url}/tokenize", json={"model": "tiny-vllm", "prompt": "hello"}, timeout=30)
    assert reply.status_code == 200
    assert reply.json()["count"] > 0


def running_in_vllm(run: ServeRun) -> float:
    """Requests that vLLM's engine is working on, by its own count."""
    text = httpx.get(f"{run.url}/models/tiny-vllm/metrics", timeout=10).text
    lines = [line for line in text.splitlines() if line.startswith("vllm:num_requests_running")]
    return sum(float(line.split()[-1]) for line in lines)


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("way", WAYS)
async def test_vllm_stops_working_for_a_client_that_left(run: ServeRun, way: str, stream: bool) -> None:
    """Also where nothing was streamed: the engine's own count of running requests falls to zero at once."""
    url = base_url(run, "tiny-vllm", way)
    endless = chat("tiny-vllm", "Hello", max_tokens=1900, ignore_eos=True, stream=stream)
    async with httpx.AsyncClient(timeout=60) as client:
        tasks = [asyncio.create_task(client.post(f"{url}/chat/completions", json=endless)) for _ in range(4)]
        for _ in range(100):
            if await asyncio.to_thread(running_in_vllm, run) == 4:
                break
            await asyncio.sleep(0.05)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        left = 4.0
        for _ in range(100):  # the work itself would take some ten seconds more
            left = await asyncio.to_thread(running_in_vllm, run)
            if not left:
                break
            await asyncio.sleep(0.05)
    assert left == 0


def test_status_has_planned_and_measured_of_both_engines(run: ServeRun) -> None:
    """And says of the model that has no GPU what it lacks."""
    for _ in range(20):  # The first report follows the start by a moment.
        told = {model["name"]: model for model in run.status_of_ours()["models"]}
        reports = [told[name]["replicas"][0]["report"] for name in ("tiny-pt", "tiny-vllm")]
        if all(reports):
            break
        time.sleep(1)
    for report in reports:
        (device,) = report["devices"]
        assert device["device"] == "cpu"
        assert 0 < device["held"] <= device["peak"]
        assert device["planned"] > device["weights"] > 0
    pt, vllm = (report["blocks"] for report in reports)
    assert pt == {"planned": None, "made": None}
    assert vllm["planned"] == vllm["made"] > 0
    assert told["homeless"]["state"] == "failed"
    assert "2 GPUs" in told["homeless"]["error"]


def test_a_terminated_serve_run_leaves_no_process_behind(run: ServeRun) -> None:
    """Ray, its workers, both engines and HAProxy end too. The last test here: it ends the cluster."""
    commands = " ".join(run.processes().values())
    parts = ("raylet", "ServeReplica:tiny-pt", "VLLM::EngineCore", "bin/haproxy")
    assert all(name in commands for name in parts), commands
    assert run.stop(signal.SIGTERM) == {}
