"""Reads from a Ray Serve config file which applications are models, and how many replicas they have."""

import re
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from serve_app.config import ModelConfig, RouterConfig
from serve_app.errors import ConfigError, nearest
from serve_app.field_errors import field_errors
from serve_app.model_fields import LiveFields, Whole

# People write these for `args`, and so they do words that are near it, such as `arguments`.
FOREIGN_ARGS = ("params", "parameters", "config")
# A model's name is part of its route, of the paths of log files and of the ids of replicas, where "/" and "#" separate.
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._~:@+=,-]*")
# HAProxy gets a route prefix as it stands in its config file, where a space, a quote or "#" would end it.
ROUTE_PREFIX = re.compile(r"/|(/[A-Za-z0-9._~:@+=,-]+)+")


class DeploymentSpec(BaseModel):
    """This is the part of an application's `deployments:` that says how many replicas there are."""

    model_config = ConfigDict(frozen=True)

    name: str = ""
    num_replicas: Annotated[Whole, Field(ge=0, le=100_000)] | Literal["auto"] | None = None
    autoscaling_config: dict[str, Any] | Literal["auto"] | None = None
    user_config: dict[str, Any] | None = None

    @model_validator(mode="after")
    def _counts_are_counts(self) -> Self:
        if isinstance(self.autoscaling_config, dict):
            least = self.autoscaling_config.get("min_replicas", 1)
            if not isinstance(least, int) or isinstance(least, bool) or not 0 <= least <= 100_000:
                raise ValueError(f"autoscaling_config.min_replicas: {least!r} is not a number of replicas.")
        return self


class ApplicationSpec(BaseModel):
    """This is an application of a Serve config file, with the parts that this project reads."""

    model_config = ConfigDict(frozen=True)

    name: str
    import_path: str
    route_prefix: str | None = None
    args: dict[str, Any] = Field(default_factory=dict)
    deployments: list[DeploymentSpec] = Field(default_factory=list)

    @model_validator(mode="before")
    @classmethod
    def _args_are_called_args(cls, item: Any) -> Any:
        """Raises ValueError for another word for `args`. Without it, the model's fields would be missing. Other unknown
        keys are compared with Serve's own schema."""
        if isinstance(item, dict) and "args" not in item:
            for key in item:
                if key in FOREIGN_ARGS or nearest(key, ("args",)):
                    raise ValueError(f"unknown key '{key}'. Did you mean 'args'?")
        return item

    @model_validator(mode="after")
    def _name_is_a_name(self) -> Self:
        is_ours = self.import_path.startswith("serve_app.")
        if "/" in self.name or (is_ours and NAME.fullmatch(self.name) is None):
            raise ValueError(
                f"name: {self.name!r} must begin with a letter or digit and may have letters, digits and ._~:@+=,- "
                f"after it. Write {_as_name(self.name)}."
            )
        return self

    @model_validator(mode="after")
    def _route_is_a_route(self) -> Self:
        if self.route_prefix is not None and ROUTE_PREFIX.fullmatch(self.route_prefix) is None:
            raise ValueError(
                f"route_prefix: {self.route_prefix!r} must begin with '/', must not end with '/', and may have "
                f"letters, digits and ._~:@+=,- between them. Write {_as_route(self.route_prefix)}."
            )
        return self

    @property
    def least_replicas(self) -> int:
        """Returns the least number of replicas, which is `num_replicas` or `min_replicas`. Zero counts as one."""
        for deployment in self.deployments:
            if isinstance(deployment.num_replicas, int):
                return max(1, deployment.num_replicas)
            if isinstance(deployment.autoscaling_config, dict):
                return max(1, int(deployment.autoscaling_config.get("min_replicas", 1)))
        return 1

    @property
    def is_model(self) -> bool:
        """Returns whether the application serves a model of ours."""
        return self.import_path == "serve_app.app:model"

    @property
    def is_router(self) -> bool:
        """Returns whether the application is our router."""
        return self.import_path == "serve_app.app:router"

    @property
    def _user_config(self) -> dict[str, Any]:
        return {name: value for item in self.deployments for name, value in (item.user_config or {}).items()}

    def router_settings(self) -> RouterConfig:
        """Returns the router's config with the fields that `user_config` replaces. Raises ConfigError."""
        return RouterConfig.from_args(self.args | self._user_config)

    def model_settings(self) -> ModelConfig:
        """Returns the model's config with the adapters that `user_config` replaces. Raises ConfigError that names the
        application."""
        try:
            config, live = ModelConfig.from_args(self.args), self._user_config
            for name in LiveFields.model_fields.keys() & live.keys() & self.args.keys():
                raise ConfigError(
                    f"{name}: it is under 'args' and under 'user_config', which would replace it. Write it in one of "
                    "the two places."
                )
            return config.with_live(live)
        except ConfigError as error:
            raise ConfigError("\n".join(f"{self.name}: {line}" for line in str(error).splitlines())) from None


def read_applications(path: Path) -> list[ApplicationSpec]:
    """Returns the applications of a Ray Serve config file. Raises ConfigError if it cannot be read."""
    try:
        document = yaml.safe_load(path.read_text())
    except UnicodeDecodeError:
        raise ConfigError(f"{path}: the file is not UTF-8 text.") from None
    except IsADirectoryError:
        holds_model = (path / "config.json").exists()
        hint = f" To plan the model in it, give --model {path}." if holds_model else ""
        raise ConfigError(f"{path}: this is a folder. A Ray Serve config file (YAML) is needed.{hint}") from None
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}.") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: the file is not valid YAML: {' '.join(str(error).split())}") from None
    except (ValueError, RecursionError) as error:  # A number or a date is none, or lists are nested too deep.
        why = "it is nested too deep" if isinstance(error, RecursionError) else " ".join(str(error).split())
        why = "a number has too many digits" if "integer string conversion" in why else why
        raise ConfigError(f"{path}: the file is not valid YAML: {why}") from None
    if not isinstance(document, dict) or not isinstance(document.get("applications"), list):
        raise ConfigError(f"{path}: the file is not a Ray Serve config file, because it has no list of 'applications'.")
    applications, problems = [], []
    for number, item in enumerate(document["applications"]):
        try:
            applications.append(ApplicationSpec.model_validate(item))
        except ValidationError as error:
            name = item.get("name") if isinstance(item, dict) else None
            where = f"applications[{number}]" + (f" ({name})" if isinstance(name, str) else "")
            problems += [f"{path}: {where}: {line}" for line in field_errors(error.errors(), item)]
    if problems:
        raise ConfigError("\n".join(problems))
    names = [application.name for application in applications]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ConfigError(f"{path}: the name '{twice[0]}' appears twice. Each application needs a name of its own.")
    return applications


def _as_route(prefix: str) -> str:
    """Returns the route that was probably meant."""
    return "/" + "/".join(_as_name(part) for part in prefix.split("/") if part)


def _as_name(text: str) -> str:
    """Returns the name that was probably meant."""
    return re.sub(r"[^A-Za-z0-9._~:@+=,-]+", "-", text).strip("._~:@+=,-") or "model"
