"""Makes the request of a plan from a config: the facts of its checkpoint, and of the engines' own code where the plan
has no formulas."""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from serve_app.config import ModelConfig
from serve_app.engines.adapters import readable_adapters, with_adapter_room
from serve_app.engines.model_facts import answers
from serve_app.errors import ConfigError
from serve_app.facts.card_capability import HOPPER, Capability, capability_text, card_capability, read_capability
from serve_app.facts.checkpoint import Checkpoint, read_checkpoint
from serve_app.facts.engine_facts import CardFacts, EngineFacts, PtFacts, TensorFacts, VllmFacts
from serve_app.facts.inventory import Inventory
from serve_app.facts.known_facts import Answer, Question, known_answer
from serve_app.facts.model_code import code_digest
from serve_app.facts.packages import facts_version
from serve_app.facts.weights import CANNOT_BUILD, Tensor, tensors_without_weights
from serve_app.model_fields import PT_QUANTIZATIONS
from serve_app.planning.model_request import ModelRequest

# vLLM is asked about these tensor parallel sizes at once. Another size of a config is a question of its own, in the
# same process, so that the answer for these sizes is found among those that are kept or shipped.
TENSOR_PARALLEL_SIZES = (1, 2, 4, 8)
# The question for the tensors of a config.json has this name.
TENSORS = "tensors"
# The question for vLLM's buffers for adapters has this name.
ADAPTERS = "vllm_adapters"
# A field of a question about other cards than Hopper ends with this and their capability.
ON = "@"
# A field of a question about a tensor parallel size that is none of those ends with this.
ONE_SIZE = "+"

Tell = Callable[[str], None]


@dataclass(frozen=True)
class Unanswered:
    """This is a model whose checkpoint was read, and what an engine has to be asked about it, by the fields of
    `EngineFacts`, with `ON` and `ONE_SIZE` behind those for other cards and for another size. "tensors" is asked for a
    model without files of weights. `draft` is the model that drafts for it, if there is one."""

    request: ModelRequest
    checkpoint: Checkpoint
    questions: dict[str, Question]
    draft: "Unanswered | None" = None


def read_request(name: str, config: ModelConfig, replicas: int = 1, cards: Collection[Capability] = ()) -> Unanswered:
    """Returns a model with the facts of its checkpoint. `cards` are the compute capabilities for which it is to be
    planned. Raises ConfigError if they cannot be read."""
    checkpoint = read_checkpoint(config.model, config.revision)
    config, adapters = with_adapter_room(config), readable_adapters(config)
    request = ModelRequest(
        name, config, checkpoint.architecture, checkpoint.tensors, replicas, adapters=adapters,
        pooling=checkpoint.pooling,
    )  # fmt: skip
    return Unanswered(request, checkpoint, questions_of(request, checkpoint, cards), _read_draft(name, config))


def _read_draft(name: str, config: ModelConfig) -> Unanswered | None:
    """Returns the model that drafts for one of pt, or None if there is none. Raises ConfigError."""
    draft = config.draft
    if draft is None or config.infer_backend == "vllm":
        return None
    try:
        return read_request(f"the draft of {name}", draft)
    except ConfigError as error:
        raise ConfigError(f"speculative.{error}") from None


def cards_of(inventory: Inventory | None) -> frozenset[Capability]:
    """Returns the compute capabilities of an inventory's cards, as far as they are known."""
    found = {card_capability(device.name) for device in (inventory.gpus if inventory is not None else ())}
    return frozenset(capability for capability in found if capability is not None)


def questions_of(
    request: ModelRequest, checkpoint: Checkpoint, cards: Collection[Capability] = ()
) -> dict[str, Question]:
    """Returns what the plan has to know from engines: of vLLM with the config's own type of KV cache and in 8 bits, and
    of pt. Where there are no files of weights, transformers is asked for the tensors of the config.json."""
    config, shape = request.config, request.architecture
    found: dict[str, Question] = {}
    if checkpoint.lacks_tensors:
        found[TENSORS] = Question("pt", facts_version("pt"), checkpoint.config, {"wants": TENSORS})
    if config.infer_backend != "pt" and not request.formulas_hold:
        if request.kv_cache_dtype != "fp8":
            own = None if request.kv_cache_dtype == "auto" else request.kv_cache_dtype
            found["vllm"] = _of_vllm(request, checkpoint, own)
        found["vllm_fp8"] = _of_vllm(request, checkpoint, "fp8")
        found |= _on_other_cards(request, found, cards)
        found |= _of_own_size(config, found)
    if config.infer_backend != "pt" and config.has_adapters:
        found[ADAPTERS] = _of_adapters(request, checkpoint)
    if config.infer_backend != "vllm" and (checkpoint.pooling is not None or not shape.has_formulas):
        found["pt"] = _of_pt(config, checkpoint)
    return found


def _of_vllm(request: ModelRequest, checkpoint: Checkpoint, kv_cache_dtype: str | None) -> Question:
    config, arguments = request.config, request.asked_arguments
    settings: dict[str, Any] = {
        "dtype": config.dtype,
        "kv_cache_dtype": kv_cache_dtype,
        "quantization": config.quantization,
        "trust_remote_code": config.trust_remote_code,
        "tensor_parallel_sizes": list(TENSOR_PARALLEL_SIZES),
        "rules": config.device,
    }
    if arguments:  # Most configs have none, whose answers are shipped.
        settings["engine_args"] = arguments
    settings |= _code(config, checkpoint)
    return Question("vllm", facts_version("vllm"), checkpoint.config, settings)


def _of_adapters(request: ModelRequest, checkpoint: Checkpoint) -> Question:
    """Returns the question for vLLM's buffers for LoRA adapters, which do not depend on the card or the KV cache."""
    question = _of_vllm(request, checkpoint, None)
    own = request.config.tensor_parallel_size or 1
    settings = {
        **question.settings, "wants": "adapters",
        "tensor_parallel_sizes": sorted({*TENSOR_PARALLEL_SIZES, own}),
    }  # fmt: skip
    if request.config.lora_target_modules is not None:
        settings["lora_target_modules"] = sorted(request.config.lora_target_modules)
    return replace(question, settings=settings)


def _on_other_cards(
    request: ModelRequest, asked: Mapping[str, Question], cards: Collection[Capability]
) -> dict[str, Question]:
    """Returns the same questions for the other cards, if vLLM chooses the kernels of the model's weights by the card.
    The answers for Hopper are those that the plan has without a card, and are shipped for public models."""
    is_quantised = bool(request.config.quantization or request.architecture.quantization)
    if not is_quantised or request.config.device == "cpu":
        return {}
    return {
        f"{field}{ON}{capability_text(card)}": replace(
            question, settings={**question.settings, "rules": f"{question.settings['rules']} {capability_text(card)}"}
        )
        for card in sorted(set(cards) - {HOPPER})
        for field, question in asked.items()
        if question.engine == "vllm"
    }


def _of_own_size(config: ModelConfig, asked: Mapping[str, Question]) -> dict[str, Question]:
    """Returns the same questions of vLLM for the config's own tensor parallel size, if it is none of the usual ones."""
    size = config.tensor_parallel_size or 1
    if size in TENSOR_PARALLEL_SIZES:
        return {}
    return {
        f"{field}{ONE_SIZE}": replace(question, settings={**question.settings, "tensor_parallel_sizes": [size]})
        for field, question in asked.items()
        if question.engine == "vllm"
    }


def _of_pt(config: ModelConfig, checkpoint: Checkpoint) -> Question:
    settings: dict[str, Any] = {"dtype": config.dtype, "trust_remote_code": config.trust_remote_code}
    if config.quantization in PT_QUANTIZATIONS:  # Most configs have none, whose answers are shipped.
        settings["quantization"] = config.quantization
    if config.pt_cache_dtype is not None:
        settings["kv_cache_dtype"] = config.pt_cache_dtype
    if checkpoint.pooling is not None:  # Answers for models that generate text are shipped without it.
        settings["task"] = checkpoint.pooling.task
    settings |= _code(config, checkpoint)
    return Question("pt", facts_version("pt"), checkpoint.config, settings)


def _code(config: ModelConfig, checkpoint: Checkpoint) -> dict[str, str]:
    """Returns what stands for the model's own code in a question, if that code may run."""
    if not config.trust_remote_code or checkpoint.folder is None:
        return {}
    try:
        return {"code": code_digest(checkpoint.folder)}
    except OSError as error:
        raise ConfigError(f"model: {error.filename}: it cannot be read: {error.strerror}.") from None


def answered(unanswered: Sequence[Unanswered], tell: Tell | None) -> list[ModelRequest]:
    """Returns the requests with what the engines say. Without `tell` no process is started for it, and only what was
    kept or is shipped is known. Raises ConfigError for a model without files of weights that cannot be built."""
    everything = [*unanswered, *(item.draft for item in unanswered if item.draft is not None)]
    flat = [(item, question) for item in everything for question in item.questions.values()]
    questions = {question.key: (question, item.checkpoint.folder) for item, question in flat}
    if tell is None:
        found = {key: known_answer(question) or Answer(None) for key, (question, _) in questions.items()}
    else:
        asked, folders = [pair[0] for pair in questions.values()], [pair[1] for pair in questions.values()]
        found = dict(zip(questions, answers(asked, folders, tell), strict=True))
    return [_with_answers(item, found) for item in unanswered]


def _with_answers(item: Unanswered, found: Mapping[str, Answer]) -> ModelRequest:
    answered = _joined({field: found[question.key] for field, question in item.questions.items() if field != TENSORS})
    known = {field: answer for field, answer in answered.items() if ON not in field}
    request = item.request
    if TENSORS in item.questions:
        request = replace(request, tensors=_tensors(item, found[item.questions[TENSORS].key]))
    reasons = {item.questions[field].engine: answer.problem for field, answer in known.items() if answer.problem}
    text = "; ".join(f"{engine}: {reason}" for engine, reason in reasons.items())
    versions = {f"{item.questions[field].engine}_version": item.questions[field].version for field in known}
    others = _others(answered)
    facts = EngineFacts(**{field: answer.facts for field, answer in known.items()}, **versions, others=others)  # type: ignore[arg-type]
    draft = None if item.draft is None else _with_answers(item.draft, found)
    return replace(request, facts_problem=text, engine_facts=_with_known_pt(item, facts), draft=draft)


def _with_known_pt(item: Unanswered, facts: EngineFacts) -> EngineFacts:
    """Returns the facts with what transformers' code said of a model that is to run with vLLM, if that was kept or is
    shipped. The search for fixes tries pt with it, for which alone no engine is asked."""
    is_by_formula = item.request.architecture.has_formulas and item.request.pooling is None
    if item.request.config.infer_backend != "vllm" or is_by_formula:
        return facts
    question = _of_pt(item.request.config, item.checkpoint)
    known = known_answer(question)
    if known is None or not isinstance(known.facts, PtFacts):
        return facts
    return replace(facts, pt=known.facts, pt_version=question.version)


def _joined(answers: Mapping[str, Answer]) -> dict[str, Answer]:
    """Returns the answers with those for one size as a part of those for the usual sizes."""
    found = {field: answer for field, answer in answers.items() if not field.endswith(ONE_SIZE)}
    for field, own in answers.items():
        name = field.removesuffix(ONE_SIZE)
        if name == field:
            continue
        usual = found[name]
        parts = [answer.facts for answer in (usual, own) if isinstance(answer.facts, VllmFacts)]
        ranks = {size: rank for part in parts for size, rank in part.ranks.items()}
        refusals = {size: reason for part in parts for size, reason in part.refusals.items()}
        found[name] = Answer(VllmFacts(ranks, refusals) if parts else None, own.problem or usual.problem)
    return found


def _others(answered: Mapping[str, Answer]) -> tuple[CardFacts, ...]:
    """Returns what vLLM said of other cards, by their capability."""
    found: dict[str, dict[str, Any]] = {}
    for name, answer in answered.items():
        field, is_other, capability = name.partition(ON)
        if is_other:
            found.setdefault(capability, {})[field] = answer.facts
    return tuple(CardFacts(read_capability(text), **facts) for text, facts in found.items())


def _tensors(item: Unanswered, answer: Answer) -> tuple[Tensor, ...]:
    """Returns the tensors that transformers makes of a model's config.json. Raises ConfigError if it makes none."""
    where = f"model: {item.request.config.model}"
    if isinstance(answer.facts, TensorFacts):
        return answer.facts.tensors
    if not answer.problem:  # No process was asked, as in a replica, which has imported torch already.
        return tuple(tensors_without_weights(item.checkpoint.config, where))
    raise ConfigError(f"{where}: {CANNOT_BUILD} {answer.problem}")
