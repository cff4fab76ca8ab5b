"""Decides which of vLLM's endpoints take requests here. It is pure.

vLLM has others, for its operators and for other vendors' clouds. What their bodies ask for is neither counted by keys'
limits nor bounded by the guard, and some stop the engine for all clients, so only the endpoints named here are served.
"""

from serve_app.errors import InvalidRequest

# These methods have no body.
READING = frozenset({"GET", "HEAD", "OPTIONS"})

SERVED = frozenset({
    "/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages", "/v1/messages/count_tokens",
    "/v1/embeddings", "/pooling", "/classify", "/score", "/v1/score", "/rerank", "/v1/rerank", "/v2/rerank",
    "/tokenize", "/detokenize",
})  # fmt: skip

# What a model that makes vectors or scores has no route for, in vLLM's words for it.
OF_TEXT = {
    "/v1/chat/completions": "Chat Completions", "/v1/completions": "Completions", "/v1/responses": "Responses",
    "/v1/messages": "Messages", "/v1/messages/count_tokens": "Messages",
}  # fmt: skip


def require_served(method: str, path: str) -> None:
    """Raises InvalidRequest for another endpoint. vLLM redirects a `path` that ends with a slash."""
    if method not in READING and path.removesuffix("/") not in SERVED:
        raise InvalidRequest(
            f"{method} {path} is not served, because keys' limits and the bounds of a request do not know what it asks "
            f"for. These are served if the model does what they ask for: {', '.join(sorted(SERVED))}."
        )
