"""What files say about themselves is held against one table a kind of file."""

from __future__ import annotations

import json
from typing import Any

import pytest

from lqkd.errors import UsageError
from lqkd.utils.schema import EXPORT_REPORT, EXPORTED_FILE, NETWORK_FILE, PREPROCESSING, SUMMARY, Table, check


@pytest.mark.parametrize(
    ("table", "said", "told"),
    [
        (SUMMARY, {"packed_bytes": "text"}, "packed_bytes='text' where it must be a finite number"),
        (SUMMARY, {"val": float("nan")}, "val=nan where"),
        (SUMMARY, {"val": True}, "val=True where"),
        (SUMMARY, {"train_seconds": 10**400}, r"train_seconds=1000.*\.\.\. where"),
        (SUMMARY, {"versions": ["torch"]}, "versions=.* where it must be a mapping to texts"),
        (SUMMARY, {"regularizer": "text"}, "regularizer must be a mapping, not 'text'"),
        (SUMMARY, {"regularizer": {"sentence": 3}}, r"regularizer\.sentence=3 where it must be a text"),
        (SUMMARY, {"warnings": "text"}, "warnings='text' where it must be a list of texts"),
        (PREPROCESSING, {"channels": 2.5}, "channels=2.5 where"),
        (PREPROCESSING, {"size": [8, 0]}, "size=.* where"),
        (PREPROCESSING, {"std": [float("inf")]}, "std=.inf. where"),
        (NETWORK_FILE, {"class_names": ["a", None]}, "class_names=.* where it must be a list of texts"),
        (EXPORTED_FILE, [1], r"it must be a mapping, not \[1\]"),
        (EXPORT_REPORT, {"file_bytes": float("nan")}, "file_bytes=nan where"),
        (EXPORT_REPORT, {"latency": {"milliseconds": {"x": "y"}}}, r"latency\.milliseconds=.* where"),
        (EXPORT_REPORT, {"layers": [{"name": "conv1"}]}, "layers=.* where it must be a list of layers"),
    ],
)
def test_a_value_of_another_kind_is_refused_with_its_key_and_what_is_needed(table: Table, said: Any, told: str) -> None:
    with pytest.raises(UsageError, match=rf"'f\.json' is damaged: {told}") as caught:
        check(said, table, "f.json")
    assert len(str(caught.value)) < 200


@pytest.mark.parametrize("table", [SUMMARY, PREPROCESSING, NETWORK_FILE, EXPORTED_FILE])
def test_what_is_missing_unknown_or_null_is_no_mistake(table: Table) -> None:
    check({"something": object()}, table, "f.json")
    check(json.loads('{"class_names": null, "mean": null, "val": null, "regularizer": null}'), table, "f.json")
