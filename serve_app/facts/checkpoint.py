"""Where a model's files are."""

from pathlib import Path

from serve_app.config import ModelConfig
from serve_app.errors import ConfigError

# The id of the model that ships with this package.
DEMO_MODEL = "serve-app/demo"


def with_absolute_paths(config: ModelConfig) -> ModelConfig:
    """The config with its local paths made absolute: replicas may run in another folder. Raises ConfigError."""
    template = config.chat_template
    if template is not None:
        file = Path(template).expanduser()
        if not file.is_file():
            raise ConfigError(f"chat_template: there is no file {file.absolute()}.")
        template = str(file.absolute())
    return config.model_copy(update={"model": model_path(config.model), "chat_template": template})


def model_path(model: str) -> str:
    """The folder of a local model, absolute, or the Hugging Face id as it stands.

    Raises ConfigError for what can only be meant as a folder and is none with a config.json.
    """
    if model == DEMO_MODEL:
        from serve_app.demo import MODEL_DIR

        return str(MODEL_DIR)
    folder = Path(model).expanduser()
    if (folder / "config.json").is_file():
        return str(folder.absolute())
    if folder.is_dir():
        raise ConfigError(
            f"model: the folder {folder.absolute()} has no config.json, so it holds no Hugging Face model."
        )
    if model.startswith(("/", ".", "~")) or model.count("/") > 1:
        raise ConfigError(f"model: there is no folder {folder.absolute()}. Write a local folder or a Hugging Face id.")
    return model
