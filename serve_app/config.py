"""Defines what a user writes: one `ModelConfig` for each model and one `RouterConfig`, both as `args` in a Ray Serve
config file. Nothing is accepted and then ignored.
"""

from collections.abc import Mapping
from typing import Annotated, Any, Self

from pydantic import Field, model_validator

from serve_app.backend_fields import backend_problem
from serve_app.errors import ConfigError
from serve_app.model_fields import (
    BODY_TIMEOUT_S,
    MAX_BODY_BYTES,
    Flag,
    LiveFields,
    ModelFields,
    Positive,
    Seconds,
    Strict,
    Whole,
)

# All bodies together that a router replica holds at one time, if its config does not say.
MAX_BODIES_BYTES = 2**30


class ModelConfig(ModelFields):
    """This is a model whose fields agree with its backend, with its device and with each other."""

    @model_validator(mode="after")
    def _fits_the_backend(self) -> Self:
        if (problem := backend_problem(self)) is not None:
            raise ValueError(problem)
        return self

    def with_live(self, user_config: Mapping[str, Any] | None) -> "ModelConfig":
        """Returns the config with the fields of a deployment's `user_config`, which changes while replicas run. Raises
        ConfigError with a line for each mistake."""
        given = dict(user_config or {})
        for name in given.keys() & (ModelFields.model_fields.keys() - LiveFields.model_fields.keys()):
            raise ConfigError(
                f"user_config.{name}: this field does not change while replicas run. Set it under 'args'. user_config "
                f"of a model may have {' and '.join(LiveFields.model_fields)}."
            )
        try:
            live = LiveFields.from_args(given)
        except ConfigError as error:
            raise ConfigError("\n".join(f"user_config: {line}" for line in str(error).splitlines())) from None
        if live.adapters and not self.has_adapters:
            raise ConfigError(
                "user_config.adapters: the model has no room for adapters, because memory for them is reserved at its "
                "start. Set max_loras and max_lora_rank under 'args', such as max_loras: 4 and max_lora_rank: 16."
            )
        return self.model_copy(update=live.model_dump(exclude_none=True))

    @property
    def draft(self) -> "ModelConfig | None":
        """Returns the config of the model that drafts for this one in pt, or None if none does. It runs beside this
        one on one of its devices, and takes the `dtype` that this one is told to take. Its KV cache is in its own type
        whatever `kv_cache_dtype` is."""
        spec = self.speculative
        if spec is None or spec.model is None:
            return None
        return ModelConfig(
            model=spec.model,
            infer_backend="pt",
            revision=spec.revision,
            trust_remote_code=self.trust_remote_code,
            dtype=self.dtype,
            device=self.device,
            max_num_seqs=self.max_num_seqs,
            quantization=spec.quantization,
            num_cpus=self.num_cpus,
        )


class RouterConfig(Strict):
    """This is the router: its names, limits and waiting. Sizes are in bytes and times in seconds, and all hold for each
    router replica.

    `aliases` are other names of models, and `fallbacks` are the models that answer for one that is down or full.
    `first_byte_timeout_s` is a whole answer's time if it is not streamed. `max_retries` bounds how often a request is
    sent again, or a stream is continued, after its replica was lost. `max_waiting_requests` may wait for their
    first byte at one model, and `max_held_requests` of them for a model that is loading, for `hold_timeout_s`.
    `max_bodies_bytes` bounds all bodies together that a router replica holds at one time. `allow_open_access` says that
    the address is meant to be open, without API keys, to other machines. `console` says whether the console answers at
    /ui, which is None where that follows from the address and the keys, and `console_keeps_prompts` whether it shows
    the beginning of prompts.
    """

    allow_open_access: Flag = False
    aliases: dict[str, str] = Field(default_factory=dict)
    default_model: str | None = None
    fallbacks: dict[str, list[str]] = Field(default_factory=dict)
    max_body_bytes: Positive = MAX_BODY_BYTES
    max_bodies_bytes: Positive = MAX_BODIES_BYTES
    max_header_bytes: Positive = 32 * 2**10
    body_timeout_s: Seconds = BODY_TIMEOUT_S
    first_byte_timeout_s: Seconds = 600.0
    idle_timeout_s: Seconds = 300.0
    total_timeout_s: Seconds = 3600.0
    max_retries: Annotated[Whole, Field(ge=0)] = 3
    max_waiting_requests: Positive = 1024
    max_held_requests: Annotated[Whole, Field(ge=0)] = 256
    hold_timeout_s: Seconds = 300.0
    discovery_interval_s: Seconds = 2.0
    console: Flag | None = None
    console_keeps_prompts: Flag = False

    @model_validator(mode="after")
    def _names_lead_somewhere(self) -> Self:
        for alias, name in self.aliases.items():
            if name in self.aliases:
                raise ValueError(f"aliases.{alias}: '{name}' is itself an alias. Name the model.")
        return self
