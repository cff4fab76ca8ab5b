"""Makes vectors and scores of what the model computed, and writes the answers. It is pure, and grows with a request."""

import base64
import math
from collections.abc import Sequence
from typing import Any

import msgspec
import numpy as np

from serve_app.engines.pt.pooling.loop import Vector
from serve_app.engines.pt.pooling.protocol import EmbedRequest, RerankRequest
from serve_app.errors import InvalidRequest
from serve_app.facts.pooling import Pooling

# torch divides by at least this much, so vectors of zeros stay.
LEAST_LENGTH, LEAST_PRODUCT = 1e-12, 1e-8


def check_dimensions(asked: int | None, pooling: Pooling, size: int, name: str) -> None:
    """Raises InvalidRequest, in vLLM's words, for vectors that the model `name` was not trained for."""
    if asked is None:
        return
    problem = None
    if not pooling.is_matryoshka:
        problem = f"does not support Matryoshka embeddings; dimensions must be unset (received dimensions={asked})."
    elif asked > size:
        problem = f"only supports dimensions in range [1, {size}], got {asked}."
    elif pooling.dimensions is not None and asked not in pooling.dimensions:
        problem = f"only supports Matryoshka dimensions {list(pooling.dimensions)}, got {asked}."
    if problem is not None:
        raise InvalidRequest(f"Model '{name}' {problem}", param="dimensions")


def shaped(vector: Vector, dimensions: int | None, normalizes: bool) -> Vector:
    """Returns the vector as it is answered: shortened first, and then scaled to length 1, as with vLLM."""
    kept = vector[:dimensions]
    return kept / np.float32(max(float(np.linalg.norm(kept)), LEAST_LENGTH)) if normalizes else kept


def embeddings(asked: EmbedRequest, vectors: Sequence[Vector], head: dict[str, Any]) -> bytes:
    """Returns the answer of /v1/embeddings. `head` has its id, time, model and usage."""
    data = [
        {"index": index, "object": "embedding", "embedding": _encoded(vector, asked.encoding_format)}
        for index, vector in enumerate(vectors)
    ]
    return msgspec.json.encode({**head, "object": "list", "data": data})


def _encoded(vector: Vector, form: str) -> Any:
    little = vector.astype("<f4")
    return base64.b64encode(little.tobytes()).decode() if form == "base64" else little.tolist()


def score_of(logit: float, pooling: Pooling, use_activation: bool | None) -> float:
    """Returns the score of a classifier's logit."""
    if use_activation is False or pooling.activation == "identity":
        return logit
    small = math.exp(-abs(logit))  # It never overflows.
    return 1 / (1 + small) if logit >= 0 else small / (1 + small)


def similarities(firsts: Sequence[Vector], seconds: Sequence[Vector]) -> list[float]:
    """Returns the cosine of each pair. A single first vector is compared with all second ones."""
    left, right = (np.stack(vectors).astype(np.float64) for vectors in (firsts, seconds))
    lengths = np.linalg.norm(left, axis=1) * np.linalg.norm(right, axis=1)
    products = np.einsum("ij,ij->i", np.broadcast_to(left, right.shape), right)
    found: list[float] = (products / np.maximum(lengths, LEAST_PRODUCT)).tolist()
    return found


def scores(values: Sequence[float], head: dict[str, Any]) -> bytes:
    """Returns the answer of /score."""
    data = [{"index": index, "object": "score", "score": value} for index, value in enumerate(values)]
    return msgspec.json.encode({**head, "object": "list", "data": data})


def ranking(asked: RerankRequest, documents: Sequence[str], values: Sequence[float], head: dict[str, Any]) -> bytes:
    """Returns the answer of /rerank: the documents with the highest scores first, and equal ones in their order."""
    order = sorted(range(len(values)), key=lambda index: values[index], reverse=True)
    results: list[dict[str, Any]] = [
        {"index": index, "document": {"text": documents[index], "multi_modal": None}, "relevance_score": values[index]}
        for index in order[: asked.top_n or len(order)]
    ]
    if not asked.return_documents:
        for result in results:
            del result["document"]
    return msgspec.json.encode({**head, "results": results})
