"""Decodes and checks the header of a safetensors file, which others wrote.

A safetensors file begins with eight bytes (the header's length, little-endian) and a JSON header with the type, the
shape and the place of each tensor. https://github.com/huggingface/safetensors#format

The laws are safetensors' own: each tensor has a known type, its bytes are the product of its shape and the size of its
type, and the tensors fill the data of the file without a gap and without an overlap.
"""

import json
import struct
from collections import Counter
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Annotated, Any

import msgspec

from serve_app.errors import ConfigError
from serve_app.facts.field_kind import FieldKind, check_fields, list_of, one_of, shown, whole
from serve_app.facts.foreign_file import MOST_DIAGNOSED_BYTES, decode_json, opened

# These are the bytes of safetensors' types.
SIZES = {
    "C64": 8, "F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2, "I16": 2, "U16": 2,
    "F8_E4M3": 1, "F8_E4M3FNUZ": 1, "F8_E5M2": 1, "F8_E5M2FNUZ": 1, "F8_E8M0": 1, "I8": 1, "U8": 1, "BOOL": 1,
}  # fmt: skip
# A header has at most 100 MB, which is safetensors' own limit.
MOST_HEADER_BYTES = 100_000_000
# DeepSeek-V3 has some 92,000 tensors in 163 files. Models with more experts have some 200,000.
MOST_TENSORS = 400_000
# Longer metadata is not looked at. Nothing here depends on it.
MOST_METADATA_BYTES = 2**20
MOST_DIMENSIONS = 64
MOST_SIZE = 2**53
MOST_NAME = 1000
METADATA = "__metadata__"

_Size = Annotated[int, msgspec.Meta(ge=0, le=MOST_SIZE)]


class Entry(msgspec.Struct, frozen=True):
    """This is what a header says of one tensor. `data_offsets` are the first byte and the byte after the last one,
    counted from the end of the header."""

    dtype: str
    shape: Annotated[tuple[_Size, ...], msgspec.Meta(max_length=MOST_DIMENSIONS)]
    data_offsets: tuple[_Size, _Size]

    @property
    def bytes(self) -> int:
        """Returns the bytes that the shape and the type ask for."""
        return prod(self.shape) * SIZES[self.dtype]


_KINDS: Mapping[str, FieldKind] = {
    "dtype": one_of(SIZES),
    "shape": list_of(whole(0, MOST_SIZE), MOST_DIMENSIONS),
    "data_offsets": list_of(whole(0, MOST_SIZE), 2),
}
_decode_header = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode
_decode_entry = msgspec.json.Decoder(Entry).decode
_decode_metadata = msgspec.json.Decoder(dict[str, str] | None).decode


def read_header(file: Path, most: int = MOST_TENSORS) -> dict[str, Entry]:
    """Returns the tensors of a safetensors file of at most `most` tensors, by their names. Raises FileMissing or
    ConfigError, which name the file and what is wrong in it."""
    with opened(file) as stream:
        size = stream.seek(0, 2)
        stream.seek(0)
        first = stream.read(8)
        if len(first) < 8:
            raise _broken(file, f"it has {size} bytes, and the length of its header alone takes 8.")
        (length,) = struct.unpack("<Q", first)
        if length > MOST_HEADER_BYTES:
            raise _broken(file, f"its header would have {length} bytes; at most {MOST_HEADER_BYTES} are allowed.")
        content = stream.read(length)
    if len(content) < length:
        raise _broken(file, f"its header has {length} bytes, and the file ends after {size}. Download it again.")
    entries = _entries(content, str(file), most)
    _check_places(entries, content, size - 8 - length, file)
    return entries


def _broken(file: Path, reason: str) -> ConfigError:
    return ConfigError(f"model: {file} is not a safetensors file: {reason}")


def _entries(content: bytes, file: str, most: int) -> dict[str, Entry]:
    try:
        found = _decode_header(content)
    except RecursionError:
        raise _broken(Path(file), "the lists and objects of its header are nested too deep.") from None
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        problem = _header_problem(content, file)
        raise (
            ConfigError(problem) if problem else _broken(Path(file), f"its header is not a JSON object: {error}.")
        ) from None
    metadata = found.pop(METADATA, None)
    if metadata is not None and len(bytes(metadata)) <= MOST_METADATA_BYTES:
        try:
            _decode_metadata(metadata)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            raise _broken(Path(file), f"{METADATA} must be an object of texts in UTF-8: {error}.") from None
    if len(found) > most:
        raise _broken(Path(file), f"its header has {len(found)} tensors; at most {most} are read.")
    return {name: _entry(name, raw, file) for name, raw in found.items()}


def _entry(name: str, raw: msgspec.Raw, file: str) -> Entry:
    try:
        entry = _decode_entry(raw)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        where = _where(name, file)
        raise ConfigError(_raw_problem(raw, where) or f"{where}: {error}.") from None
    return checked_entry(name, entry, file)


def checked_entry(name: str, entry: Entry, file: str) -> Entry:
    """Returns the entry if its type is known and its bytes are those of its shape. Raises ConfigError that names the
    file, the tensor and the field."""
    if not 0 < len(name) <= MOST_NAME:
        raise ConfigError(f"{_where(name, file)}: its name has {len(name)} characters; 1 to {MOST_NAME} are allowed.")
    if entry.dtype not in SIZES:
        needed = _KINDS["dtype"].problem(entry.dtype)
        raise ConfigError(f"{_where(name, file)}: dtype is {shown(entry.dtype)}; {needed}.")
    begin, end = entry.data_offsets
    if end - begin != entry.bytes:
        needed = str(entry.bytes) if entry.bytes < MOST_SIZE else "more than any file has"
        raise ConfigError(
            f"{_where(name, file)}: data_offsets {[begin, end]} have {end - begin} bytes, and shape "
            f"{shown(entry.shape)} of {entry.dtype} takes {needed}."
        )
    return entry


def _where(name: str, file: str) -> str:
    return f"model: {file} is not a safetensors file: tensor {_quoted(name)}"


def _header_problem(content: bytes, file: str) -> str:
    """Returns which tensor makes a header unreadable, such as one with NaN, which is JSON for Python alone. It is empty
    if it is none in particular, or if the header is too long for a second reading."""
    try:
        found = decode_json(content) if len(content) <= MOST_DIAGNOSED_BYTES else None
    except (ValueError, RecursionError):
        return ""
    if not isinstance(found, dict):
        return ""
    if METADATA in found and not _is_metadata(found[METADATA]):
        return str(_broken(Path(file), f"{METADATA} must be an object of texts in UTF-8."))
    problems = (_entry_problem(entry, _where(name, file)) for name, entry in found.items() if name != METADATA)
    return next(filter(None, problems), "")


def _is_metadata(value: Any) -> bool:
    try:
        return isinstance(msgspec.convert(value, dict[str, str]), dict) and bool(msgspec.json.encode(value))
    except (msgspec.ValidationError, UnicodeEncodeError):
        return False


def _entry_problem(entry: Any, where: str) -> str:
    """Returns which field of a tensor is wrong, or an empty text if none is."""
    if not isinstance(entry, dict):
        return f"{where} is {shown(entry)}; an object is needed."
    try:
        check_fields(entry, _KINDS, where)
    except ConfigError as error:
        return str(error)
    if missing := [name for name in _KINDS if entry.get(name) is None]:
        return f"{where}: {missing[0]} is missing."
    return (
        ""
        if len(entry["data_offsets"]) == 2
        else f"{where}: data_offsets is {shown(entry['data_offsets'])}; two numbers are needed."
    )


def _raw_problem(raw: msgspec.Raw, where: str) -> str:
    try:
        return _entry_problem(decode_json(bytes(raw)), where) if len(bytes(raw)) <= MOST_DIAGNOSED_BYTES else ""
    except (ValueError, RecursionError):
        return ""


def _check_places(entries: Mapping[str, Entry], content: bytes, size: int, file: Path) -> None:
    """Raises ConfigError unless the tensors fill `size` bytes of data without a gap and without an overlap."""
    end = 0
    for begin, after in sorted([entry.data_offsets for entry in entries.values()]):
        if begin != end:
            raise _broken(file, _gap(end, begin, content) if begin > end else _overlap(begin, after, entries))
        end = after
    if end != size:
        advice = " Download it again." if end > size else ""
        raise _broken(file, f"data_offsets end at {end}, and the file has {size} bytes of data.{advice}")


def _gap(end: int, begin: int, content: bytes) -> str:
    twice = _twice(content)
    because = f", and tensor {_quoted(twice)} is listed twice" if twice else ""
    return f"no tensor has the bytes {end} to {begin} of its data in its data_offsets{because}."


def _overlap(begin: int, after: int, entries: Mapping[str, Entry]) -> str:
    both = [
        name
        for name, entry in entries.items()
        if entry.data_offsets[0] < max(after, begin + 1) and entry.data_offsets[1] > begin
    ]
    return f"data_offsets of the tensors {' and '.join(map(_quoted, both[:2]))} overlap."


def _quoted(name: str) -> str:
    return json.dumps(name[:MOST_NAME])


def _twice(content: bytes) -> str:
    """Returns a name that a decoded header has twice, or an empty text. msgspec keeps the last of them silently."""
    try:
        pairs = json.loads(content, object_pairs_hook=list, parse_int=str)
    except (ValueError, RecursionError):
        return ""
    counts = Counter(name for name, _ in pairs)
    return next((name for name, count in counts.items() if count > 1), "")
