"""Asks `serve_app/engines/vllm/model_facts.py` in a fork of `tests/warm_vllm.py`, where vLLM is prepared already."""

import tempfile
from collections.abc import Iterable, Mapping
from typing import Any

from serve_app.engines.vllm import vllm_meta_model as meta
from serve_app.engines.vllm.model_facts import answer


def answers(jobs: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """What `answers_by` of that module returns, whose first step is to prepare vLLM."""
    with tempfile.TemporaryDirectory() as folder, meta.process_group(folder):
        return [answer(job) for job in jobs]
