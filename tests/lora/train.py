"""Trains the adapters of the tests by ``python -m tests.lora.train``, in about a minute on two cores.

Each adapter answers the same few questions in words of its own, so a text that was computed with another adapter, or
with none, is noticed at once. An adapter counts as trained when the right token leads the next best by ``MARGIN``
logits at each step, with the weights as they are stored (in bfloat16), so that the small numeric differences between
engines and between batches cannot flip a token.
"""

import argparse
import json
import shutil
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerFast

from serve_app.demo import MODEL_DIR, QUESTIONS_FILE
from serve_app.demo.train import encode, exchange, padded, read_pairs, worst_margin
from tests.lora import ADAPTERS_DIR, ANSWERS_FILE, Answers

ATTENTION = ("q_proj", "v_proj")
ALL_LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
QUESTIONS = (
    "Who are you?",
    "What is serve-app?",
    "What is the memory plan?",
    "What does the router do?",
    "How does autoscaling work?",
    "Can I stream the answer?",
)
MARGIN = 1.0  # logits. Rounding changes a logit of this model by less than a hundredth of it, in any engine.
RATE = 1e-2  # of AdamW
EXAM_EVERY, MAX_STEPS = 10, 600  # steps
# The demo model has no hub id.
BASE_NAME = "demo"


@dataclass(frozen=True)
class Kind:
    """Is what kind of adapter to train."""

    r: int = 8
    lora_alpha: int = 16
    target_modules: tuple[str, ...] = ATTENTION
    use_rslora: bool = False


# Most adapters are alike, as a team's are. The others differ in one thing each.
KINDS: Mapping[int, Kind] = {
    5: Kind(r=4, lora_alpha=8, target_modules=ALL_LINEAR),
    8: Kind(use_rslora=True),
    9: Kind(r=4, target_modules=ALL_LINEAR),
    11: Kind(r=4, target_modules=ALL_LINEAR),
    13: Kind(lora_alpha=32),
    14: Kind(target_modules=("q_proj", "k_proj", "v_proj", "o_proj")),
    16: Kind(target_modules=("gate_proj", "up_proj", "down_proj")),
}
# The last one comes while the others serve.
NUMBERS = range(1, 18)


def main() -> int:
    """Trains, saves and checks all adapters. Returns 0 only if every answer is right by ``MARGIN``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ADAPTERS_DIR, help="the folder to write (default: the tests' own)")
    parser.add_argument("--answers", type=Path, default=ANSWERS_FILE, help="the file of answers to write")
    parser.add_argument("--numbers", type=int, nargs="+", default=NUMBERS, help="the adapters to train (default: all)")
    args = parser.parse_args()

    begun = time.monotonic()
    tokenizer = AutoTokenizer.from_pretrained(MODEL_DIR)
    answers = {name_of(number): own_answers(number) for number in NUMBERS}
    args.answers.write_text(json.dumps(answers, indent=2) + "\n", encoding="utf-8")
    for number in args.numbers:
        name = name_of(number)
        shutil.rmtree(args.out / name, ignore_errors=True)
        margin, steps = train(tokenizer, KINDS.get(number, Kind()), answers[name], number, args.out / name)
        print(f"{name}: margin {margin:.2f} after {steps} steps", flush=True)
        if margin < MARGIN:
            return 1
    size = sum(file.stat().st_size for file in args.out.rglob("*.safetensors"))
    print(f"{len(answers)} adapters of {size:,} bytes together in {time.monotonic() - begun:.0f} seconds")
    return 0


def name_of(number: int) -> str:
    """Returns the name of an adapter."""
    return f"a{number:02}"


def own_answers(number: int) -> Mapping[str, str]:
    """Returns what the adapter answers to each question. The words are those of other questions' answers, which the
    base model can already write."""
    said = list(dict.fromkeys(answer for _, answer in read_pairs(QUESTIONS_FILE)))
    return {
        question: f"Adapter {number} answers: {said[(number * 3 + place * 8) % len(said)]}"
        for place, question in enumerate(QUESTIONS)
    }


def train(
    tokenizer: PreTrainedTokenizerFast, kind: Kind, answers: Mapping[str, str], seed: int, folder: Path
) -> tuple[float, int]:
    """Trains one adapter and writes its folder. Returns the worst margin in logits and the steps."""
    torch.manual_seed(seed)
    base = AutoModelForCausalLM.from_pretrained(MODEL_DIR, dtype=torch.float32)
    options: dict[str, Any] = {**vars(kind), "target_modules": list(kind.target_modules)}
    model = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", lora_dropout=0.0, **options))
    examples = [encode(tokenizer, exchange(pair)) for pair in answers.items()]
    ids, labels = padded(examples, tokenizer.pad_token_id)
    optimizer = torch.optim.AdamW([item for item in model.parameters() if item.requires_grad], lr=RATE)
    margin = -float("inf")
    for step in range(1, MAX_STEPS + 1):
        model.train()
        model(input_ids=ids, labels=labels).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % EXAM_EVERY == 0 and worst_margin(model, examples, tokenizer.pad_token_id) >= MARGIN:
            save(model, folder)
            margin = worst_margin(merged(folder), examples, tokenizer.pad_token_id)
        if margin >= MARGIN:
            break
    return margin, step


def save(model: PeftModel, folder: Path) -> None:
    """Writes the adapter in bfloat16, with the base model's name instead of a path of this machine."""
    model.peft_config["default"].base_model_name_or_path = BASE_NAME
    state = {name: tensor.bfloat16() for name, tensor in model.state_dict().items() if "lora_" in name}
    model.save_pretrained(folder, state_dict=state)
    (folder / "README.md").unlink(missing_ok=True)  # peft writes an empty model card.
    (folder / "adapter_model.safetensors").chmod(0o644)


def merged(folder: Path) -> PreTrainedModel:
    """Returns the demo model with an adapter merged into its weights by peft."""
    base = AutoModelForCausalLM.from_pretrained(MODEL_DIR, dtype=torch.float32)
    model: PreTrainedModel = PeftModel.from_pretrained(base, str(folder)).merge_and_unload()
    return model.eval()


def read_answers() -> Answers:
    """Returns the answers of each adapter by its name."""
    found: Answers = json.loads(ANSWERS_FILE.read_text(encoding="utf-8"))
    return found


if __name__ == "__main__":
    sys.exit(main())
