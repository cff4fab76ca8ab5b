"""The command line's answers and exit codes, on this machine, which has no GPU."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from serve_app.cli import check as check_module
from serve_app.cli.main import main
from serve_app.errors import ConfigError
from serve_app.facts.inventory import Device, Inventory
from tests.builders import node

ROOT = Path(__file__).parents[2]
QWEN = str(ROOT / "tests/planning/configs/qwen2-7b")


@pytest.fixture(autouse=True)
def _no_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with two CPUs and no GPU, whatever runs beside the test."""
    monkeypatch.setattr(
        check_module, "_cluster", lambda _: ([node("here", cpus=2)], Inventory(()), {}, "no Ray cluster runs here")
    )


def test_the_local_config_fits_a_machine_without_gpus(capsys: pytest.CaptureFixture[str]) -> None:
    """Exit code 0, and one line per model."""
    assert main(["check", str(ROOT / "deploy_configs/local.yaml")]) == 0
    assert "ok  tiny-pt: a replica takes 1 CPU" in capsys.readouterr().out


def test_the_production_config_says_what_is_missing(capsys: pytest.CaptureFixture[str]) -> None:
    """Exit code 1, and for each model what it needs and what there is."""
    assert main(["check", str(ROOT / "deploy_configs/prod.yaml")]) == 1
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("NO")]
    assert len(lines) == 3
    assert "emo-7b: A replica needs 2 GPUs" in lines[0]
    assert all("here: 2 CPUs, 0 GPUs" in line for line in lines)


@pytest.mark.parametrize(
    ("options", "args", "variables", "is_told"),
    [
        ("{host: 0.0.0.0}", "{}", "{}", True),
        ("{host: 0.0.0.0}", "{allow_open_access: true}", "{}", False),
        ("{host: 0.0.0.0}", "{}", "{SERVE_APP_API_KEYS_FILE: /etc/keys.yaml}", False),
        ("{host: 127.0.0.1}", "{}", "{}", False),
        ("{port: 8000}", "{}", "{}", False),
    ],
)
def test_an_open_address_without_keys_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], options: str, args: str, variables: str, is_told: bool
) -> None:
    """As a note, since the nodes' own environment may name keys; and what has to be written is in it."""
    file = tmp_path / "x.yaml"
    file.write_text(
        f"http_options: {options}\n"
        f"controller_options: {{runtime_env: {{env_vars: {variables}}}}}\n"
        f"applications:\n- {{name: r, import_path: 'serve_app.app:router', args: {args}}}\n"
    )
    assert main(["check", str(file)]) == 0
    out = capsys.readouterr().out
    assert ("names API keys. Models will not start unless" in out) == is_told
    assert ("allow_open_access: true under 'args' of the router" in out) == is_told
    assert ("http_options.host is not set" in out) == ("host" not in options)


@pytest.mark.parametrize("options", ["num_replicas: 200", "autoscaling_config: {min_replicas: 3, max_replicas: 9}"])
def test_more_replicas_than_the_cluster_can_hold_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], options: str
) -> None:
    """Exit code 1. They would wait for a place for ever."""
    file = tmp_path / "x.yaml"
    text = (
        "applications:\n- name: a\n  import_path: serve_app.app:model\n  route_prefix: /models/a\n"
        "  args: {model: serve-app/demo, infer_backend: pt, device: cpu}\n"
        "  deployments: [{name: Model, {0}}]\n"
    )
    file.write_text(text.replace("{0}", options))
    assert main(["check", str(file)]) == 1
    assert "each replica takes 1 CPU, but the cluster holds 2 of them at most" in capsys.readouterr().out
    file.write_text(text.replace("{0}", "num_replicas: 2"))
    assert main(["check", str(file)]) == 0
    assert "ok  a: each of 2 replicas takes 1 CPU" in capsys.readouterr().out


def test_replicas_that_the_plan_has_no_room_for_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ray counts GPUs but not their sizes: the second replica would get the card that is too small."""
    cards = [Device("n1", index, "GPU", size * 2**30, size * 2**30, False) for index, size in enumerate((24, 4))]
    cluster = ([node("here", cpus=2, gpus=2)], Inventory(tuple(cards)), {}, "here")
    monkeypatch.setattr(check_module, "_cluster", lambda _: cluster)
    file = tmp_path / "x.yaml"
    text = (
        "applications:\n- name: a\n  import_path: serve_app.app:model\n  route_prefix: /models/a\n"
        f"  args: {{model: {QWEN}, infer_backend: pt, dtype: bfloat16, max_model_len: 2048}}\n"
        "  deployments: [{name: Model, num_replicas: COUNT}]\n"
    )
    file.write_text(text.replace("COUNT", "1"))
    assert main(["check", str(file)]) == 0
    file.write_text(text.replace("COUNT", "2"))
    assert main(["check", str(file)]) == 1
    assert "num_replicas (or min_replicas): 1, under deployments (loses 1 of 2 replicas" in capsys.readouterr().out


def test_all_mistakes_of_a_file_are_told_at_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Exit code 2; each line names its application."""
    file = tmp_path / "x.yaml"
    file.write_text(
        "applications:\n"
        "- {name: r, import_path: 'serve_app.app:router', args: {max_body: 1}}\n"
        "- {name: a, import_path: 'serve_app.app:model', args: {model: m, infer_backend: vllm, "
        "max_memory: {0: 3GB, cpu: 9GB}}}\n"
        "- {name: b, import_path: 'serve_app.app:model', args: {model: m, infer_backend: pt, num_gpu: 1}}\n"
    )
    assert main(["check", str(file)]) == 2
    errors = capsys.readouterr().err
    assert "r: unknown field 'max_body'. Did you mean 'max_body_bytes'" in errors
    assert "a: max_memory names cpu, but vLLM keeps all layers on GPUs" in errors
    assert "b: unknown field 'num_gpu'. Did you mean 'num_gpus'" in errors


def test_a_model_that_is_not_there_is_told_before_anything_starts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Exit code 1, with the folder."""
    file = tmp_path / "x.yaml"
    file.write_text(
        "applications:\n"
        "- name: b\n"
        "  import_path: serve_app.app:model\n"
        "  route_prefix: /models/b\n"
        "  args: {model: ./no, infer_backend: pt, device: cpu}\n"
    )
    assert main(["check", str(file)]) == 1
    assert "NO  b: model: there is no folder" in capsys.readouterr().out


@pytest.mark.parametrize("port", ["0", "65536", "-1", "abc", "8000.5", "²"])
def test_what_is_no_port_is_told(port: str, capsys: pytest.CaptureFixture[str]) -> None:
    """In words, and not with the name of a function."""
    with pytest.raises(SystemExit):
        main(["demo", f"--port={port}"])
    assert f"'{port}' is not a port. Write a number from 1 to 65535." in capsys.readouterr().err


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize(
    "words",
    [["plan", "--model", "serve-app/demo", "--gpus", "8GiB"], ["node-env"],
     ["plan", "--json", "--model", "serve-app/demo", "--gpus", "8GiB"]],
)  # fmt: skip
def test_a_reader_that_goes_away_ends_a_command_quietly(words: list[str], unbuffered: str) -> None:
    """As with other tools in front of `head`: the exit code is that of SIGPIPE, and nothing is printed."""
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-m", "serve_app.cli.main", *words]
    environment = os.environ | {"PYTHONUNBUFFERED": unbuffered}
    done = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, env=environment, check=False)
    os.close(writing)
    assert (done.returncode, done.stderr) == (141, b"")


def test_what_serve_refuses_is_told_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Two applications with one route."""
    file = tmp_path / "x.yaml"
    one = "{{name: {0}, import_path: 'serve_app.app:router', route_prefix: /}}"
    file.write_text(f"applications:\n- {one.format('a')}\n- {one.format('b')}\n")
    assert main(["check", str(file)]) == 2
    assert "route" in capsys.readouterr().err


def test_keys_that_serve_would_drop_in_silence_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """At the top, in an application, in its builder, and among its deployments."""
    file = tmp_path / "x.yaml"
    file.write_text(
        "http_option: {port: 9}\n"
        "applications:\n"
        "- {name: r, import_path: 'serve_app.app:routr', route_prefix: /}\n"
        "- name: a\n"
        "  import_path: serve_app.app:model\n"
        "  route_prefix: /models/a\n"
        "  deployment: []\n"
        "  deployments: [{name: model}]\n"
        "  args: {model: m, infer_backend: pt, device: cpu}\n"
    )
    assert main(["check", str(file)]) == 2
    errors = capsys.readouterr().err
    for words in ("Did you mean 'http_options'", "Did you mean 'serve_app.app:router'", "Did you mean 'deployments'"):
        assert words in errors
    assert "'model' must be 'Model'" in errors


def test_a_missing_file_is_wrong_input(capsys: pytest.CaptureFixture[str]) -> None:
    """No traceback."""
    assert main(["check", "nowhere.yaml"]) == 2
    assert "nowhere.yaml: No such file" in capsys.readouterr().err


def test_diff_says_what_a_changed_file_would_do(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One line per application with the reason, and whether the new file's models fit: exit code 0 or 1."""
    head = "applications:\n- {name: router, import_path: 'serve_app.app:router', route_prefix: /}\n"
    model = (
        "- {{name: {0}, import_path: 'serve_app.app:model', route_prefix: /models/{0}, args: {{model: serve-app/demo, "
    )
    model += "infer_backend: pt, max_memory: {{0: {1}}}}}}}\n"
    files = [tmp_path / name for name in ("old.yaml", "new.yaml", "large.yaml")]
    files[0].write_text(head + model.format("a", "2GB") + model.format("b", "2GB"))
    files[1].write_text(head + model.format("a", "2GB") + model.format("c", "2GB"))
    files[2].write_text(head + model.format("a", "30GB"))
    old, new, large = map(str, files)
    assert main(["diff", old, new, "--gpus", "24GiB"]) == 0
    told = capsys.readouterr().out.splitlines()
    assert told[:3] == ["  a: stays as it is", "- b: stops", "+ c: starts"]
    assert main(["diff", old, large, "--gpus", "24GiB"]) == 1
    told = capsys.readouterr().out.splitlines()
    assert told[0].startswith("! a: restarts replica by replica; streams continue")
    assert told[1] == "      args.max_memory.0: 2GB → 30GB"
    assert any(line.startswith("does not fit: a: ") for line in told)
    assert main(["diff", old, str(tmp_path / "none.yaml")]) == 2


def test_the_routers_user_config_is_checked_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A wrong field is an error, as in args; a name that leads nowhere a note."""
    router = "- {{name: router, import_path: 'serve_app.app:router', route_prefix: /, deployments: [{0}]}}\n"
    model = "- {name: a, import_path: 'serve_app.app:model', route_prefix: /models/a, "
    model += "args: {model: serve-app/demo, infer_backend: pt, device: cpu}}\n"
    file = tmp_path / "x.yaml"
    file.write_text("applications:\n" + router.format("{name: Router, user_config: {default_modl: a}}") + model)
    assert main(["check", str(file)]) == 2
    assert "Did you mean 'default_model'" in capsys.readouterr().err
    named = "{name: Router, user_config: {default_model: ghost, aliases: {a: b}, fallbacks: {a: [none]}}}"
    file.write_text("applications:\n" + router.format(named) + model)
    assert main(["check", str(file)]) == 0
    notes = [line for line in capsys.readouterr().out.splitlines() if line.startswith("note: router: ")]
    assert notes == [
        "note: router: aliases.a: this file has no model named 'b'.",
        "note: router: fallbacks.a: this file has no model named 'none'.",
        "note: router: default_model: this file has no model named 'ghost'.",
        "note: router: aliases.a: the alias hides the model of that name.",
    ]


def test_unknown_options_of_a_deployment_are_named() -> None:
    """Serve itself drops them in silence: a delay that was misspelt is no delay."""
    scaling = {"min_replicas": 1, "upscale_dely_s": 3}
    options = {"name": "Model", "max_surge_percnt": 1, "autoscaling_config": scaling}
    document = {"applications": [{"name": "a", "deployments": [options]}]}
    known = {"name", "max_surge_percent", "autoscaling_config"}
    assert check_module.unknown_options(document, known, {"min_replicas", "upscale_delay_s"}) == [
        "a: deployments[0]: unknown key 'max_surge_percnt'. Did you mean 'max_surge_percent'?",
        "a: deployments[0].autoscaling_config: unknown key 'upscale_dely_s'. Did you mean 'upscale_delay_s'?",
    ]


def test_a_policy_that_does_not_exist_is_one_line(tmp_path: Path) -> None:
    """Serve imports it while it reads the file."""
    file = tmp_path / "serve.yaml"
    file.write_text(
        "applications:\n- name: a\n  import_path: serve_app.app:model\n  deployments:\n  - name: Model\n"
        "    autoscaling_config: {policy: {policy_function: 'serve_app.replica.autoscaling:by_engin_load'}}\n"
    )
    with pytest.raises(ConfigError, match="Ray Serve refuses this file: .*by_engin_load"):
        check_module.require_serves_schema(file)


@pytest.mark.parametrize(
    ("options", "words"),
    [("{prot: 8000}", "unknown key 'prot'. Did you mean 'port'"), ("{port: 80000}", "80000 is not a port"),
     ("{port: true}", "True is not a port")],
)  # fmt: skip
def test_http_options_that_serve_would_ignore_are_refused(tmp_path: Path, options: str, words: str) -> None:
    """Serve's own schema drops unknown ones and takes any number."""
    file = tmp_path / "serve.yaml"
    file.write_text(f"http_options: {options}\napplications:\n- name: a\n  import_path: serve_app.app:model\n")
    with pytest.raises(ConfigError, match=re.escape(words)):
        check_module.require_serves_schema(file)
