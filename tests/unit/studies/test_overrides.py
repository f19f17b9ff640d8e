"""Overrides of configurations."""

from __future__ import annotations

from lqkd.studies.overrides import merge, nested


def test_dotted_and_nested_keys_say_the_same_at_any_depth() -> None:
    assert nested({"a.b": 1, "a": {"c.d": 2}}) == {"a": {"b": 1, "c": {"d": 2}}}


def test_an_override_changes_one_setting_and_leaves_its_neighbours() -> None:
    assert merge({"a": {"b": 1, "c": [1, 2]}}, {"a": {"c": [3]}}) == {"a": {"b": 1, "c": [3]}}


def test_null_replaces_a_mapping() -> None:
    assert merge({"a": {"b": 1}}, {"a": None}) == {"a": None}


def test_another_class_does_not_inherit_the_arguments_of_the_old_one() -> None:
    base = {"x": {"class_path": "A", "init_args": {"p": 1}}}
    assert merge(base, {"x": {"class_path": "B"}}) == {"x": {"class_path": "B"}}


def test_the_same_class_keeps_the_arguments_that_are_not_overridden() -> None:
    base = {"x": {"class_path": "A", "init_args": {"p": 1, "q": 2}}}
    changed = merge(base, {"x": {"class_path": "A", "init_args": {"q": 3}}})
    assert changed["x"]["init_args"] == {"p": 1, "q": 3}


def test_merging_changes_neither_argument() -> None:
    base, overrides = {"a": {"b": [1]}}, {"a": {"c": [2]}}
    merge(base, overrides)["a"]["b"].append(9)
    assert (base, overrides) == ({"a": {"b": [1]}}, {"a": {"c": [2]}})
