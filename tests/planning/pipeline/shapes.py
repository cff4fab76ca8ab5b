"""Twenty models as vLLM lays them out on a rank, with few layers, so that every split of them can be tried.

The sizes of layers, embeddings and pages are those of the models after which they are named, in bytes.
"""

from dataclasses import replace

from serve_app.facts.engine_facts import BesideLayers, CacheKind, CacheLayer, RankFacts

MIB = 2**20


def full(number: int, page: int, block: int = 16) -> CacheLayer:
    """A layer with keys and values for every token."""
    return CacheLayer(number, "full", block, page)


def of_kind(number: int, kind: CacheKind, page: int, window: int = 0, pages: int = 0, form: int = 1) -> CacheLayer:
    """A layer of another kind."""
    return CacheLayer(number, kind, 16, page, window=window, pages=pages, form=form)


def untied(layers: tuple[int, ...], embedding: int, cache: tuple[CacheLayer, ...], tower: int = 0) -> RankFacts:
    """A model whose head is as large as its embedding. Each stage has the tower."""
    return RankFacts(
        layers, embedding + tower, embedding, 8 * MIB, cache,
        beside=BesideLayers(embedding + tower, tower, embedding + tower),
    )  # fmt: skip


def tied(layers: tuple[int, ...], embedding: int, cache: tuple[CacheLayer, ...]) -> RankFacts:
    """A model whose head is its embedding, which the first and the last stage have."""
    return RankFacts(layers, embedding, 0, 8 * MIB, cache, beside=BesideLayers(embedding, 0, embedding))


def equal(count: int, layer: int, page: int) -> tuple[tuple[int, ...], tuple[CacheLayer, ...]]:
    """Equal layers of full attention."""
    return (layer,) * count, tuple(full(number, page) for number in range(count))


def _qwen25_7b() -> RankFacts:
    layers, cache = equal(7, 466_115_584, 32768)
    return untied(layers, 1_089_994_752, cache)


def _llama_31_70b_awq() -> RankFacts:
    layers, cache = equal(8, 448_000_000, 65536)
    return untied(layers, 2_101_346_304, cache)


def _llama_32_1b() -> RankFacts:
    layers, cache = equal(8, 121_643_008, 32768)
    return tied(layers, 525_336_576, cache)


def _qwen3_30b_a3b() -> RankFacts:
    """Each stage has the embedding and the head."""
    layers, cache = equal(8, 1_246_000_000, 16384)
    both = 2 * 622_329_856
    return replace(untied(layers, both // 2, cache), beside=BesideLayers(both, both, both))


def _deepseek_v2_lite() -> RankFacts:
    layers = (150_000_000, *(1_150_000_000,) * 6)
    return untied(layers, 419_430_400, tuple(of_kind(n, "mla", 18432, form=2) for n in range(7)))


def _gemma_3() -> RankFacts:
    """One layer in six has full attention."""
    cache = tuple(full(n, 65536) if n == 5 else of_kind(n, "sliding", 65536, window=1024) for n in range(8))
    return tied((220_000_000,) * 8, 1_342_177_280, cache)


def _gpt_oss() -> RankFacts:
    cache = tuple(full(n, 32768) if n % 2 else of_kind(n, "sliding", 32768, window=128) for n in range(8))
    return untied((500_000_000,) * 8, 1_158_266_880, cache)


def _llama_4() -> RankFacts:
    cache = tuple(full(n, 65536) if n % 4 == 3 else of_kind(n, "chunked", 65536, window=8192) for n in range(8))
    layers = tuple(2_000_000_000 if n % 2 else 400_000_000 for n in range(8))
    return untied(layers, 2_068_316_160, cache, tower=1_700_000_000)


def _qwen3_next() -> RankFacts:
    """Three of four layers have a state, whose page is as large as the long blocks of the fourth, and without the
    fourth kind vLLM does not pad it."""
    cache = tuple(
        full(n, 2_228_224, block=544) if n % 4 == 3 else of_kind(n, "state", 2_228_224, pages=2) for n in range(8)
    )
    return replace(untied((3_200_000_000,) * 8, 622_329_856, cache), dependent=(0, 1, 2, 4, 5, 6))


def _nemotron_h() -> RankFacts:
    """Some layers have no cache at all."""
    cache = (of_kind(0, "state", 1_048_576, pages=2), full(2, 1_048_576, block=256), full(5, 1_048_576, block=256))
    layers = (300_000_000, 200_000_000, 150_000_000, 200_000_000, 200_000_000, 150_000_000)
    return replace(untied(layers, 1_073_741_824, cache), dependent=(0,))


def _nemotron_nas() -> RankFacts:
    """Layers have different sizes, and pages too."""
    layers = tuple(MIB * size for size in (900, 300, 1500, 700, 100, 1100, 400))
    return untied(layers, 2_101_346_304, tuple(full(n, 16384 * (1 + n % 3)) for n in range(7)))


def _deepseek_v4() -> RankFacts:
    """Pages of several sizes lie side by side in a block."""
    cache = tuple(
        replace(of_kind(n, "mla" if n % 2 else "sliding_mla", 18432 if n % 2 else 9216, window=128), alignment=576)
        for n in range(6)
    )
    return replace(untied((900_000_000,) * 6, 1_000_000_000, cache), packs_blocks=True)


def _two_caches_a_layer() -> RankFacts:
    """Attention and an indexer in each layer."""
    cache = tuple(layer for n in range(6) for layer in (of_kind(n, "mla", 36864, form=2), of_kind(n, "mla", 8448)))
    return untied((800_000_000,) * 6, 1_800_000_000, cache)


def _gpt_2() -> RankFacts:
    """Each stage has the embedding, which is the head too."""
    layers, cache = equal(6, 14_175_744, 24576)
    embedding = 77_216_256 + 1_572_864
    return RankFacts(layers, embedding, 3072, 0, cache, beside=BesideLayers(embedding + 3072, embedding, embedding))


def _bert() -> RankFacts:
    """Nothing is cached."""
    cache = tuple(of_kind(n, "encoder", 49152) for n in range(6))
    return untied((14_000_000,) * 6, 47_000_000, cache)


def _mamba() -> RankFacts:
    return untied((300_000_000,) * 7, 411_000_000, tuple(of_kind(n, "state", 655_360, pages=1) for n in range(7)))


def _unknown_ends() -> RankFacts:
    return replace(_qwen25_7b(), beside=None)


def _padded_pages() -> RankFacts:
    cache = tuple(replace(full(n, 33000), alignment=4096) for n in range(5))
    return untied((120_000_000,) * 5, 600_000_000, cache)


def _few_windows() -> RankFacts:
    cache = tuple(of_kind(n, "sliding", 16384, window=512) if n < 2 else full(n, 16384) for n in range(7))
    return tied((90_000_000,) * 7, 300_000_000, cache)


def _ring() -> RankFacts:
    cache = tuple(of_kind(n, "ring", 16384, pages=3) if n == 3 else full(n, 16384) for n in range(5))
    return untied((90_000_000,) * 5, 300_000_000, cache)


SHAPES = {
    "qwen2.5-7b": _qwen25_7b(),
    "qwen2.5-7b-fp8-cache": replace(_qwen25_7b(), cache=equal(7, 0, 16384)[1]),
    "llama-3.1-70b-awq": _llama_31_70b_awq(),
    "llama-3.2-1b": _llama_32_1b(),
    "qwen3-30b-a3b": _qwen3_30b_a3b(),
    "deepseek-v2-lite": _deepseek_v2_lite(),
    "gemma-3": _gemma_3(),
    "gpt-oss": _gpt_oss(),
    "llama-4": _llama_4(),
    "qwen3-next": _qwen3_next(),
    "nemotron-h": _nemotron_h(),
    "nemotron-nas": _nemotron_nas(),
    "deepseek-v4": _deepseek_v4(),
    "deepseek-v3.2": _two_caches_a_layer(),
    "gpt-2": _gpt_2(),
    "bert": _bert(),
    "mamba": _mamba(),
    "unknown ends": _unknown_ends(),
    "padded pages": _padded_pages(),
    "few windows": _few_windows(),
    "ring": _ring(),
}
