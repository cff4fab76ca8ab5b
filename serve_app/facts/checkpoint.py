"""Finds a model's files and reads its shape and size from them. It never reads weights."""

import os
import socket
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from textwrap import shorten
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies

from serve_app.config import ModelConfig
from serve_app.errors import ConfigError
from serve_app.facts.architecture import Architecture, read_architecture
from serve_app.facts.field_kind import shown
from serve_app.facts.foreign_file import FileMissing, read_object
from serve_app.facts.pooling import Pooling, read_pooling
from serve_app.facts.side_files import Find, in_folder, on_hub
from serve_app.facts.weights import Tensor, hub_tensors, local_tensors

# A hub that takes no connection within this many seconds counts as unreachable.
HUB_TIMEOUT_S = 5.0
# A message repeats this many letters of the hub client's own words.
MOST_REASON = 300
# A config.json has some kilobytes. Lists of words or of layers that are not quantised can make it some megabytes.
MOST_CONFIG_BYTES = 8 * 2**20
# The model that ships with this package has this id.
DEMO_MODEL = "serve-app/demo"


def with_absolute_paths(config: ModelConfig) -> ModelConfig:
    """Returns the config with absolute local paths, because replicas may run in another folder. Raises ConfigError."""
    template = config.chat_template
    if template is not None:
        file = Path(template).expanduser()
        if not file.is_file():
            raise ConfigError(f"chat_template: there is no file {file.absolute()}.")
        template = str(file.absolute())
    speculative = config.speculative
    if speculative is not None and speculative.model is not None:
        speculative = speculative.model_copy(update={"model": draft_path(speculative.model)})
    folder = config.adapters_folder
    own = {
        "model": model_path(config.model),
        "chat_template": template,
        "speculative": speculative,
        "adapters": {name: _absolute_folder(source) for name, source in config.adapters.items()},
        "adapters_folder": None if folder is None else os.path.abspath(os.path.expanduser(folder)),
    }
    return config.model_copy(update=own)


def _absolute_folder(source: str) -> str:
    """Returns the absolute path of a folder that exists, and anything else as it is, which may be a Hugging Face id."""
    folder = os.path.expanduser(source)
    return os.path.abspath(folder) if os.path.isdir(folder) else source


def draft_path(model: str) -> str:
    """Returns what `model_path` does for a draft model. Its ConfigError names the field `speculative.model`."""
    try:
        return model_path(model)
    except ConfigError as error:
        raise ConfigError(f"speculative.{error}") from None


def model_path(model: str) -> str:
    """Returns the absolute folder of a local model, or the Hugging Face id as it is.

    Raises ConfigError for a text that can only mean a folder if that has no config.json.
    """
    if model == DEMO_MODEL:
        from serve_app.demo import MODEL_DIR

        return str(MODEL_DIR)
    folder = Path(os.path.expanduser(model))  # pathlib's own raises for a user who does not exist.
    if os.path.lexists(folder / "config.json"):  # Whether it is a regular file is checked when it is read.
        return str(folder.absolute())
    if os.path.isdir(folder):  # pathlib's own raises for a name that is too long.
        raise ConfigError(
            f"model: the folder {folder.absolute()} has no config.json, so it holds no Hugging Face model."
        )
    if model.startswith(("/", ".", "~")) or model.count("/") > 1:
        raise ConfigError(f"model: there is no folder {folder.absolute()}. Write a local folder or a Hugging Face id.")
    return model


@dataclass(frozen=True)
class Checkpoint:
    """This is the shape of a model, and the tensors of its files. `config` is the decoded config.json, and `folder` is
    where it lies: the local folder, or the snapshot in the hub's cache. `pooling` says how it makes vectors or scores,
    and is None for a model that generates text."""

    architecture: Architecture
    tensors: tuple[Tensor, ...]
    config: Mapping[str, Any]
    folder: Path | None = None
    pooling: Pooling | None = None

    @property
    def lacks_tensors(self) -> bool:
        """Returns whether the plan needs the tensors that the config.json would make, because there are no files. It
        has no use for them if the architecture has no formulas or the weights are quantised, because those that would
        be made are whole. Engines say themselves what a model without text takes."""
        has_use = self.architecture.has_formulas and self.architecture.quantization is None and self.pooling is None
        return not self.tensors and has_use


def read_checkpoint(model: str, revision: str | None = None) -> Checkpoint:
    """Returns what a local folder holds, or asks the Hugging Face hub for config.json and headers.

    Without safetensors files there are no tensors. If `lacks_tensors` is true then, the plan needs those that the
    config.json would make. Raises ConfigError.
    """
    path = model_path(model)
    folder = Path(path)
    if os.path.isdir(folder):
        config, tensors, find = _local_config(folder), local_tensors(folder), in_folder(folder)
    else:
        folder, tensors = _from_hub(path, revision)
        config, find = _local_config(folder), _on_hub(path, revision)
    where = f"model: {model}"
    architecture = read_architecture(config, where)
    pooling = read_pooling(config, find, architecture.max_model_len, where)
    if pooling is not None:
        architecture = replace(architecture, max_model_len=pooling.length)
    return Checkpoint(architecture, tuple(tensors), config, folder, pooling)


def read_own_pooling(model: str, revision: str | None) -> Pooling | None:
    """Returns how a model makes vectors or scores, or None for one that generates text, and for one whose config.json
    cannot be read, of which its engine says why. Raises ConfigError for other files of it that say what pt cannot
    serve."""
    try:
        path = model_path(model)
        find = side_files(path, revision)
        file = find("config.json")
        config = {} if file is None else read_object(file, MOST_CONFIG_BYTES)
        length = read_architecture(config, f"model: {model}").max_model_len if config else 0
    except ConfigError:
        return None
    return read_pooling(config, find, length, f"model: {model}") if config else None


def side_files(model: str, revision: str | None) -> Find:
    """Returns how the files beside a model's config.json are found. `model` is as `model_path` returns it."""
    folder = Path(model)
    return in_folder(folder) if os.path.isdir(folder) else _on_hub(model, revision)


def _on_hub(model: str, revision: str | None) -> Find:
    return on_hub(model, revision, cache(partial(_hub_answers, model)))


def _hub_answers(model: str) -> bool:
    try:
        require_hub(model)
    except ConfigError:
        return False
    return True


def _local_config(folder: Path) -> Mapping[str, Any]:
    return read_object(folder / "config.json", MOST_CONFIG_BYTES)


def _from_hub(model: str, revision: str | None) -> tuple[Path, list[Tensor]]:
    """Returns the folder of config.json in the hub's cache, and the tensors: from that cache if it has the whole model,
    or else by the hub's metadata calls."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        file = Path(hf_hub_download(model, "config.json", revision=revision, local_files_only=True))
        if tensors := local_tensors(file.parent):
            return file.parent, tensors
    except (LocalEntryNotFoundError, FileMissing):
        pass  # The cache does not have the whole model.
    except HFValidationError as error:
        reason = shorten(str(error), MOST_REASON, placeholder=" …")
        raise ConfigError(f"model: {shown(model)} is neither a local folder nor a Hugging Face id: {reason}") from None
    require_hub(model)
    try:
        file = Path(hf_hub_download(model, "config.json", revision=revision))
        return file.parent, hub_tensors(model, revision)
    except ConfigError:
        raise  # It names the file already.
    except Exception as error:
        reason = shorten(str(error), MOST_REASON, placeholder=" …")
        raise ConfigError(f"model: {model} cannot be read from the Hugging Face hub: {reason}") from None


def require_hub(model: str) -> None:
    """Raises ConfigError if the hub cannot be reached, because its own client would try for half a minute.

    A client that is offline by its settings, or that uses a proxy, finds out by itself.
    """
    from huggingface_hub import constants

    address = urlsplit(constants.ENDPOINT)
    proxies = getproxies()
    uses_proxy = bool(proxies.get(address.scheme) or proxies.get("all"))
    if constants.HF_HUB_OFFLINE or address.hostname is None or uses_proxy:
        return
    try:
        port = address.port or (80 if address.scheme == "http" else 443)
        socket.create_connection((address.hostname, port), HUB_TIMEOUT_S).close()
    except OSError as error:
        raise ConfigError(
            f"model: {model} is neither a local folder nor in the hub's cache, and the Hugging Face hub "
            f"({constants.ENDPOINT}) cannot be reached: {error.strerror or error}. Write the path of a folder, or "
            f"download the model on a machine that reaches the hub: hf download {model}"
        ) from None
