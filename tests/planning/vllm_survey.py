"""Builds every architecture of vLLM's registry without storage and compares the plan's bytes with vLLM's own.

    .venv/bin/python -m tests.planning.vllm_survey [--json FILE] [--configs | ARCHITECTURE…]

prints a line for each architecture and the counts: built, equal, and refused by reason. It takes some minutes on two
cores. Each architecture has a process of its own that is forked from one with vLLM imported. With `--configs` it takes
the public models of `tests/planning/configs` instead, of which the tests ask at fewer sizes.
"""

import argparse
import json
import os
import re
import select
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

from serve_app.engines.facts_worker import reason_of
from serve_app.engines.vllm import model_facts, vllm_meta_model
from tests.planning.model_requests import CONFIGS
from tests.planning.vllm_configs import BY_HAND, EXTRAS, LAYERS, Configs

SIZES = (1, 2, 4, 8)
TIMEOUT_S = 120.0
# vLLM's draft models are parts of a model with speculative decoding, and cannot be served alone.
DRAFTS = "a draft for speculative decoding, which is no model of its own"


MISSING = re.compile(r"has no attribute '(\w+)'|KeyError: '(\w+)'")
MOST_EXTRAS = 12


def survey_one(architecture: str, configs: Configs | None, folder: Path) -> dict[str, Any]:
    """What becomes of an architecture at each tensor parallel size: with few layers, or else with all, and with the
    fields that vLLM misses in the defaults. Without `configs` it is the folder of a public model."""
    if configs is None:
        return at_sizes({"folder": str(CONFIGS / architecture)})
    outcome: dict[str, Any] = {}
    for most in (LAYERS, 1000):
        extras: dict[str, Any] = {}
        for number in range(MOST_EXTRAS):
            try:
                place = configs.write(architecture, folder / f"{architecture}-{most}-{number}", most, extras)
            except Exception as error:
                return {"no_config": reason_of(error)}
            outcome = at_sizes({"folder": str(place), "trust_remote_code": "like" in BY_HAND.get(architecture, {})})
            found = MISSING.search(outcome["refusals"].get(1, ""))
            name = (found[1] or found[2]) if found else ""
            if outcome["ranks"] or name in extras or name not in EXTRAS:
                break
            extras[name] = EXTRAS[name]
        if outcome["ranks"]:
            break
    return outcome


def at_sizes(job: dict[str, Any]) -> dict[str, Any]:
    """The weights or the reason of vLLM at each tensor parallel size. Where the first gives none, the others are not
    tried."""
    outcome: dict[str, Any] = {"ranks": {}, "refusals": {}, "kinds": []}
    for size in SIZES:
        try:
            facts = model_facts.rank_facts(job, size)
        except Exception as error:
            outcome["refusals"][size] = reason_of(error)
            if size == SIZES[0]:
                break
            continue
        outcome["ranks"][size] = facts.weights
        outcome["kinds"] = sorted({layer.kind for layer in facts.cache})
    return outcome


def in_process(architecture: str, configs: Configs | None, folder: Path) -> dict[str, Any]:
    """`survey_one` in a forked process, which may crash or hang."""
    receiver, sender = os.pipe()
    child = os.fork()
    if not child:
        os.close(receiver)
        try:
            text = json.dumps(survey_one(architecture, configs, folder))
        except BaseException as error:
            text = json.dumps({"no_config": repr(error)})
        with os.fdopen(sender, "w") as stream:
            stream.write(text)
        os._exit(0)
    os.close(sender)
    with os.fdopen(receiver) as stream:
        answered = bool(select.select([stream], [], [], TIMEOUT_S)[0])
        if not answered:
            os.kill(child, signal.SIGKILL)
        text = stream.read() if answered else ""
    os.waitpid(child, 0)
    if not text:
        return {"no_config": "its process crashed" if answered else f"it took more than {TIMEOUT_S:.0f} s"}
    found: dict[str, Any] = json.loads(text)
    return found


def verdict(outcome: dict[str, Any]) -> str:
    """One of: no config, refused, unequal, equal."""
    if "no_config" in outcome:
        return "no config"
    if any("the plan's rule gives" in reason or "the plan" in reason for reason in outcome["refusals"].values()):
        return "unequal"
    return "equal" if outcome["ranks"] else "refused"


def survey(architectures: list[str], configs: Configs | None, folder: Path) -> dict[str, dict[str, Any]]:
    """The outcome of each architecture. vLLM is prepared already."""
    outcomes = {}
    for architecture in architectures:
        start = time.monotonic()
        outcome = in_process(architecture, configs, folder)
        outcomes[architecture] = {**outcome, "verdict": verdict(outcome), "seconds": time.monotonic() - start}
        reasons = [outcome.get("no_config", ""), *outcome.get("refusals", {}).values()]
        reason = next((reason for reason in reasons if reason), "")
        print(
            f"{verdict(outcome):10} {architecture:50} TP {','.join(map(str, outcome.get('ranks', {})))}"
            f" {' '.join(outcome.get('kinds', []))} {reason[:200]}",
            flush=True,
        )
    return outcomes


def registered() -> tuple[list[str], list[str]]:
    """The architectures of vLLM's registry that are models of their own, and its drafts."""
    from vllm.model_executor.models import registry

    drafts = sorted(registry._SPECULATIVE_DECODING_MODELS)
    return sorted(set(registry.ModelRegistry.get_supported_archs()) - set(drafts)), drafts


def main() -> None:
    """Surveys the named architectures, or all, or the public models."""
    parser = argparse.ArgumentParser()
    parser.add_argument("architectures", nargs="*")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--configs", action="store_true")
    arguments = parser.parse_args()
    vllm_meta_model.prepare("cuda")
    with tempfile.TemporaryDirectory() as folder, vllm_meta_model.process_group(folder):
        models, drafts = registered()
        if arguments.configs:
            models, drafts = sorted(path.name for path in CONFIGS.iterdir() if path.is_dir()), []
        configs = None if arguments.configs else Configs()
        outcomes = survey(arguments.architectures or models, configs, Path(folder))
    counts = Counter(outcome["verdict"] for outcome in outcomes.values())
    built = counts["equal"] + counts["unequal"]
    print(f"{len(outcomes)} architectures: {built} built, {counts['equal']} equal, {dict(counts)}")
    if drafts and not arguments.architectures:
        print(f"{len(drafts)} more are {DRAFTS}")
    if arguments.json:
        arguments.json.write_text(json.dumps(outcomes, indent=1))
    sys.exit(0 if counts["equal"] >= 0.95 * built else 1)


if __name__ == "__main__":
    main()
