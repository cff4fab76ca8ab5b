"""API keys: reading them, finding one, and a file that changes."""

import hashlib
import logging
import os
from pathlib import Path

import pytest

from serve_app.access import keys as keys_module
from serve_app.access.keys import ApiKey, KeyRing, KeySource, configured_keys, read_keys, sha256_of
from serve_app.access.limits import KeyLimits
from serve_app.errors import ConfigError, Forbidden, Unauthorized
from serve_app.wire.asked_model import Asked


class Clock:
    """Seconds that pass when told."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        """As `time.monotonic`."""
        return self.now


LONG = "sk-long-enough-to-be-no-guess"


def ring(**models: tuple[str, ...] | None) -> KeyRing:
    """A ring in which the key of each name is `sk-NAME`."""
    return KeyRing([ApiKey(name=name, sha256=sha256_of(f"sk-{name}"), models=of) for name, of in models.items()])


def keys_file(folder: Path, text: str) -> Path:
    """A keys file with this text, where H1 and H2 stand for the hashes of sk-1 and sk-2."""
    file = folder / "keys.yaml"
    file.write_text(text.replace("H1", sha256_of("sk-1")).replace("H2", sha256_of("sk-2")))
    return file


def mistakes(folder: Path, text: str) -> str:
    """What is said of a wrong file."""
    with pytest.raises(ConfigError) as caught:
        read_keys(keys_file(folder, text), {})
    return str(caught.value)


def test_a_file_is_read_with_all_its_fields(tmp_path: Path) -> None:
    """Models and limits are optional, and a hash may be written in capitals."""
    text = (
        "keys:\n"
        "- {name: team-a, sha256: H1, models: [a, b], requests_per_minute: 60, tokens_per_minute: 10000,\n"
        "   max_concurrent_requests: 4}\n"
        f"- {{name: team-b, sha256: {sha256_of('sk-2').upper()}}}\n"
    )
    first, second = read_keys(keys_file(tmp_path, text), {})
    assert (first.name, first.models, first.limits) == ("team-a", ("a", "b"), KeyLimits(60, 10000, 4))
    assert (second.models, bool(second.limits)) == (None, False)
    assert KeyRing([first, second]).find(b"Bearer sk-2") is second


def test_keys_of_the_environment_are_hashed_and_have_no_limits() -> None:
    """Their names are their places."""
    first, second = read_keys(None, {"SERVE_APP_API_KEYS": f" {LONG}1 , {LONG}2"})
    assert (first.name, second.name, bool(first.limits)) == ("env:0", "env:1", False)
    assert first.sha256 == hashlib.sha256(f"{LONG}1".encode()).hexdigest()
    assert KeyRing([first, second]).find(f"Bearer {LONG}2".encode()) is second


@pytest.mark.parametrize("header", [b"Bearer sk-a", b"bearer sk-a", b"  BEARER   sk-a "])
def test_a_key_is_found_by_its_bearer_header(header: bytes) -> None:
    """The scheme's case and spaces around do not matter."""
    assert ring(b=None, a=None).find(header).name == "a"


def test_a_key_is_found_by_the_other_header() -> None:
    """x-api-key counts where there is no bearer token, and only there."""
    both = ring(a=None, b=None)
    assert both.find(None, b"sk-a").name == "a"
    assert both.find(b"Basic dXNlcjpwYXNz", b"sk-a").name == "a"
    assert both.find(b"Bearer sk-b", b"sk-a").name == "b"
    with pytest.raises(Unauthorized):
        both.find(b"Bearer wrong", b"sk-a")


@pytest.mark.parametrize(
    ("header", "words"),
    [
        (None, "No API key"),
        (b"", "No API key"),
        (b"Bearer", "No API key"),
        (b"Bearer ", "No API key"),
        (b"Basic sk-a", "No API key"),
        (b"sk-a", "No API key"),
        (b"Bearer sk-A", "not known"),
        (b"Bearer sk-a sk-a", "not known"),
        (b"Bearer \xff\x00", "not known"),
    ],
)
def test_anything_else_is_refused_as_openai_does(header: bytes | None, words: str) -> None:
    """401, with the code and the header that clients know, and without the key in the message."""
    with pytest.raises(Unauthorized, match=words) as caught:
        ring(a=None).find(header)
    error = caught.value
    assert (error.status, error.type, error.code) == (401, "invalid_request_error", "invalid_api_key")
    assert error.headers == (("www-authenticate", "Bearer"),)
    assert "sk-" not in error.message


def test_the_hash_of_a_key_is_no_key() -> None:
    """Who reads the file cannot enter with what stands in it."""
    with pytest.raises(Unauthorized):
        ring(a=None).find(b"Bearer " + sha256_of("sk-a").encode())


def test_every_key_is_compared_in_constant_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first key's holder waits as long as the last one's."""
    compared = []

    def compare(known: bytes, shown: bytes) -> bool:
        compared.append(known)
        return known == shown

    three = ring(a=None, b=None, c=None)
    monkeypatch.setattr(keys_module.hmac, "compare_digest", compare)
    assert three.find(b"Bearer sk-a").name == "a"
    assert len(compared) == 3


def test_a_key_opens_only_its_models() -> None:
    """403 with the field to blame; without a list it opens all."""
    some = ring(a=("x", "y"), b=None)
    first, second = some.keys
    first.require(Asked("y"))
    second.require(Asked("z"))
    with pytest.raises(Forbidden, match="'a' may not use the model 'z', only x, y") as caught:
        first.require(Asked("z"))
    error = caught.value
    assert (error.status, error.code, error.param) == (403, "model_not_allowed", "model")


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ("{name: a}", "keys[0].sha256: it is missing. Make the hash with: printf"),
        ("{sha256: H1}", "keys[0].name: it is missing"),
        ("{name: a b, sha256: H1}", "keys[0].name: must be 1 to 64 letters"),
        ("{name: 'env:0', sha256: H1}", "keys[0].name: must be 1 to 64 letters"),
        ("{name: 5, sha256: H1}", "keys[0].name: must be"),
        ("{name: a, sha256: sk-secret}", "keys[0].sha256: must be the 64 hex digits"),
        ("{name: a, sha256: H1, models: []}", "keys[0].models: must be a list of at least one"),
        ("{name: a, sha256: H1, models: x}", "keys[0].models: must be a list"),
        ("{name: a, sha256: H1, models: [1]}", "keys[0].models: must be a list"),
        ("{name: a, sha256: H1, role: root}", "keys[0].role: must be 'user' or 'admin'. Leave it out for a user."),
        ("{name: a, sha256: H1, role: [admin]}", "keys[0].role: must be 'user' or 'admin'. Leave it out for a user."),
        ("{name: a, sha256: H1, requests_per_minute: 0}", "keys[0].requests_per_minute: must be a whole number above"),
        ("{name: a, sha256: H1, tokens_per_minute: '9'}", "keys[0].tokens_per_minute: must be"),
        ("{name: a, sha256: H1, max_concurrent_requests: true}", "keys[0].max_concurrent_requests: must be"),
        (
            "{name: a, sha256: H1, request_per_minute: 1}",
            "unknown field 'request_per_minute'. Did you mean 'requests_p",
        ),
        ("{name: a, key: sk-secret}", "keys[0].key: plain keys are not stored. Write sha256 instead."),
        ("{name: a, sha256: H1, name: b}", "not valid YAML in line 2: 'name' is written twice"),
        ("sk-secret", "keys[0]: it must be a mapping"),
        ("{name: a, sha256: 'sk-secret}", "not valid YAML in line"),
        ("{name: a, sha256: H1, models: !x [sk-secret]}", "not valid YAML in line 2"),
    ],
)
def test_a_mistake_is_told_with_its_place_and_its_cure(tmp_path: Path, entry: str, words: str) -> None:
    """The message names file and field, and never shows a value: it may be a key in the wrong place."""
    message = mistakes(tmp_path, f"keys:\n- {entry}\n")
    assert words in message
    assert str(tmp_path / "keys.yaml") in message
    assert "secret" not in message


@pytest.mark.parametrize("text", ["", "[]", "key: []", "keys: {a: b}", "keys:"])
def test_a_file_without_a_list_is_no_keys_file(tmp_path: Path, text: str) -> None:
    """An empty file is a mistake and not an open door."""
    assert "has no list of 'keys'" in mistakes(tmp_path, text)


def test_all_mistakes_are_told_at_once(tmp_path: Path) -> None:
    """One line each, also for the top of the file."""
    lines = mistakes(tmp_path, "version: 1\nkeys:\n- {name: a}\n- {name: b, sha256: H1, x: 1}\n").splitlines()
    assert [word in line for word, line in zip(("version", "keys[0]", "keys[1]"), lines, strict=True)] == [True] * 3


def test_equal_names_and_equal_keys_are_refused(tmp_path: Path) -> None:
    """Also between the file and the environment, and whatever the case of the hash."""
    capitals = sha256_of("sk-1").upper()
    message = mistakes(tmp_path, f"keys:\n- {{name: a, sha256: H1}}\n- {{name: a, sha256: {capitals}}}\n")
    assert "keys[1].name: the name is also that of" in message
    assert "keys[1].sha256: the key is also that of" in message
    file = keys_file(tmp_path, f"keys: [{{name: a, sha256: {sha256_of(LONG)}}}]")
    with pytest.raises(ConfigError, match=r"SERVE_APP_API_KEYS\[0\].sha256: the key is also that of .*keys\[0\]"):
        read_keys(file, {"SERVE_APP_API_KEYS": LONG})


@pytest.mark.parametrize(
    "value", [",", f"{LONG},,{LONG}2", f"{LONG} {LONG}", f"{LONG}schlüssel", "sk-1", f"{LONG},sk-1"]
)
def test_a_wrong_environment_is_told_without_its_keys(value: str) -> None:
    """A comma alone is a mistake and not an open door; a short key could be guessed."""
    with pytest.raises(ConfigError, match=r"SERVE_APP_API_KEYS\[\d\]: ") as caught:
        KeySource(None, {"SERVE_APP_API_KEYS": value})
    assert "sk-" not in str(caught.value)
    assert "schl" not in str(caught.value)


@pytest.mark.parametrize("value", ["", " "])
@pytest.mark.parametrize("name", ["SERVE_APP_API_KEYS", "SERVE_APP_API_KEYS_FILE"])
def test_a_variable_that_is_set_and_empty_is_a_mistake(monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    """As from a secret that is missing on one node: it must not open that node's replicas."""
    monkeypatch.delenv("SERVE_APP_API_KEYS", raising=False)
    monkeypatch.delenv("SERVE_APP_API_KEYS_FILE", raising=False)
    monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=f"{name}: it is set but empty"):
        configured_keys()


def test_only_where_nothing_names_keys_the_door_is_open(tmp_path: Path) -> None:
    """An empty list in a file lets nobody in."""
    empty = keys_file(tmp_path, "keys: []")
    assert KeySource(None, {}).is_open
    assert not KeySource(None, {"SERVE_APP_API_KEYS": LONG}).is_open
    assert not KeySource(empty, {}).is_open
    with pytest.raises(Unauthorized):
        KeySource(empty, {}).ring.find(b"Bearer sk-1")


def test_a_missing_file_stops_the_start(tmp_path: Path) -> None:
    """It does not count as a file without keys."""
    with pytest.raises(ConfigError, match=r"none.yaml: No such file"):
        KeySource(tmp_path / "none.yaml", {})


def test_a_changed_file_is_read_at_most_once_a_second(tmp_path: Path) -> None:
    """A new key counts, and one that was taken out does not."""
    clock = Clock()
    source = KeySource(keys_file(tmp_path, "keys: [{name: a, sha256: H1}]"), {}, clock)
    keys_file(tmp_path, "keys: [{name: bb, sha256: H2}]")
    clock.now = 0.9
    assert source.refresh().find(b"Bearer sk-1").name == "a"
    clock.now = 1.0
    assert source.refresh().find(b"Bearer sk-2").name == "bb"
    with pytest.raises(Unauthorized):
        source.refresh().find(b"Bearer sk-1")


def test_an_unchanged_file_is_not_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A look at it is one stat."""
    clock = Clock()
    source = KeySource(keys_file(tmp_path, "keys: [{name: a, sha256: H1}]"), {}, clock)
    monkeypatch.setattr(keys_module, "read_keys", lambda *_: pytest.fail("was read"))
    clock.now = 5.0
    assert source.refresh() is source.ring


def test_a_file_replaced_by_one_of_equal_size_and_time_is_seen(tmp_path: Path) -> None:
    """A rename changes the inode: so editors and Kubernetes write files."""
    clock = Clock()
    file = keys_file(tmp_path, "keys: [{name: a, sha256: H1}]")
    source = KeySource(file, {}, clock)
    other = tmp_path / "other"
    other.write_text(file.read_text().replace("name: a", "name: b"))
    os.utime(other, ns=(file.stat().st_atime_ns, file.stat().st_mtime_ns))
    other.replace(file)
    clock.now = 2.0
    assert source.refresh().find(b"Bearer sk-1").name == "b"


def test_a_file_that_breaks_or_vanishes_changes_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The keys of before stay, one error is logged for each, and a right file is taken again."""
    caplog.set_level(logging.ERROR, "ray.serve")
    clock = Clock()
    file = keys_file(tmp_path, "keys: [{name: a, sha256: H1}]")
    source = KeySource(file, {}, clock)

    def later() -> KeyRing:
        clock.now += 1
        return source.refresh()

    file.write_text("keys: [{name: a")
    assert [later().find(b"Bearer sk-1").name for _ in range(3)] == ["a"] * 3
    file.unlink()
    assert [later().find(b"Bearer sk-1").name for _ in range(3)] == ["a"] * 3
    assert not source.is_open
    assert ["not valid YAML" in caplog.messages[0], "No such file" in caplog.messages[1]] == [True, True]
    assert len(caplog.messages) == 2
    keys_file(tmp_path, "keys: [{name: c, sha256: H2}]")
    assert later().find(b"Bearer sk-2").name == "c"


def test_a_key_is_a_user_unless_the_file_says_otherwise(tmp_path: Path) -> None:
    """Keys of the environment are users."""
    text = "keys:\n- {name: ops, sha256: H1, role: admin}\n- {name: team, sha256: H2}\n"
    keys = read_keys(keys_file(tmp_path, text), {"SERVE_APP_API_KEYS": LONG})
    assert [(key.name, key.role, key.is_admin) for key in keys] == [
        ("ops", "admin", True),
        ("team", "user", False),
        ("env:0", "user", False),
    ]
