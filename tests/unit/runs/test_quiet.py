"""What libraries say is kept from the screen where nobody can do anything about it."""

from __future__ import annotations

import logging

import pytest

from lqkd.runs.quiet import quiet


def test_a_download_that_is_tried_again_is_not_told_line_by_line(caplog: pytest.LogCaptureFixture) -> None:
    hub = logging.getLogger("huggingface_hub.utils._http")
    with quiet():
        hub.warning("'[Errno -2] Name or service not known' thrown while requesting HEAD https://huggingface.co/x")
        hub.warning("Retrying in 8s [Retry 5/5].")
        hub.warning("your token is not valid")
    hub.warning("Retrying in 1s [Retry 1/5].")
    assert caplog.messages == ["your token is not valid", "Retrying in 1s [Retry 1/5]."]
