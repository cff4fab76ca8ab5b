"""Makes inputs of texts and pairs of texts, cut and refused as vLLM 0.32 does.

It takes time, so it must not run on the event loop. A tokenizer keeps how it cuts between two calls, so each serves one
thread at a time: one is for small requests, and a copy is for large ones, which then hold up only each other.
"""

import copy
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from operator import itemgetter
from typing import Any, Literal, TypeVar

import numpy as np
from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from serve_app.engines.pt.api.prompts import TEMPLATE_METHOD_ARGUMENTS, characters
from serve_app.engines.pt.pooling.excerpt import Side, excerpt
from serve_app.engines.pt.pooling.inputs import Ids, Input
from serve_app.engines.pt.pooling.loader import LoadedPooler
from serve_app.engines.pt.pooling.pair_encoder import PairEncoder
from serve_app.engines.pt.pooling.protocol import PooledBody
from serve_app.engines.workers import SMALL_BYTES
from serve_app.errors import ContextTooLong, InvalidRequest

# All inputs of a request have at most this many tokens together, or one of full length.
MOST_TOKENS = 2**18
# A text that is to be cut may have this many times the characters that the model can take.
MOST_OVER = 16
# A text of which all token ids are asked for may have this many characters.
MOST_CHARACTERS = 2**20
# So many texts are tokenised before their tokens are counted, or fewer with more characters than these.
AT_ONCE, CHARACTERS_AT_ONCE = 64, 2**18


Item = TypeVar("Item")


@dataclass(frozen=True)
class Cut:
    """Says how inputs are cut: to `tokens`, which may be -1 for the model's length or None for not at all, on one side
    or on the tokenizer's own."""

    tokens: int | None = None
    side: Literal["left", "right"] | None = None
    add_special_tokens: bool = True

    @classmethod
    def of(cls, asked: PooledBody, add_special_tokens: bool = True) -> "Cut":
        """Returns what a request asks for."""
        return cls(asked.truncate_prompt_tokens, asked.truncation_side, add_special_tokens)


class InputMaker:
    """Makes inputs for one model."""

    def __init__(self, loaded: LoadedPooler):
        self.max_model_len = loaded.max_model_len
        self._loaded = loaded
        self._lanes = [_Lane(tokenizer) for tokenizer in (loaded.tokenizer, _copied(loaded.tokenizer))]
        longest = max(map(len, loaded.tokenizer.get_vocab()), default=1)
        self._most_characters = self.max_model_len * longest
        self._most_tokens = max(MOST_TOKENS, self.max_model_len)

    def of_texts(
        self, items: Sequence[str | list[int]], cut: Cut, owner: object, size: int, name: str, prompt: str = ""
    ) -> list[Input]:
        """Returns an input for each text or list of token ids. `prompt` comes before each text, `name` is the field of
        the request, and `size` is the request's bytes. Raises InvalidRequest and ContextTooLong."""
        self._check_cut(cut)
        made: list[Input] = []
        total = 0
        with self._lane(size) as lane:
            tokenizer = lane.tokenizer
            skipped = self._prompt_tokens(tokenizer, prompt) if prompt and self._loaded.pooling.skips_prompt else 0
            for part in _parts(items, len):
                texts = [self._excerpt(tokenizer, prompt + item, cut, name) for item in part if isinstance(item, str)]
                encoded = iter(self._encode(tokenizer, texts, cut, name)["input_ids"] if texts else [])
                for item in part:
                    ids = self._checked(next(encoded) if isinstance(item, str) else item, cut, tokenizer, name)
                    total = self._counted(total, ids, name)
                    made.append(Input(_ids(ids), owner, skipped=min(skipped, len(ids) - 1)))
        return made

    def of_pairs(
        self,
        pairs: Sequence[tuple[str, str]],
        cut: Cut,
        owner: object,
        size: int,
        limits: tuple[int, int] = (0, 0),
        variables: Mapping[str, Any] | None = None,
    ) -> list[Input]:
        """Returns an input for each pair. `limits` are the most tokens of the first text and of the second one, where
        0 means no limit of its own, and `variables` are those of the template for pairs, if the model has one. Raises
        InvalidRequest and ContextTooLong."""
        self._check_cut(cut)
        self._check_limits(limits)
        variables = {} if variables is None or self._loaded.template is None else variables
        self._check_variables(variables, cut)
        length = self._length_of_pairs(variables)
        made: list[Input] = []
        total = 0
        with self._lane(size) as lane:
            tokenizer = lane.tokenizer
            read = [_once(partial(self._read, tokenizer, cut, most)) for most in limits]
            for part in _parts(pairs, length):
                texts = [(read[0](first), read[1](second)) for first, second in part]
                found = self._encode_pairs(lane, texts, cut, variables)
                for number, ids in enumerate(found["input_ids"]):
                    types = found["token_type_ids"][number] if "token_type_ids" in found else None
                    ids = self._checked(ids, cut, tokenizer, "documents")
                    total = self._counted(total, ids, "documents")
                    kept = None if types is None else _ids(_sliced(types, self._kept(cut), _side(cut, tokenizer)))
                    made.append(Input(_ids(ids), owner, kept))
        return made

    def shortened(self, texts: Sequence[str], most: int, size: int) -> list[str]:
        """Returns the texts with at most `most` tokens each, where 0 means no limit."""
        if not most:
            return list(texts)
        with self._lane(size) as lane:
            return [self._shortened(lane.tokenizer, text, most) for text in texts]

    def check_limits(self, limits: tuple[int, int]) -> None:
        """Raises InvalidRequest for limits of a text that are no limits, because the model takes no more."""
        self._check_limits(limits)

    def text_of(self, ids: list[int], size: int) -> str:
        """Returns the text of token ids."""
        self._check_ids(ids, "tokens")
        with self._lane(size) as lane:
            return str(lane.tokenizer.decode(ids))

    def ids_of(self, text: str, add_special_tokens: bool, size: int) -> list[int]:
        """Returns the token ids of a text, which may be longer than the model can take. Raises ContextTooLong for one
        that takes much memory to tokenise."""
        if len(text) > MOST_CHARACTERS:
            raise ContextTooLong(
                f"'prompt' has {len(text)} characters, but at most {MOST_CHARACTERS} are tokenised at one time. Send "
                "several requests.",
                param="prompt",
            )
        with self._lane(size) as lane:
            found: list[int] = lane.tokenizer(
                text, add_special_tokens=add_special_tokens, truncation=False, verbose=False
            )["input_ids"]
        return found

    @contextmanager
    def _lane(self, size: int) -> Iterator["_Lane"]:
        lane = self._lanes[size > SMALL_BYTES]
        with lane.lock:
            yield lane

    def _read(self, tokenizer: PreTrainedTokenizerBase, cut: Cut, most: int, text: str) -> str:
        """Returns what is read of one text of a pair, which may have `most` tokens of its own."""
        return self._excerpt(tokenizer, self._shortened(tokenizer, text, most), cut, "documents")

    def _excerpt(self, tokenizer: PreTrainedTokenizerBase, text: str, cut: Cut, name: str) -> str:
        """Returns the part of a text that has all tokens that stay, or so many that the input is refused."""
        self._check_characters([text], self._over(cut), name)
        if self._loaded.pooling.lowers_case:
            text = text.lower()
        side: Side = "left" if cut.tokens is not None and _side(cut, tokenizer) == "left" else "right"
        return excerpt(text, self._most(cut), side, partial(_spans, tokenizer)) if tokenizer.is_fast else text

    def _encode_pairs(
        self, lane: "_Lane", pairs: Sequence[tuple[str, str]], cut: Cut, variables: Mapping[str, Any]
    ) -> Mapping[str, Any]:
        name = "documents"
        if self._loaded.template is not None:
            rendered = (self._by_template(lane.tokenizer, first, second, variables) for first, second in pairs)
            return self._encode(
                lane.tokenizer, [self._excerpt(lane.tokenizer, text, cut, name) for text in rendered], cut, name
            )
        if not self._loaded.pairs_are_separate:  # As vLLM does for decoders whose config says so (use_sep_token).
            return self._encode(lane.tokenizer, [first + second for first, second in pairs], cut, name)
        most = None if self._cuts_here(cut) else self._most(cut)
        found: dict[str, list[Any]] = {}
        for first, of_first in groupby(pairs, key=itemgetter(0)):
            seconds = [second for _, second in of_first]
            with self._uncuttable(cut, name):
                encoded = lane.pairs.encode(first, seconds, most, cut.add_special_tokens)
            for field, values in encoded.items():
                found.setdefault(field, []).extend(values)
        return found

    def _length_of_pairs(self, variables: Mapping[str, Any]) -> Callable[[tuple[str, str]], int]:
        """Returns what gives the characters that are tokenised for a pair. Where a pair is one text, these include the
        first text and the template's variables, and otherwise the first text is tokenised once for many pairs."""
        shared = characters(variables)
        if self._loaded.template is None and self._loaded.pairs_are_separate:
            return lambda pair: len(pair[1])
        return lambda pair: shared + len(pair[0]) + len(pair[1])

    def _check_variables(self, variables: Mapping[str, Any], cut: Cut) -> None:
        """Refuses variables that make each pair too long, before they are rendered into all of them."""
        name = "instruction" if "instruction" in variables else "chat_template_kwargs"
        self._check_count(characters(variables), self._over(cut), name)

    def _by_template(
        self, tokenizer: PreTrainedTokenizerBase, first: str, second: str, variables: Mapping[str, Any]
    ) -> str:
        if reserved := sorted(TEMPLATE_METHOD_ARGUMENTS & variables.keys()):
            raise InvalidRequest(
                f"'chat_template_kwargs.{reserved[0]}' is not a variable of the template.", param="chat_template_kwargs"
            )
        messages = [{"role": "query", "content": first}, {"role": "document", "content": second}]
        try:
            text: str = tokenizer.apply_chat_template(messages, tokenize=False, **variables)
        except (TemplateError, ValueError, TypeError, RecursionError) as error:
            raise InvalidRequest(f"The chat template refuses this pair: {error}", param="documents") from error
        return text

    def _encode(self, tokenizer: PreTrainedTokenizerBase, texts: list[str], cut: Cut, name: str) -> Mapping[str, Any]:
        if self._loaded.pooling.lowers_case:
            texts = [text.lower() for text in texts]
        cuts = {"truncation": True, "max_length": self._most(cut)}
        how = {"truncation": False} if self._cuts_here(cut) else cuts
        with self._uncuttable(cut, name):
            found: Mapping[str, Any] = tokenizer(
                texts, add_special_tokens=cut.add_special_tokens, return_attention_mask=False, verbose=False, **how
            )
        return found

    @contextmanager
    def _uncuttable(self, cut: Cut, name: str) -> Iterator[None]:
        """Raises InvalidRequest if the tokenizer cannot cut as it is asked to."""
        try:
            yield
        except Exception as error:  # The tokenizer's own errors have no class of their own.
            if cut.tokens is None:
                raise
            raise InvalidRequest(
                f"The tokenizer cannot cut '{name}' to {self._most(cut)} tokens: {error}. Raise "
                "truncate_prompt_tokens.",
                param="truncate_prompt_tokens",
            ) from None

    def _cuts_here(self, cut: Cut) -> bool:
        """Returns whether an input is cut after it was tokenised, as vLLM does for a side that the request names."""
        return cut.tokens is not None and cut.side is not None

    def _most(self, cut: Cut) -> int:
        """Returns how many tokens of an input are looked at. Without a cut, one more than the model takes is enough to
        refuse it."""
        return self.max_model_len + 1 if cut.tokens is None else self._kept(cut)

    def _over(self, cut: Cut) -> int:
        """Returns how many times the characters that the model can take a text may have."""
        return 1 if cut.tokens is None else MOST_OVER

    def _kept(self, cut: Cut) -> int:
        """Returns how many tokens of an input stay."""
        return self.max_model_len if cut.tokens is None or cut.tokens < 0 else cut.tokens

    def _check_cut(self, cut: Cut) -> None:
        if cut.tokens is not None and cut.tokens > self.max_model_len:
            raise InvalidRequest(
                f"truncate_prompt_tokens={cut.tokens} cannot be greater than max_model_len = {self.max_model_len}. "
                "Please request a smaller truncation size.",
                param="truncate_prompt_tokens",
            )

    def _check_limits(self, limits: tuple[int, int]) -> None:
        for name, most in zip(("max_tokens_per_query", "max_tokens_per_doc"), limits, strict=True):
            if most >= self.max_model_len:
                raise InvalidRequest(
                    f"{name} ({most}) must be less than max_model_len ({self.max_model_len}).", param=name
                )

    def _check_characters(self, texts: Sequence[str], over: int, name: str) -> None:
        """Refuses a text that cannot fit before it is tokenised, which takes a second per megabyte."""
        self._check_count(max(map(len, texts), default=0), over, name)

    def _check_count(self, longest: int, over: int, name: str) -> None:
        most = over * self._most_characters
        if longest > most:
            raise ContextTooLong(
                f"This model's maximum context length is {self.max_model_len} tokens. However, your prompt contains "
                f"{longest} characters (more than {most} characters, which is the upper bound). Please reduce the "
                "length of the input prompt.",
                param=name,
            )

    def _checked(self, ids: list[int], cut: Cut, tokenizer: PreTrainedTokenizerBase, name: str) -> list[int]:
        """Returns the ids that stay. Raises ContextTooLong for more than the model takes, in vLLM's words."""
        if cut.tokens is not None:
            ids = _sliced(ids, self._kept(cut), _side(cut, tokenizer))
        if len(ids) > self.max_model_len:
            least = "at least " if len(ids) == self.max_model_len + 1 else ""
            raise ContextTooLong(
                f"This model's maximum context length is {self.max_model_len} tokens. However, your prompt contains "
                f"{least}{len(ids)} input tokens, which exceeds this limit even without any output tokens. Please "
                "reduce the length of the input prompt.",
                param=name,
            )
        if not ids:
            raise InvalidRequest(f"'{name}' is empty.", param=name)
        self._check_ids(ids, name)
        return ids

    def _check_ids(self, ids: list[int], name: str) -> None:
        vocabulary = self._loaded.vocabulary
        if ids and not (min(ids) >= 0 and max(ids) < vocabulary):
            wrong = next(token for token in ids if not 0 <= token < vocabulary)
            raise InvalidRequest(f"'{name}': token id {wrong} is outside the vocabulary of {vocabulary}.", param=name)

    def _counted(self, total: int, ids: list[int], name: str) -> int:
        total += len(ids)
        if total > self._most_tokens:
            raise ContextTooLong(
                f"'{name}' has more than {self._most_tokens} tokens together, which is the most of one request. Send "
                "several requests.",
                param=name,
            )
        return total

    def _shortened(self, tokenizer: PreTrainedTokenizerBase, text: str, most: int) -> str:
        """Returns the longest beginning of a text that has at most `most` tokens, as vLLM finds it."""
        if most:
            self._check_characters([text], MOST_OVER, "documents")
            text = excerpt(text, most, "right", partial(_spans, tokenizer))
        while text and most:
            offsets = _spans(tokenizer, text)
            if len(offsets) <= most:
                break
            end = min(offsets[most - 1][1], offsets[most][0])
            text = text[: min(end, len(text) - 1)]
        return text

    def _prompt_tokens(self, tokenizer: PreTrainedTokenizerBase, prompt: str) -> int:
        """Returns how many tokens come of a prompt before the text, as sentence-transformers counts them."""
        ids = tokenizer(prompt, truncation=False)["input_ids"]
        return len(ids) - (1 if ids and ids[-1] in tokenizer.all_special_ids else 0)


class _Lane:
    """Has a tokenizer, which the thread that has the lock may use."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self.lock = threading.Lock()
        self.tokenizer = tokenizer
        self.pairs = PairEncoder(tokenizer)


def _parts(items: Sequence[Item], length: Callable[[Item], int]) -> Iterator[Sequence[Item]]:
    """Yields the items in parts that are tokenised at one time. `length` gives an item's characters."""
    begin = characters = 0
    for number, item in enumerate(items):
        if number > begin and (number - begin == AT_ONCE or characters + length(item) > CHARACTERS_AT_ONCE):
            yield items[begin:number]
            begin, characters = number, 0
        characters += length(item)
    yield items[begin:]


def _once(read: Callable[[str], str]) -> Callable[[str], str]:
    """Returns `read` for texts of which many that follow each other are the same one."""
    last: list[tuple[str, str]] = []

    def reading(text: str) -> str:
        if not last or last[0][0] is not text:
            last[:] = [(text, read(text))]
        return last[0][1]

    return reading


def _spans(tokenizer: PreTrainedTokenizerBase, text: str) -> Sequence[tuple[int, int]]:
    found: Sequence[tuple[int, int]] = tokenizer(
        text, add_special_tokens=False, truncation=False, return_offsets_mapping=True, verbose=False
    )["offset_mapping"]
    return found


def _ids(ids: Sequence[int]) -> Ids:
    return np.array(ids, dtype=np.int32)


def _side(cut: Cut, tokenizer: PreTrainedTokenizerBase) -> str:
    return cut.side or str(tokenizer.truncation_side)


def _sliced(ids: list[int], most: int, side: str) -> list[int]:
    if len(ids) <= most:
        return ids
    return ids[-most:] if side == "left" else ids[:most]


def _copied(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    copied: PreTrainedTokenizerBase = copy.deepcopy(tokenizer)
    return copied
