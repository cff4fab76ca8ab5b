"""How often a stream that is taken up again by its text goes on from other tokens than it had, and whether it shows.

    python -m benchmarks.retokenize [--model serve-app/demo] [--temperature 0,0.7,1.2,1.6] [--tokens 48]

The router keeps the text that it has sent, not its tokens, and tokenizes it anew when a replica is lost. For each
answer to the demo model's questions, and each token after which it may be cut: are the tokens of the text those that
were generated, and if not, is the greedy rest another text? Prints one line of JSON for each temperature.
"""

import argparse
import json
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import serve_app.demo
from serve_app.facts.checkpoint import model_path


def generate(model, ids: list[int], tokens: int, temperature: float) -> list[int]:
    """The tokens that follow, without the end's."""
    sampling = {"do_sample": True, "temperature": temperature, "top_k": 0} if temperature else {"do_sample": False}
    given = torch.tensor([ids])
    out = model.generate(given, attention_mask=torch.ones_like(given), max_new_tokens=tokens, **sampling)
    answer = out[0, len(ids) :].tolist()
    return answer[:-1] if answer and answer[-1] == model.generation_config.eos_token_id else answer


def cuts(tokenizer, answer: list[int]) -> list[tuple[int, str]]:
    """Where a stream may end: the text of so many tokens, unless the last character is not complete."""
    texts = [(count, tokenizer.decode(answer[:count], skip_special_tokens=True)) for count in range(1, len(answer))]
    return [(count, text) for count, text in texts if text and not text.endswith("\ufffd")]


def main() -> None:
    """Prints the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="serve-app/demo")
    parser.add_argument("--temperature", default="0,0.7,1.2,1.6")
    parser.add_argument("--tokens", type=int, default=48)
    options = parser.parse_args()
    torch.manual_seed(0)
    folder = model_path(options.model)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    asked = json.loads((Path(serve_app.demo.__file__).parent / "questions.json").read_text())
    questions = [item["question"] if isinstance(item, dict) else item[0] for item in asked][:40]
    for temperature in map(float, options.temperature.split(",")):
        tried = other_tokens = other_text = unclear = 0
        for question in questions:
            chat = [{"role": "user", "content": question}]
            prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
            answer = generate(model, prompt, options.tokens, temperature)
            before = tokenizer.decode(prompt)
            for count, text in cuts(tokenizer, answer):
                tried += 1
                again = tokenizer.encode(text, add_special_tokens=False)
                if again == answer[:count]:
                    continue
                other_tokens += 1
                if tokenizer.decode(prompt + again) != before + text:
                    unclear += 1  # The router sees that, and ends the stream with an error event.
                    continue
                left = options.tokens - count
                rests = [generate(model, prompt + ids, left, 0) for ids in (answer[:count], again)]
                other_text += tokenizer.decode(rests[0]) != tokenizer.decode(rests[1])
        row = {"temperature": temperature, "cuts": tried, "other_tokens": other_tokens, "not_resumed": unclear}
        print(json.dumps(row | {"other_greedy_rest": other_text}), flush=True)


if __name__ == "__main__":
    main()
