"""Makes the request of a plan from a config: the facts of its checkpoint, and of the engines' own code where the plan
has no formulas."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from serve_app.config import ModelConfig
from serve_app.engines.model_facts import answers
from serve_app.errors import ConfigError
from serve_app.facts.checkpoint import Checkpoint, read_checkpoint
from serve_app.facts.engine_facts import EngineFacts
from serve_app.facts.known_facts import Answer, Question, known_answer
from serve_app.facts.model_code import code_digest
from serve_app.facts.packages import facts_version
from serve_app.planning.model_request import ModelRequest

# vLLM is asked about these tensor parallel sizes and that of the config, in one process.
TENSOR_PARALLEL_SIZES = frozenset({1, 2, 4, 8})

Tell = Callable[[str], None]


@dataclass(frozen=True)
class Unanswered:
    """This is a model whose checkpoint was read, and what an engine has to be asked about it, by the fields of
    `EngineFacts`."""

    request: ModelRequest
    checkpoint: Checkpoint
    questions: dict[str, Question]


def read_request(name: str, config: ModelConfig, replicas: int = 1) -> Unanswered:
    """Returns a model with the facts of its checkpoint. Raises ConfigError if they cannot be read."""
    checkpoint = read_checkpoint(config.model, config.revision)
    request = ModelRequest(name, config, checkpoint.architecture, checkpoint.tensors, replicas)
    return Unanswered(request, checkpoint, questions_of(request, checkpoint))


def questions_of(request: ModelRequest, checkpoint: Checkpoint) -> dict[str, Question]:
    """Returns what the plan has to know from engines: of vLLM with the config's own type of KV cache and in 8 bits, and
    of pt."""
    config, shape = request.config, request.architecture
    found = {}
    if config.infer_backend != "pt" and not request.formulas_hold:
        if request.kv_cache_dtype != "fp8":
            own = None if request.kv_cache_dtype == "auto" else request.kv_cache_dtype
            found["vllm"] = _of_vllm(request, checkpoint, own)
        found["vllm_fp8"] = _of_vllm(request, checkpoint, "fp8")
    if config.infer_backend != "vllm" and not shape.has_formulas:
        found["pt"] = _of_pt(config, checkpoint)
    return found


def _of_vllm(request: ModelRequest, checkpoint: Checkpoint, kv_cache_dtype: str | None) -> Question:
    config, arguments = request.config, request.asked_arguments
    sizes = TENSOR_PARALLEL_SIZES | {config.tensor_parallel_size or 1}
    settings: dict[str, Any] = {
        "dtype": config.dtype,
        "kv_cache_dtype": kv_cache_dtype,
        "quantization": config.quantization,
        "trust_remote_code": config.trust_remote_code,
        "tensor_parallel_sizes": sorted(sizes),
        "rules": config.device,
    }
    if arguments:  # Most configs have none, whose answers are shipped.
        settings["engine_args"] = arguments
    settings |= _code(config, checkpoint)
    return Question("vllm", facts_version("vllm"), checkpoint.config, settings)


def _of_pt(config: ModelConfig, checkpoint: Checkpoint) -> Question:
    settings: dict[str, Any] = {"dtype": config.dtype, "trust_remote_code": config.trust_remote_code}
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
    """Returns the requests with what the engines say. Without `tell` no engine is asked, and only what was kept or is
    shipped is known."""
    flat = [(item, question) for item in unanswered for question in item.questions.values()]
    questions = {question.key: (question, item.checkpoint.folder) for item, question in flat}
    if tell is None:
        found = {key: known_answer(question) or Answer(None) for key, (question, _) in questions.items()}
    else:
        asked, folders = [pair[0] for pair in questions.values()], [pair[1] for pair in questions.values()]
        found = dict(zip(questions, answers(asked, folders, tell), strict=True))
    return [_with_answers(item, found) for item in unanswered]


def _with_answers(item: Unanswered, found: Mapping[str, Answer]) -> ModelRequest:
    known = {field: found[question.key] for field, question in item.questions.items()}
    reasons = {item.questions[field].engine: answer.problem for field, answer in known.items() if answer.problem}
    text = "; ".join(f"{engine}: {reason}" for engine, reason in reasons.items())
    versions = {f"{question.engine}_version": question.version for question in item.questions.values()}
    facts = EngineFacts(**{field: answer.facts for field, answer in known.items()}, **versions)  # type: ignore[arg-type]
    return replace(item.request, facts_problem=text, engine_facts=facts)
