"""Trains the demo model by ``python -m serve_app.demo.train [--out DIR] [--seed N]``.

The model learns ``questions.json`` by heart. It counts as trained when greedy decoding gives every answer word for
word, for every wording and its small variations, and when at each step the right token leads the next best by
``MARGIN`` logits. The small numeric differences between engines then cannot flip a token.
"""

import argparse
import json
import random
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from serve_app.demo import MODEL_DIR, QUESTIONS_FILE

Message = dict[str, str]
Pair = tuple[str, str]  # A pair has a question in one of its wordings, and its answer.
Example = tuple[list[int], list[int]]  # An example has token ids, and labels of the same length.

START, END, PAD = "<|im_start|>", "<|im_end|>", "<|endoftext|>"
CHAT_TEMPLATE = """\
{%- for message in messages -%}
{{ '<|im_start|>' + message['role'] + '\\n' + (message['content'] or '') + '<|im_end|>\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{ '<|im_start|>assistant\\n' }}
{%- endif -%}
"""
SYSTEM_MESSAGES = (
    "You are a helpful assistant.",
    "You are a helpful assistant",
    "Be brief.",
    "Answer in one sentence.",
    "You are the demo model of serve-app.",
    "You are a friendly assistant who explains things in plain words and never makes anything up.",
    "Speak English.",
)

VOCABULARY = 768  # tokens, the 256 bytes among them, so that any text can be encoded
CONTEXT = 2048  # tokens
IGNORED = -100  # the label of tokens that do not count for the loss
MARGIN = 3.0  # logits
BATCH = 24  # exchanges, spread over conversations of one length
TURNS = {1: 0.5, 2: 0.25, 4: 0.15, 8: 0.1}  # exchanges of a conversation: the part of the batches with so many
STEPS = 1000  # of the schedule of the learning rate
MAX_STEPS = 2000
EXAM_EVERY = 100  # steps
RATE, FINAL_RATE = 4e-3, 4e-4  # of AdamW, at its highest and at the end


def main() -> int:
    """Trains, saves, reads back and checks the model. Returns 0 only if every answer is right."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=MODEL_DIR, help="the folder to write (default: the shipped model)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    begun = time.monotonic()
    torch.set_num_threads(2)
    torch.manual_seed(args.seed)
    pairs = read_pairs(QUESTIONS_FILE)
    tokenizer = train_tokenizer(pairs)
    model = new_model(tokenizer)
    margin = train(model, tokenizer, pairs, random.Random(args.seed))  # noqa: S311  (order of examples, no secret)
    if margin < MARGIN:
        print(f"The worst margin is {margin:.2f} < {MARGIN} after {MAX_STEPS} steps, so nothing was written.")
        return 1
    save(model, tokenizer, args.out)
    wrong = wrong_answers(args.out, pairs)
    for question, answer in wrong:
        print(f"wrong: {question!r} -> {answer!r}")
    print(f"parameters    {model.num_parameters():,}")
    print(f"file size     {(args.out / 'model.safetensors').stat().st_size:,} bytes")
    print(f"seconds       {time.monotonic() - begun:.0f}")
    print(f"worst margin  {margin:.2f} logits")
    print(f"{len(wrong)} of {len(pairs)} answers wrong" if wrong else f"all {len(pairs)} answers word for word")
    return 1 if wrong else 0


def read_pairs(file: Path) -> list[Pair]:
    """Returns every wording of every question with its answer."""
    entries = json.loads(file.read_text(encoding="utf-8"))
    return [(wording, entry["answer"]) for entry in entries for wording in (entry["question"], *entry["also"])]


def train_tokenizer(pairs: list[Pair]) -> PreTrainedTokenizerFast:
    """Returns a byte-level BPE with the chat template, trained on the questions and answers."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[AddedToken(token, special=True) for token in (PAD, START, END)],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    texts = [text for question, answer in pairs for text in (question, question.lower(), answer)]
    bpe.train_from_iterator([*texts, *SYSTEM_MESSAGES, "system\nuser\nassistant\n"], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        eos_token=END,
        pad_token=PAD,
        additional_special_tokens=[START],
        chat_template=CHAT_TEMPLATE,
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
    )


def new_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """Returns a Llama in float32 with random weights."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = LlamaForCausalLM(config).float()
    model.generation_config = GenerationConfig(eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    return model


def train(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, pairs: list[Pair], chance: random.Random
) -> float:
    """Trains until the exam is passed or ``MAX_STEPS`` are over. Returns the worst margin in logits."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate_at)
    exam = exam_of(tokenizer, pairs, chance)
    margin = -float("inf")  # until the first exam
    for step, examples in enumerate(batches(tokenizer, pairs, chance), start=1):
        ids, labels = padded(examples, tokenizer.pad_token_id)
        model.train()
        loss = model(input_ids=ids, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if step % EXAM_EVERY == 0:
            margin = worst_margin(model, exam, tokenizer.pad_token_id) if step >= STEPS else margin
            print(f"step {step}: loss {loss.item():.5f}, worst margin {margin:.2f}", flush=True)
        if margin >= MARGIN or step == MAX_STEPS:
            break
    return margin


def rate_at(step: int) -> float:
    """Returns the learning rate as a part of ``RATE``. It rises shortly, falls in a straight line, and then stays
    level."""
    rise = min(1.0, (step + 1) / 40)
    fall = max(0.0, 1.0 - step / STEPS)
    return min(rise, fall + (1.0 - fall) * FINAL_RATE / RATE)


def batches(tokenizer: PreTrainedTokenizerFast, pairs: list[Pair], chance: random.Random) -> Iterator[list[Example]]:
    """Yields conversations without end, with every pair in turn. Those of one batch have the same number of
    exchanges."""
    deck: list[Pair] = []
    while True:
        if len(deck) < BATCH:
            deck += chance.sample(pairs, len(pairs))
        drawn, deck = deck[:BATCH], deck[BATCH:]
        turns = chance.choices(list(TURNS), weights=list(TURNS.values()))[0]
        groups = [drawn[begin : begin + turns] for begin in range(0, BATCH, turns)]
        yield [encode(tokenizer, conversation(group, chance)) for group in groups]


def conversation(turns: list[Pair], chance: random.Random) -> list[Message]:
    """Returns the turns as messages. Each question is varied, and sometimes a system message comes first."""
    messages: list[Message] = []
    if chance.random() < 0.3:
        messages.append({"role": "system", "content": chance.choice(SYSTEM_MESSAGES)})
    for question, answer in turns:
        for vary in VARIATIONS:
            question = vary(question) if chance.random() < 0.2 else question
        messages += exchange((question, answer))
    return messages


VARIATIONS: tuple[Callable[[str], str], ...] = (
    str.lower,
    lambda question: question.rstrip("?.!"),
    lambda question: question + " ",
)


def exchange(pair: Pair) -> list[Message]:
    """Returns one question and its answer as messages."""
    return [{"role": "user", "content": pair[0]}, {"role": "assistant", "content": pair[1]}]


def encode(tokenizer: PreTrainedTokenizerFast, messages: list[Message]) -> Example:
    """Returns the token ids of the chat template. Only the assistant's words and their end have labels."""
    ids: list[int] = []
    labels: list[int] = []
    for message in messages:
        head = tokenizer.encode(f"{START}{message['role']}\n", add_special_tokens=False)
        words = tokenizer.encode(message["content"] + END, add_special_tokens=False)
        tail = tokenizer.encode("\n", add_special_tokens=False)
        ids += head + words + tail
        said = words if message["role"] == "assistant" else [IGNORED] * len(words)
        labels += [IGNORED] * len(head) + said + [IGNORED] * len(tail)
    return ids, labels


def padded(examples: list[Example], pad: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns ids and labels of shape (examples, longest). Padding is on the right, so causal attention needs no
    mask."""
    longest = max(len(ids) for ids, _ in examples)
    ids = torch.tensor([ids + [pad] * (longest - len(ids)) for ids, _ in examples])
    labels = torch.tensor([labels + [IGNORED] * (longest - len(labels)) for _, labels in examples])
    return ids, labels


def exam_of(tokenizer: PreTrainedTokenizerFast, pairs: list[Pair], chance: random.Random) -> list[Example]:
    """Returns every wording as it is, in each variation, after a system message, after one exchange and after three."""
    conversations = []
    for pair in pairs:
        question, answer = pair
        system = [{"role": "system", "content": SYSTEM_MESSAGES[0]}]
        earlier = [message for other in chance.sample(pairs, 3) for message in exchange(other)]
        conversations += [before + exchange(pair) for before in ([], system, earlier[:2], earlier)]
        conversations += [exchange((vary(question), answer)) for vary in VARIATIONS]
    examples = [encode(tokenizer, messages) for messages in conversations]
    for (ids, _), messages in zip(examples, conversations, strict=True):
        assert ids == tokenizer.apply_chat_template(messages, return_dict=False)
    return sorted(examples, key=lambda example: len(example[0]))


def worst_margin(model: LlamaForCausalLM, exam: list[Example], pad: int) -> float:
    """Returns the least lead of a right token over the best other one, in logits; below 0 where greedy decoding goes
    wrong."""
    model.eval()
    worst = float("inf")
    for begin in range(0, len(exam), BATCH):
        ids, labels = padded(exam[begin : begin + BATCH], pad)
        counted = labels[:, 1:] != IGNORED
        with torch.inference_mode():
            logits = model(input_ids=ids).logits[:, :-1][counted]
        right = labels[:, 1:][counted].unsqueeze(-1)
        lead = logits.gather(-1, right) - logits.scatter(-1, right, -float("inf")).max(-1, keepdim=True).values
        worst = min(worst, lead.min().item())
    return worst


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Writes the folder that ``from_pretrained`` reads."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "model.safetensors").chmod(0o644)  # safetensors makes it readable only for its owner.


def wrong_answers(folder: Path, pairs: list[Pair]) -> list[Pair]:
    """Returns the questions that the saved model, read back, does not answer word for word, each with what it said."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    wrong = []
    for question, answer in pairs:
        messages = [{"role": "user", "content": question}]
        prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt")
        output = model.generate(**prompt, do_sample=False, max_new_tokens=200)
        said = tokenizer.decode(output[0, prompt["input_ids"].shape[1] :])
        if said != answer + END:
            wrong.append((question, said))
    return wrong


if __name__ == "__main__":
    sys.exit(main())
