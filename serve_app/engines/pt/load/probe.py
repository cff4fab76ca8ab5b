"""Finds out at load whether joining sequences changes the model's answers.

Two prompts of different lengths are generated together, one joining late and in two chunks, and compared token by token
with the same prompts computed one by one without a cache. Some architectures are silently wrong when batched: RoBERTa
counts positions from the padding, and Mamba forgets the first chunk of a prompt.
"""

import logging
from typing import NamedTuple

import torch

from serve_app.engines.pt.core.cache_codec import WHOLE, CacheCodec
from serve_app.engines.pt.core.model_runner import BatchRunner, Runner, SerialRunner, Verifier, free_memory
from serve_app.engines.pt.core.scheduler import Step
from serve_app.engines.pt.core.sequence import SamplingParams, Sequence
from serve_app.engines.pt.load.model_loader import LoadedModel
from serve_app.errors import EngineError
from serve_app.planning.unplanned import ALONE as RUNS_ALONE
from serve_app.planning.unplanned import NO_KEYS

logger = logging.getLogger("ray.serve")

STEPS = 4
# Logits may differ by rounding, up to this share of their spread, by the bits of the type.
TOLERANCE = {torch.float32: 1e-3, torch.float16: 5e-2, torch.bfloat16: 1e-1}
# A KV cache in 8 bits that changes logits by more than this share of their spread is logged.
MUCH_IN_8_BITS = 0.25


# Small random models of these types fail the probe in transformers 5.19 (`python -m tests.planning.pt_survey`). Some
# count positions from the padding, and others have no cache that pt could fill. The plan says so before a load; the
# load itself goes by the probe.
ALONE = frozenset(
    {"bart", "bigbird_pegasus", "blenderbot-small", "camembert", "data2vec-text", "falcon_mamba", "git", "mamba"}
    | {"marian", "mbart", "megatron-bert", "mvp", "openai-gpt", "pegasus", "plbart", "prophetnet", "recurrent_gemma"}
    | {"reformer", "roberta", "roberta-prelayernorm", "rwkv", "trocr", "whisper", "xlm", "xlm-roberta"}
    | {"xlm-roberta-xl", "xmod"}
)


class ProbeResult(NamedTuple):
    """Has the runner to use, and what was found out about the model.

    `reason` says why it is not the batching runner, and is empty if it is. `bytes_per_token` is the cache's by device,
    with the copy of a layer while it is moved. `pad_prompts` says whether prompts of different lengths may be computed
    together.
    """

    runner: Runner
    reason: str
    bytes_per_token: dict[torch.device, float]
    pad_prompts: bool = True


def probe(loaded: LoadedModel, codec: CacheCodec = WHOLE) -> ProbeResult:
    """Returns the runner for a model and what was found out about it.

    Whether rows can be joined is found out with the cache in the model's own type, and then holds in 8 bits too. Raises
    EngineError for a model whose cache cannot be in 8 bits if `codec` asks for it.
    """
    found = _probe(loaded)
    if codec == WHOLE:
        return found
    if found.reason:
        raise EngineError(f"kv_cache_dtype: {codec.name}, but this model {RUNS_ALONE}. The reason: {found.reason}.")
    return _in_8_bits(loaded, codec)


def _in_8_bits(loaded: LoadedModel, codec: CacheCodec) -> ProbeResult:
    """Returns the runner with a cache in 8 bits, and what such a cache takes."""
    batched = BatchRunner(loaded.model, loaded.input_device, codec)
    if not batched.has_keys:
        raise EngineError(f"kv_cache_dtype: {codec.name}, but this model {NO_KEYS}.")
    difference, bytes_per_token = _compare(batched, SerialRunner(loaded.model, loaded.input_device), loaded)
    if not difference < float("inf"):
        raise EngineError(
            f"kv_cache_dtype: {codec.name}, but this model then computes numbers that are not finite. Use another "
            "type, or leave kv_cache_dtype out."
        )
    if difference > MUCH_IN_8_BITS:
        logger.warning(
            "kv_cache_dtype: %s changes the logits of this model by %.2g of their spread, which is much.",
            codec.name,
            difference,
        )
    batched.reset()
    return ProbeResult(batched, "", bytes_per_token, batched.pad_prompts)


def _probe(loaded: LoadedModel) -> ProbeResult:
    serial = SerialRunner(loaded.model, loaded.input_device)
    try:
        batched = BatchRunner(loaded.model, loaded.input_device)
    except Exception as error:
        return _fall_back(serial, f"there is no cache for its config: {type(error).__name__}: {error}")
    if not batched.is_joinable:
        return _fall_back(serial, "its cache has layers of a kind that cannot be joined")
    try:
        difference, bytes_per_token = _compare(batched, serial, loaded)
    except Exception as error:
        return _fall_back(serial, f"joining two sequences failed: {type(error).__name__}: {error}")
    tolerance = TOLERANCE.get(loaded.model.dtype, 1e-1)
    if not difference <= tolerance:
        return _fall_back(serial, f"joined sequences got other logits (difference {difference:.2g} of their spread)")
    batched.reset()
    return ProbeResult(batched, "", bytes_per_token, batched.pad_prompts)


def verifier(loaded: LoadedModel, probed: ProbeResult) -> Verifier | str:
    """Returns the runner if it can verify drafted tokens of this model, or else the reason why it cannot.

    Several tokens of two rows are computed at once, some of them are taken back, and the logits are compared with those
    of the same texts alone, as at the model's load. The cache is in the model's own type then, because 8 bits change
    the logits.
    """
    runner = probed.runner
    if not isinstance(runner, BatchRunner):
        return "it runs one request at a time without a cache"
    if not runner.can_roll_back:
        return "its cache has states, from which no token can be taken back"
    checked = BatchRunner(loaded.model, loaded.input_device)
    try:
        difference = _compare_drafts(checked, SerialRunner(loaded.model, loaded.input_device), loaded)
    except Exception as error:
        return f"verifying drafts failed: {type(error).__name__}: {error}"
    finally:
        checked.reset()
    if not difference <= TOLERANCE.get(loaded.model.dtype, 1e-1):
        return f"drafted tokens got other logits than the same tokens alone (difference {difference:.2g})"
    return runner


def _compare_drafts(batched: BatchRunner, serial: SerialRunner, loaded: LoadedModel) -> float:
    """Returns the largest difference between the logits of drafts and single logits, in spreads."""
    vocabulary = loaded.model.get_input_embeddings().num_embeddings
    params, worst = SamplingParams(max_tokens=8 * STEPS), 0.0
    rows = [Sequence([(7 * place + length) % vocabulary for place in range(length)], params) for length in (5, 11)]
    with torch.inference_mode():
        for row in rows:
            batched.prefill(Step((row,), 0, row.length, row.length))
            row.output_ids.append(row.length % vocabulary)
        for kept in ((1, 3), (2, 1), (3, 3)):  # Of one more token than are drafted, so many are kept in each row.
            drafts = [[(5 * place + row.length) % vocabulary for place in range(2)] for row in rows]
            logits = batched.verify(rows, drafts).float().cpu()
            for number, (row, draft) in enumerate(zip(rows, drafts, strict=True)):
                texts = [Sequence([*row.token_ids, *draft[:place]], params) for place in range(len(draft) + 1)]
                expected = serial.decode(texts).float().cpu()
                spread = (expected.max() - expected.min()).clamp(min=1e-9)
                worst = max(worst, float((logits[number] - expected).abs().nan_to_num(torch.inf).max() / spread))
            batched.keep(dict(zip(rows, kept, strict=True)))
            for row, draft, tokens in zip(rows, drafts, kept, strict=True):
                row.output_ids += [*draft[: tokens - 1], row.length % vocabulary]
    return worst


def _fall_back(serial: SerialRunner, reason: str) -> ProbeResult:
    free_memory()
    logger.warning("This model runs one request at a time: %s.", reason)
    return ProbeResult(serial, reason, {})


def _compare(
    batched: BatchRunner, serial: SerialRunner, loaded: LoadedModel
) -> tuple[float, dict[torch.device, float]]:
    """Returns the largest difference between joined and single logits, in spreads, and the cache's bytes per token."""
    vocabulary = loaded.model.get_input_embeddings().num_embeddings
    params = SamplingParams(max_tokens=STEPS)
    first, second = (
        Sequence([(7 * number + length) % vocabulary for number in range(length)], params) for length in (5, 11)
    )
    worst = 0.0

    def note(sequences: list[Sequence], logits: torch.Tensor) -> None:
        nonlocal worst
        expected = serial.decode(sequences).float().cpu()
        got = logits.float().cpu()
        spread = (expected.max() - expected.min()).clamp(min=1e-9)
        difference = float((got - expected).abs().max() / spread)
        worst = difference if difference > worst or difference != difference else worst
        for sequence, token in zip(sequences, expected.argmax(-1).tolist(), strict=True):
            sequence.output_ids.append(token)

    with torch.inference_mode():
        for newcomer, running, chunks in ((first, [first], (5,)), (second, [first, second], (6, 11))):
            logits = None
            for begin, end in zip((0, *chunks), chunks, strict=False):
                logits = batched.prefill(Step((newcomer,), begin, end, newcomer.length))
            assert logits is not None, "the last chunk ends the prompt"
            note([newcomer], logits)
            for _ in range(STEPS // 2):
                note(running, batched.decode(running))
        sizes = batched.bytes_per_cell
        batched.drop(first)
        note([second], batched.decode([second]))
    return worst, sizes
