"""Finds the models that may answer for the name that a client writes, by aliases, the default, and fallbacks."""

from serve_app.config import RouterConfig
from serve_app.errors import InvalidRequest


def candidates(config: RouterConfig, name: str | None) -> list[str]:
    """Returns the models to try in this order: the one that is meant, then those that stand in for it.

    An alias may be among another one's fallbacks, but none is followed twice. Raises InvalidRequest if there is neither
    a name nor a default model.
    """
    if name is None:
        if config.default_model is None:
            raise InvalidRequest("The field 'model' is missing. GET /v1/models lists the models.", param="model")
        name = config.default_model
    meant = config.aliases.get(name, name)
    stand_ins = config.fallbacks.get(name) or config.fallbacks.get(meant) or []
    return list(dict.fromkeys([meant, *(config.aliases.get(other, other) for other in stand_ins)]))
