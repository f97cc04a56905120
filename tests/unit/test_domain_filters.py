"""The filter language: what it accepts, what it means, and what it says to the rest."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from memos_vllm.domain.filters import (
    MAX_DEPTH,
    MAX_LEAVES,
    MAX_VALUES,
    AllOf,
    AnyOf,
    Bounds,
    HasTag,
    HasTier,
    MetadataIn,
    MetadataIs,
    Not,
    SourceIs,
    TimeIn,
    matches,
    parse_filter,
)
from memos_vllm.domain.ids import CubeId, MemoryId, PrincipalId
from memos_vllm.domain.memory import Lineage, Memory, MemoryState, Source, Tier, Usage
from memos_vllm.domain.scope import FilterFields, Scope, allows, flat_metadata
from memos_vllm.errors import InvalidRequest

NEW_YEAR = 1_735_689_600.0


def fields(**given_fields: Any) -> FilterFields:
    return FilterFields(**({"created_at": 10.0, "updated_at": 20.0} | given_fields))


def holds(filter_: object, **given_fields: Any) -> bool:
    return matches(parse_filter(filter_), fields(**given_fields))


def refusal(filter_: object) -> InvalidRequest:
    with pytest.raises(InvalidRequest) as caught:
        parse_filter(filter_)
    return caught.value


def test_every_key_is_read() -> None:
    parsed = parse_filter(
        {
            "tags": "x",
            "tier": ["plaintext", "activation"],
            "source": {"kind": "note", "author": ["a", "b"]},
            "created_at": {"gte": "2025-01-01T00:00:00Z"},
            "updated_at": {"lt": "2025-01-01t01:00:00.5+01:00"},
            "metadata": {"a.b": 1, "n": {"gt": 2, "lte": 3.5}, "f": [True, "y"]},
            "and": [{"tags": ["p", "q"]}],
            "or": [{"tags": "r"}, {"tags": "s"}],
            "not": {"tags": "t"},
        }
    )

    assert parsed == AllOf(
        (
            HasTag(("x",)),
            HasTier((Tier.PLAINTEXT, Tier.ACTIVATION)),
            SourceIs("kind", ("note",)),
            SourceIs("author", ("a", "b")),
            TimeIn("created_at", Bounds(gte=NEW_YEAR)),
            TimeIn("updated_at", Bounds(lt=NEW_YEAR + 0.5)),
            MetadataIs("a.b", (1,)),
            MetadataIn("n", Bounds(gt=2.0, lte=3.5)),
            MetadataIs("f", (True, "y")),
            AllOf((HasTag(("p", "q")),)),
            AnyOf((HasTag(("r",)), HasTag(("s",)))),
            Not(HasTag(("t",))),
        )
    )


@pytest.mark.parametrize(
    ("filter_", "param", "says"),
    [
        (None, "filter", "must be an object with one or more of tags, tier"),
        ({}, "filter", "must be an object with one or more of tags, tier"),
        ([], "filter", "must be an object"),
        ({"tag": "x"}, "filter.tag", "no key 'tag'; known are tags, tier, source"),
        ({1: "x"}, "filter", "a key that is no string"),
        ({"tags": []}, "filter.tags", "has 0 values; give 1 to 64"),
        ({"tags": ["x"] * (MAX_VALUES + 1)}, "filter.tags", "has 65 values"),
        ({"tags": ["x", 1]}, "filter.tags[1]", "must be a string"),
        ({"tags": {"x": 1}}, "filter.tags", "must be a string or a list of strings"),
        ({"tags": "x" * 2049}, "filter.tags", "has 2049 characters and the limit is 2048"),
        ({"tags": "\ud800"}, "filter.tags", "surrogate"),
        ({"tier": "hot"}, "filter.tier", "may be plaintext, activation, parametric"),
        ({"source": {}}, "filter.source", "one or more of kind, uri, title, author, locator"),
        ({"source": {"page": "1"}}, "filter.source.page", "known are kind, uri"),
        ({"source": {"kind": None}}, "filter.source.kind", "must be a string"),
        ({"created_at": "2025-01-01T00:00:00Z"}, "filter.created_at", "one or more of gte, gt"),
        ({"created_at": {}}, "filter.created_at", "one or more of gte, gt, lte, lt"),
        ({"created_at": {"after": 1}}, "filter.created_at.after", "known are gte, gt, lte, lt"),
        ({"created_at": {"gte": 1}}, "filter.created_at.gte", "such as '2025-01-31T12:00:00Z'"),
        ({"created_at": {"gte": "2025-01-01T00:00:00"}}, "filter.created_at.gte", "with its zone"),
        ({"created_at": {"gte": "2025-01-01"}}, "filter.created_at.gte", "with its zone"),
        ({"created_at": {"gte": "2025-13-01T00:00:00Z"}}, "filter.created_at.gte", "a time"),
        ({"updated_at": {"lt": "0001-01-01T00:00:00+10:00"}}, "filter.updated_at.lt", "a time"),
        ({"metadata": {}}, "filter.metadata", "dotted paths such as 'project.name'"),
        ({"metadata": {"a": None}}, "filter.metadata.a", "must be a string, a number"),
        ({"metadata": {"a": []}}, "filter.metadata.a", "has 0 values"),
        ({"metadata": {"a": [[1]]}}, "filter.metadata.a[0]", "must be a string, a number"),
        ({"metadata": {"a": {"b": 1}}}, "filter.metadata.a.b", "known are gte, gt, lte, lt"),
        ({"metadata": {"a": float("nan")}}, "filter.metadata.a", "finite"),
        ({"metadata": {"a": {"gt": float("inf")}}}, "filter.metadata.a.gt", "finite"),
        ({"metadata": {"a": {"gt": True}}}, "filter.metadata.a.gt", "must be a number"),
        ({"metadata": {"a": {"gt": "1"}}}, "filter.metadata.a.gt", "must be a number"),
        ({"metadata": {"a": 2**64}}, "filter.metadata.a", "more than 64 bits"),
        ({"and": []}, "filter.and", "a list of one or more filters"),
        ({"or": {"tags": "x"}}, "filter.or", "a list of one or more filters"),
        ({"not": []}, "filter.not", "must be an object"),
        ({"not": {}}, "filter.not", "must be an object"),
        ({"or": [{"tags": "x"}, {"and": [{"x": 1}]}]}, "filter.or[1].and[0].x", "no key 'x'"),
    ],
)
def test_what_cannot_be_used_is_refused_with_its_place(
    filter_: object, param: str, says: str
) -> None:
    error = refusal(filter_)
    assert error.param == param
    assert says in str(error)


def test_a_filter_may_be_eight_levels_deep_and_no_deeper() -> None:
    nested: dict[str, Any] = {"tags": "x"}
    for _ in range(MAX_DEPTH - 1):
        nested = {"not": nested}
    parse_filter(nested)

    error = refusal({"not": nested})
    assert error.param == "filter" + ".not" * MAX_DEPTH
    assert "nested deeper than 8 levels" in str(error)


def test_a_filter_may_have_64_conditions_and_no_more() -> None:
    parse_filter({"or": [{"tags": "x"}] * MAX_LEAVES})
    error = refusal({"or": [{"tags": "x"}] * (MAX_LEAVES + 1)})
    assert error.param == "filter.or[64].tags"
    assert "condition number 65 and the limit is 64" in str(error)


def test_a_long_unknown_key_is_not_repeated_whole() -> None:
    assert len(str(refusal({"k" * 10_000: 1}))) < 300


_JSON: st.SearchStrategy[Any] = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5)),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(
            st.sampled_from(["tags", "and", "or", "not", "metadata", "created_at", "gte", "k"]),
            inner,
            max_size=3,
        ),
    ),
    max_leaves=12,
)


@given(_JSON)
def test_whatever_comes_is_parsed_or_refused(value: Any) -> None:
    try:
        parsed = parse_filter(value)
    except InvalidRequest as error:
        place = error.param
    else:
        place = "filter"
        assert matches(parsed, fields()) in (True, False)
    assert place is not None
    assert place.startswith("filter")


def test_tags_and_tiers_match_any_of_the_values() -> None:
    assert holds({"tags": ["x", "y"]}, tags=("y", "z"))
    assert not holds({"tags": ["x", "y"]}, tags=("z",))
    assert holds({"tier": "activation"}, tier=Tier.ACTIVATION)
    assert not holds({"tier": "activation"})


def test_keys_of_one_object_apply_together() -> None:
    both = {"tags": "x", "metadata": {"a": 1}}
    assert holds(both, tags=("x",), metadata={"a": (1,)})
    assert not holds(both, tags=("x",), metadata={"a": (2,)})


def test_a_missing_field_matches_only_a_negation() -> None:
    for condition in ({"tags": "x"}, {"source": {"author": "x"}}, {"metadata": {"a": {"lt": 1}}}):
        assert not holds(condition)
        assert holds({"not": condition})


def test_numbers_are_equal_by_value_and_never_to_booleans() -> None:
    assert holds({"metadata": {"a": 1}}, metadata={"a": (1.0,)})
    assert not holds({"metadata": {"a": 1}}, metadata={"a": (True,)})
    assert not holds({"metadata": {"a": True}}, metadata={"a": (1,)})
    assert not holds({"metadata": {"a": "1"}}, metadata={"a": (1,)})
    assert not holds({"metadata": {"a": {"gte": 0}}}, metadata={"a": (True, "1")})
    assert holds({"metadata": {"a": {"gte": 0, "lt": 2}}}, metadata={"a": ("x", 1)})


def test_one_number_must_lie_within_both_ends() -> None:
    assert not holds({"metadata": {"a": {"gt": 1, "lt": 3}}}, metadata={"a": (0, 4)})


def test_ends_are_open_or_closed_as_named() -> None:
    for end, at in (("gte", True), ("gt", False), ("lte", True), ("lt", False)):
        assert holds({"updated_at": {end: "1970-01-01T00:00:20Z"}}) == at


def test_metadata_is_flat_by_dotted_path() -> None:
    nested = {"a": {"b": [1, "x", None, {"c": True}]}, "a.b": 2.5, "n": None, "e": {}, "l": []}
    assert flat_metadata(nested) == {"a.b": (1, "x", 2.5), "a.b.c": (True,)}


def memory(**given_fields: Any) -> Memory:
    moment = datetime.fromtimestamp(100, UTC)
    defaults: dict[str, Any] = {
        "id": MemoryId("m"),
        "cube_id": CubeId("c"),
        "text": "text",
        "tags": ("t",),
        "labels": ("l",),
        "metadata": {"a": {"b": 1}},
        "source": Source(kind="file", uri="u"),
        "state": MemoryState.ACTIVE,
        "tier": Tier.PLAINTEXT,
        "version": 1,
        "lineage": Lineage(),
        "edges": (),
        "created_by": PrincipalId("p"),
        "created_at": moment,
        "updated_at": moment,
        "expires_at": None,
        "usage": Usage(),
    }
    return Memory(**(defaults | given_fields))


def test_fields_are_taken_from_a_memory() -> None:
    said_at = datetime.fromtimestamp(50, UTC)
    found = FilterFields.of(memory(source=Source("file", "u", created_at=said_at)))
    assert found == FilterFields(
        created_at=50.0,
        updated_at=100.0,
        tags=("t",),
        labels=("l",),
        source={"kind": "file", "uri": "u"},
        metadata={"a.b": (1,)},
    )
    assert FilterFields.of(memory()).created_at == 100.0
    assert FilterFields.of(memory(expires_at=said_at)).expires_at == 50.0


def test_a_scope_allows_its_cubes_its_labels_and_what_is_alive() -> None:
    here = Scope((CubeId("a"),), frozenset({"x", "y"}), now=5.0)
    assert allows(here, CubeId("a"), fields(labels=("x",), expires_at=5.1))
    assert not allows(here, CubeId("b"), fields())
    assert not allows(here, CubeId("a"), fields(labels=("x", "z")))
    assert not allows(here, CubeId("a"), fields(expires_at=5.0))
    assert allows(Scope((CubeId("a"),), None, 5.0), CubeId("a"), fields(labels=("z",)))
