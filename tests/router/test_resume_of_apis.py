"""Streams of the Messages and Responses APIs whose replica is lost, with the pt engine itself behind the router."""

import asyncio
import json
import time
from collections.abc import AsyncIterator
from typing import Any, cast

import httpx
import pytest
import pytest_asyncio
from starlette.types import ASGIApp

from serve_app.engines.pt.engine import PtEngine
from serve_app.errors import UnreadableAnswer
from serve_app.router import dispatcher
from serve_app.router.messages_transcript import MessagesTranscript
from serve_app.router.messages_transcript import chat_of as chat_of_messages
from serve_app.router.relay import _rewritten
from serve_app.router.responses_transcript import ResponsesTranscript
from serve_app.router.responses_transcript import chat_of as chat_of_responses
from serve_app.router.resume import _ids
from serve_app.router.transcript import CannotResume, Transcript, WholeEvents
from tests.demo_answers import ANSWERS, QUESTIONS
from tests.engines.pt.api.test_messages_api import TOOL, named
from tests.engines.pt.conftest import demo_engine
from tests.fakes import ModelsFake, router_app
from tests.router.test_resume import Replicas

QUESTION = QUESTIONS[0]
MESSAGES, RESPONSES = "/v1/messages", "/v1/responses"
TURNS = [{"role": "user", "content": QUESTION}]
BODIES: dict[str, dict[str, Any]] = {
    MESSAGES: {"model": "demo", "messages": TURNS, "max_tokens": 200, "temperature": 0, "stream": True},
    RESPONSES: {"model": "demo", "input": QUESTION, "temperature": 0, "stream": True},
}
# Ids and times differ between two answers.
OWN = {"id", "item_id", "created_at"}


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody needs time to see that a replica has died."""
    monkeypatch.setattr(dispatcher, "BACKOFF_S", (0.0,))


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def engine() -> AsyncIterator[ASGIApp]:
    """The demo model."""
    running = PtEngine(demo_engine(), "demo")
    yield await running.start()
    await running.stop()


async def stream(replicas: Replicas, path: str, body: dict[str, Any], **config: Any) -> list[tuple[str, Any]]:
    """The events that a client gets, with their names."""
    _, app = router_app(ModelsFake(demo="ready"), replicas, **{"max_retries": 5, **config})
    transport = httpx.ASGITransport(app=app)
    async with httpx.AsyncClient(transport=transport, base_url="http://router") as session:
        reply = await session.post(path, json=body)
    return named("\n\n".join(block for block in reply.text.split("\n\n") if not block.startswith(":")))


def merged(events: list[tuple[str, Any]]) -> list[Any]:
    """The events with deltas that follow each other as one, without what differs between two answers."""
    found: list[Any] = []
    for name, event in events:
        event = cleaned(event)
        delta = event.get("delta")
        text = delta if isinstance(delta, str) else delta.pop("text", None) if isinstance(delta, dict) else None
        event.pop("sequence_number", None)
        if text is not None and found and found[-1][0] == name:
            found[-1][1] += text
        else:
            found.append([name, text, event])
    return found


def cleaned(value: Any) -> Any:
    """The value without ids and times."""
    if isinstance(value, list):
        return [cleaned(item) for item in value]
    if not isinstance(value, dict):
        return value
    kept = {name: cleaned(item) for name, item in value.items() if name not in OWN}
    if isinstance(kept.get("delta"), str):
        kept.pop("logprobs", None)
    return kept


def without_deltas(found: list[Any]) -> list[Any]:
    """What is left of events whose deltas were put together."""
    return [[name, text, {key: item for key, item in event.items() if key != "delta" or text is None}]
            for name, text, event in found]  # fmt: skip


@pytest.mark.asyncio(loop_scope="module")
@pytest.mark.parametrize("path", [MESSAGES, RESPONSES])
@pytest.mark.parametrize("died", [False, True])
async def test_a_stream_goes_on_wherever_it_was_cut(engine: ASGIApp, path: str, died: bool) -> None:
    """The client gets the events of an undisturbed stream, with one id, and the usage of the whole."""
    body = BODIES[path]
    whole = await stream(Replicas(engine, []), path, body)
    expected = without_deltas(merged(whole))
    assert ANSWERS[QUESTION] in [text for _, text, _ in expected]
    cuts = range(len(whole))
    streams = await asyncio.gather(*(stream(Replicas(engine, [cut], died=died), path, body) for cut in cuts))
    for cut, events in enumerate(streams):
        assert without_deltas(merged(events)) == expected, cut
        if path == RESPONSES:
            assert [event["sequence_number"] for _, event in events] == list(range(len(events)))
            assert len({event["response"]["id"] for _, event in events if "response" in event}) == 1
            assert len({event["item_id"] for _, event in events if "item_id" in event}) == 1


@pytest.mark.asyncio(loop_scope="module")
@pytest.mark.parametrize("path", [MESSAGES, RESPONSES])
async def test_several_losses_in_one_stream(engine: ASGIApp, path: str) -> None:
    """Each one goes on where the last one stopped."""
    expected = without_deltas(merged(await stream(Replicas(engine, []), path, BODIES[path])))
    events = await stream(Replicas(engine, [5, 2, 3, 1]), path, BODIES[path])
    assert without_deltas(merged(events)) == expected


@pytest.mark.asyncio(loop_scope="module")
async def test_limits_and_stop_sequences_hold_over_a_loss(engine: ASGIApp) -> None:
    """The rest has the tokens that are left, and the reason for its end."""
    stop = "demo"  # Text before it that could be its beginning would be held back, and its tokens lost.
    assert ANSWERS[QUESTION].index("d") == ANSWERS[QUESTION].index(stop)
    for fields, reason in (({"max_tokens": 12}, "max_tokens"), ({"stop_sequences": [stop]}, "stop_sequence")):
        body = BODIES[MESSAGES] | fields
        whole = await stream(Replicas(engine, []), MESSAGES, body)
        assert whole[-2][1]["delta"]["stop_reason"] == reason
        for cut in range(3, 8):
            events = await stream(Replicas(engine, [cut]), MESSAGES, body)
            assert without_deltas(merged(events)) == without_deltas(merged(whole)), cut
    body = BODIES[RESPONSES] | {"max_output_tokens": 12}
    whole = await stream(Replicas(engine, []), RESPONSES, body)
    assert whole[-1][0] == "response.incomplete"
    for cut in range(4, 10):
        events = await stream(Replicas(engine, [cut]), RESPONSES, body)
        assert events[-1][0] == "response.incomplete"
        assert events[-1][1]["response"]["usage"] == whole[-1][1]["response"]["usage"]


@pytest.mark.asyncio(loop_scope="module")
async def test_a_stream_that_has_said_nothing_is_asked_again(engine: ASGIApp) -> None:
    """Whatever it asks for: the beginning that the client has is left out."""
    call = {"type": "tool", "name": "look_up"}
    body = BODIES[MESSAGES] | {"tools": [TOOL], "tool_choice": call, "max_tokens": 1000}
    replicas = Replicas(engine, [1])
    events = await stream(replicas, MESSAGES, body)
    assert replicas.paths == [MESSAGES, MESSAGES]
    names = [name for name, _ in events if name != "content_block_delta"]
    assert names.count("message_start") == 1
    assert names[-3:] == ["content_block_stop", "message_delta", "message_stop"]


@pytest.mark.asyncio(loop_scope="module")
@pytest.mark.parametrize(
    ("path", "begun"), [(MESSAGES, "content_block_delta"), (RESPONSES, "response.output_item.added")]
)
async def test_a_call_that_has_begun_ends_with_the_apis_own_error(engine: ASGIApp, path: str, begun: str) -> None:
    """A grammar would begin anew."""
    tool = {"type": "function", "name": "look_up", "parameters": TOOL["input_schema"]}
    fields = {
        MESSAGES: {"tools": [TOOL], "tool_choice": {"type": "tool", "name": "look_up"}, "max_tokens": 1000},
        RESPONSES: {"tools": [tool], "tool_choice": {"type": "function", "name": "look_up"}},
    }
    events = await stream(Replicas(engine, [6]), path, BODIES[path] | fields[path])
    assert begun in [name for name, _ in events]
    name, event = events[-1]
    assert (name, event["type"]) == ("error", "error")
    if path == MESSAGES:
        assert (event["error"]["type"], event["error"]["code"]) == ("overloaded_error", "model_unavailable")
    else:
        assert (event["code"], event["sequence_number"]) == ("model_unavailable", len(events) - 1)


@pytest.mark.parametrize(
    ("fields", "part"),
    [
        ({"thinking": {"type": "adaptive"}}, "thinking"),
        ({"watermarking": True}, "watermarking"),
        ({"messages": [*TURNS, {"role": "assistant", "content": "Hel"}]}, "begun"),
        ({"messages": [*TURNS, {"role": "assistant", "content": ""}]}, "begun"),
        ({"messages": [*TURNS, {"role": "system", "content": "x"}]}, "after others"),
    ],
)
def test_messages_whose_prompt_engines_differ_in_are_not_taken_up(fields: dict[str, Any], part: str) -> None:
    """The rest would not follow from the same prompt."""
    with pytest.raises(CannotResume, match=part):
        chat_of_messages(BODIES[MESSAGES] | fields)


def test_responses_with_fields_of_vllm_are_not_taken_up() -> None:
    """They change the text, and a chat request does not have them."""
    with pytest.raises(CannotResume, match="truncation"):
        chat_of_responses(BODIES[RESPONSES] | {"truncation": "auto"})
    chat = chat_of_responses(BODIES[RESPONSES] | {"truncation": "disabled", "store": True, "background": False})
    assert json.loads(json.dumps(chat))["messages"] == TURNS


@pytest.mark.asyncio(loop_scope="module")
@pytest.mark.parametrize("limit", [12, 200])
async def test_the_reason_for_the_end_is_right_wherever_the_end_was_cut(engine: ASGIApp, limit: int) -> None:
    """The end of the text does not say why it ended."""
    body = BODIES[RESPONSES] | {"max_output_tokens": limit}
    whole = await stream(Replicas(engine, []), RESPONSES, body)
    for cut in range(len(whole) - 5, len(whole)):
        events = await stream(Replicas(engine, [cut]), RESPONSES, body)
        assert events[-1][0] == ("response.incomplete" if limit == 12 else "response.completed"), cut
        assert cleaned(events[-1][1]["response"]) == cleaned(whole[-1][1]["response"]), cut


@pytest.mark.parametrize("kind", [Transcript, MessagesTranscript, ResponsesTranscript])
@pytest.mark.parametrize(
    "event",
    [
        {"choices": [7]},
        {"choices": 7},
        {"type": "content_block_start"},
        {"type": "content_block_start", "index": 0, "content_block": None},
        {"type": "content_block_delta", "delta": "x"},
        {"type": "response.created"},
        {"type": "response.created", "sequence_number": "x", "response": {}},
        {"type": "response.output_item.added", "item": {}},
        {"type": "response.output_text.delta", "delta": 7},
        {"type": "response.output_item.done"},
    ],
)
def test_an_event_of_another_form_breaks_nothing(kind: type[Transcript], event: dict[str, Any]) -> None:
    """The stream goes on, and only cannot be continued by another replica."""
    transcript = kind()
    transcript.add(f"data: {json.dumps(event)}\n\n".encode())
    transcript.read()
    assert transcript.started
    assert not transcript.text
    known = [problem.split("'")[0] for problem in [transcript.problem] if problem]
    assert known in ([], ["one of its events has a form that is not known here"])


def test_a_continuation_of_another_form_is_an_error_that_the_client_can_read() -> None:
    """It ends the stream with an event and does not break the connection."""
    for transcript in (MessagesTranscript(), ResponsesTranscript(), Transcript()):
        rest = transcript.continued("chat", 1, 1, b"")
        with pytest.raises(UnreadableAnswer, match="continuation"):
            _rewritten(rest, b'data: {"choices": [7]}\n\n')


class Tokenizer:
    """A caller whose tokens are characters, of a model whose template ends prompts with this text."""

    def __init__(self, end: str):
        self._end = end

    async def call(self, path: str, body: Any) -> Any:
        """The answer of either endpoint."""
        if path == "/detokenize":
            return {"prompt": "".join(map(chr, body["tokens"]))}
        text = body["prompt"] if "prompt" in body else QUESTION + self._end
        return {"tokens": list(map(ord, text)), "max_model_len": 100}


@pytest.mark.parametrize(
    ("end", "text", "goes_on"),
    [
        ("<think>\n", "The answer", False),
        ("<think>\n", "hm</think>The answer", True),
        ("<think>\n\n</think>\n\n", "The answer", True),
        ("assistant\n", "The answer", True),
    ],
)
async def test_a_stream_is_not_continued_inside_of_thinking(end: str, text: str, goes_on: bool) -> None:
    """Where the template opens the tag, an answer whose thinking was empty would go on as thinking."""
    ids = _ids(cast(Any, Tokenizer(end)), {"messages": TURNS}, {"model": "m"}, text)
    if goes_on:
        assert (await ids)[1] == list(map(ord, text))
    else:
        with pytest.raises(CannotResume, match="thinking"):
            await ids


def test_a_long_stream_costs_work_in_proportion_to_its_length() -> None:
    """However many pieces an event or a text comes in. Both took minutes when each piece was put together with all
    before it."""
    start = time.monotonic()
    whole, piece = WholeEvents(), b"x" * 2**14
    assert not any(whole.feed(piece) for _ in range(4096))
    assert len(whole.feed(b"\n\n")) == 2**26 + 2
    for transcript in (Transcript(), MessagesTranscript(), ResponsesTranscript()):
        for _ in range(200_000):
            transcript._add_text("ten chars.")
        assert transcript.length == len(transcript.text) == 2_000_000
    assert time.monotonic() - start < 10


def test_padded_events_are_not_continued() -> None:
    """The rest would come without padding."""
    with pytest.raises(CannotResume, match="padded"):
        chat_of_responses(BODIES[RESPONSES] | {"stream_options": {"include_obfuscation": True}})
