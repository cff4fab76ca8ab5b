"""Says when a step that does not end counts as a hang."""

from serve_app.config import ModelConfig

STEP_TIMEOUT_S = 60.0
SLOW_STEP_TIMEOUT_S = 600.0


def step_timeout_s(config: ModelConfig) -> float:
    """Returns the seconds after which a step that has not ended counts as a hang. They are ten times longer if weights
    come from the host's memory or disk in every step, or if the processor computes."""
    if config.step_timeout_s is not None:
        return config.step_timeout_s
    return SLOW_STEP_TIMEOUT_S if config.device == "cpu" or config.spill_tiers else STEP_TIMEOUT_S
