"""Finds `vllm serve` in the command of a llama-swap model, also within Docker, Podman or a shell, and reads its
arguments."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import PurePosixPath

from serve_app.cli.shell_words import is_operator, shell_words, without_wrappers
from serve_app.engines.vllm.arguments import FLAGS

# vLLM's short names.
SHORT = {
    "-tp": "tensor_parallel_size", "-pp": "pipeline_parallel_size", "-dp": "data_parallel_size", "-q": "quantization",
    "-n": "nnodes", "-O": "optimization_level", "-cc": "compilation_config", "-ac": "attention_config",
}  # fmt: skip
# These take several words.
LISTS = frozenset({
    "served_model_name", "api_key", "lora_modules", "lora_target_modules", "default_mm_loras", "allowed_media_domains",
    "cudagraph_capture_sizes", "middleware", "logits_processors", "collect_detailed_traces", "ignore_patterns",
    "device_ids", "disable_access_log_for_endpoints", "allowed_origins", "allowed_methods", "allowed_headers",
})  # fmt: skip
CONTAINERS = frozenset({"docker", "podman", "nerdctl"})
# These options of `docker run` take a word.
DOCKER_VALUES = frozenset({
    "-p", "--publish", "-v", "--volume", "-e", "--env", "--env-file", "--name", "--gpus", "--ipc", "--network", "--net",
    "--shm-size", "--runtime", "--device", "--entrypoint", "-u", "--user", "-w", "--workdir", "--ulimit", "--restart",
    "--cpus", "-m", "--memory", "-l", "--label", "--mount", "--add-host", "-h", "--hostname", "--group-add",
    "--security-opt", "--cap-add", "--cap-drop", "--pull", "--platform", "--tmpfs", "--cpuset-cpus", "--pid",
    "--stop-timeout", "--userns", "--log-driver", "--log-opt", "--memory-swap", "--cidfile", "--health-cmd",
})  # fmt: skip
# vllm/vllm-openai:latest, ghcr.io/someone/vllm-cpu and the like.
_IMAGE = re.compile(r"(^|/)vllm[\w.-]*(:[\w.-]+)?(@[\w:]+)?$")
# Shells in shells are read so deep.
MOST_SHELLS = 3


@dataclass(frozen=True)
class VllmCommand:
    """This is a `vllm serve`: its model, its arguments with underscores in their names, the environment variables that
    are set for it, and notes on what surrounds it. A flag without a value has no words."""

    model: str
    arguments: Mapping[str, tuple[str, ...]]
    variables: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def read_command(command: str) -> VllmCommand | str:
    """Returns the `vllm serve` of a command, or the name of the program that it starts instead. Raises ConfigError for
    a quote that is not closed. Lines that begin with # are comments, as in llama-swap."""
    lines = (line for line in command.splitlines() if not line.lstrip().startswith("#"))
    words = shell_words(" ".join(line.rstrip().removesuffix("\\") for line in lines))
    return _of_words(words, MOST_SHELLS)


def _of_words(words: Sequence[str], depth: int) -> VllmCommand | str:
    first, around = "", list[str]()
    for segment in _segments(words):
        variables, own = without_wrappers(segment)
        found = _of_segment(own, depth)
        if isinstance(found, VllmCommand):
            others = [" ".join(part) for part in _segments(words) if part != segment]
            around = [f"'{text}' stands beside the command and does not run here." for text in others]
            return replace(found, variables={**variables, **found.variables}, notes=(*found.notes, *around))
        first = first or found
    return first


def _segments(words: Sequence[str]) -> Iterator[list[str]]:
    """Yields the commands between the shell's operators."""
    segment: list[str] = []
    for word in [*words, ";"]:
        if not is_operator(word):
            segment.append(word)
        elif segment:
            yield segment
            segment = []


def _of_segment(words: list[str], depth: int) -> VllmCommand | str:
    program = PurePosixPath(words[0]).name if words else ""
    if program in ("bash", "sh", "zsh") and depth and len(words) > 2 and re.fullmatch(r"-\w*c", words[1]):
        return _of_words(shell_words(words[2]), depth - 1)
    if program in CONTAINERS and "run" in words:
        return _of_container(words[words.index("run") + 1 :], program)
    if (rest := _without_program(words)) is not None:
        return _of_arguments(rest)
    return program


def _without_program(words: list[str]) -> list[str] | None:
    """Returns the words after `vllm serve` and the like, or None for another program."""
    program = PurePosixPath(words[0]).name if words else ""
    if program == "vllm" and words[1:2] == ["serve"]:
        return words[2:]
    is_python = re.fullmatch(r"python[\d.]*", program) is not None
    if is_python and words[1:3] == ["-m", "vllm.entrypoints.openai.api_server"]:
        return words[3:]
    if program in ("uv", "uvx"):  # uv run vllm serve, uvx vllm serve
        starts = [place for place, pair in enumerate(pairwise(words)) if pair == ("vllm", "serve")]
        return words[starts[0] + 2 :] if starts else None
    return None


def _of_container(words: list[str], program: str) -> VllmCommand | str:
    """Returns the command in a container of vLLM's image. Paths in the container become those of the host."""
    variables: dict[str, str] = {}
    mounts: dict[str, str] = {}
    notes: list[str] = []
    image = len(words)
    place = 0
    while place < len(words):
        word, _, value = words[place].partition("=")
        if not word.startswith("-"):
            image = place
            break
        place += 1
        if word in DOCKER_VALUES and not value and place < len(words):
            value = words[place]
            place += 1
        _add_option(word, value, variables, mounts, notes)
    if image == len(words) or _IMAGE.search(words[image]) is None:
        return f"{program} run {words[image] if image < len(words) else ''}".strip()
    rest = words[image + 1 :]
    inner = _without_program(rest)
    found = _of_arguments(rest if inner is None else inner)
    if isinstance(found, str):
        return found
    model, moved = _on_host(found.model, mounts)
    notes += [f"the model {found.model} is {model} outside of the container."] if moved else []
    return replace(found, model=model, variables=variables, notes=(*notes, *found.notes))


def _add_option(option: str, value: str, variables: dict[str, str], mounts: dict[str, str], notes: list[str]) -> None:
    if option in ("-e", "--env"):
        name, equals, text = value.partition("=")
        if equals:
            variables[name] = text
        else:
            notes.append(f"{option} {name}: set {name} where Ray starts.")
    elif option in ("-v", "--volume"):
        source, _, target = value.partition(":")
        mounts[target.partition(":")[0].rstrip("/")] = source.rstrip("/")
    elif option == "--gpus" and value.strip("'\"") != "all":
        notes.append(f"--gpus {value}: the pool's GPUs are those that pool_memory names.")
    elif option == "--env-file":
        notes.append(f"--env-file {value}: this file is not read. Set its variables where Ray starts.")


def _on_host(model: str, mounts: Mapping[str, str]) -> tuple[str, bool]:
    """Returns the path of a model outside of a container, and whether it is another one."""
    for target, source in sorted(mounts.items(), key=lambda item: -len(item[0])):
        if target and (model == target or model.startswith(f"{target}/")):
            return source + model[len(target) :], True
    return model, False


def _of_arguments(words: list[str]) -> VllmCommand | str:
    """Returns the arguments of `vllm serve`, whose model is the word without a name, or `--model`."""
    arguments: dict[str, tuple[str, ...]] = {}
    notes, model, place = list[str](), "", 0
    while place < len(words):
        word = words[place]
        place += 1
        if not _is_name(word):
            notes += [f"'{word}' stands without an argument's name, and is not read."] if model else []
            model = model or word
            continue
        name, equals, value = word.partition("=")
        name = SHORT.get(name, name).lstrip("-")
        first, dot, rest = name.partition(".")
        name = first.replace("-", "_") + dot + rest
        values = [value] if equals else []
        most = 0 if equals or _is_flag(name) else len(words) if name in LISTS else 1
        while most > len(values) and place < len(words) and not _is_name(words[place]):
            values.append(words[place])
            place += 1
        notes += [f"--{name}: it is given twice. The last one counts, as in vLLM."] if name in arguments else []
        arguments[name] = tuple(values)
    model = "".join(arguments.pop("model", ())) or model
    return VllmCommand(model, arguments, notes=tuple(notes)) if model else "vllm serve without a model"


def _is_name(word: str) -> bool:
    """Returns whether a word is the name of an argument, and not a negative number."""
    return word.startswith("-") and re.fullmatch(r"-\d+(\.\d+)?", word) is None and len(word) > 1


def _is_flag(name: str) -> bool:
    return name in FLAGS or name.removeprefix("no_") in FLAGS
