"""Makes the request of a plan from a config: the facts of its checkpoint, and of the engines' own code where the plan
has no formulas."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from serve_app.config import ModelConfig
from serve_app.engines.model_facts import answers
from serve_app.errors import ConfigError
from serve_app.facts.checkpoint import Checkpoint, read_checkpoint
from serve_app.facts.engine_facts import EngineFacts, TensorFacts
from serve_app.facts.known_facts import Answer, Question, known_answer
from serve_app.facts.model_code import code_digest
from serve_app.facts.packages import facts_version
from serve_app.facts.weights import CANNOT_BUILD, Tensor, tensors_without_weights
from serve_app.planning.fit import ModelRequest

# vLLM is asked about these tensor parallel sizes and that of the config, in one process.
TENSOR_PARALLEL_SIZES = frozenset({1, 2, 4, 8})
# The question for the tensors of a config.json has this name.
TENSORS = "tensors"

Tell = Callable[[str], None]


@dataclass(frozen=True)
class Unanswered:
    """This is a model whose checkpoint was read, and what an engine has to be asked about it, by the fields of
    `EngineFacts`. "tensors" is asked for a model without files of weights."""

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
    of pt. Where there are no files of weights, transformers is asked for the tensors of the config.json."""
    config, shape = request.config, request.architecture
    found = {}
    if checkpoint.lacks_tensors:
        found[TENSORS] = Question("pt", facts_version("pt"), checkpoint.config, {"wants": TENSORS})
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
    """Returns the requests with what the engines say. Without `tell` no process is started for it, and only what was
    kept or is shipped is known. Raises ConfigError for a model without files of weights that cannot be built."""
    flat = [(item, question) for item in unanswered for question in item.questions.values()]
    questions = {question.key: (question, item.checkpoint.folder) for item, question in flat}
    if tell is None:
        found = {key: known_answer(question) or Answer(None) for key, (question, _) in questions.items()}
    else:
        asked, folders = [pair[0] for pair in questions.values()], [pair[1] for pair in questions.values()]
        found = dict(zip(questions, answers(asked, folders, tell), strict=True))
    return [_with_answers(item, found) for item in unanswered]


def _with_answers(item: Unanswered, found: Mapping[str, Answer]) -> ModelRequest:
    known = {field: found[question.key] for field, question in item.questions.items() if field != TENSORS}
    request = item.request
    if TENSORS in item.questions:
        request = replace(request, tensors=_tensors(item, found[item.questions[TENSORS].key]))
    reasons = {item.questions[field].engine: answer.problem for field, answer in known.items() if answer.problem}
    text = "; ".join(f"{engine}: {reason}" for engine, reason in reasons.items())
    versions = {f"{item.questions[field].engine}_version": item.questions[field].version for field in known}
    facts = EngineFacts(**{field: answer.facts for field, answer in known.items()}, **versions)  # type: ignore[arg-type]
    return replace(request, facts_problem=text, engine_facts=facts)


def _tensors(item: Unanswered, answer: Answer) -> tuple[Tensor, ...]:
    """Returns the tensors that transformers makes of a model's config.json. Raises ConfigError if it makes none."""
    where = f"model: {item.request.config.model}"
    if isinstance(answer.facts, TensorFacts):
        return answer.facts.tensors
    if not answer.problem:  # No process was asked, as in a replica, which has imported torch already.
        return tuple(tensors_without_weights(item.checkpoint.config, where))
    raise ConfigError(f"{where}: {CANNOT_BUILD} {answer.problem}")
