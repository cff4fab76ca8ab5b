"""Reads from a Ray Serve config file which applications are models, and how many replicas they have."""

from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from serve_app.config import ModelConfig, RouterConfig, explain
from serve_app.errors import ConfigError


class DeploymentSpec(BaseModel):
    """This is the part of an application's `deployments:` that says how many replicas there are."""

    model_config = ConfigDict(frozen=True)

    name: str = ""
    num_replicas: Annotated[int, Field(ge=0, le=100_000)] | Literal["auto"] | None = None
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
    args: dict[str, Any] = Field(default_factory=dict)
    deployments: list[DeploymentSpec] = Field(default_factory=list)

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

    def router_settings(self) -> RouterConfig:
        """Returns the router's config with the fields that `user_config` replaces. Raises ConfigError."""
        changed = {name: value for item in self.deployments for name, value in (item.user_config or {}).items()}
        return RouterConfig.from_args(self.args | changed)

    def model_settings(self) -> ModelConfig:
        """Returns the model's config. Raises ConfigError that names the application."""
        try:
            return ModelConfig.from_args(self.args)
        except ConfigError as error:
            raise ConfigError("\n".join(f"{self.name}: {line}" for line in str(error).splitlines())) from None


def read_applications(path: Path) -> list[ApplicationSpec]:
    """Returns the applications of a Ray Serve config file. Raises ConfigError if it cannot be read."""
    try:
        document = yaml.safe_load(path.read_text())
    except UnicodeDecodeError:
        raise ConfigError(f"{path}: the file is not UTF-8 text.") from None
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}.") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: the file is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(document, dict) or not isinstance(document.get("applications"), list):
        raise ConfigError(f"{path}: the file is not a Ray Serve config file, because it has no list of 'applications'.")
    try:
        applications = [ApplicationSpec.model_validate(item) for item in document["applications"]]
    except ValidationError as error:
        lines = [f"{path}: applications.{explain(item)}" for item in error.errors()]
        raise ConfigError("\n".join(lines)) from None
    names = [application.name for application in applications]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ConfigError(f"{path}: the name '{twice[0]}' appears twice. Each application needs a name of its own.")
    return applications
