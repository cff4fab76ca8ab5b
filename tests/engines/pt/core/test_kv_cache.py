"""Buffers of the KV cache that grow leave nothing behind on a GPU."""

from collections.abc import Iterable

import pytest
import torch

from serve_app.engines.pt.core import kv_cache
from serve_app.engines.pt.core.kv_cache import BatchCache, give_back_unused
from serve_app.planning.pt_kv_buffers import SLACK
from tests.engines.pt.tiny_models import tiny_model

CPU, GPU = torch.device("cpu"), torch.device("cuda", 1)


def test_only_gpus_keep_freed_buffers(monkeypatch: pytest.MonkeyPatch) -> None:
    """The call would be an error without CUDA in some builds of torch, and free nothing."""
    calls: list[str] = []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: calls.append("emptied"))
    give_back_unused([])
    give_back_unused([CPU])
    assert calls == []
    give_back_unused([CPU, GPU])
    assert calls == ["emptied"]


@torch.inference_mode()
def test_old_buffers_are_given_back_when_they_are_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    """Once for all layers, and not at every step."""
    given: list[set[torch.device]] = []

    def give_back(devices: Iterable[torch.device]) -> None:
        given.append(set(devices))

    monkeypatch.setattr(kv_cache, "give_back_unused", give_back)
    model = tiny_model("llama")
    cache = BatchCache(model.config)
    cache.reserve(1, 1)
    del given[:]
    for _ in range(SLACK + 10):
        cache.reserve(1, 1)
        cache.window.rows = 1
        model(input_ids=torch.ones(1, 1, dtype=torch.long), past_key_values=cache.cache, use_cache=True)
        cache.advance(1)
    assert given == [{CPU}]
    cache.shrink(5)
    cache.compact()
    assert given == [{CPU}] * 2
