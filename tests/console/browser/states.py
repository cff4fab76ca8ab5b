"""States as the console sends them: the demo's, a large cluster's, and one in which every text is hostile."""

import time
from collections.abc import Mapping
from typing import Any

MIB, GIB = 2**20, 2**30
SLOTS = 120
SHARES = {"weights": 0.55, "kv_cache": 0.28, "adapters": 0.04, "activations": 0.08, "context": 0.05}
CERTAINTIES = {"weights": "exact", "kv_cache": "exact", "adapters": "exact", "activations": "calibrated"}
# What would run or load something if any of it became markup.
HOSTILE = (
    "<img src=x onerror=alert(1)>",
    "</script><script>alert(2)</script>",
    "\"'><svg onload=alert(3)>",
    "javascript:alert(4)",
    "<a href=javascript:alert(5)>press</a>",
    "{{constructor.constructor('alert(6)')()}}",
    "<style>*{display:none}</style>",
    "`${alert(7)}`",
)


def part(name: str, planned: int, held: int | None) -> dict[str, Any]:
    """One part of a block."""
    return {"name": name, "planned": planned, "held": held, "certainty": CERTAINTIES.get(name, "guessed")}


def block(model: str | None, planned: int, filled: float, number: int = 0, **fields: Any) -> dict[str, Any]:
    """What a replica has of one device, of which it holds the share `filled` of its plan."""
    held = int(planned * filled)
    parts = [part(name, int(planned * share), int(held * share)) for name, share in SHARES.items()]
    return {
        "model": model, "replica": f"r{number:04x}", "rank": 0, "state": "RUNNING", "residency": None,
        "planned": planned, "held": held, "peak": int(held * 1.02), "certainty": "calibrated", "parts": parts, **fields,
    }  # fmt: skip


def device(
    index: int | None, name: str, total: int, blocks: list[dict[str, Any]], foreign: int = 0, now: float = 0.0
) -> dict[str, Any]:
    """A GPU, or the memory of a node where there is no index."""
    used = sum(each["held"] or 0 for each in blocks) + foreign
    return {
        "device": "cpu" if index is None else f"GPU-{index:08d}", "index": index, "name": name, "total": total,
        "used": used, "foreign": foreign, "free": total - used, "measured_at": now, "blocks": blocks,
    }  # fmt: skip


def node(number: int, devices: list[dict[str, Any]], **fields: Any) -> dict[str, Any]:
    """A node that is there."""
    return {
        "id": f"{number:056x}", "name": f"n{number}", "address": f"10.0.0.{number}", "is_head": number == 1,
        "alive": True, "note": "", "cpus": 64.0, "devices": devices, **fields,
    }  # fmt: skip


def model(name: str, state: str = "ready", **fields: Any) -> dict[str, Any]:
    """A model with one replica."""
    replica = {
        "replica": f"{name}#1", "node": "10.0.0.1", "pid": 4321, "state": "RUNNING", "load": 0.42, "residency": None,
    }  # fmt: skip
    return {
        "name": name, "parent": "", "state": state, "message": "", "backend": "vllm", "model": f"org/{name}",
        "running": 1, "wanted": 1, "missing": "", "load": 0.42, "waiting": 0, "held": 0, "active": 3,
        "ready_in_s": None, "replicas": [replica], "can": [], **fields,
    }  # fmt: skip


def traffic(names: list[str], now: float) -> dict[str, Any]:
    """Ten minutes of traffic, which rises and falls."""
    series = {}
    for number, name in enumerate(names):
        wave = [abs((slot + 17 * number) % 60 - 30) for slot in range(SLOTS)]
        quiet = number % 9 > 6
        series[name] = {
            "requests": [0 if quiet else 2 * value for value in wave],
            "errors": [value // 29 for value in wave],
            "tokens_per_s": [0.0 if quiet else 31.7 * value for value in wave],
            "ttft_p50_s": [None if quiet or value < 5 else 0.02 + value / 800 for value in wave],
            "ttft_p95_s": [None if quiet or value < 5 else 0.05 + value / 300 for value in wave],
            "waiting": [max(0, value - 25) for value in wave],
            "active": [value // 3 for value in wave],
        }
    return {"interval_s": 5, "slot": int(now // 5), "models": series}


def event(number: int, kind: str, name: str, text: str, now: float) -> dict[str, Any]:
    """One event."""
    return {"id": number, "time": now, "kind": kind, "model": name, "text": text}


def request(number: int, name: str, now: float, outcome: str = "ok", **fields: Any) -> dict[str, Any]:
    """One request."""
    return {
        "id": number, "request_id": f"chatcmpl-{number:032x}", "time": now, "model": name,
        "path": "/v1/chat/completions", "status": 200, "outcome": outcome, "error_code": None, "key": None,
        "streamed": True, "retries": 0, "resumes": 0, "queue_ms": 0.2, "first_ms": 21.4, "total_ms": 312.0,
        "prompt_tokens": 18, "completion_tokens": 64, **fields,
    }  # fmt: skip


def state(nodes: list[Any], models: list[Any], events: list[Any], requests: list[Any], **fields: Any) -> dict[str, Any]:
    """A whole state."""
    now = time.time()
    return {
        "version": "0.7.0", "time": now, "router": "router#1",
        "access": {"keys": False, "key": None, "is_admin": True, "keeps_prompts": False},
        "nodes": nodes, "models": models, "traffic": traffic([each["name"] for each in models], now),
        "events": events, "requests": requests, **fields,
    }  # fmt: skip


def demo() -> dict[str, Any]:
    """Two models on the memory of one node."""
    now = time.time()
    blocks = [block("tiny-pt", 1066 * MIB, 0.6, 1), block("tiny-vllm", 1199 * MIB, 0.97, 2, certainty="guessed")]
    memory = device(None, "memory", 24 * GIB, blocks, foreign=4 * GIB, now=now)
    events = [
        event(1, "started", "tiny-pt", "A replica of tiny-pt has started on 10.0.0.1.", now - 60),
        event(2, "ready", "tiny-pt", "tiny-pt is ready.", now - 41),
        event(3, "resumed", "tiny-vllm", "Another replica continues 2 streams of tiny-vllm.", now - 4),
    ]
    requests = [
        request(1, "tiny-pt", now - 9),
        request(2, "tiny-vllm", now - 7, resumes=1, retries=1),
        request(3, "tiny-vllm", now - 3, "refused", status=429, error_code="rate_limit_exceeded", first_ms=None),
        request(4, "tiny-pt", now - 1, "running", status=None, total_ms=None, completion_tokens=None),
    ]
    return state([node(1, [memory])], [model("tiny-pt", backend="pt"), model("tiny-vllm")], events, requests)


def large(nodes_there: int = 8, gpus_each: int = 8, requests_there: int = 200) -> dict[str, Any]:
    """Eight nodes of eight GPUs with ten models on each. The last node is gone."""
    now = time.time()
    names = [f"model-{number:02d}-instruct" for number in range(10)]
    nodes = []
    for number in range(1, nodes_there + 1):
        gpus = [
            device(
                index,
                "NVIDIA H100",
                80 * GIB,
                [
                    block(name, (2 + (at + index) % 9) * GIB, 0.5 + at / 18, 80 * number + at)
                    for at, name in enumerate(names)
                ],
                foreign=index * GIB // 2,
                now=now,
            )
            for index in range(gpus_each)
        ]
        memory = device(None, "memory", 1024 * GIB, [block(names[0], 90 * GIB, 0.9, number)], foreign=40 * GIB, now=now)
        nodes.append(
            node(
                number,
                [*gpus, memory],
                alive=number < nodes_there,
                note="The node is gone." if number == nodes_there else "",
            )
        )
    return _with_models(nodes, names, requests_there, now)


def _with_models(nodes: list[Any], names: list[str], requests_there: int, now: float) -> dict[str, Any]:
    states = ["ready"] * 7 + ["asleep", "loading", "failed"]
    models = [model(name, how) for name, how in zip(names, states, strict=True)]
    models[7]["can"], models[0]["can"] = ["wake"], ["park"]
    models[9] |= {"message": "The folder /models/x has no file config.json.", "running": 0, "wanted": 2, "replicas": []}
    events = [
        event(at, "scaled", names[at % 10], f"{names[at % 10]} has {at} replicas.", now - 200 + at)
        for at in range(requests_there)
    ]
    requests = [request(at, names[at % 10], now - 200 + at, resumes=int(at % 7 == 0)) for at in range(requests_there)]
    return state(nodes, models, events, requests)


def mixed() -> dict[str, Any]:
    """Two nodes, one of which is gone, with models in every state, and a GPU of which nothing is known."""
    made = large(nodes_there=2, gpus_each=2, requests_there=20)
    unknown = {"total": None, "used": None, "foreign": None, "free": None, "measured_at": None}
    unplanned = {"planned": None, "held": None, "peak": None, "certainty": "", "parts": []}
    silent = device(2, "GPU", GIB, [block("model-00-instruct", GIB, 0.0) | unplanned], now=0.0) | unknown
    made["nodes"][0]["devices"].append(silent)
    return made


def pool() -> dict[str, Any]:
    """Four models of 60 GiB that share one GPU of 80 GiB, of which one is resident, and one of no pool."""
    now = time.time()
    residencies = ["resident", "parked", "draining", "parked"]
    held = [0.9, 0.01, 0.1, 0.0]
    blocks = [
        block(f"member-{at}", 60 * GIB, held[at], at, residency=residency) for at, residency in enumerate(residencies)
    ]
    gpu = device(0, "NVIDIA H100", 80 * GIB, [*blocks, block("alone", 8 * GIB, 0.5, 9)], foreign=GIB, now=now)
    names = [f"member-{at}" for at in range(4)]
    return state([node(1, [gpu])], [model(name) for name in (*names, "alone")], [], [])


def container() -> dict[str, Any]:
    """A GPU inside of a container, where nobody can tell what a process holds, beside memory where that is known."""
    now = time.time()
    made = demo()
    parts = [part(name, int(16 * GIB * share), None) for name, share in SHARES.items()]
    mine = block("llama", 16 * GIB, 0.0, 5, held=None, peak=None, parts=parts)
    gpu = device(0, "NVIDIA L4", 24 * GIB, [mine], now=now)
    made["nodes"][0]["devices"].append(gpu | {"used": 15 * GIB, "foreign": None, "free": 9 * GIB})
    return made


def hostile() -> dict[str, Any]:
    """The demo with markup in every text."""
    now = time.time()
    bad = HOSTILE
    blocks = [
        block(text, (at + 1) * GIB, 1.2, at, replica=text, state=text, residency=text, certainty=text)
        for at, text in enumerate(bad)
    ]
    blocks[0]["parts"][0]["name"] = bad[0]
    devices = [device(0, bad[1], 80 * GIB, blocks, now=now), device(None, bad[2], 90 * GIB, [], now=now)]
    devices[0]["device"] = bad[0]
    nodes = [node(1, devices, address=bad[0], note=bad[1], id=bad[2])]
    models = [
        model(text, text, message=text, missing=text, backend=text, model=text, parent=text, can=["wake", "park", text])
        for text in bad
    ]
    for each in models:
        each["replicas"][0] |= {
            "replica": bad[0], "node": bad[1], "state": bad[2],
            "residency": {"state": bad[3], "pool": bad[4], "ready_in_s": 2.0, "is_guess": True},
        }  # fmt: skip
    events = [event(at, text, text, text, now) for at, text in enumerate(bad)]
    requests = [
        request(at, text, now, text, path=text, error_code=text, key=text, request_id=text, prompt=text)
        for at, text in enumerate(bad)
    ]
    access = {"keys": True, "key": bad[0], "is_admin": True, "keeps_prompts": True}
    return state(nodes, models, events, requests, version=bad[0], router=bad[1], access=access)


def delta(**parts: Any) -> Mapping[str, Any]:
    """What has changed."""
    return {"time": time.time(), **parts}
