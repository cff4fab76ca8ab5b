"""Makes broken checkpoints from real ones by a seed: config.json, safetensors headers and index files.

A case has one broken file, and `fields` are the names of what was changed in it. They are empty if its bytes were
changed, so that it may not be JSON any more.
"""

import json
import os
import struct
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

from serve_app.demo import MODEL_DIR

CONFIGS = Path(__file__).parents[1] / "planning" / "configs"
CONFIG, SINGLE, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
BASES = (MODEL_DIR, *sorted(file.parent for file in CONFIGS.glob("*/config.json")))
# This text stands for the value that is written in its place, which `json.dumps` cannot write.
RAW = "@raw@"
RAW_VALUES = (
    "1" * 5000,
    "-" + "9" * 400,
    "1e999",
    "NaN",
    "-Infinity",
    "[" * 3000 + "]" * 3000,
    "[" * 200_000,
    '{"a":' * 50_000,
)
VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 2, 3, 7, 1.5, -0.0, 1024, 4096, 10**6, 10**9, 2**53, 2**63, 2**64, 10**18, 10**60),
    *("", "4096", "-1", "\ud800", "\x1b[2J", "null", "x" * 100_000, "full_attention", "llama", "gpt2", "deepseek_v3"),
    *([], [1], ["a"], [None], [[]], ["full_attention"] * 3, [0] * 100_000, {}, {"a": 1}, {"factor": "x"}),
    *({"factor": -1}, {"factor": 1e300}, {"rope_type": 5}, {"full_attention": {"factor": []}}, {"quant_method": 4}),
    {"\ud800": {"factor": ""}},
)  # fmt: skip
# These fields are added where a config lacks them, since an absent field cannot be broken.
ADDED = (
    *("rope_scaling", "rope_parameters", "quantization_config", "text_config", "layer_types", "sliding_window"),
    *("head_dim", "architectures", "num_key_value_heads", "model_type", "kv_lora_rank", "qk_rope_head_dim"),
    *("moe_intermediate_size", "full_attention_interval", "sliding_window_pattern", "max_window_layers"),
    *("partial_rotary_factor", "dtype"),
    *("num_experts", "tie_word_embeddings", "vision_config", "linear_num_key_heads", "n_routed_experts"),
)  # fmt: skip
SHAPE_FIELDS = ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size", "max_position_embeddings")


@dataclass
class Case:
    """This is a broken checkpoint: the name of the broken file, and the names of what was changed."""

    seed: int
    base: str
    file: str
    fields: set[str] = field(default_factory=set)
    what: list[str] = field(default_factory=list)


def make_case(seed: int, folder: Path) -> Case:
    """Writes the checkpoint of a seed into an empty folder. The same seed makes the same files."""
    random = Random(seed)
    base = random.choice(BASES)
    config = json.loads((base / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(config))
    breaks = random.choices([_break_config, _break_header, _break_index], [6, 3, 3])[0]
    case = Case(seed, base.name, {_break_config: CONFIG, _break_header: SINGLE, _break_index: INDEX}[breaks])
    breaks(random, folder, case)
    return case


def _header() -> dict[str, Any]:
    with (MODEL_DIR / SINGLE).open("rb") as stream:
        (length,) = struct.unpack("<Q", stream.read(8))
        header: dict[str, Any] = json.loads(stream.read(length))
        return header


def _write(file: Path, header: bytes, data: int, length: int | None = None) -> None:
    """Writes a safetensors file whose data is a hole of so many bytes."""
    with file.open("wb") as stream:
        stream.write(struct.pack("<Q", len(header) if length is None else length) + header)
        stream.truncate(8 + len(header) + data)


def _data(header: dict[str, Any]) -> int:
    return max((entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"), default=0)


def _break_config(random: Random, folder: Path, case: Case) -> None:
    header = _header()
    _write(folder / SINGLE, json.dumps(header).encode(), _data(header))
    config = json.loads((folder / CONFIG).read_text())
    if random.random() < 0.15:
        (folder / CONFIG).write_bytes(_broken_bytes(random, json.dumps(config).encode(), case))
        return
    raw: list[str] = []
    for _ in range(random.choice((1, 1, 1, 2, 3))):
        _change(random, config, case, raw)
    (folder / CONFIG).write_bytes(_encoded(config, raw))


def _change(random: Random, config: dict[str, Any], case: Case, raw: list[str]) -> None:
    """Changes one field of an object, or one of an object inside it."""
    inner = [name for name, value in config.items() if isinstance(value, dict) and value]
    if inner and random.random() < 0.3:
        name = random.choice(inner)
        case.fields.add(name)
        return _change(random, config[name], case, raw)
    shape = [name for name in SHAPE_FIELDS if name in config]
    pool = random.choice([list(config), list(ADDED), shape or list(config)])
    name = random.choice(pool)
    case.fields.add(name)
    found = config.get(name)
    way = random.randrange(6)
    case.what.append(f"{name} by way {way}")
    if way == 0:
        config.pop(name, None)
        if random.random() < 0.5:
            config[name] = None
    elif way == 1 and isinstance(found, (int, float)):
        config[name] = random.choice(
            (-found, found + 1, found * 1000, str(found), [found], float(found) + 0.5, found * 10**15)
        )
    elif way == 2 and isinstance(found, list) and found:
        config[name] = deepcopy(
            random.choice((found[:-1], found * 2, [*found[:-1], random.choice(VALUES)], found[0], [found]))
        )
    elif way == 3:
        raw.append(random.choice(RAW_VALUES))
        config[name] = f"{RAW}{len(raw) - 1}"
    else:
        config[name] = deepcopy(random.choice(VALUES))
    return None


def _encoded(value: Any, raw: list[str]) -> bytes:
    text = json.dumps(value)
    for number, item in enumerate(raw):
        text = text.replace(f'"{RAW}{number}"', item)
    return text.encode()


def _broken_bytes(random: Random, content: bytes, case: Case) -> bytes:
    """Returns other bytes than `content`, which may be JSON or not."""
    place = random.randrange(len(content))
    ways: list[Callable[[], bytes]] = [
        lambda: content[:place],
        lambda: content[:place] + bytes([random.randrange(256)]) + content[place + 1 :],
        lambda: content[:place] + random.randbytes(8) + content[place:],
        lambda: b"\xef\xbb\xbf" + content,
        lambda: random.randbytes(200),
        lambda: b"",
        lambda: random.choice((b"[]", b"null", b"3", b'"text"', b"{}")),
        lambda: content.decode().encode("utf-16"),
        lambda: b"[" * 500_000,
        lambda: content[:-1] + b"," + content[1:],  # Every key is there twice, with equal values.
    ]
    way = random.randrange(len(ways))
    case.what.append(f"bytes by way {way}")
    return ways[way]()


def _break_header(random: Random, folder: Path, case: Case) -> None:
    header = _header()
    size, raw = _data(header), list[str]()
    content = json.dumps(header).encode()
    way = random.randrange(8)
    case.what.append(f"header by way {way}")
    if way == 0:
        lengths = (0, 1, 7, 10**10, 2**63, 2**64 - 1, len(content) - 1, len(content) + 1, 100_000_001)
        _write(folder / SINGLE, content, size, random.choice(lengths))
    elif way == 1:
        _write(folder / SINGLE, _broken_bytes(random, content, case), size)
    elif way == 2:
        (folder / SINGLE).write_bytes(random.choice((b"", b"\x00" * 7, random.randbytes(500), content)))
    elif way == 3:
        _write(folder / SINGLE, content, random.choice((0, size // 2, size - 1, size + 1, 2 * size)))
    elif way == 4:
        _special(random, folder / SINGLE, case)
    else:
        _change_tensor(random, header, case, raw)
        _write(folder / SINGLE, _encoded(header, raw), size)


def _change_tensor(random: Random, header: dict[str, Any], case: Case, raw: list[str]) -> None:
    name = random.choice(list(header))
    case.fields.add(name)
    entry = header[name]
    if name == "__metadata__" or random.random() < 0.2:
        header[name] = deepcopy(random.choice(VALUES))
        return
    part = random.choice(("dtype", "shape", "data_offsets"))
    way = random.randrange(5)
    case.what.append(f"{part} by way {way}")
    if way == 0:
        del entry[part]
    elif way == 1 and part != "dtype":
        place = random.randrange(len(entry[part]))
        entry[part][place] = random.choice((*VALUES[:20], "1", [1], -entry[part][place], entry[part][place] + 8))
    elif way == 2:
        raw.append(random.choice(RAW_VALUES))
        entry[part] = f"{RAW}{len(raw) - 1}"
    elif way == 3:
        header[f"{name}.copy"] = dict(entry)
    else:
        entry[part] = deepcopy(random.choice((*VALUES, "F32", "F128", [2**53] * 64, [1] * 65, [0, 0], [5, 4])))


def _special(random: Random, file: Path, case: Case) -> None:
    """Puts something that is no regular file in the place of a file."""
    way = random.randrange(5)
    case.what.append(f"special file by way {way}")
    if way == 0:
        file.mkdir()
    elif way == 1:
        os.mkfifo(file)
    elif way == 2:
        file.symlink_to("/dev/zero")
    elif way == 3:
        file.symlink_to(file)
    else:
        file.symlink_to("nowhere")


def _break_index(random: Random, folder: Path, case: Case) -> None:
    header = {name: entry for name, entry in _header().items() if name != "__metadata__"}
    names = sorted(header)
    halves = (names[: len(names) // 2], names[len(names) // 2 :])
    way = random.randrange(7)
    case.what.append(f"index by way {way}")
    for number, (shard, half) in enumerate(zip(SHARDS, halves, strict=True)):
        if way == 0 and number:
            half = [*half, halves[0][0]]  # Both shards have this tensor.
            case.fields.add(halves[0][0])
        _write(folder / shard, *_part(header, half))
    index: dict[str, Any] = {
        "metadata": {"total_size": _data(header)},
        "weight_map": {name: shard for shard, half in zip(SHARDS, halves, strict=True) for name in half},
    }
    raw: list[str] = []
    if way == 1:
        (folder / INDEX).write_bytes(_broken_bytes(random, json.dumps(index).encode(), case))
        return
    if way == 2:
        _special(random, folder / INDEX, case)
        return
    if way == 3:
        (folder / SHARDS[1]).unlink()
        _special(random, folder / SHARDS[1], case)
    elif way == 4:
        _change(random, index, case, raw)
    elif way > 4:
        name = random.choice(names)
        case.fields.add(name)
        index["weight_map"][name] = random.choice(
            (
                "../../etc/passwd",
                "/etc/passwd",
                "..",
                ".",
                "a/../../b",
                "a\x00b",
                "missing.safetensors",
                CONFIG,
                *VALUES,
            )
        )
    (folder / INDEX).write_bytes(_encoded(index, raw))


def _part(header: dict[str, Any], names: list[str]) -> tuple[bytes, int]:
    """Returns a header of some of the tensors, and the bytes of their data."""
    part, end = {}, 0
    for name in names:
        begin, after = header[name]["data_offsets"]
        part[name] = {**header[name], "data_offsets": [end, end + after - begin]}
        end += after - begin
    return json.dumps(part).encode(), end
