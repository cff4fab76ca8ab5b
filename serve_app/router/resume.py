"""Continues a lost stream: asks a replica for the token ids of what was sent, and then for the rest."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import msgspec

from serve_app.errors import InvalidRequest
from serve_app.router import messages_transcript, responses_transcript
from serve_app.router.engine_loss import is_lost_status
from serve_app.router.messages_transcript import MessagesTranscript
from serve_app.router.responses_transcript import ResponsesTranscript
from serve_app.router.transcript import (
    CannotResume,
    Continued,
    Kind,
    Repeated,
    Transcript,
    continuation,
    kind_of,
    prompt_request,
)
from serve_app.router.upstream.protocol import Answer, Upstream
from serve_app.wire.asgi import HttpRequest
from serve_app.wire.body_threads import beside_loop
from serve_app.wire.census import decode_body
from serve_app.wire.thinking_tags import open_tag

CHAT = "/v1/chat/completions"
# The transcript of a stream of each endpoint that can be continued.
TRANSCRIPTS: Mapping[str, type[Transcript]] = {
    CHAT: Transcript,
    "/v1/completions": Transcript,
    messages_transcript.PATH: MessagesTranscript,
    responses_transcript.PATH: ResponsesTranscript,
}
# How a request to these endpoints is written as one to chat completions.
CHATS: Mapping[str, Callable[[Mapping[str, Any]], dict[str, Any]]] = {
    messages_transcript.PATH: messages_transcript.chat_of,
    responses_transcript.PATH: responses_transcript.chat_of,
}
JSON_HEADERS = [(b"content-type", b"application/json"), (b"accept", b"application/json")]


class Resumed:
    """How a stream continues: with an `answer` to be rewritten or, if it was complete, with its `last` events."""

    def __init__(self, answer: Answer | None, rest: Continued | None, last: bytes = b""):
        self.answer = answer
        self.rest = rest
        self.last = last


def transcript_of(path: str) -> Transcript | None:
    """Returns an empty transcript for a stream of this endpoint, or None if it cannot be continued."""
    kind = TRANSCRIPTS.get(path)
    return None if kind is None else kind()


async def resume(upstream: Upstream, name: str, request: HttpRequest, transcript: Transcript) -> Resumed:
    """Returns how the stream continues. Raises CannotResume, or ReplicaLost if the next replica was lost too."""
    await beside_loop(transcript.unread_bytes, transcript.read)
    if transcript.done:
        return Resumed(None, None)
    if not transcript.started:  # The client has nothing yet, so the whole request is sent again.
        return Resumed(await _accepted(upstream, name, request), None)
    if not (transcript.has_output or transcript.problem):
        return Resumed(await _accepted(upstream, name, request), Repeated(transcript))
    size = len(request.body) + transcript.length
    kind, asked = await beside_loop(size, partial(_asked, request))
    if transcript.problem:
        raise CannotResume(transcript.problem)
    caller = _Caller(upstream, name, request, size)
    prompt_ids, text_ids, max_model_len = await _ids(caller, prompt_request(kind, asked), asked, transcript.text)
    continued = partial(continuation, kind, asked, transcript, prompt_ids, text_ids, max_model_len)
    rest = await beside_loop(size, continued)
    if rest is None or transcript.is_over or transcript.finish_reason is not None:
        is_cut = rest is None if transcript.finish_reason is None else transcript.finish_reason == "length"
        ending = partial(transcript.ending, kind, asked, len(prompt_ids), len(text_ids), is_cut)
        return Resumed(None, None, await beside_loop(size, ending))
    return Resumed(await caller.stream("/v1/completions", rest.body), rest)


def _asked(request: HttpRequest) -> tuple[Kind, Mapping[str, Any]]:
    """Returns the form of the stream and the decoded request. It takes time with a large body. Raises CannotResume."""
    try:
        asked = decode_body(request.body)
    except InvalidRequest as error:
        raise CannotResume(error.message) from None
    if not isinstance(asked, dict):
        raise CannotResume("the request is not a JSON object")
    if request.path not in CHATS:
        return kind_of(request.path, asked), asked
    try:
        chat = CHATS[request.path](asked)
    except InvalidRequest as error:
        raise CannotResume(error.message) from None
    except (LookupError, TypeError, AttributeError, ValueError):  # vLLM takes forms that are not read here.
        raise CannotResume("the request has a form that is not known here") from None
    return kind_of(CHAT, chat), chat


async def _ids(
    caller: "_Caller", prompt: Mapping[str, Any] | None, asked: Mapping[str, Any], text: str
) -> tuple[list[int], list[int], int]:
    """Asks for the ids of the prompt and of the text, and for the model's length in tokens.

    Some tokenizers put a space before a text, or join it with what comes before. The ids together then do not stand for
    prompt and text, and the stream is not continued.
    """
    model = asked.get("model")
    said = await caller.call("/tokenize", {"model": model, "prompt": text, "add_special_tokens": False})
    text_ids, max_model_len = said["tokens"], said["max_model_len"]
    if prompt is None:
        given = asked["prompt"]
        prompt_ids = given[0] if given and isinstance(given[0], list) else given
    else:
        prompt_ids = (await caller.call("/tokenize", prompt))["tokens"]
    before, both = [
        (await caller.call("/detokenize", {"model": model, "tokens": ids}))["prompt"]
        for ids in (prompt_ids, prompt_ids + text_ids)
    ]
    if both != before + text:
        raise CannotResume("the tokens of its text cannot be determined")
    if (tags := open_tag(before)) is not None and tags[1] not in text:
        # An engine that tells thinking from the answer sends no text of one without thinking, and its end is missing.
        raise CannotResume("its prompt has begun the thinking, and it is not known whether that has ended")
    return prompt_ids, text_ids, max_model_len


class _Caller:
    """Sends requests to the same model with the request's id. They have about `size` bytes, as the request has."""

    def __init__(self, upstream: Upstream, name: str, request: HttpRequest, size: int):
        self._size = size
        self._upstream = upstream
        self._name = name
        ids = [pair for pair in request.headers if pair[0] in (b"x-request-id", b"authorization")]
        self._headers = [*JSON_HEADERS, *ids]

    async def call(self, path: str, body: Mapping[str, Any]) -> Any:
        """Returns the decoded answer. Raises CannotResume if the model refuses, or ReplicaLost if it is lost."""
        content = await beside_loop(self._size, partial(msgspec.json.encode, body))
        answer = await _accepted(self._upstream, self._name, HttpRequest("POST", path, b"", self._headers, content))
        try:
            said = b"".join([piece async for piece in answer.pieces()])
            return await beside_loop(len(said), partial(msgspec.json.decode, said))
        finally:
            await answer.close()

    async def stream(self, path: str, body: bytes) -> Answer:
        """Sends a request whose answer streams. Raises what `call` raises."""
        return await _accepted(self._upstream, self._name, HttpRequest("POST", path, b"", self._headers, body))


async def _accepted(upstream: Upstream, name: str, request: HttpRequest) -> Answer:
    answer = await upstream.send(name, request)
    if answer.status == 200:
        return answer
    try:
        body = b"".join([piece async for piece in answer.pieces()])
    finally:
        await answer.close()
    if is_lost_status(answer.status):
        raise answer.lost(f"{request.path} was answered with {answer.status}")
    raise CannotResume(f"{request.path} was refused with {answer.status}: {body[:200].decode('utf-8', 'replace')}")
