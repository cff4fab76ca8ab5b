"""Answers how transformers lays models out in memory: `python -m serve_app.engines.pt.model_facts JOBS ANSWERS`.

JOBS is a JSON list. Each job has `folder`, which holds a config.json and needs no weights, `dtype`, and
`trust_remote_code`, without which no code of the folder runs. ANSWERS becomes a JSON list of the same length: an
answer has `facts` (`PtFacts` as JSON), or `error`, which says why there are none. The process uses no network.
"""

import json
import os
import sys
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from serve_app.facts.engine_facts import facts_to_json

# An error repeats this many letters of transformers' own words.
MOST_REASON = 300


def main() -> None:
    """Reads the jobs, answers each, and writes the answers."""
    os.environ |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error", "CUDA_VISIBLE_DEVICES": ""}
    warnings.simplefilter("ignore")
    jobs, answers = (Path(name) for name in sys.argv[1:3])
    answers.write_text(json.dumps([answer(job) for job in json.loads(jobs.read_bytes())]))


def answer(job: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the answer to one job. It imports torch and transformers, which takes most of the time."""
    from serve_app.engines.pt.load.layout import layout_of, read_config

    try:
        trusts = bool(job.get("trust_remote_code"))
        config, dtype = read_config(Path(job["folder"]), str(job.get("dtype", "auto")), trusts)
        return {"facts": facts_to_json(layout_of(config, dtype, trusts))}
    except Exception as error:  # A model's code may raise anything, and the other jobs go on.
        return {"error": f"{type(error).__name__}: {' '.join(str(error).split())}"[:MOST_REASON]}


if __name__ == "__main__":
    main()
