"""Where a model's files are."""

from pathlib import Path

from serve_app.errors import ConfigError

# The id of the model that ships with this package.
DEMO_MODEL = "serve-app/demo"


def model_path(model: str) -> str:
    """The folder of a local model, absolute, or the Hugging Face id as it stands.

    Raises ConfigError for what can only be meant as a folder and is none with a config.json.
    """
    if model == DEMO_MODEL:
        from serve_app.demo import MODEL_DIR

        return str(MODEL_DIR)
    folder = Path(model).expanduser()
    if (folder / "config.json").is_file():
        return str(folder.resolve())
    if folder.is_dir():
        raise ConfigError(
            f"model: the folder {folder.resolve()} has no config.json, so it holds no Hugging Face model."
        )
    if model.startswith(("/", ".", "~")) or model.count("/") > 1:
        raise ConfigError(f"model: there is no folder {folder.resolve()}. Write a local folder or a Hugging Face id.")
    return model
