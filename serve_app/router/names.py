"""Finds the models that may answer for the name that a client writes, by aliases, the default, and fallbacks."""

from serve_app.config import RouterConfig
from serve_app.errors import InvalidRequest


def meant_by(config: RouterConfig, name: str | None) -> str:
    """Returns the name of the model that is meant, of which an adapter is one. Raises InvalidRequest if there is
    neither a name nor a default model."""
    if name is None:
        if config.default_model is None:
            raise InvalidRequest("The field 'model' is missing. GET /v1/models lists the models.", param="model")
        name = config.default_model
    return config.aliases.get(name, name)


def stand_ins(config: RouterConfig, *spellings: str | None) -> list[str]:
    """Returns the models that stand in for one, which may be written in any of these ways, of which the first with
    fallbacks counts. An alias may be among another one's fallbacks, but none is followed twice."""
    others = next((config.fallbacks[name] for name in spellings if name is not None and config.fallbacks.get(name)), [])
    return [config.aliases.get(other, other) for other in others]
