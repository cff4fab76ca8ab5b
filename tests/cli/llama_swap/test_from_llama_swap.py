"""What becomes of a config file of llama-swap."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from serve_app.cli.check import dangling_names, require_serves_schema, require_valid
from serve_app.cli.llama_swap.config_file import read_swap_file
from serve_app.cli.llama_swap.from_llama_swap import translate
from serve_app.cli.llama_swap.vllm_command import VllmCommand, read_command
from serve_app.cli.main import main
from serve_app.cli.translation import TranslatedFile
from serve_app.config import ModelConfig
from serve_app.errors import ConfigError
from serve_app.facts.serve_file import read_applications

# It has a bit of everything: macros in macros, containers, shells, short names, aliases and a persistent group.
REALISTIC = """
healthCheckTimeout: 500
logLevel: info
macros:
  models_dir: /srv/models
  ctx: 16384
  vllm: >
    docker run --name ${MODEL_ID} --init --rm --gpus all --ipc=host
    -p ${PORT}:8000 -v ${models_dir}:/models:ro -v /root/.cache/huggingface:/root/.cache/huggingface
    -e VLLM_ATTENTION_BACKEND=FLASHINFER -e HF_TOKEN=hf_not_for_files
    vllm/vllm-openai:v0.11.0
models:
  "qwen2.5:7b":
    cmd: |
      # the everyday model
      ${vllm} --model /models/Qwen2.5-7B-Instruct --max-model-len ${ctx}
      --gpu-memory-utilization 0.9 --served-model-name qwen \\
      --enable-auto-tool-choice --tool-call-parser hermes
    aliases: [gpt-4o-mini]
    useModelName: qwen
    ttl: 300
    cmdStop: docker stop ${MODEL_ID}
  "Qwen/Qwen3-8B":
    macros: {ctx: 32k}
    cmd: >
      vllm serve Qwen/Qwen3-8B --host 0.0.0.0 --port ${PORT} -tp 2 --max-model-len ${ctx} --no-enable-prefix-caching
      --override-generation-config '{"temperature": 0.5}' --dtype half
    env: ["CUDA_VISIBLE_DEVICES=0,1", "OMP_NUM_THREADS=4"]
    proxy: http://127.0.0.1:${PORT}
    concurrencyLimit: 4
    filters: {stripParams: "temperature"}
  embed:
    cmd: >
      bash -lc 'source /opt/venv/bin/activate && exec python -m vllm.entrypoints.openai.api_server --model BAAI/bge-m3'
    checkEndpoint: /health
  llama:
    cmd: llama-server --port ${PORT} -m /models/llama-8B-Q4_K_M.gguf -ngl 99
    aliases: [llama3]
  tts:
    cmd: /opt/speech/server --port ${PORT}
groups:
  forever: {persistent: true, swap: false, exclusive: false, members: [embed]}
hooks: {on_startup: {preload: [embed]}}
apiKeys: [sk-hunter2]
peers: {other: {proxy: "http://192.168.1.23", models: [model_a]}}
"""


def made(folder: Path, text: str) -> TranslatedFile:
    """The translation of a file, whose models ModelConfig accepts."""
    path = folder / "config.yaml"
    path.write_text(text)
    file = translate(read_swap_file(path), str(path))
    for model in file.models:
        ModelConfig.from_args(model.args)
    return file


def of(folder: Path, command: str, **fields: Any) -> TranslatedFile:
    """The translation of a file of one model."""
    return made(folder, yaml.safe_dump({"models": {"m": {"cmd": command, **fields}}}))


def args_of(folder: Path, command: str) -> dict[str, Any]:
    """What the command says beside the model and its backend."""
    return {
        key: value for key, value in of(folder, command).models[0].args.items() if key not in ("model", "infer_backend")
    }


def note_about(file: TranslatedFile, start: str) -> str:
    """The only note that begins so."""
    (note,) = [note for note in file.notes if note.startswith(start)]
    return note


def test_the_printed_file_is_one_that_serve_app_takes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """By its own checks and by Serve's schema, and no secret is in it."""
    path, printed = tmp_path / "config.yaml", tmp_path / "serve.yaml"
    path.write_text(REALISTIC)
    assert main(["from-llama-swap", str(path)]) == 0
    out, err = capsys.readouterr()
    printed.write_text(out)
    applications = read_applications(printed)
    require_valid(applications)
    require_serves_schema(printed)
    assert dangling_names(applications) == []
    assert err == ""
    assert not any(secret in out for secret in ("hunter2", "hf_not_for_files"))
    document = yaml.safe_load(out)
    assert document["http_options"] == {"host": "127.0.0.1", "port": 8080}
    assert [item["name"] for item in document["applications"]] == ["router", "qwen2.5:7b", "Qwen-Qwen3-8B", "embed"]


def test_a_realistic_file(tmp_path: Path) -> None:
    """Models, pools, names and variables arrive, and the rest has notes."""
    file = made(tmp_path, REALISTIC)
    everyday, large, embed = file.models
    assert everyday.args == {
        "model": "/srv/models/Qwen2.5-7B-Instruct",
        "infer_backend": "vllm",
        "max_model_len": 16384,
        "engine_args": {"enable_auto_tool_choice": True, "tool_call_parser": "hermes"},
        "residency": {"policy": "swap"},
    }
    assert everyday.variables == {"VLLM_ATTENTION_BACKEND": "FLASHINFER"}
    assert (large.args["tensor_parallel_size"], large.args["max_model_len"]) == (2, 32000)
    assert (large.args["dtype"], large.variables) == ("float16", {"OMP_NUM_THREADS": "4"})
    assert large.args["engine_args"] == {
        "enable_prefix_caching": False,
        "override_generation_config": {"temperature": 0.5},
    }
    assert embed.args == {"model": "BAAI/bge-m3", "infer_backend": "vllm"}
    assert file.router == {
        "aliases": {"gpt-4o-mini": "qwen2.5:7b", "Qwen/Qwen3-8B": "Qwen-Qwen3-8B"},
        "hold_timeout_s": 500,
    }
    assert "(/models/llama-8B-Q4_K_M.gguf)" in note_about(file, "llama: IT IS LEFT OUT")
    assert "Hugging Face id" in note_about(file, "tts: IT IS LEFT OUT. 'server' is no `vllm serve`.")
    for start in (
        "qwen2.5:7b: ttl: a model does not leave by time",
        "qwen2.5:7b: --gpu-memory-utilization 0.9: the plan gives a model of a pool its bytes",
        "qwen2.5:7b: HF_TOKEN: a secret does not belong",
        "Qwen/Qwen3-8B: CUDA_VISIBLE_DEVICES=0,1: the pool's GPUs",
        "Qwen/Qwen3-8B: concurrencyLimit: max_num_seqs",
        "Qwen/Qwen3-8B: filters: ",
        "Qwen/Qwen3-8B: it is called 'Qwen-Qwen3-8B' here",
        "embed: 'source /opt/venv/bin/activate' stands beside",
        "llama: its aliases are left out too: llama3.",
        "pool_memory: the file does not say how much each pool may take beside embed",
        "apiKeys: keys are kept as hashes",
        "peers: ",
        "logLevel: these are for llama-swap itself",
        "hooks.on_startup.preload: ",
        "llama-swap listens on all addresses",
    ):
        note_about(file, start)


@pytest.mark.parametrize(
    ("command", "model", "arguments"),
    [
        ("vllm serve org/m", "org/m", {}),
        ("/opt/venv/bin/vllm serve --enforce-eager org/m", "org/m", {"enforce_eager": ()}),
        ("python3 -m vllm.entrypoints.openai.api_server --model org/m --seed=7", "org/m", {"seed": ("7",)}),
        ("uv run --with vllm vllm serve org/m", "org/m", {}),
        ("CUDA_VISIBLE_DEVICES=1 nohup vllm serve org/m", "org/m", {}),
        (
            "env HF_HOME=/x vllm serve org/m -q awq -pp 2",
            "org/m",
            {"quantization": ("awq",), "pipeline_parallel_size": ("2",)},
        ),
        (
            "vllm serve org/m --served-model-name a b --max-model-len -1",
            "org/m",
            {"served_model_name": ("a", "b"), "max_model_len": ("-1",)},
        ),
        (
            "podman run -d --rm -p 1:8000 --device nvidia.com/gpu=all docker.io/vllm/vllm-openai:latest --model org/m",
            "org/m",
            {},
        ),
        ("docker run -v /data:/models/x vllm/vllm-openai /models/x/m", "/data/m", {}),
        ("docker run ghcr.io/me/vllm-cpu:1 vllm serve org/m", "org/m", {}),
        ("sh -c 'exec vllm serve org/m > log 2>&1'", "org/m", {}),
        ("vllm serve org/m --compilation-config.mode 3", "org/m", {"compilation_config.mode": ("3",)}),
    ],
)
def test_vllm_is_found_in_a_command(command: str, model: str, arguments: dict[str, tuple[str, ...]]) -> None:
    """However it is started."""
    found = read_command(command)
    assert isinstance(found, VllmCommand)
    assert (found.model, dict(found.arguments)) == (model, arguments)


@pytest.mark.parametrize(
    ("command", "program"),
    [
        ("llama-server -m x.gguf", "llama-server"),
        (
            "docker run -v /vllm:/vllm ghcr.io/ggml-org/llama.cpp:server -m x.gguf",
            "docker run ghcr.io/ggml-org/llama.cpp:server",
        ),
        ("vllm serve --enforce-eager", "vllm serve without a model"),
        ("python server.py", "python"),
        ("docker run", "docker run"),
    ],
)
def test_other_programs_are_named(command: str, program: str) -> None:
    """A mount or an option that has vllm in its name is no image."""
    assert read_command(command) == program


def test_arguments_become_fields_or_engine_args(tmp_path: Path) -> None:
    """Numbers, lists, mappings and dotted names keep their kinds."""
    args = args_of(
        tmp_path,
        "vllm serve x --max-num-seqs 8 --kv-cache-memory-bytes 2G --trust-remote-code --swap 3 --seed 7 "
        "--allowed-media-domains a.com b.com --compilation-config.mode 3 --rope 1 --max-num-batched-tokens 8k",
    )
    assert args == {
        "max_num_seqs": 8,
        "kv_cache_memory_bytes": "2048MiB",
        "trust_remote_code": True,
        "engine_args": {
            "seed": 7,
            "allowed_media_domains": ["a.com", "b.com"],
            "compilation_config": {"mode": 3},
            "max_num_batched_tokens": 8000,
        },
    }


def test_lora_modules_become_adapters(tmp_path: Path) -> None:
    """As NAME=PATH or as JSON, with the room for them. That LoRA is on follows from that."""
    args = args_of(
        tmp_path,
        "vllm serve x --max-loras 2 --enable-lora --max-lora-rank 32 --lora-modules a=/a "
        """'{"name": "b", "path": "/b", "base_model_name": "x"}'""",
    )
    assert args == {"adapters": {"a": "/a", "b": "/b"}, "max_loras": 2, "max_lora_rank": 32}


@pytest.mark.parametrize(
    ("argument", "words"),
    [
        ("--swap-space 4", "has no such argument."),
        ("--max-modle-len 4", "Did you mean 'max_model_len'?"),
        ("--max-model-len auto", "cannot be read as a number"),
        ("--api-key sk-1", "--api-key …: keys are kept as hashes"),
        ("--data-parallel-size 2", "num_replicas"),
        ("--ssl-keyfile x", "belongs to vLLM's own HTTP server"),
        ("--distributed-executor-backend ray", "changes the GPUs or processes that Ray counts"),
        ("--enable-sleep-mode", "parked by its pool"),
        ("--seed 1 --seed 2", "given twice"),
        ("--lora-modules /a", "/a is not written as NAME=PATH"),
        ("--enforce-eager stray", "stands without an argument's name"),
    ],
)
def test_what_does_not_carry_over_has_a_note(argument: str, words: str, tmp_path: Path) -> None:
    """With the reason, and without secrets."""
    file = of(tmp_path, f"vllm serve x {argument}")
    assert any(words in note for note in file.notes), file.notes
    assert not any("sk-1" in note for note in file.notes)


VLLM = {"cmd": "vllm serve org/m"}
SWAP = {"swap": True}
TOGETHER = {"swap": False, "exclusive": False}


@pytest.mark.parametrize(
    ("groups", "pools"),
    [
        ({}, {"a": "default", "b": "default", "c": "default", "d": "default"}),
        ({"g": SWAP | {"members": ["a", "b"]}}, {"a": "default", "b": "default", "c": "default", "d": "default"}),
        (
            {"g": TOGETHER | {"persistent": True, "members": ["a", "b"]}},
            {"a": None, "b": None, "c": "default", "d": "default"},
        ),
        ({"g": TOGETHER | {"members": ["a", "b", "c", "d"]}}, {"a": None, "b": None, "c": None, "d": None}),
        ({"g": TOGETHER | {"members": ["a", "b"]}}, {"a": "default", "b": "default", "c": "default", "d": "default"}),
        (
            {"Big Ones": {"persistent": True, "members": ["a", "b"]}},
            {"a": "big-ones", "b": "big-ones", "c": "default", "d": "default"},
        ),
        (
            {"g": TOGETHER | {"persistent": True, "members": ["a", "b", "c"]}},
            {"a": None, "b": None, "c": None, "d": None},
        ),
    ],
)
@pytest.mark.parametrize("is_new", [False, True])
def test_groups_become_pools(
    groups: dict[str, Any], pools: dict[str, str | None], is_new: bool, tmp_path: Path
) -> None:
    """Who may have to leave for another one is in a pool; a model alone in a pool has nobody to leave for. Newer files
    have groups under `routing`."""
    where = {"routing": {"router": {"use": "group", "settings": {"groups": groups}}}} if is_new else {"groups": groups}
    file = made(tmp_path, yaml.safe_dump({"models": dict.fromkeys("abcd", VLLM), **where}))
    found = {model.name: ModelConfig.from_args(model.args).swaps for model in file.models}
    assert {name: swaps and swaps.pool for name, swaps in found.items()} == pools


def test_names_that_collide_are_made_different(tmp_path: Path) -> None:
    """An alias that another model has already is left out with a note."""
    models = {
        "a/b": VLLM,
        "a b": VLLM,
        "router": VLLM,
        "c": {**VLLM, "aliases": ["a-b", "x"]},
        "d": {**VLLM, "aliases": ["x"]},
    }
    file = made(tmp_path, yaml.safe_dump({"models": models}, sort_keys=False))
    assert [model.name for model in file.models] == ["a-b", "a-b-2", "router-model", "c", "d"]
    assert file.router["aliases"] == {"a/b": "a-b", "a b": "a-b-2", "router": "router-model", "x": "c"}
    note_about(file, "c: the alias 'a-b' is the name of another model")
    note_about(file, "d: the alias 'x' is the name of another model")


def test_the_environment_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A value of it may be a secret."""
    monkeypatch.setenv("MODELS", "/secret/place")
    file = of(tmp_path, "vllm serve ${env.MODELS}/m", env=["CACHE=${env.MODELS}"])
    assert file.models[0].args["model"] == "${env.MODELS}/m"
    assert file.models[0].variables == {}
    note_about(file, "m: ${env.MODELS}: the environment is not read here")
    note_about(file, "m: CACHE=${env.MODELS}: ")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("applications: []\nmodels: {}", "this is a Ray Serve config file already"),
        ("models: []", "it has no mapping 'models'"),
        ("just text", "it has no mapping 'models'"),
        ("models: {a: [}", "not valid YAML"),
        ("models: {a: text}", "models.a: expected a mapping with 'cmd', got"),
        ("models: {a: {cmd: ''}}", "models.a.cmd: expected the command"),
        ("models: {a: {cmd: [vllm, serve]}}", "models.a.cmd: expected the command"),
        ("models: {a: {cmd: 'vllm serve ${ctx}'}}", "models.a.cmd: the macro ${ctx} is not defined"),
        ("macros: {a: '${b}', b: '${a}'}\nmodels: {a: {cmd: '${a}'}}", "or for ever"),
        (
            "macros: {a: '${b}${b}${b}${b}', b: '${c}${c}${c}${c}', c: '"
            + "x" * 9999
            + "'}\nmodels: {a: {cmd: '${a}'}}",
            "longer than",
        ),
        ("models: {a: {cmd: 'vllm serve \"x'}}", "models.a.cmd: the command cannot be read: No closing quotation"),
        ("models: {a: {cmd: vllm serve x, env: {A: 1}}}", "models.a.env: expected a list"),
        ("models: {a: {cmd: vllm serve x, env: [A]}}", "models.a.env: expected NAME=value"),
        ("models: {a: {cmd: vllm serve x}}\ngroups: {g: {members: [b]}}", "groups.g.members: there is no model 'b'"),
        (
            "models: {a: {cmd: vllm serve x}}\ngroups: {g: {members: [a]}, h: {members: [a]}}",
            "is in the group 'g' already",
        ),
        (
            "models: {a: {cmd: vllm serve x}}\ngroups: {g: {members: [a], swap: sometimes}}",
            "groups.g.swap: expected true",
        ),
        ("models: {a: {cmd: llama-server -m x.gguf}}", "none of its models runs with `vllm serve`"),
    ],
)
def test_a_wrong_file_is_refused_with_the_place(
    text: str, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With exit code 2."""
    path = tmp_path / "config.yaml"
    path.write_text(text)
    assert main(["from-llama-swap", str(path)]) == 2
    out, err = capsys.readouterr()
    assert words in err
    assert str(path) in err
    assert out == ""


def test_a_file_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    """One that is missing, a folder, one that is no text, and one that is too large."""
    large, binary = tmp_path / "large.yaml", tmp_path / "binary.yaml"
    large.write_text("#" * (4 * 2**20 + 1))
    binary.write_bytes(b"\xff\xfe\x00models")
    for path, words in (
        (tmp_path / "none", "No such file"),
        (tmp_path, "directory"),
        (large, "larger"),
        (binary, "UTF-8"),
    ):
        with pytest.raises(ConfigError, match=words):
            read_swap_file(path)
