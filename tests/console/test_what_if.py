"""Plans for what a visitor sends, made by the real process that plans."""

import asyncio
import json
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from serve_app.console import what_if as what_if_module
from serve_app.console.what_if import MOST_BODY_BYTES, PlanJob, WhatIf, asked_for, run_planner
from serve_app.errors import DeadlineExceeded, InvalidRequest, ModelUnavailable, Overloaded, RequestTooLarge
from serve_app.facts.inventory import Device, Inventory
from serve_app.status.beside import Holding, Running, RunningModel
from tests.facts.test_yaml_bounds import LAUGHS

pytestmark = pytest.mark.slow
GIB = 2**30
MEMORY = Device("n1", None, "memory", 16 * GIB, 8 * GIB)
CARD = Device("n1", 0, "NVIDIA L4", 23 * GIB, 22 * GIB, by_index=True)
MODEL = {"model": "serve-app/demo"}
FILE = """# my models
applications:
- name: tiny
  import_path: serve_app.app:model
  args: {model: serve-app/demo, infer_backend: pt, device: cpu, max_model_len: 512}  # small
"""


def planner(*running: RunningModel, device: Device = MEMORY) -> WhatIf:
    """One for a cluster that has this device and runs these."""
    return WhatIf(lambda: (Inventory((device,)), Running(running)))


async def plan(body: Any, *running: RunningModel, device: Device = MEMORY) -> dict[str, Any]:
    """The answer."""
    told: dict[str, Any] = json.loads(await planner(*running, device=device).answer(json.dumps(body).encode()))
    return told


def holding(name: str, gib: float) -> RunningModel:
    """A model that runs and holds so much memory."""
    return RunningModel(name, [Holding("n1:cpu", int(gib * GIB), int(gib * GIB))])


async def test_a_file_comes_back_with_what_was_chosen() -> None:
    """Its comments stay, and the plan is that of the terminal, as a text and as data."""
    told = await plan({"yaml": FILE})
    assert (told["fits"], told["fixes"]) == (True, [])
    assert told.keys() == {"fits", "text", "plan", "fixes", "yaml", "notes"}
    assert told["text"].endswith("Everything fits.")
    assert "\x1b" not in told["text"]
    assert told["plan"]["models"][0]["max_model_len"] == 512
    assert "# my models" in told["yaml"]
    assert "kv_cache_memory_bytes:" in told["yaml"]


async def test_a_model_comes_back_as_an_application_that_ends_nothing() -> None:
    """With the fields that were sent, on the CPU where there is no GPU. Without the file that is served, it is no file
    that could be deployed."""
    told = await plan({**MODEL, "max_model_len": 256, "max_memory": {"cpu": "1GiB"}, "dtype": None})
    assert told["fits"]
    assert told["yaml"].startswith("# Add this to the applications of your file.\n- name: demo ")
    assert told["notes"][0] == "What you download is one application. Add it to the applications of your file."
    assert "taken from the plan" not in told["yaml"]
    assert "router" not in told["yaml"]
    assert "device: cpu" in told["yaml"]
    assert "max_model_len: 256" in told["yaml"]
    on_gpu = await plan(MODEL, device=CARD)
    assert (on_gpu["fits"], "device: cpu" in on_gpu["yaml"]) == (True, False)


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"num_gpus": 1}, "num_gpus asks for GPUs, but this cluster has none, so the model is planned on the CPU."),
        ({"max_memory": {"0": "10GiB"}}, "max_memory asks for GPUs, but this cluster has none"),
        ({"num_gpus": 1, "tensor_parallel_size": 2}, "num_gpus and tensor_parallel_size ask for GPUs"),
    ],
)
async def test_a_field_of_gpus_is_refused_where_there_is_none(fields: dict[str, Any], told: str) -> None:
    """The visitor has not written the `device: cpu` of the file, so its words would be no help."""
    with pytest.raises(InvalidRequest) as caught:
        await plan({**MODEL, **fields})
    assert told in caught.value.message
    assert "device" not in caught.value.message


async def test_a_model_is_added_to_the_file_that_is_served() -> None:
    """The file keeps its comments and all that it has, and says what the plan chose for the new model."""
    plans = WhatIf(
        lambda: (Inventory((MEMORY,)), Running([holding("tiny", 0.1)])), served=lambda: ("models.yaml", FILE)
    )
    told = json.loads(await plans.answer(json.dumps(MODEL).encode()))
    old, new = yaml.safe_load(told["yaml"])["applications"]
    assert old == yaml.safe_load(FILE)["applications"][0]
    assert (new["name"], new["route_prefix"], "kv_cache_memory_bytes" in new["args"]) == ("demo", "/models/demo", True)
    assert "# my models" in told["yaml"]
    assert told["notes"][0] == "What you download is models.yaml, which runs now, with 'demo' added."
    assert (await plan({"yaml": told["yaml"]}))["fits"]


async def test_what_runs_leaves_less() -> None:
    """A plan that would fit alone does not fit beside it, and says what would help. An update of the model that runs
    has all that this one holds."""
    small = Device("n1", None, "memory", 16 * GIB, GIB // 4)
    starved = RunningModel("other", [Holding("n1:cpu", 0, GIB // 4 - 2**20)])
    told = await plan({"yaml": FILE}, starved, device=small)
    assert (told["fits"], told["yaml"]) == (False, None)
    assert "1 model does not fit." in told["text"]
    update = await plan({"yaml": FILE}, RunningModel("tiny", starved.holdings), device=small)
    assert update["fits"]
    assert update["notes"] == ["What tiny holds now counts as free, because the plan has it anew."]


async def test_the_least_fix_is_told() -> None:
    """By the model and the line to write."""
    told = await plan({**MODEL, "max_model_len": 4096})
    assert not told["fits"]
    assert [(fix["model"], fix["text"]) for fix in told["fixes"]] == [("demo", "max_model_len: 2048")]
    assert told["notes"][0] == "The file to download has the fixes in it, so everything in it fits."
    assert yaml.safe_load(told["yaml"])[0]["args"]["max_model_len"] == 2048
    assert (await plan({"yaml": "applications:\n" + told["yaml"]}))["fits"]


@pytest.mark.parametrize(
    ("body", "told"),
    [
        (b"", "The body is not valid JSON"),
        (b"\xff\xfe", "The body is not valid JSON"),
        (b"[" * 100_000, "The body is not valid JSON: it is nested more than 100 levels deep."),
        (b'{"max_model_len": ' + b"9" * 5000 + b"}", "The body is not valid JSON"),
        (b"[]", "The body must be a JSON object"),
        (b"{}", "Send the field 'yaml' with a config file, or 'model' with an id or a folder."),
        (b'{"yaml": 1}', "The field 'yaml' must be a text."),
        (b'{"yaml": " "}', "The field 'yaml' is empty. Send a file."),
        (b'{"model": " "}', "The field 'model' is empty. Name a model: its id on the hub, or a folder of the server."),
        (b'{"yaml": "a", "model": "b"}', "The field 'model' has no place beside 'yaml'. Write it there."),
        (b'{"model": ["a"]}', "The field 'model' must be a text."),
        (b'{"model": "a", "max_modellen": 1}', "unknown field 'max_modellen'. Did you mean 'max_model_len'?"),
        (b'{"model": "a", "trust_remote_code": true}', "unknown field 'trust_remote_code'. Known fields: yaml, or"),
        (json.dumps({"model": "a" * 2000}).encode(), "The field 'model' has 2000 characters, but takes at most 1024."),
    ],
)
def test_a_wrong_body_is_refused_before_a_process_starts(body: bytes, told: str) -> None:
    """In our words."""
    with pytest.raises(InvalidRequest) as caught:
        asked_for(body)
    assert told in caught.value.message


def test_a_large_body_is_refused() -> None:
    """A config file has some kilobytes."""
    with pytest.raises(RequestTooLarge, match=f"at most {MOST_BODY_BYTES}"):
        asked_for(b" " * (MOST_BODY_BYTES + 1))


BROKEN = {
    "a bomb": (LAUGHS, "config.yaml: with its aliases it stands for more than 20000 values"),
    "no mapping": ("applications: [1]", "config.yaml: applications[0]: expected a mapping, got 1."),
    "no list": ("[]", "config.yaml: the file is not a Ray Serve config file"),
    "digits": ("applications: " + "9" * 5000, "config.yaml: the file is not valid YAML: a number has too many digits"),
    "no date": ("applications: 2024-99-99", "config.yaml: the file is not valid YAML"),
    "python": ("applications: !!python/object/apply:os.system [exit]", "config.yaml: the file is not valid YAML"),
    "unknown": (FILE.replace("device: cpu", "devise: cpu"), "tiny: unknown field 'devise'. Did you mean 'device'?"),
    "wrong": (FILE.replace("512", "[1]"), "tiny: max_model_len: expected a whole number, got [1]."),
    "twice": (FILE + FILE.split("applications:\n")[1], "the name 'tiny' appears twice"),
    "keys": (
        FILE + "  deployments: [{name: Model, max_replicas: 1}]",
        "config.yaml: tiny: deployments[0]: unknown key 'max_replicas'.",
    ),
    "no model": ("applications: [{name: r, import_path: 'serve_app.app:router'}]", "so there is nothing to plan"),
    "no folder": (
        FILE.replace("serve-app/demo", "/no/such/folder"),
        "tiny: model: there is no folder /no/such/folder.",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
async def test_a_wrong_file_is_refused_with_what_is_wrong(case: str) -> None:
    """Whatever it stands for or names, in a second or two."""
    text, told = BROKEN[case]
    begun = time.monotonic()
    with pytest.raises(InvalidRequest) as caught:
        await plan({"yaml": text})
    assert told in caught.value.message
    assert "Traceback" not in caught.value.message
    assert time.monotonic() - begun < 20


async def test_nothing_that_a_file_names_is_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Serve itself imports the policy of a file when it reads it."""
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'was_run')!r}, 'w').close()\npolicy = None\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    options = "{min_replicas: 1, max_replicas: 2, policy: {policy_function: 'evil:policy'}}"
    text = FILE + f"  deployments: [{{name: Model, autoscaling_config: {options}}}]\n"
    assert (await plan({"yaml": text}))["fits"]
    assert not (tmp_path / "was_run").exists()


async def test_the_code_of_a_model_does_not_run(tmp_path: Path) -> None:
    """Also where the file trusts it, since who plans may not deploy."""
    config = {
        "model_type": "evil", "architectures": ["Evil"], "auto_map": {"AutoConfig": "code.C"},
        "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "vocab_size": 8, "intermediate_size": 8,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "code.py").write_text(f"open({str(tmp_path / 'was_run')!r}, 'w').close()\n")
    text = FILE.replace("serve-app/demo", str(tmp_path)).replace("device: cpu", "device: cpu, trust_remote_code: true")
    told = await plan({"yaml": text})
    assert not (tmp_path / "was_run").exists()  # `serve-app plan` of the same file on the server would run it.
    assert "tiny: trust_remote_code: code of a model does not run for a plan from the console." in told["notes"][0]
    assert not told["fits"]


async def test_no_key_of_this_process_reaches_the_planner(monkeypatch: pytest.MonkeyPatch) -> None:
    """A file cannot have it read."""
    monkeypatch.setenv("SERVE_APP_API_KEYS", "sk-secret")
    assert "SERVE_APP_API_KEYS" not in what_if_module._environment()


def planners() -> list[psutil.Process]:
    """The processes that plan for this one."""
    return [child for child in psutil.Process().children() if what_if_module.PLANNER in " ".join(child.cmdline())]


SLOW = FILE + "  deployments: [{name: Model, num_replicas: 90000}]\n"


async def test_who_leaves_ends_the_process() -> None:
    """At once, and its place is free."""
    plans = planner()
    asked = asyncio.create_task(plans.answer(json.dumps({"yaml": SLOW}).encode()))
    async with asyncio.timeout(30):
        while not planners():  # noqa: ASYNC110
            await asyncio.sleep(0.05)
    (process,) = planners()
    asked.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asked
    assert not process.is_running()
    assert json.loads(await plans.answer(json.dumps(MODEL).encode()))["fits"]


async def test_two_plan_at_once_and_a_third_is_told_to_come_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """What runs is read once for both."""
    reads, may_end = list[int](), asyncio.Event()

    async def run(_: PlanJob) -> bytes:
        await may_end.wait()
        return b"{}"

    def read() -> tuple[Inventory, Running]:
        reads.append(1)
        return Inventory((MEMORY,)), Running()

    plans, body = WhatIf(read, run), json.dumps(MODEL).encode()
    first = [asyncio.create_task(plans.answer(body)) for _ in range(2)]
    await asyncio.sleep(0.1)
    with pytest.raises(Overloaded) as caught:
        await plans.answer(body)
    assert (caught.value.status, caught.value.retry_after_s) == (429, 5.0)
    may_end.set()
    assert await asyncio.gather(*first) == [b"{}", b"{}"]
    assert await plans.answer(body) == b"{}"
    assert len(reads) == 1
    monkeypatch.setattr(what_if_module, "FRESH_S", 0.0)
    await plans.answer(body)
    assert len(reads) == 2


async def test_a_plan_has_an_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its process too."""
    monkeypatch.setattr(what_if_module, "TIMEOUT_S", 1.0)
    with pytest.raises(DeadlineExceeded, match="within 1 s"):
        await plan({"yaml": SLOW})
    assert planners() == []


async def test_a_planner_that_takes_too_much_memory_is_stopped() -> None:
    """By the kernel, which the answer says."""
    with pytest.raises(InvalidRequest, match="its plan needs more than 100 MiB"):
        await run_planner(PlanJob(Inventory((MEMORY,)), Running(), yaml=SLOW, most_memory_bytes=100 * 2**20))


async def test_a_cluster_that_does_not_answer_is_told() -> None:
    """As a 503, and the next one asks again."""
    answers: list[Any] = [RuntimeError("no head"), (Inventory((MEMORY,)), Running())]

    def read() -> tuple[Inventory, Running]:
        found = answers.pop(0)
        if isinstance(found, Exception):
            raise found
        return found  # type: ignore[no-any-return]

    plans, body = WhatIf(read), json.dumps(MODEL).encode()
    with pytest.raises(ModelUnavailable, match="The cluster did not say what it runs: no head"):
        await plans.answer(body)
    assert json.loads(await plans.answer(body))["fits"]
