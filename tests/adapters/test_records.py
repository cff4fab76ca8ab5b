"""What replicas write of their adapters, and what readers make of it."""

import pytest

from serve_app.adapters import records
from serve_app.adapters.records import (
    DELETED_S,
    FOLDERS,
    FORGOTTEN_S,
    PREFIX,
    AdapterState,
    FoundInFolder,
    RecordReader,
    ReplicaRecord,
    write_found,
)


class Store(dict[bytes, bytes]):
    """A key-value store in this process that counts readings."""

    reads = 0

    def get_counted(self, key: bytes) -> bytes | None:
        """One value."""
        self.reads += 1
        return self.get(key)


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Store:
    """In place of Ray's."""
    made = Store()
    monkeypatch.setattr(records, "store", made.__setitem__)
    monkeypatch.setattr(records, "delete_stored", lambda key: made.pop(key, None))
    return made


def reader(store: Store, clock: list[float]) -> RecordReader:
    """A reader of the store."""
    return RecordReader(
        lambda prefix: sorted(key for key in store if key.startswith(prefix)),
        store.get_counted, lambda key: store.pop(key, None), lambda: clock[0],
    )  # fmt: skip


def test_a_reader_sees_the_last_state_and_reads_only_what_has_changed(store: Store) -> None:
    """A record that stays costs nothing but its key."""
    first, second, seen = ReplicaRecord("qwen", "r1"), ReplicaRecord("qwen", "r2"), reader(store, [0.0])
    first.write({"sql": AdapterState("loading")})
    second.write({"sql": AdapterState("failed", "no file")})
    assert seen.read()["qwen", "r2"] == {"sql": AdapterState("failed", "no file")}
    assert store.reads == 2
    first.write({"sql": AdapterState("ready")})
    assert seen.read()["qwen", "r1"] == {"sql": AdapterState("ready")}
    assert (store.reads, len(store)) == (3, 2)
    first.forget()
    assert seen.read().keys() == {("qwen", "r2")}


def test_the_record_of_a_replica_that_was_killed_is_deleted_later(store: Store) -> None:
    """Not at once, because Serve may not know a new replica yet."""
    clock = [0.0]
    seen = reader(store, clock)
    ReplicaRecord("qwen", "dead").write({})
    ReplicaRecord("qwen", "alive").write({})
    for clock[0] in (0.0, FORGOTTEN_S):
        seen.read()
        seen.forget_all_but(lambda *place: place == ("qwen", "alive"))
        assert len(store) == 2
    clock[0] = FORGOTTEN_S + 1
    seen.forget_all_but(lambda *place: place == ("qwen", "alive"))
    assert len(store) == 1


def test_what_is_no_record_of_ours_is_skipped(store: Store) -> None:
    """Another version may have written it."""
    store[PREFIX + b"qwen/r1/x"] = b"[1]"
    store[PREFIX + b"qwen/r2/x"] = b'{"a": {"state": "ready", "colour": "red"}}'
    store[PREFIX + b"odd"] = b"{}"
    assert reader(store, [0.0]).read() == {}


def test_what_was_found_in_a_folder_outlives_the_replicas_and_goes_with_the_model(store: Store) -> None:
    """There is one record for each model, which the replica that wrote last has written. A model that Serve does not
    know for a moment keeps it."""
    clock = [0.0]
    seen = reader(store, clock)
    for state in ("loading", "ready"):
        write_found("qwen", FoundInFolder("/srv", {"sql": AdapterState(state)}))  # type: ignore[arg-type]
    write_found("llama", FoundInFolder("/srv", {}))
    ready = FoundInFolder("/srv", {"sql": AdapterState("ready")})
    assert seen.found(["qwen", "unknown"]) == {"qwen": ready}
    assert seen.read() == {}
    seen.forget_models_but(["llama"])
    clock[0] = DELETED_S
    seen.forget_models_but(["qwen", "llama"])  # It is there again.
    clock[0] += DELETED_S + 1
    seen.forget_models_but(["llama"])
    assert seen.found(["qwen"]) == {"qwen": ready}
    clock[0] += DELETED_S + 1
    seen.forget_models_but(["llama"])
    assert list(store) == [FOLDERS + b"llama"]


def test_what_another_version_wrote_of_a_folder_is_skipped(store: Store) -> None:
    """As in the records of replicas."""
    for content in (b"[]", b"{}", b'{"folder": "/srv", "adapters": {"a": {"colour": "red"}}}', b"\xff"):
        store[FOLDERS + b"qwen"] = content
        assert reader(store, [0.0]).found(["qwen"]) == {}
