"""A real engine with LoRA adapters: each answer is its own adapter's, word for word, whatever else runs."""

import asyncio
import itertools
import os
import random
import shutil
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.adapters import random_adapter
from benchmarks.park_and_wake import build
from serve_app.engines.adapters import unpickled
from serve_app.engines.pt.core.sequence import SamplingParams
from serve_app.engines.pt.engine import PtEngine
from serve_app.engines.pt.load import adapter_places as places
from serve_app.errors import AdapterError
from serve_app.facts.adapter import read_adapter
from serve_app.facts.checkpoint import DEMO_MODEL, model_path, read_checkpoint
from serve_app.planning.adapters import AdapterRoom, buffer_bytes, buffered_modules
from serve_app.replica.replica_plan import plan_replica
from tests.builders import model_config
from tests.demo_answers import ANSWERS
from tests.engines.pt.lora_adapters import merged as merged_model
from tests.lora import ADAPTERS_DIR
from tests.lora.train import QUESTIONS, merged, read_answers

pytestmark = pytest.mark.asyncio

TOKENS = 24
TIE = 1e-4
NAMES = [f"a{number:02}" for number in range(1, 17)]
SAID = read_answers() | {"demo": {question: ANSWERS[question] for question in QUESTIONS}}


@asynccontextmanager
async def serving(names: list[str] = NAMES, **fields: Any) -> AsyncIterator[tuple[PtEngine, httpx.AsyncClient]]:
    """An engine with these adapters, and a client of it."""
    adapters = {name: str(ADAPTERS_DIR / name) for name in names}
    room = {"max_loras": 16, "max_lora_rank": 8}
    config = model_config(
        model=model_path(DEMO_MODEL), device="cpu", dtype="float32", num_cpus=1, adapters=adapters, **(room | fields)
    )
    engine = PtEngine(config, "demo")
    app = await engine.start()
    try:
        for name, folder in adapters.items():
            await engine.load_adapter(name, Path(folder))
        transport = httpx.ASGITransport(app=app)
        async with httpx.AsyncClient(transport=transport, base_url="http://pt", timeout=120) as client:
            yield engine, client
    finally:
        await engine.stop()


async def ask(client: httpx.AsyncClient, model: str, question: str, **fields: Any) -> str:
    """The answer to a question, which all choices have given."""
    body = {
        "model": model,
        "messages": [{"role": "user", "content": question}],
        "temperature": 0,
        "max_tokens": 200,
        **fields,
    }
    answer = await client.post("/v1/chat/completions", json=body)
    assert answer.status_code == 200, answer.text
    assert answer.json()["model"] == model.removeprefix("demo:")
    texts = {choice["message"]["content"] for choice in answer.json()["choices"]}
    assert len(texts) == 1
    return str(texts.pop())


async def assert_all_right(client: httpx.AsyncClient, models: list[str], count: int = 32, **fields: Any) -> None:
    """So many requests at once over these models, each with a question of its own."""
    pairs = list(itertools.islice(zip(itertools.cycle(models), itertools.cycle(QUESTIONS), strict=False), count))
    answers = await asyncio.gather(*(ask(client, model, question, **fields) for model, question in pairs))
    wrong = [
        (model, question, answer)
        for (model, question), answer in zip(pairs, answers, strict=True)
        if answer != SAID[model.removeprefix("demo:")][question]
    ]
    assert not wrong


async def until(condition: Callable[[], object], what: str) -> None:
    """Waits until the condition holds."""
    async with asyncio.timeout(20):
        while not condition():  # noqa: ASYNC110  the engine's thread sets no event
            await asyncio.sleep(0.01)
    assert condition(), what


async def test_thirty_two_at_once_over_sixteen_adapters_and_the_base() -> None:
    """Also with several choices, and with one adapter in nearly all rows. The bytes are the planned ones."""
    async with serving() as (engine, client):
        await assert_all_right(client, [*NAMES, "demo"], 34)
        await assert_all_right(client, ["a11", "demo:a05", "demo"], n=2)
        # One adapter has nearly all rows.
        await assert_all_right(client, ["a16"] * 15 + ["a14"])
        # The buffers take what the plan computes from files alone.
        facts = [read_adapter(ADAPTERS_DIR / name) for name in NAMES]
        planned = buffer_bytes(
            buffered_modules(None, facts, read_checkpoint(model_path(DEMO_MODEL), None).tensors), AdapterRoom(16, 8), 4
        )
        bank = engine.generator.loaded and engine._bank
        assert bank is not None
        assert sum(bank.bytes_by_device.values()) == planned
        # They are told apart from the weights, which are those of the base alone, and are a term of the replica's plan.
        plan = plan_replica(engine._config, [])
        assert plan is not None
        (rank,) = plan.ranks
        (memory,) = await engine.memory()
        assert memory.adapters == planned == rank.adapters.terms[0].bytes
        assert rank.adapters.certainty == "exact"
        plain = PtEngine(model_config(model=model_path(DEMO_MODEL), device="cpu", dtype="float32"), "demo")
        await plain.start()
        assert engine._weights == plain._weights
        await plain.stop()


@pytest.mark.parametrize(
    "fields",
    [
        {"max_loras": 1},
        {"max_loras": 3, "max_num_seqs": 8},
        {"max_loras": 5, "speculative": {"method": "ngram", "num_speculative_tokens": 4}},
        {"max_loras": 4, "kv_cache_dtype": "int8"},
        {"max_loras": 4, "max_memory": {"cpu": "2MB", "disk": "1GB"}},
        {"max_loras": 4, "speculative": {"model": model_path(DEMO_MODEL), "num_speculative_tokens": 3}},
    ],
    ids=lambda fields: "-".join(fields),
)
async def test_more_adapters_than_slots_take_turns(fields: dict[str, Any]) -> None:
    """With speculation, a cache in 8 bits and a part of the model on disk, too."""
    async with serving(**fields) as (_, client):
        await assert_all_right(client, [*NAMES, "demo"], 51)


async def test_kept_texts_are_of_one_adapter_and_one_version() -> None:
    """The same long prompt: what one adapter has computed, no other one takes up, nor one of the same name later."""
    system = {"role": "system", "content": "You are a helpful assistant. " * 12}
    question = QUESTIONS[1]
    messages = [system, {"role": "user", "content": question}]
    body = {"messages": messages, "temperature": 0, "max_tokens": 40, "logprobs": True}

    async def logprobs(client: httpx.AsyncClient, model: str) -> list[float]:
        answer = await client.post("/v1/chat/completions", json=body | {"model": model})
        assert answer.status_code == 200, answer.text
        return [item["logprob"] for item in answer.json()["choices"][0]["logprobs"]["content"]]

    async with serving(["a01", "a02"], prompt_cache_memory="100MB") as (engine, client):
        first = await logprobs(client, "a01")
        base = await logprobs(client, "demo")
        other = await logprobs(client, "a02")
        counts = engine.prompt_cache_counts()
        assert counts is not None
        assert (counts.hits, counts.texts) == (0, 3)
        again = await logprobs(client, "a01")
        assert counts.hits == 1
        assert again == pytest.approx(first, abs=1e-4)
        assert first != pytest.approx(base, abs=1e-2)
        await engine.load_adapter("a01", ADAPTERS_DIR / "a02")
        await until(lambda: counts.texts == 2, "the old version's text is gone")
        assert await logprobs(client, "a01") == pytest.approx(other, abs=1e-4)
        assert counts.hits == 1, "a new version of the adapter computes its prompts itself"
        await engine.unload_adapter("a01")
        await until(lambda: counts.texts == 2, "the text goes with its adapter")


async def test_adapters_come_and_go_while_others_run() -> None:
    """Nothing else notices."""
    async with serving(
        NAMES[:4],
        max_loras=2,
        lora_target_modules=("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
    ) as (engine, client):
        load = asyncio.create_task(assert_all_right(client, [*NAMES[:4], "demo"], 60))
        await asyncio.sleep(0.1)
        await engine.load_adapter("a17", ADAPTERS_DIR / "a17")
        assert await ask(client, "a17", QUESTIONS[0]) == SAID["a17"][QUESTIONS[0]]
        listed = (await client.get("/v1/models")).json()["data"]
        assert {item["id"]: item.get("parent") for item in listed} == {
            "demo": None,
            **dict.fromkeys([*NAMES[:4], "a17"], "demo"),
        }
        await engine.unload_adapter("a17")
        refused = await client.post("/v1/completions", json={"model": "a17", "prompt": "x"})
        assert refused.status_code == 404
        await load
        assert engine.generator.in_flight == 0


async def test_requests_of_an_adapter_that_goes_end_first() -> None:
    """New ones are refused meanwhile."""
    async with serving(["a01", "a02"]) as (engine, client):
        params = SamplingParams(max_tokens=400, temperature=0, ignore_eos=True)
        with engine.generator.reserve(1, "a01") as places:
            pieces = engine.generator.generate([5, 6, 7], params, places=places)
            await anext(pieces)
            gone = asyncio.create_task(engine.unload_adapter("a01"))
            replaced = asyncio.create_task(engine.load_adapter("a02", ADAPTERS_DIR / "a03"))
            await asyncio.wait_for(replaced, 20)  # Nobody uses it.
            refused = await client.post("/v1/completions", json={"model": "a01", "prompt": "x"})
            assert refused.status_code == 404
            assert not gone.done()
            rest = [piece async for piece in pieces]
            assert rest[-1].finish_reason == "length"
        await asyncio.wait_for(gone, 20)
        assert await ask(client, "a02", QUESTIONS[0]) == SAID["a03"][QUESTIONS[0]]
        await until(lambda: all(held is None or held.name != "a01" for held in engine._bank._held), "its slot is free")  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("path", "fields"),
    [
        ("/v1/embeddings", {"input": ["x", "y"]}),
        ("/v1/completions", {"prompt": "x", "max_tokens": 4}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "x"}], "max_tokens": 4}),
    ],
)
async def test_an_adapter_that_goes_while_a_request_is_prepared_answers_it(path: str, fields: dict[str, Any]) -> None:
    """The request has taken its places with the adapter, whose name the answer has."""
    async with serving(["a01"]) as (engine, client):
        generator, removals = engine.generator, []
        reserve = generator.reserve

        def removing(count: int, model: str | None = None) -> Any:
            places = reserve(count, model)
            removals.append(asyncio.create_task(engine.unload_adapter("a01")))
            return places

        generator.reserve = removing  # type: ignore[method-assign]
        first = asyncio.create_task(client.post(path, json={"model": "demo:a01", **fields}))
        answer = await asyncio.wait_for(first, 20)
        assert answer.status_code == 200, answer.text
        assert answer.json()["model"] == "a01"
        await asyncio.wait_for(removals[0], 20)
        generator.reserve = reserve  # type: ignore[method-assign]
        assert (await client.post(path, json={"model": "a01", **fields})).status_code == 404


async def test_a_client_that_leaves_holds_no_adapter() -> None:
    """Its adapter can go at once."""
    async with serving(["a01"]) as (engine, client):
        body = {"model": "a01", "prompt": "x", "max_tokens": 1500, "ignore_eos": True}
        asked = asyncio.create_task(client.post("/v1/completions", json=body))
        await until(lambda: engine.generator.in_flight, "it runs")
        asked.cancel()
        await asyncio.wait_for(engine.unload_adapter("a01"), 20)


async def test_a_broken_adapter_harms_nobody(tmp_path: Path) -> None:
    """The one of its name that was there stays."""
    async with serving(["a01"]) as (engine, client):
        with pytest.raises(AdapterError, match="adapter_config.json"):
            await engine.load_adapter("a01", tmp_path)
        with pytest.raises(AdapterError, match="k_proj.*lora_target_modules"):
            await engine.load_adapter("a14", ADAPTERS_DIR / "a14")
        await assert_all_right(client, ["a01", "demo"], 4)


async def test_an_adapter_that_is_pickled_has_buffers_beside_others(tmp_path: Path) -> None:
    """For the modules of its config, of which no other adapter changes some."""
    shutil.copyfile(ADAPTERS_DIR / "a14" / "adapter_config.json", tmp_path / "adapter_config.json")
    torch.save(load_file(ADAPTERS_DIR / "a14" / "adapter_model.safetensors"), tmp_path / "adapter_model.bin")
    adapters = {"a01": str(ADAPTERS_DIR / "a01"), "old": str(tmp_path)}
    config = model_config(
        model=model_path(DEMO_MODEL), device="cpu", dtype="float32", num_cpus=1, max_loras=2, max_lora_rank=8,
        adapters=adapters, allow_pickled_adapters=("old",),
    )  # fmt: skip
    engine = PtEngine(config, "demo")
    app = await engine.start()
    converted = tmp_path / "converted"
    converted.mkdir()
    unpickled(read_adapter(tmp_path, pickled=True), converted)
    await engine.load_adapter("old", converted)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url="http://pt", timeout=60) as client:
        assert await ask(client, "old", QUESTIONS[0]) == SAID["a14"][QUESTIONS[0]]
    assert engine._bank is not None
    plan = plan_replica(config, [])
    assert plan is not None
    assert sum(engine._bank.bytes_by_device.values()) == plan.ranks[0].adapters.terms[0].bytes
    await engine.stop()


async def test_the_host_keeps_as_many_as_it_may(tmp_path: Path) -> None:
    """Others are read again, from copies of the files that they had when they were loaded."""
    async with serving(NAMES[:6], max_loras=2, max_cpu_loras=3) as (engine, client):
        entries = engine.generator._adapters._entries

        def kept() -> list[str]:
            return [name for name, entry in entries.items() if entry.adapter.factors is not None]

        assert kept() == NAMES[3:6]
        await assert_all_right(client, [*NAMES[:6], "demo"], 28)
        await ask(client, "a01", QUESTIONS[0])
        await ask(client, "a02", QUESTIONS[0])
        assert len(kept()) <= 3
        shutil.copytree(ADAPTERS_DIR / "a07", tmp_path / "own")
        await engine.load_adapter("own", tmp_path / "own")
        assert await ask(client, "own", QUESTIONS[0]) == SAID["a07"][QUESTIONS[0]]
        for name in NAMES[:6]:
            await ask(client, name, QUESTIONS[0])
        assert "own" not in kept()
        shutil.copytree(ADAPTERS_DIR / "a08", tmp_path / "own", dirs_exist_ok=True)
        assert await ask(client, "own", QUESTIONS[0]) == SAID["a07"][QUESTIONS[0]]
        await engine.load_adapter("own", tmp_path / "own")
        assert await ask(client, "own", QUESTIONS[0]) == SAID["a08"][QUESTIONS[0]]
        copies = engine._copies.folder
        await until(lambda: len(list(copies.glob("*/"))) == 7, "the files of the old version are gone")
        with pytest.raises(AdapterError, match=str(tmp_path / "broken")):  # Its own folder, and not that of the copy.
            await engine.load_adapter("own", broken_copy(tmp_path))
        await engine.unload_adapter("own")
        assert len(list(copies.glob("*/"))) == 6
    assert not copies.exists()


def in_float32(name: str, folder: Path) -> Path:
    """An adapter in the type of the model, of which nothing needs to be converted."""
    folder.mkdir()
    shutil.copyfile(ADAPTERS_DIR / name / "adapter_config.json", folder / "adapter_config.json")
    tensors = load_file(ADAPTERS_DIR / name / "adapter_model.safetensors")
    save_file({key: tensor.float() for key, tensor in tensors.items()}, folder / "adapter_model.safetensors")
    return folder


async def test_a_file_that_is_written_over_changes_no_adapter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither while it is read nor later, also where the file has the model's own type."""
    own, other = in_float32("a07", tmp_path / "own"), in_float32("a08", tmp_path / "other")
    weights = own / "adapter_model.safetensors"
    newer, whole = (other / weights.name).read_bytes(), weights.stat().st_size

    def cut_meanwhile(file: Path) -> dict[str, torch.Tensor]:
        tensors = load_file(file)
        os.truncate(weights, 0)  # A mapped file that is cut ends the process at the next read, so it is whole again.
        os.truncate(weights, whole)
        return tensors

    monkeypatch.setattr(places, "load_file", cut_meanwhile)
    async with serving([]) as (engine, client):
        await engine.load_adapter("own", own)
        assert await ask(client, "own", QUESTIONS[0]) == SAID["a07"][QUESTIONS[0]]
        assert not list(engine._copies.folder.glob("*/")), "the copy is not needed any more"
    monkeypatch.undo()
    weights.write_bytes(newer)
    adapter = places.load_adapter("own", read_adapter(own), places_of(own), 8, torch.float32)
    assert adapter.factors is not None
    before = {name: (factors.a.clone(), factors.b.clone()) for name, factors in adapter.factors.items()}
    with weights.open("r+b") as file:
        file.write(bytes(len(newer)))
    for name, factors in adapter.factors.items():
        assert torch.equal(factors.a, before[name][0])
        assert torch.equal(factors.b, before[name][1])


def places_of(folder: Path) -> places.AdapterPlaces:
    """The modules of an adapter."""
    modules = read_adapter(folder).modules
    device = torch.device("cpu")
    return places.AdapterPlaces({name: (each.inputs, each.outputs, device) for name, each in modules.items()})


def broken_copy(folder: Path) -> Path:
    """An adapter whose weights are half a file."""
    broken = folder / "broken"
    shutil.copytree(ADAPTERS_DIR / "a07", broken)
    weights = broken / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    return broken


async def test_a_sequence_that_was_cancelled_keeps_its_adapter_until_the_thread_drops_it() -> None:
    """Its step may still run, so its factors stay in the host's memory whatever else comes."""
    async with serving(["a01"], max_loras=1, max_cpu_loras=1) as (engine, _):
        goes_on, is_held = threading.Event(), threading.Event()
        goes_on.set()
        decode = engine._runner.decode  # type: ignore[union-attr]

        def held(*arguments: Any) -> Any:
            if not goes_on.is_set():
                is_held.set()
            goes_on.wait(20)
            return decode(*arguments)

        engine._runner.decode = held  # type: ignore[union-attr, method-assign]
        entry = engine.generator._adapters._entries["a01"]
        params = SamplingParams(max_tokens=400, temperature=0, ignore_eos=True)
        with engine.generator.reserve(1, "a01") as places:
            pieces = engine.generator.generate([5, 6, 7], params, places=places)
            await anext(pieces)
            goes_on.clear()
            assert await asyncio.to_thread(is_held.wait, 20)
            await pieces.aclose()
        await engine.load_adapter("a02", ADAPTERS_DIR / "a02")
        assert entry.adapter.factors is not None
        gone = asyncio.create_task(engine.unload_adapter("a01"))
        await asyncio.sleep(0.1)
        assert not gone.done()
        goes_on.set()
        await asyncio.wait_for(gone, 20)
        assert entry.users == 0


async def test_a_new_version_does_not_wait_for_requests_of_the_old_one() -> None:
    """They end with the old one, whose removal waits for them, also when newer ones come and go meanwhile."""
    async with serving(["a01"]) as (engine, client):
        params = SamplingParams(max_tokens=400, temperature=0, ignore_eos=True)
        with engine.generator.reserve(1, "a01") as places:
            pieces = engine.generator.generate([5, 6, 7], params, places=places)
            await anext(pieces)
            gone = asyncio.create_task(engine.unload_adapter("a01"))
            await asyncio.sleep(0)
            for name in ("a02", "a03"):
                await asyncio.wait_for(engine.load_adapter("a01", ADAPTERS_DIR / name), 20)
                assert await ask(client, "a01", QUESTIONS[0]) == SAID[name][QUESTIONS[0]]
            await asyncio.wait_for(engine.unload_adapter("a01"), 20)
            assert not gone.done()
            rest = [piece async for piece in pieces]
            assert rest[-1].finish_reason == "length"
        await asyncio.wait_for(gone, 20)
        assert not engine.generator._retiring


async def test_a_parked_engine_keeps_its_adapters() -> None:
    """Some come and go while it is parked."""
    async with serving(NAMES[:3], max_loras=2) as (engine, client):
        await assert_all_right(client, NAMES[:3], 6)
        running = [asyncio.create_task(assert_all_right(client, [*NAMES[:3], "demo"], 12))]
        await until(lambda: engine.generator.in_flight, "some run")
        await engine.park()
        await engine.load_adapter("a04", ADAPTERS_DIR / "a04")
        await engine.unload_adapter("a04")
        await engine.load_adapter("a06", ADAPTERS_DIR / "a06")
        running.append(asyncio.create_task(assert_all_right(client, ["a06"], 2)))
        await engine.wake()
        await asyncio.gather(*running)


async def test_vectors_are_the_adapter_s() -> None:
    """They are those of the merged model."""
    text = "What is serve-app?"
    tokenizer = AutoTokenizer.from_pretrained(model_path(DEMO_MODEL))
    ids = torch.tensor([tokenizer(text).input_ids])
    async with serving(["a11", "a14"]) as (_, client):
        for name in ("a11", "a14"):
            body = {"model": name, "input": [text, text]}
            answer = (await client.post("/v1/embeddings", json=body)).json()
            assert answer["model"] == name
            with torch.inference_mode():
                states = merged(ADAPTERS_DIR / name).model(input_ids=ids).last_hidden_state[0].mean(0)
            wanted = torch.nn.functional.normalize(states, dim=0)
            for item in answer["data"]:
                assert torch.allclose(torch.tensor(item["embedding"]), wanted, atol=1e-4)


@pytest.mark.slow
@pytest.mark.timeout(300)
async def test_a_model_of_100_million_parameters_answers_as_merged_models_do(tmp_path: Path) -> None:
    """Through the real generator, sixteen at once over three random adapters of all linear modules and the base.

    The tokens are those of peft's merged model, greedy and alone. Where one differs, the merged model's logits of the
    two tokens are a tie: they differ by less than TIE of their spread, which rounding may decide either way. The texts
    differ then from that token on, so the rest is not compared.
    """
    path = build("100M", tmp_path / "model")
    base = AutoModelForCausalLM.from_pretrained(path)
    shapes = {
        name: (module.in_features, module.out_features)
        for name, module in base.named_modules()
        if isinstance(module, torch.nn.Linear) and ".layers." in name
    }
    folders = {f"r{seed}": random_adapter(tmp_path / f"r{seed}", shapes, seed) for seed in range(3)}
    adapters = {name: str(folder) for name, folder in folders.items()}
    config = model_config(
        model=path, device="cpu", dtype="float32", num_cpus=2, adapters=adapters, max_loras=2, max_lora_rank=8
    )
    engine = PtEngine(config, "demo")
    await engine.start()
    for name, folder in folders.items():
        await engine.load_adapter(name, folder)
    draw = random.Random(3)
    asked = [(model, [draw.randrange(8000) for _ in range(draw.randint(5, 40))]) for model in [*folders, None] * 4]

    async def tokens_of(model: str | None, prompt: list[int]) -> list[int]:
        params = SamplingParams(max_tokens=TOKENS, temperature=0, ignore_eos=True, logprobs=0)
        with engine.generator.reserve(1, model) as places:
            pieces = [piece async for piece in engine.generator.generate(prompt, params, places=places)]
        return [item.token_id for piece in pieces for item in piece.logprobs]

    found = await asyncio.gather(*(tokens_of(*item) for item in asked))
    await engine.stop()
    texts, same = dict[str | None, set[tuple[int, ...]]](), 0
    for name in [*folders, None]:
        model = base if name is None else merged_model(base, folders[name])
        for (asked_model, prompt), tokens in zip(asked, found, strict=True):
            if asked_model != name:
                continue
            with torch.inference_mode():
                logits = model(input_ids=torch.tensor([[*prompt, *tokens[:-1]]])).logits[0, len(prompt) - 1 :]
            best = logits.argmax(-1).tolist()
            first = next((place for place in range(TOKENS) if best[place] != tokens[place]), None)
            same += first is None
            if first is not None:
                gap = float(logits[first, best[first]] - logits[first, tokens[first]])
                assert gap < TIE * float(logits[first].max() - logits[first].min())
            texts.setdefault(name, set()).add(tuple(tokens))
    assert same >= len(asked) - 2
    assert len(texts) == 4
    with torch.inference_mode():  # The adapters do change what comes.
        prompt = asked[0][1]
        logits = [
            model(input_ids=torch.tensor([prompt])).logits[0, -1] for model in (base, merged_model(base, folders["r0"]))
        ]
    assert int(logits[0].argmax()) != int(logits[1].argmax()) or float((logits[0] - logits[1]).abs().max()) > 0.05
