"""Keeps what engines said of models, by what they were asked.

An engine builds a model without storage in a process of its own (`engines/model_facts.py`), because that takes seconds
and imports torch. The answers are kept as JSON files, one for each question, in the folder `facts` beside the file of
calibrations (`engines/kept_facts.py`). The package ships the answers for public models (`scripts/ship_facts.py`).
Deleting the folder only costs time.
"""

import gzip
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal

from serve_app.facts.calibration import calibration_file
from serve_app.facts.engine_facts import Facts, facts_from_json, facts_to_json

SHIPPED = Path(__file__).parent / "shipped.json.gz"
# This is the number of the form of answers. Those of another form are asked for again.
FORM = 4

# These fields of a config.json change nothing of a model's layout. Copies of one model often differ in them.
_WITHOUT_EFFECT = frozenset(
    {"transformers_version", "_name_or_path", "bos_token_id", "eos_token_id", "pad_token_id", "initializer_range"}
    | {"rms_norm_eps", "layer_norm_eps", "use_cache", "attention_dropout", "resid_pdrop", "embd_pdrop", "attn_pdrop"}
    | {"hidden_dropout", "hidden_dropout_prob", "attention_probs_dropout_prob", "router_aux_loss_coef", "unsloth_fixed"}
    | {"output_router_logits", "pretraining_tp", "_attn_implementation_autoset"}
)


@dataclass(frozen=True)
class Question:
    """This is what an engine is asked: its name, its version, the model's config.json, and the settings that change the
    answer (dtype, kv_cache_dtype, quantization, the tensor parallel sizes)."""

    engine: Literal["vllm", "pt"]
    version: str
    config: Mapping[str, Any]
    settings: Mapping[str, Any]

    @property
    def key(self) -> str:
        """Returns a name for a file, the same for the same question."""
        config = {name: value for name, value in self.config.items() if name not in _WITHOUT_EFFECT}
        text = json.dumps([FORM, self.engine, self.version, config, self.settings], sort_keys=True)
        return f"{self.engine}-{sha256(text.encode()).hexdigest()[:32]}"


@dataclass(frozen=True)
class Answer:
    """This is what an engine said: the facts, or why it has none. `is_refusal` says that the reason is the engine's own
    judgement of the model, and not a fault of ours or of this machine."""

    facts: Facts | None
    problem: str = ""
    is_refusal: bool = False

    def to_json(self) -> dict[str, Any]:
        """Returns what `answer_from_json` reads."""
        if self.facts is None:
            return {"error": self.problem, "is_refusal": self.is_refusal}
        return {"facts": facts_to_json(self.facts)}


def answer_from_json(engine: str, plain: Mapping[str, Any]) -> Answer:
    """Returns a decoded answer. Raises KeyError, TypeError, ValueError or AttributeError for another form."""
    if "facts" not in plain:
        return Answer(None, str(plain["error"]), bool(plain.get("is_refusal", False)))
    return Answer(facts_from_json(engine, plain["facts"]))


def facts_folder() -> Path:
    """Returns the folder of this machine's answers."""
    return calibration_file().parent / "facts"


def known_answer(question: Question) -> Answer | None:
    """Returns the answer that was kept or is shipped, or None. A file that is damaged counts as none."""
    for read in (_kept, _shipped):
        try:
            plain = read(question.key)
            if plain is not None:
                return answer_from_json(question.engine, plain)
        except (OSError, ValueError, TypeError, KeyError, AttributeError):
            continue
    return None


def _kept(key: str) -> Any:
    return json.loads((facts_folder() / f"{key}.json").read_bytes())


def _shipped(key: str) -> Any:
    return _all_shipped().get(key)


@cache
def _all_shipped() -> Mapping[str, Any]:
    return dict(json.loads(gzip.decompress(SHIPPED.read_bytes())))
