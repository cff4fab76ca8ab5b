"""What the person at the terminal reads."""

import json
import shlex

from serve_app.router.announcer import still_loading, summary
from serve_app.router.model_status import ModelStatus

READY = ModelStatus("a", "ready", 1)
FAILED = ModelStatus("b", "failed", 0, "needs 2 GPUs")


def test_the_curl_line_can_be_pasted() -> None:
    """A shell splits it into an address, a header and a JSON body with the first ready model."""
    lines = summary({"b": FAILED, "a": READY}, "http://127.0.0.1:8000")
    words = shlex.split(lines[1].removeprefix("try: "))
    assert words[:2] == ["curl", "http://127.0.0.1:8000/v1/chat/completions"]
    assert json.loads(words[-1])["model"] == "a"


def test_failures_are_listed_with_their_reasons() -> None:
    """And with what to do next."""
    lines = summary({"a": READY, "b": FAILED}, "u")
    assert lines[0] == "1 of 2 models serve at u"
    assert "  b: needs 2 GPUs" in lines
    assert "serve deploy" in lines[-1]


def test_without_a_ready_model_there_is_nothing_to_try() -> None:
    """No curl line that cannot work."""
    assert not any("curl" in line for line in summary({"b": FAILED}, "u"))


def test_each_model_has_the_time_for_which_it_has_been_loading() -> None:
    """One that was deployed later has a shorter one."""
    assert still_loading({"a": 10.0, "b": 100.4}, 140.0) == "still loading: a (130 s), b (40 s)"
