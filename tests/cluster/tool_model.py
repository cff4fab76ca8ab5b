"""Makes a small model that calls a tool: the demo model, trained on to look a topic up before it answers.

    python -m tests.cluster.tool_model FOLDER

It knows twenty of the demo's questions. To each it answers with a call of `look_up`, whose topic is the question's
number in words, and after the tool's result with the demo's own answer. Its chat template writes calls in Hermes' way,
so both engines read them with `tool_choice: auto`. Takes about a minute on two cores.
"""

import argparse
import json
import random
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from serve_app.facts.checkpoint import DEMO_MODEL, model_path
from tests.demo_answers import ANSWERS, QUESTIONS

STEPS, BATCH, RATE = 160, 10, 3e-3
ENOUGH = 0.002  # The loss at which greedy answers are right with a wide lead.
ASKED = QUESTIONS[:20]
TOPICS = {question: f"topic {number}" for number, question in enumerate(ASKED)}
TEMPLATE = """\
{%- if tools -%}
{{ '<|im_start|>system\\nTools:' }}
{%- for tool in tools %}{{ ' ' + tool.function.name }}{% endfor -%}
{{ '<|im_end|>\\n' }}
{%- endif -%}
{%- for message in messages -%}
{%- if message.role == 'tool' -%}
{{ '<|im_start|>user\\n<tool_response>' + message.content + '</tool_response><|im_end|>\\n' }}
{%- else -%}
{{ '<|im_start|>' + message.role + '\\n' + (message.content or '') }}
{%- for call in message.tool_calls or [] -%}
{{ '<tool_call>{"name": "' + call.function.name + '", "arguments": ' }}
{{- (call.function.arguments | tojson) + '}</tool_call>' }}
{%- endfor -%}
{{ '<|im_end|>\\n' }}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{ '<|im_start|>assistant\\n' }}
{%- endif -%}
"""
TOOL = {"type": "function", "function": {"name": "look_up", "parameters": {"type": "object"}}}


def found(topic: str) -> str:
    """What the tool finds."""
    return f"Page of {topic}."


def conversation(question: str) -> list[dict[str, Any]]:
    """The question, the call, its result and the answer."""
    topic = TOPICS[question]
    call = {"id": "x", "type": "function", "function": {"name": "look_up", "arguments": {"topic": topic}}}
    return [
        {"role": "user", "content": question},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "x", "content": found(topic)},
        {"role": "assistant", "content": ANSWERS[question]},
    ]


def example(tokenizer: PreTrainedTokenizerBase, question: str) -> tuple[list[int], list[int]]:
    """The ids of the conversation, and the labels of what the assistant says in it."""
    turns = conversation(question)
    ids: list[int] = []
    labels: list[int] = []
    for end in (1, 3):
        prompt = tokenizer.apply_chat_template(turns[:end], tools=[TOOL], add_generation_prompt=True, return_dict=False)
        whole = tokenizer.apply_chat_template(turns[: end + 1], tools=[TOOL], return_dict=False)
        assert whole[: len(prompt)] == prompt
        said = whole[len(prompt) : -1]  # The line break after the end is the template's.
        labels += [-100] * (len(prompt) - len(ids)) + said + [-100]
        ids = list(whole)
    return ids, labels


def train(folder: Path) -> float:
    """Writes the model, and returns the last loss."""
    torch.manual_seed(0)
    torch.set_num_threads(2)
    tokenizer = AutoTokenizer.from_pretrained(model_path(DEMO_MODEL))
    tokenizer.chat_template = TEMPLATE
    model = AutoModelForCausalLM.from_pretrained(model_path(DEMO_MODEL), dtype=torch.float32)
    examples = [example(tokenizer, question) for question in ASKED]
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 20) * (1 - step / STEPS))
    chance = random.Random(0)
    loss, good = torch.tensor(0.0), 0
    for _ in range(STEPS):
        if good == 10:
            break
        drawn = chance.sample(examples, BATCH)
        longest = max(len(ids) for ids, _ in drawn)
        ids = torch.tensor([ids + [0] * (longest - len(ids)) for ids, _ in drawn])
        labels = torch.tensor([labels + [-100] * (longest - len(labels)) for _, labels in drawn])
        loss = model(input_ids=ids, labels=labels).loss
        good = good + 1 if loss.item() < ENOUGH else 0
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return float(loss.item())


def main() -> int:
    """Trains the model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    print(json.dumps({"loss": round(train(folder), 6), "folder": str(folder)}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
