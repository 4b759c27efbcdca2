"""Merging is RFC 7396, and every value knows the layer that set it."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kdzoo.recipe.merge import Layer, in_text, leaves, merge, merge_patch

# RFC 7396, appendix A: original, patch, result.
EXAMPLES = [
    ({"a": "b"}, {"a": "c"}, {"a": "c"}),
    ({"a": "b"}, {"b": "c"}, {"a": "b", "b": "c"}),
    ({"a": "b"}, {"a": None}, {}),
    ({"a": "b", "b": "c"}, {"a": None}, {"b": "c"}),
    ({"a": ["b"]}, {"a": "c"}, {"a": "c"}),
    ({"a": "c"}, {"a": ["b"]}, {"a": ["b"]}),
    ({"a": {"b": "c"}}, {"a": {"b": "d", "c": None}}, {"a": {"b": "d"}}),
    ({"a": [{"b": "c"}]}, {"a": [1]}, {"a": [1]}),
    (["a", "b"], ["c", "d"], ["c", "d"]),
    ({"a": "b"}, ["c"], ["c"]),
    ({"a": "foo"}, None, None),
    ({"a": "foo"}, "bar", "bar"),
    ({"e": None}, {"a": 1}, {"e": None, "a": 1}),
    ([1, 2], {"a": "b", "c": None}, {"a": "b"}),
    ({}, {"a": {"bb": {"ccc": None}}}, {"a": {"bb": {}}}),
]

plain = st.recursive(
    st.integers() | st.text(max_size=2) | st.booleans(),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from("abc"), inner, max_size=3),
    max_leaves=8,
)
objects = st.dictionaries(st.sampled_from("abc"), plain, max_size=3)


def layers(**patches: dict) -> list[Layer]:
    return [Layer(label, Path(), patch) for label, patch in patches.items()]


def origins(**patches: dict) -> dict[str, str]:
    merged = merge(layers(**patches))
    return {in_text(at): merged.origins[at].label for at, _ in leaves(merged.document)}


@pytest.mark.parametrize(("original", "patch", "result"), EXAMPLES)
def test_the_examples_of_the_rfc(original, patch, result):
    before = copy.deepcopy((original, patch))

    assert merge_patch(original, patch) == result
    assert (original, patch) == before


@given(objects, objects)
def test_a_patch_merged_twice_is_merged_once(original, patch):
    once = merge_patch(original, patch)
    assert merge_patch(once, patch) == once


@given(objects, objects, objects)
def test_every_leaf_was_set_by_the_layer_that_holds_it(a, b, c):
    merged = merge(layers(a=a, b=b, c=c))

    assert merged.document == merge_patch(merge_patch(merge_patch({}, a), b), c)
    for address, value in leaves(merged.document):
        held = {"a": a, "b": b, "c": c}[merged.origins[address].label]
        for key in address:
            held = held[key]
        assert held == value


def test_a_leaf_is_of_the_last_layer_that_set_it():
    assert origins(a={"x": {"y": 1, "z": 2}}, b={"x": {"y": 3}}) == {"x.y": "b", "x.z": "a"}


def test_a_replaced_object_leaves_nothing_behind():
    assert origins(a={"x": {"y": 1}}, b={"x": 2}, c={"x": {"z": 3}}) == {"x.z": "c"}


def test_an_empty_object_and_a_list_are_leaves():
    assert origins(a={"x": {}, "y": [1, {"z": 2}]}) == {"x": "a", "y": "a"}


def test_a_deleted_key_remembers_who_deleted_it():
    merged = merge(layers(a={"x": {"y": 1}}, b={"x": None}))

    assert merged.document == {}
    assert merged.origins[("x",)].label == "b"
    assert ("x", "y") not in merged.origins


def test_an_item_of_a_list_is_of_the_layer_that_set_the_list():
    merged = merge(layers(a={"x": {"betas": [1, 2]}}))

    origin = merged.origin(("x", "betas", 1))
    assert origin is not None
    assert origin.label == "a"
    assert merged.origin(("unknown",)) is None


def test_objects_are_found_by_address():
    merged = merge(layers(a=json.loads('{"stages": {"a": {"n": {"x": 1}}, "b": {"n": 2}, "c": 3}, "n": {}}')))

    assert list(merged.objects("stages", "*", "n")) == [(("stages", "a", "n"), {"x": 1})]
    assert list(merged.objects("n")) == [(("n",), {})]
    assert list(merged.objects("nothing", "n")) == []
