"""pt's embeddings beside transformers in sorted batches, and beside sentence-transformers where that is installed.

    python -m benchmarks.embeddings [--texts 512] [--rounds 3] [--batch 32] [--threads 2]

The model has MiniLM's shape (6 layers of 384 channels) with random weights, and texts have 4 to 250 words. pt answers
one request of all texts through its HTTP application, tokenising and JSON included. The others get the same texts
sorted by their length, as sentence-transformers sorts them, in batches of 32. The ways run in turns, and each has its
best round. Prints one line of JSON with texts in a second, and the ratio of pt to each other way.
"""

import argparse
import asyncio
import json
import os
import random
import tempfile
import time
from collections.abc import Awaitable, Callable
from importlib.util import find_spec
from pathlib import Path

import httpx
import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoModel, AutoTokenizer, BertConfig, BertModel, PreTrainedTokenizerFast

from serve_app.config import ModelConfig
from serve_app.engines.engine import create_engine

WORDS = [f"word{number}" for number in range(30_000)]
Way = Callable[[list[str]], Awaitable[np.ndarray]]


def write_model(folder: Path) -> None:
    """Writes a model of MiniLM's shape with mean pooling, as sentence-transformers does."""
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS]
    backend = Tokenizer(models.WordLevel({token: number for number, token in enumerate(tokens)}, unk_token="[UNK]"))  # noqa: S106
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    ends = [("[CLS]", 2), ("[SEP]", 3)]
    backend.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=ends)
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    PreTrainedTokenizerFast(tokenizer_object=backend, model_max_length=512, **names).save_pretrained(folder)
    shape = {"hidden_size": 384, "intermediate_size": 1536, "num_hidden_layers": 6, "num_attention_heads": 12}
    torch.manual_seed(0)
    BertModel(BertConfig(vocab_size=len(tokens), pad_token_id=0, **shape)).save_pretrained(folder)
    kinds = {"Transformer": "", "Pooling": "1_Pooling", "Normalize": "2_Normalize"}
    modules = [
        {"idx": number, "name": str(number), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for number, (kind, path) in enumerate(kinds.items())
    ]
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "1_Pooling").mkdir()
    pooling = {"word_embedding_dimension": 384, "pooling_mode_mean_tokens": True, "pooling_mode_cls_token": False}
    (folder / "1_Pooling/config.json").write_text(json.dumps(pooling))


def mixed_texts(count: int) -> list[str]:
    """Texts of 4 to 250 words, most of them short, as those of an index are."""
    draw = random.Random(0)
    return [" ".join(draw.choices(WORDS, k=int(4 * (250 / 4) ** draw.random()))) for _ in range(count)]


def by_transformers(folder: Path, batch: int) -> Way:
    """Mean pooling over sorted batches by transformers itself."""
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder).eval()

    async def embed(texts: list[str]) -> np.ndarray:
        order = sorted(range(len(texts)), key=lambda index: -len(texts[index]))
        found = np.empty((len(texts), 384), np.float32)
        with torch.inference_mode():
            for begin in range(0, len(order), batch):
                part = order[begin : begin + batch]
                encoded = tokenizer([texts[index] for index in part], padding=True, return_tensors="pt")
                mask = encoded["attention_mask"][..., None]
                states = model(**encoded).last_hidden_state
                means = (states * mask).sum(1) / mask.sum(1)
                found[part] = torch.nn.functional.normalize(means, dim=-1).numpy()
        return found

    return embed


def by_sentence_transformers(folder: Path, batch: int) -> Way:
    """`SentenceTransformer.encode`."""
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(folder), device="cpu")

    async def embed(texts: list[str]) -> np.ndarray:
        return np.asarray(model.encode(texts, batch_size=batch, show_progress_bar=False))

    return embed


def by_pt(client: httpx.AsyncClient) -> Way:
    """One request to pt."""

    async def embed(texts: list[str]) -> np.ndarray:
        answer = await client.post("/v1/embeddings", json={"input": texts})
        answer.raise_for_status()
        return np.array([item["embedding"] for item in answer.json()["data"]], np.float32)

    return embed


async def compare(folder: Path, options: argparse.Namespace) -> dict[str, float]:
    """Texts in a second of each way, the best of all rounds."""
    config = ModelConfig.from_args({
        "model": str(folder), "infer_backend": "pt", "device": "cpu", "num_cpus": options.threads, "dtype": "float32",
    })  # fmt: skip
    engine = create_engine(config, "minilm")
    transport = httpx.ASGITransport(app=await engine.start())
    texts, best = mixed_texts(options.texts), dict[str, float]()
    async with httpx.AsyncClient(transport=transport, base_url="http://pt", timeout=600) as client:
        ways = {"pt": by_pt(client), "transformers": by_transformers(folder, options.batch)}
        if find_spec("sentence_transformers"):
            ways["sentence-transformers"] = by_sentence_transformers(folder, options.batch)
        expected = await ways["transformers"](texts[:8])
        for name, embed in ways.items():
            assert (expected * await embed(texts[:8])).sum(-1).min() > 0.9999, name
        for _ in range(options.rounds):
            for name, embed in ways.items():
                start = time.perf_counter()
                await embed(texts)
                best[name] = max(best.get(name, 0.0), len(texts) / (time.perf_counter() - start))
    await engine.stop()
    return best


def main() -> None:
    """Prints one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("texts", 512), ("rounds", 3), ("batch", 32), ("threads", os.cpu_count() or 1)):
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as folder:
        write_model(Path(folder))
        found = asyncio.run(compare(Path(folder), options))
    ratios = {f"pt / {name}": round(found["pt"] / rate, 2) for name, rate in found.items() if name != "pt"}
    print(json.dumps({"texts_per_second": {name: round(rate, 1) for name, rate in found.items()}} | ratios))


if __name__ == "__main__":
    main()
