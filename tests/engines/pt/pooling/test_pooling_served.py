"""An embedding model behind the router, by name, and behind the gate of its own route: keys, limits and usage."""

from pathlib import Path
from typing import Any

import httpx
import pytest

from serve_app.access.gate import KeyedApp
from serve_app.router.openapi import POST_PATHS
from serve_app.wire.asgi import HttpRequest
from tests.engines.pt.pooling.conftest import Serve
from tests.engines.pt.pooling.tiny_poolers import save_embedder
from tests.fakes import AUTH, OUTSIDE, LocalLimiter, Models, Said, make_gate, router_app, says

BODIES: dict[str, dict[str, Any]] = {
    "/v1/embeddings": {"input": ["w1 w2", "w3"]},
    "/score": {"text_1": "w1 w2", "text_2": "w3"},
    "/v2/rerank": {"query": "w1 w2", "documents": ["w3"]},
}
TOKENS = 7


class OneApp(Models):
    """The upstream of a model that is this application."""

    def __init__(self, app: httpx.AsyncClient):
        super().__init__(m=says(b""))
        self._app = app

    async def send(self, name: str, request: HttpRequest) -> Said:
        """Asks it."""
        headers = [(key.decode(), value.decode()) for key, value in request.headers]
        answer = await self._app.request(request.method, request.path, headers=headers, content=request.body)
        return Said(answer.status_code, [answer.content])


def limited(folder: Path) -> tuple[Any, LocalLimiter]:
    """A gate with a limit of tokens."""
    return make_gate(folder, "tokens_per_minute: 1000")


@pytest.mark.parametrize("path", BODIES)
async def test_by_name_its_tokens_are_charged_to_the_key(path: str, tmp_path: Path, serve: Serve) -> None:
    """And another key may not ask it."""
    gate, limiter = limited(tmp_path)
    body = {"model": "m", **BODIES[path]}
    async with serve(save_embedder(tmp_path / "model", "bert mean")) as model:
        model.engine.pooler.name = "m"  # type: ignore[attr-defined]
        models = OneApp(model)
        app = router_app(models, models, gate)[1]
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url="http://router") as client:
            answer = await client.post(path, json=body, headers=AUTH)
            other = await client.post(path, json=body, headers=OUTSIDE)
            chat = await client.post("/v1/chat/completions", json={"model": "m", "messages": []}, headers=AUTH)
    assert answer.status_code == 200, answer.text
    assert answer.json()["usage"]["total_tokens"] == TOKENS
    assert limiter.settled[0] == TOKENS
    assert (other.status_code, other.json()["error"]["code"]) == (403, "model_not_allowed")
    assert chat.status_code == 400
    assert "does not support Chat Completions API" in chat.json()["error"]["message"]
    assert limiter.settled[1:] == [0]
    assert path in POST_PATHS


@pytest.mark.parametrize("path", BODIES)
async def test_by_its_route_its_tokens_are_charged_to_the_key(path: str, tmp_path: Path, serve: Serve) -> None:
    """Behind the gate of a replica."""
    gate, limiter = limited(tmp_path)
    async with serve(save_embedder(tmp_path / "model", "bert mean")) as model:
        keyed = KeyedApp(model._transport.app, gate, "m")  # type: ignore[attr-defined]
        transport = httpx.ASGITransport(app=keyed, root_path="/models/m")
        async with httpx.AsyncClient(transport=transport, base_url="http://here/models/m") as client:
            answer = await client.post(path, json=BODIES[path], headers=AUTH)
            nobody = await client.post(path, json=BODIES[path])
            other = await client.post(path, json=BODIES[path], headers=OUTSIDE)
    assert answer.status_code == 200, answer.text
    assert limiter.settled == [TOKENS]
    assert (nobody.status_code, other.status_code) == (401, 403)
