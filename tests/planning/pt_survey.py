"""Compares what the plan says of a model in pt with the model itself, for every causal model type of transformers.

    .venv/bin/python -m tests.planning.pt_survey [TYPE …]

Each type has a small config with random weights. It is saved, loaded by transformers as pt does it, and computes
prompts of two lengths, one and three at a time, in pt's own cache. The weights and the cache are compared with what
the process of `engines/pt/model_facts.py` says of the config alone, to the byte.
"""

import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import check_device_map
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.utils import logging as transformers_logging

from serve_app.engines.pt.core.model_runner import BatchRunner
from serve_app.engines.pt.core.scheduler import Step
from serve_app.engines.pt.core.sequence import SamplingParams, Sequence
from serve_app.engines.pt.load.device_map import device_map_of
from serve_app.engines.pt.load.layout import layout_of, read_config
from serve_app.engines.pt.load.model_loader import LoadedModel
from serve_app.engines.pt.load.probe import probe
from serve_app.facts.architecture import Architecture
from serve_app.facts.engine_facts import PtFacts
from serve_app.facts.inventory import Device
from serve_app.planning.layer_map import blocks_of
from serve_app.planning.memory import ZERO
from serve_app.planning.plan import ModelPlan, RankPlan
from tests.builders import model_config
from tests.planning.small_configs import TYPES, VOCABULARY, small_config

DTYPE = torch.bfloat16
BATCHES = ((1, 5), (3, 5), (1, 40), (3, 40))


@dataclass(frozen=True)
class Finding:
    """What came out for a model type: `refused` is why it could not be built, and `different` what was not equal."""

    model_type: str
    refused: str = ""
    different: str = ""
    alone: str = ""
    probed: str = ""


def survey(model_type: str) -> Finding:
    """What the plan says of a type, and what is so."""
    torch.manual_seed(0)
    try:
        config = small_config(model_type)
        built = AutoModelForCausalLM.from_config(config, dtype=DTYPE)
    except Exception as error:
        return Finding(model_type, refused=_line(error))
    with tempfile.TemporaryDirectory() as weights, tempfile.TemporaryDirectory() as folder:
        built.save_pretrained(weights)
        config.save_pretrained(folder)
        try:
            facts = layout_of(*read_config(Path(folder), "bfloat16", False))
        except Exception as error:
            return Finding(model_type, different=f"no facts: {_line(error)}")
        model = AutoModelForCausalLM.from_pretrained(weights, config=config, dtype=DTYPE).eval()
    different = _weights(facts, model) or _caches(facts, model) or _placement(facts, model)
    probed = _probed(model)
    if not different and bool(facts.alone) != bool(probed):
        different = f"the probe says '{probed}', and the plan says '{facts.alone}'"
    return Finding(model_type, "", different, facts.alone, probed)


def _weights(facts: PtFacts, model: PreTrainedModel) -> str:
    tensors = {id(tensor): tensor.nbytes for tensor in (*model.parameters(), *model.buffers())}
    planned = facts.before + sum(facts.layers) + facts.after + sum(facts.buffers)
    found = sum(tensors.values())
    return "" if planned == found else f"weights: planned {planned}, found {found}"


def _caches(facts: PtFacts, model: PreTrainedModel) -> str:
    for rows, tokens in BATCHES:
        try:
            found, cells = _filled(model, rows, tokens)
        except Exception as error:
            return "" if facts.alone else f"it does not run, and the plan says that it does: {_line(error)}"
        if facts.alone and not any(facts.kv):
            return ""  # It runs, but the probe will not let it.
        planned = (sum(facts.kv) * cells, sum(facts.state) * rows)
        if planned != found:
            return f"cache of {rows} x {tokens}: planned {planned}, found {found}"
    return ""


def _filled(model: PreTrainedModel, rows: int, tokens: int) -> tuple[tuple[int, int], int]:
    """The bytes of keys and values and of states after a prompt and one token more, and the tokens with room."""
    runner = BatchRunner(model, torch.device("cpu"))
    if not runner.is_joinable:
        raise ValueError("its cache has layers of a kind that cannot be joined")
    sequences = tuple(
        Sequence([(7 * column + row) % VOCABULARY for column in range(tokens)], SamplingParams(max_tokens=4))
        for row in range(rows)
    )
    with torch.inference_mode():
        runner.prefill(Step(sequences, 0, tokens, tokens))
        for sequence in sequences:
            sequence.output_ids.append(1)
        runner.decode(sequences)
    cache = runner._batch
    return (cache.buffer_bytes, cache.state_bytes), cache.cells


def _placement(facts: PtFacts, model: PreTrainedModel) -> str:
    """The map of two GPUs that share the layers, which must put as many bytes on each as the plan counts there."""
    blocks = blocks_of((), shape_of(facts), DTYPE.itemsize, facts)
    half = facts.names.count // 2
    device_map = device_map_of(_split(facts, half), model)
    check_device_map(model, device_map)
    found = {0: 0, 1: 0}
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if isinstance(tensor, torch.nn.Parameter) or name in model.state_dict():
            found[int(device_map[_key(name, device_map)])] += tensor.nbytes
    planned = {0: 0, 1: 0}
    for block in blocks:
        planned[int(block.number >= half)] += block.weights - facts.buffers[block.number + 1]
    return "" if planned == found else f"placement: planned {planned}, found {found}"


def _key(name: str, device_map: Mapping[str, int | str]) -> str:
    """The module of the map that holds a tensor, which is the one with the longest name."""
    while name not in device_map:
        assert name, "every tensor has a place"
        name = name.rpartition(".")[0]
    return name


def shape_of(facts: PtFacts) -> Architecture:
    """An architecture for which there are no formulas. Only the activations go by its sizes."""
    sizes: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 96, "heads": 4, "kv_heads": 4, "head_size": 16}
    layers: Any = ("full",) * facts.names.count
    return Architecture("x", "x", "bfloat16", **sizes, vocabulary=VOCABULARY, max_model_len=128, layers=layers)


def _split(facts: PtFacts, half: int) -> ModelPlan:
    """The first layers on one GPU, and the others on a second one."""
    gpus = [Device("n1", index, "GPU", 2**34, 2**34) for index in (0, 1)]
    parts = ((-1, half - 1), (half, facts.names.count))
    ranks = tuple(RankPlan(gpu, ZERO, ZERO, ZERO, ZERO, ZERO, part) for gpu, part in zip(gpus, parts, strict=True))
    return ModelPlan("m", model_config(), shape_of(facts), 0, "pt", (), 1, 128, 0, 0, 0, ranks)


def _probed(model: PreTrainedModel) -> str:
    """Why pt would run it alone, by the probe that every load runs."""
    loaded = LoadedModel(model.float(), None, torch.device("cpu"), 128, frozenset(), {}, None)  # type: ignore[arg-type]
    try:
        return probe(loaded).reason
    except Exception as error:
        return f"the probe failed: {_line(error)}"


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:200]


def main(types: list[str]) -> None:
    """Prints what was found, the counts last."""
    warnings.simplefilter("ignore")
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    torch.set_num_threads(1)
    findings = []
    for model_type in types or TYPES:
        start = time.perf_counter()
        finding = survey(model_type)
        findings.append(finding)
        words = {"refused": finding.refused, "different": finding.different, "alone": finding.alone}
        words["probe"] = finding.probed
        told = "; ".join(f"{name}: {text}" for name, text in words.items() if text)
        print(f"{model_type:28} {time.perf_counter() - start:5.1f} s  {told or 'equal'}", flush=True)
    built = [finding for finding in findings if not finding.refused]
    counts = Counter(bool(finding.different) for finding in built)
    print(f"{len(findings)} types, {len(built)} built, {counts[False]} equal, {counts[True]} different")
    alone = Counter(bool(finding.alone) for finding in built)
    print(f"pt joins {alone[False]} of these types and runs {alone[True]} one request at a time")


if __name__ == "__main__":
    main(sys.argv[1:])
