"""The pt engine's HTTP interface, with the real engine and the demo model in this process."""

import asyncio
import base64
import struct
from pathlib import Path
from typing import Any

import httpx
import pytest

from serve_app.access.gate import KeyedApp
from serve_app.engines.pt.api.openai_api import build_app
from serve_app.engines.pt.engine import DEFAULT_MAX_QUEUED_REQUESTS, PtEngine
from serve_app.facts.checkpoint import DEMO_MODEL, model_path
from tests.access.test_gate import AUTH, make_gate
from tests.builders import model_config
from tests.demo_answers import ANSWERS, QUESTIONS
from tests.engines.pt.api_client import chat, events


async def test_every_known_question_is_answered_word_for_word(client: httpx.AsyncClient) -> None:
    """All at once, with four running at a time."""
    replies = await asyncio.gather(*(client.post("/v1/chat/completions", json=chat(q)) for q in QUESTIONS))
    texts = [reply.json()["choices"][0]["message"]["content"] for reply in replies]
    assert texts == [ANSWERS[question] for question in QUESTIONS]


async def test_a_stream_has_openais_chunks(client: httpx.AsyncClient) -> None:
    """The role first, then text, a finish reason, the usage where it was asked for, and `[DONE]`."""
    body = chat(stream=True, stream_options={"include_usage": True})
    reply = await client.post("/v1/chat/completions", json=body)
    assert reply.headers["content-type"].startswith("text/event-stream")
    chunks = events(reply.text)
    assert len({chunk["id"] for chunk in chunks}) == 1
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert "".join(c["choices"][0]["delta"].get("content", "") for c in chunks[:-1]) == ANSWERS["Hello"]
    assert [c["choices"][0]["finish_reason"] for c in chunks[:-1]].count("stop") == 1
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"]["completion_tokens"] > 5


async def test_several_prompts_give_a_choice_each(client: httpx.AsyncClient) -> None:
    """Texts and token ids, in the order of the prompts."""
    prompts = [f"<|im_start|>user\n{q}<|im_end|>\n<|im_start|>assistant\n" for q in QUESTIONS[:3]]
    body = {"prompt": prompts, "temperature": 0, "max_tokens": 100}
    choices = (await client.post("/v1/completions", json=body)).json()["choices"]
    assert [(c["index"], c["text"]) for c in choices] == [(i, ANSWERS[q]) for i, q in enumerate(QUESTIONS[:3])]


async def test_stop_strings_cut_the_text_and_count_the_tokens_so_far(client: httpx.AsyncClient) -> None:
    """The text before the stop string, and a finish reason of `stop`."""
    answer = ANSWERS["Hello"]
    reply = (await client.post("/v1/chat/completions", json=chat(stop=["small demo"]))).json()
    assert reply["choices"][0]["message"]["content"] == answer[: answer.index("small demo")]
    assert reply["choices"][0]["finish_reason"] == "stop"


async def test_continuing_the_last_message(client: httpx.AsyncClient) -> None:
    """`continue_final_message` goes on where the assistant's text ends."""
    answer = ANSWERS["Hello"]
    start = answer[: answer.index(" demo")]
    messages = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": start}]
    body = {
        "messages": messages,
        "temperature": 0,
        "continue_final_message": True,
        "add_generation_prompt": False,
    }
    reply = (await client.post("/v1/chat/completions", json=body)).json()
    assert start + reply["choices"][0]["message"]["content"] == answer


async def test_text_parts_are_joined(client: httpx.AsyncClient) -> None:
    """A list of text parts is what some clients send for plain text."""
    body = chat()
    body["messages"][0]["content"] = [{"type": "text", "text": "Hello"}]
    reply = (await client.post("/v1/chat/completions", json=body)).json()
    assert reply["choices"][0]["message"]["content"] == ANSWERS["Hello"]


@pytest.mark.parametrize(
    ("path", "body", "param", "words"),
    [
        ("chat/completions", chat(best_of=2), "best_of", "not supported"),
        ("chat/completions", chat(stream_options={"include_usage": True}), "stream_options", "only with stream: true"),
        (
            "chat/completions",
            chat(chat_template_kwargs={"chat_template": "x"}),
            "chat_template_kwargs",
            "not a variable",
        ),
        ("chat/completions", chat(logit_bias={"99999": 1}), "logit_bias", "token id 99999 is outside"),
        ("chat/completions", chat(min_tokens=9, max_tokens=3), "min_tokens", "min_tokens: 9 is over max_tokens"),
        ("chat/completions", chat(temperature=-1), "temperature", "greater than or equal to 0"),
        ("chat/completions", chat(max_tokens=10**9), "max_tokens", "maximum context length"),
        ("chat/completions", chat(stop=[1]), "stop", "valid string"),
        ("chat/completions", chat(tools=[{"type": "function"}]), "tools", "'tools[0].function': Field required"),
        ("chat/completions", chat(top_logprobs=2), "top_logprobs", "only with logprobs: true"),
        ("completions", {"prompt": "a", "echo": True, "logprobs": 1}, "echo", "it cannot be combined with logprobs"),
        ("chat/completions", chat(temprature=1), "temprature", "Did you mean 'temperature'"),
        ("chat/completions", chat(top_p=0), "top_p", "greater than 0"),
        ("chat/completions", chat(max_tokens=0), "max_tokens", "greater than or equal to 1"),
        ("chat/completions", {"messages": []}, "messages", "at least 1"),
        ("chat/completions", {}, "messages", "required"),
        ("chat/completions", [], None, "must be a JSON object"),
        ("chat/completions", chat(max_tokens=3000), "max_tokens", "maximum context length is 2048 tokens"),
        ("chat/completions", chat("word " * 3000), None, "maximum context length is 2048 tokens"),
        ("completions", {"prompt": ""}, "prompt", "empty"),
        ("completions", {"prompt": [5, 99999]}, "prompt", "token id 99999 is outside"),
        ("completions", {"prompt": [-1]}, "prompt", "token id -1 is outside"),
        (
            "chat/completions",
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
            "messages",
            "'image_url' is not supported",
        ),
    ],
)
async def test_what_cannot_be_honoured_is_refused_by_name(
    client: httpx.AsyncClient, path: str, body: Any, param: str | None, words: str
) -> None:
    """400 in OpenAI's envelope, before anything reaches the batch."""
    reply = await client.post(f"/v1/{path}", json=body)
    error = reply.json()["error"]
    assert (reply.status_code, error["type"], error["param"]) == (400, "invalid_request_error", param)
    assert words in error["message"]


async def test_neutral_values_are_accepted(client: httpx.AsyncClient) -> None:
    """Clients send defaults that ask for nothing."""
    body = chat(n=1, logprobs=False, presence_penalty=0, logit_bias={}, response_format={"type": "text"}, user="u")
    assert (await client.post("/v1/chat/completions", json=body)).status_code == 200


async def test_another_models_name_is_a_404(client: httpx.AsyncClient) -> None:
    """A route serves one model."""
    reply = await client.post("/v1/chat/completions", json=chat(model="other"))
    assert (reply.status_code, reply.json()["error"]["code"]) == (404, "model_not_found")


async def test_models_and_health(client: httpx.AsyncClient) -> None:
    """The model tells its context length."""
    (entry,) = (await client.get("/v1/models")).json()["data"]
    assert (entry["id"], entry["max_model_len"]) == ("demo", 2048)
    assert (await client.get("/health")).status_code == 200
    missing = await client.get("/v1/nothing")
    assert (missing.status_code, missing.json()["error"]["type"]) == (404, "invalid_request_error")
    wrong = await client.get("/v1/chat/completions")
    assert (wrong.status_code, wrong.headers["allow"]) == (405, "POST")
    assert wrong.json()["error"]["type"] == "invalid_request_error"


async def test_n_gives_several_choices_and_each_has_its_own_seed(client: httpx.AsyncClient) -> None:
    """The same seed gives the same set of choices again."""
    body = chat("Tell me", n=3, temperature=2.0, seed=5, max_tokens=12)
    first, second = [(await client.post("/v1/chat/completions", json=body)).json() for _ in range(2)]
    texts = [choice["message"]["content"] for choice in first["choices"]]
    assert [choice["index"] for choice in first["choices"]] == [0, 1, 2]
    assert len(set(texts)) > 1
    assert texts == [choice["message"]["content"] for choice in second["choices"]]


async def test_echo_puts_the_prompt_before_the_text(client: httpx.AsyncClient) -> None:
    """In whole answers and in streams."""
    body = {"prompt": "serve-app is", "max_tokens": 4, "temperature": 0, "echo": True}
    whole = (await client.post("/v1/completions", json=body)).json()["choices"][0]["text"]
    assert whole.startswith("serve-app is")
    streamed = events((await client.post("/v1/completions", json={**body, "stream": True})).text)
    assert "".join(chunk["choices"][0]["text"] for chunk in streamed) == whole


async def test_log_probabilities_of_a_chat(client: httpx.AsyncClient) -> None:
    """One entry a token; the greedy token is the best of its alternatives."""
    body = chat(logprobs=True, top_logprobs=2, max_tokens=5)
    choice = (await client.post("/v1/chat/completions", json=body)).json()["choices"][0]
    content = choice["logprobs"]["content"]
    assert "".join(entry["token"] for entry in content) == choice["message"]["content"]
    assert all(entry["top_logprobs"][0]["token"] == entry["token"] for entry in content)
    assert all(entry["logprob"] <= 0 and len(entry["top_logprobs"]) == 2 for entry in content)


async def test_log_probabilities_of_a_text(client: httpx.AsyncClient) -> None:
    """0 asks for the chosen tokens only."""
    body = {"prompt": "serve-app is", "max_tokens": 4, "temperature": 0, "logprobs": 0}
    choice = (await client.post("/v1/completions", json=body)).json()["choices"][0]
    assert "".join(choice["logprobs"]["tokens"]) == choice["text"]
    assert len(choice["logprobs"]["token_logprobs"]) == 4


async def test_tokenize_and_detokenize_are_inverse(client: httpx.AsyncClient) -> None:
    """A text, and a conversation through the template."""
    reply = (await client.post("/tokenize", json={"prompt": "What is serve-app? é"})).json()
    assert reply["count"] == len(reply["tokens"])
    back = (await client.post("/detokenize", json={"tokens": reply["tokens"]})).json()
    assert back["prompt"] == "What is serve-app? é"
    messages = [{"role": "user", "content": "Hello"}]
    chatted = (await client.post("/tokenize", json={"messages": messages})).json()
    usage = (await client.post("/v1/chat/completions", json=chat())).json()["usage"]
    assert chatted["count"] == usage["prompt_tokens"]


async def test_embeddings_have_length_one_and_tell_texts_apart(client: httpx.AsyncClient) -> None:
    """In both encodings."""
    body = {"input": ["the router", "the router", "disk"]}
    reply = (await client.post("/v1/embeddings", json=body)).json()
    first, same, other = (entry["embedding"] for entry in reply["data"])
    assert sum(value * value for value in first) == pytest.approx(1, abs=1e-5)
    assert first == same
    assert first != other
    packed = (await client.post("/v1/embeddings", json={**body, "encoding_format": "base64"})).json()
    raw = base64.b64decode(packed["data"][0]["embedding"])
    assert list(struct.unpack(f"<{len(first)}f", raw)) == pytest.approx(first)


async def test_inputs_count_as_sequences(engine: PtEngine, client: httpx.AsyncClient) -> None:
    """More than the queue could ever take are refused before one of them is computed."""
    most = engine.generator.limits.max_num_seqs + DEFAULT_MAX_QUEUED_REQUESTS
    reply = await client.post("/v1/embeddings", json={"input": ["x"] * (most + 1)})
    assert reply.status_code == 400
    assert f"at most {most}" in reply.json()["error"]["message"]
    assert len((await client.post("/v1/embeddings", json={"input": ["x"] * most})).json()["data"]) == most
    assert engine.generator.in_flight == 0


async def test_numbers_beyond_every_type(client: httpx.AsyncClient) -> None:
    """Refused by name, or taken for what they mean."""
    usual = (await client.post("/v1/chat/completions", json=chat())).json()["choices"]
    refused = await client.post("/v1/chat/completions", json=chat(temperature=1, top_k=10**19))
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "top_k")
    wide = chat(temperature=1, top_k=2**63 - 1, seed=1, max_tokens=4)
    answers = await asyncio.gather(
        *(client.post("/v1/chat/completions", json=body) for body in (wide, chat(), wide, chat()))
    )
    assert [reply.status_code for reply in answers] == [200] * 4
    assert answers[1].json()["choices"] == answers[3].json()["choices"] == usual


async def test_a_text_far_too_long_is_refused_before_it_is_tokenised(client: httpx.AsyncClient) -> None:
    """Ten megabytes would cost seconds of CPU."""
    reply = await client.post("/v1/completions", json={"prompt": "x" * 10**7})
    assert (reply.status_code, reply.json()["error"]["code"]) == (400, "context_length_exceeded")


async def test_a_full_queue_is_a_429_with_retry_after() -> None:
    """One runs, one waits, the third is told when to come again."""
    config = model_config(
        model=model_path(DEMO_MODEL), device="cpu", dtype="float32", max_num_seqs=1, max_queued_requests=1
    )
    engine = PtEngine(config, "demo")
    transport = httpx.ASGITransport(app=await engine.start())  # type: ignore[arg-type]
    async with httpx.AsyncClient(transport=transport, base_url="http://pt", timeout=60) as session:
        endless = chat(max_tokens=1500, ignore_eos=True)
        tasks = [asyncio.create_task(session.post("/v1/chat/completions", json=endless)) for _ in range(2)]
        for _ in range(500):
            if len(engine.generator._outputs) == 2:
                break
            await asyncio.sleep(0.01)
        reply = await session.post("/v1/chat/completions", json=chat())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        assert (reply.status_code, reply.json()["error"]["code"]) == (429, "overloaded")
        assert int(reply.headers["retry-after"]) >= 1
        assert (await session.post("/v1/chat/completions", json=chat())).status_code == 200
    await engine.stop()


async def test_a_model_over_cpu_and_disk_gives_the_same_answers() -> None:
    """Part of the layers are read from disk at each step."""
    config = model_config(
        model=model_path(DEMO_MODEL), device="cpu", dtype="float32", max_memory={"cpu": "1500KB", "disk": "1GB"}
    )
    engine = PtEngine(config, "demo")
    transport = httpx.ASGITransport(app=await engine.start())  # type: ignore[arg-type]
    assert "disk" in engine.generator.loaded.device_map.values()
    assert engine.generator.serial_reason == ""
    async with httpx.AsyncClient(transport=transport, base_url="http://pt", timeout=60) as session:
        replies = await asyncio.gather(
            *(session.post("/v1/chat/completions", json=chat(question)) for question in QUESTIONS[:4])
        )
    texts = [reply.json()["choices"][0]["message"]["content"] for reply in replies]
    assert texts == [ANSWERS[question] for question in QUESTIONS[:4]]
    offload = engine.generator.loaded.offload
    assert offload is not None
    await engine.stop()
    assert not await asyncio.to_thread(Path(offload.name).exists)


async def test_a_failure_of_ours_is_json() -> None:
    """Plain text is what Serve says in a replica's place, and the router would ask another one, and another."""
    transport = httpx.ASGITransport(app=build_app(None), raise_app_exceptions=False)  # type: ignore[arg-type]
    async with httpx.AsyncClient(transport=transport, base_url="http://pt") as client:
        reply = await client.get("/load")
    assert reply.status_code == 500
    assert "AttributeError" in reply.json()["error"]["message"]


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
async def test_a_limit_of_tokens_changes_nothing_in_a_stream(engine: PtEngine, tmp_path: Path, path: str) -> None:
    """The engine is asked for the usage then, which a client that did not ask for it does not see."""
    app = engine.application  # type: ignore[attr-defined]
    gate, limiter = make_gate(tmp_path, "tokens_per_minute: 100_000")
    told = []
    for keyed in (app, KeyedApp(app, gate, "m")):
        body = {**chat(), "prompt": "Hello", "max_tokens": 4, "temperature": 0, "stream": True}
        del body["prompt" if "chat" in path else "messages"]
        transport = httpx.ASGITransport(app=keyed)
        async with httpx.AsyncClient(transport=transport, base_url="http://pt", headers=AUTH) as session:
            plain = await session.post(path, json=body)
            wanted = await session.post(path, json=body | {"stream_options": {"include_usage": True}})
        usage = events(wanted.text)[-1]["usage"]["total_tokens"]
        told.append([event | {"id": "", "created": 0} for event in events(plain.text)])
    assert told[0] == told[1]
    assert limiter.settled == [usage, usage]
