"""Which of vLLM's endpoints take requests here. Pure.

vLLM has others, for its operators and for other vendors' clouds. What their bodies ask for is neither counted by keys'
limits nor bounded by the guard, and some stop the engine for everybody; so what is not named here is not served.
"""

from serve_app.errors import InvalidRequest

# Methods without a body.
READING = frozenset({"GET", "HEAD", "OPTIONS"})

SERVED = frozenset({
    "/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages", "/v1/messages/count_tokens",
    "/v1/embeddings", "/pooling", "/classify", "/score", "/v1/score", "/rerank", "/v1/rerank", "/v2/rerank",
    "/tokenize", "/detokenize",
})  # fmt: skip


def require_served(method: str, path: str) -> None:
    """Raises InvalidRequest. `path` is that of the endpoint, which vLLM redirects where a slash is at its end."""
    if method not in READING and path.removesuffix("/") not in SERVED:
        raise InvalidRequest(
            f"{method} {path} is not served: keys' limits and the bounds of a request do not know what it asks for. "
            f"Served are {', '.join(sorted(SERVED))}, as far as the model does what they ask for."
        )
