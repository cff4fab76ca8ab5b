"""Has the tags that chat templates write around a model's thinking."""

# The tags of Qwen3, DeepSeek-R1, GLM and most others; Magistral; Seed-OSS; Kimi-VL; Ernie and InternLM.
KNOWN_TAGS = (
    ("<think>", "</think>"),
    ("[THINK]", "[/THINK]"),
    ("<seed:think>", "</seed:think>"),
    ("◁think▷", "◁/think▷"),
    ("<thinking>", "</thinking>"),
)


def open_tag(prompt: str) -> tuple[str, str] | None:
    """Returns the opening and the closing tag of the thinking that the end of a prompt has begun, or None."""
    end = prompt[-256:].rstrip()
    return next((tags for tags in KNOWN_TAGS if end.endswith(tags[0])), None)
