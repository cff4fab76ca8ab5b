"""What a contract test says when it fails: a change of the library is one cause, a mistake in the test another."""

import pytest

from tests.contracts.contract import Changed, contract


def fails() -> None:
    """A test that does not pass."""
    raise KeyError("x")


def test_a_failure_names_the_library_and_blames_nobody() -> None:
    """The line goes into the table of `make upgrade-check`."""
    path = "tests/contracts/contract.py"
    with pytest.raises(Changed) as found:
        contract("torch", "the moon", path)(fails)()
    assert str(found.value).startswith("the test of the moon does not pass with torch 2.")
    assert f" It is used by {path}. KeyError: " in str(found.value)
