"""Says how transformers lays models out in memory, without weights, in a process of its own:

    python -m serve_app.engines.pt.model_facts JOBS.json ANSWERS.jsonl

JOBS.json is a list. Each job has `folder`, which holds a config.json and needs no weights, `dtype`, `quantization` if
pt quantises the weights while they load, `kv_cache_dtype` if its cache is in 8 bits, `task` unless the model generates
text, and `trust_remote_code`, without which no code of the folder runs. `facts_worker.py` says what ANSWERS.jsonl
becomes. `facts` are as `facts_to_json` writes `PtFacts`, or `TensorFacts` for a job with `wants: tensors`, for which
no code of the folder ever runs. The process uses no network.
"""

import json
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from serve_app.engines.facts_worker import Job, outcome, refusals, work
from serve_app.facts.engine_facts import PtFacts, TensorFacts, facts_to_json
from serve_app.facts.weights import built_tensors


def main() -> None:
    """Answers all jobs."""
    work(sys.argv[1:], answer, ready)


@contextmanager
def ready(jobs: Sequence[Job]) -> Iterator[None]:
    """Imports torch and transformers, which takes most of the time."""
    os.environ |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error", "CUDA_VISIBLE_DEVICES": ""}
    warnings.simplefilter("ignore")
    import serve_app.engines.pt.load.layout  # noqa: F401

    yield


def answer(job: Job) -> dict[str, Any]:
    """Returns the facts of one job, or why there are none. Raises MemoryError."""
    facts_of = _tensors if job.get("wants") == "tensors" else _facts
    return outcome(lambda: facts_to_json(facts_of(job)), str(job["folder"]))


def _tensors(job: Job) -> TensorFacts:
    config = json.loads((Path(job["folder"]) / "config.json").read_bytes())
    with refusals(str(job["folder"])):
        return TensorFacts(tuple(built_tensors(config)))


def _facts(job: Job) -> PtFacts:
    from serve_app.engines.pt.load.layout import layout_of_model, model_without_storage, read_config

    trusts, task = bool(job.get("trust_remote_code")), job.get("task", "generate")
    with refusals(str(job["folder"])):
        config, dtype = read_config(Path(job["folder"]), str(job.get("dtype", "auto")), trusts)
        model = model_without_storage(config, dtype, trusts, task)
    return layout_of_model(model, dtype, job.get("quantization"), job.get("kv_cache_dtype"), task)


if __name__ == "__main__":
    main()
