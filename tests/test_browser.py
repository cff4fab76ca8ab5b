"""What tests of the page do where no Chromium is installed."""

import pytest

from tests.browser import NEEDED, chromium


def test_without_a_browser_they_are_skipped_or_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    """They fail where the environment says that one is needed, so that CI cannot leave them out unseen."""
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv(NEEDED, raising=False)
    with pytest.raises(pytest.skip.Exception, match="scripts/install_browser.sh"), chromium():
        pass
    monkeypatch.setenv(NEEDED, "1")
    with pytest.raises(pytest.fail.Exception, match="scripts/install_browser.sh"), chromium():
        pass
