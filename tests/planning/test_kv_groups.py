"""The rules by which vLLM puts layers into groups, each by figures that can be checked by hand."""

import pytest

from serve_app.facts.engine_facts import CacheLayer, RankFacts
from serve_app.planning.kv_groups import cache_groups, kv_bytes_per_request, spare_bytes

PAGE = 1024
BATCHED = 100


def layers(kind: str, count: int, first: int = 0, page_bytes: int = PAGE, **fields: int) -> list[CacheLayer]:
    """Layers of one kind."""
    forms = ("full", "mla", "sliding", "sliding_mla", "chunked", "state", "ring", "cross", "encoder")
    given = {"block_tokens": 16, "form": forms.index(kind), **fields}
    return [CacheLayer(first + number, kind, page_bytes=page_bytes, **given) for number in range(count)]  # type: ignore[arg-type]


def rank(*cache: CacheLayer, packs_blocks: bool = False) -> RankFacts:
    """A rank with these caches."""
    return RankFacts((), 0, 0, 0, cache, packs_blocks=packs_blocks)


def sizes(*cache: CacheLayer, packs_blocks: bool = False) -> list[int]:
    """How many layers each group has."""
    return sorted(map(len, cache_groups(cache, packs_blocks)))


def test_equal_layers_share_one_group() -> None:
    """A request of 33 tokens has three blocks of 16 in each."""
    facts = rank(*layers("full", 4))
    assert kv_bytes_per_request(facts, 33, BATCHED) == 3 * 4 * PAGE
    assert spare_bytes(facts) == 4 * PAGE


def test_growing_layers_of_two_sizes_share_one_group() -> None:
    """MLA with an indexer: both have a block for the same tokens."""
    facts = rank(*layers("mla", 2), *layers("mla", 2, 2, page_bytes=256, form=9))
    assert len(cache_groups(facts.cache, False)) == 1
    assert kv_bytes_per_request(facts, 16, BATCHED) == 2 * PAGE + 2 * 256


def test_windows_hold_the_tokens_on_their_way() -> None:
    """A window of 32 tokens and two steps of 100 tokens are 231 tokens, and the first block may be cut: 16 blocks."""
    facts = rank(*layers("sliding", 1, window=32))
    assert kv_bytes_per_request(facts, 10_000, BATCHED) == 16 * PAGE
    assert kv_bytes_per_request(facts, 20, BATCHED) == 3 * PAGE


def test_chunks_hold_the_tokens_on_their_way() -> None:
    """A chunk of 32 tokens and 200 on their way are 15 blocks."""
    assert kv_bytes_per_request(rank(*layers("chunked", 1, window=32)), 10_000, BATCHED) == 15 * PAGE


def test_a_cross_cache_holds_what_an_encoder_makes() -> None:
    """At most the tokens of a step, 7 blocks, whatever the length of the answer."""
    facts = rank(*layers("full", 2), *layers("cross", 2, 2))
    assert kv_bytes_per_request(facts, 16, BATCHED) == (1 + 7) * 2 * PAGE


def test_an_encoder_has_no_cache() -> None:
    """Neither for a request nor in the pool."""
    assert kv_bytes_per_request(rank(*layers("encoder", 3)), 1000, BATCHED) == 0
    assert spare_bytes(rank()) == 0


@pytest.mark.parametrize(
    ("full", "sliding", "expected"),
    [(2, 10, [2] * 6), (12, 13, [12, 13]), (8, 9, [8, 9]), (5, 29, [4, 5, 5, 5, 5, 5, 5])],
)
def test_hybrids_have_groups_of_one_size(full: int, sliding: int, expected: list[int]) -> None:
    """The fewer layers make the size, unless there are nearly as many of the others."""
    cache = [*layers("full", full), *layers("sliding", sliding, full, window=32)]
    assert sizes(*cache) == expected
    widest = max(expected)
    blocks = 625 * -(-full // widest) + 16 * -(-sliding // widest)
    assert kv_bytes_per_request(rank(*cache), 10_000, BATCHED) == blocks * widest * PAGE


def test_smaller_pages_get_longer_blocks() -> None:
    """A page of a quarter holds four times the tokens in one of full size."""
    cache = [*layers("full", 2), *layers("sliding", 2, 2, page_bytes=PAGE // 4, window=32)]
    assert kv_bytes_per_request(rank(*cache), 640, BATCHED) == (640 // 16 + -(-231 // 64) + 1) * 2 * PAGE


def test_states_and_odd_pages_are_padded() -> None:
    """A state has its pages at any length, and a page that divides nothing is as large as the largest."""
    cache = [*layers("full", 2), *layers("state", 2, 2, page_bytes=700, pages=2)]
    assert kv_bytes_per_request(rank(*cache), 160, BATCHED) == (10 + 2) * 2 * PAGE
    odd = [*layers("full", 1), *layers("sliding", 1, 1, page_bytes=700, window=32)]
    assert kv_bytes_per_request(rank(*odd), 160, BATCHED) == (10 + 11) * PAGE


def test_windows_beside_mla_are_kept_in_full() -> None:
    """MLA's pages cannot be padded, so the windows get a block for every token."""
    cache = [*layers("mla", 2, page_bytes=700), *layers("sliding", 2, 2, window=32)]
    assert kv_bytes_per_request(rank(*cache), 160, BATCHED) == 10 * 2 * (700 + PAGE)


def test_caches_that_fit_into_no_pool_are_refused() -> None:
    """As vLLM refuses them, by name of the layer."""
    cache = [*layers("mla", 1, page_bytes=700), *layers("chunked", 1, 1, window=32)]
    with pytest.raises(ValueError, match="layer 0: its pages of 700 bytes"):
        kv_bytes_per_request(rank(*cache), 160, BATCHED)


def test_packed_blocks_hold_pages_of_several_sizes() -> None:
    """Two patterns of a large and a small page, and four windows, which are split so that the block stays as wide."""
    cache = [
        *layers("mla", 2), *layers("mla", 2, 2, page_bytes=256, form=9),
        *layers("sliding_mla", 4, 4, window=32),
    ]  # fmt: skip
    assert sizes(*cache, packs_blocks=True) == [2, 2, 4]
    assert kv_bytes_per_request(rank(*cache, packs_blocks=True), 160, BATCHED) == (10 + 11 + 11) * (2 * PAGE + 2 * 256)


def test_pages_begin_at_their_alignment() -> None:
    """A page of 1024 bytes takes 1500 where it must begin at a multiple of 500."""
    assert spare_bytes(rank(*layers("full", 2, alignment=500))) == 2 * 1500
