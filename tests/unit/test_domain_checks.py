"""What callers may send, before anything is stored."""

from __future__ import annotations

from datetime import datetime

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memos_vllm.domain.checks import (
    MAX_METADATA_DEPTH,
    MAX_TEXT_BYTES,
    check_json_object,
    check_time,
    check_words,
)
from memos_vllm.domain.cube import CubePatch, checked_cube_patch, validate_cube_id
from memos_vllm.domain.memory import (
    Edge,
    MemoryPatch,
    NewMemory,
    Source,
    checked_batch,
    checked_patch,
    validate_edges,
    validate_text,
)
from memos_vllm.domain.patch import UNSET
from memos_vllm.errors import InvalidRequest, MemosError, TooLarge


def test_a_text_of_exactly_64_kib_is_taken_and_one_byte_more_is_not() -> None:
    text = "é" * (MAX_TEXT_BYTES // 2)
    assert validate_text(text) == text
    with pytest.raises(TooLarge, match="65537 bytes"):
        validate_text(text + "x")


@pytest.mark.parametrize("text", ["", " \n\t", "a\x00b", "a\ud800b"])
def test_text_that_no_store_keeps_is_refused(text: str) -> None:
    with pytest.raises(InvalidRequest):
        validate_text(text)


@settings(database=None)
@given(st.text(alphabet=st.characters(), max_size=50))
def test_any_text_is_kept_exactly_or_refused_without_repeating_it(text: str) -> None:
    if not text.strip() or "\x00" in text or any("\ud800" <= char <= "\udfff" for char in text):
        with pytest.raises(InvalidRequest) as caught:
            validate_text(text, param="p")
        assert len(text.strip()) < 3 or text not in str(caught.value)
    else:
        assert validate_text(text) == text


@pytest.mark.parametrize(
    "value", ["", "-a", ".a", "A", "a/b", "a b", "a\n", "ä", "a" * 65, "a\ud800", 7, None]
)
def test_an_id_that_is_no_cube_id_is_refused(value: str) -> None:
    with pytest.raises(InvalidRequest, match="1 to 64"):
        validate_cube_id(value)


@pytest.mark.parametrize("value", ["a", "0", "acme-support", "user.42_x", "a" * 64])
def test_a_cube_id_is_taken_as_it_is(value: str) -> None:
    assert validate_cube_id(value) == value


@pytest.mark.parametrize(
    "value",
    [
        {"a": float("nan")},
        {"a": float("inf")},
        {"a": 2**64},
        {"a": {1}},
        {1: "a"},
        {"a": "\x00"},
        {"\ud800": 1},
        [1],
    ],
)
def test_metadata_that_is_not_json_is_refused(value: dict[str, object]) -> None:
    with pytest.raises(InvalidRequest):
        check_json_object(value, param="metadata")


def test_metadata_nested_without_end_is_refused_before_it_overflows_the_stack() -> None:
    nested: dict[str, object] = {}
    for _ in range(100_000):
        nested = {"a": nested}
    with pytest.raises(InvalidRequest, match=str(MAX_METADATA_DEPTH)):
        check_json_object(nested, param="metadata")
    while nested:
        nested = nested["a"]


def test_metadata_over_16_kib_is_too_large() -> None:
    with pytest.raises(TooLarge):
        check_json_object({"a": "x" * 16_384}, param="metadata")


def test_metadata_is_copied_so_that_its_sender_cannot_change_it_later() -> None:
    sent = {"a": [1]}
    kept = check_json_object(sent, param="metadata")
    sent["a"].append(2)
    assert kept == {"a": [1]}


def test_tags_lose_doubles_and_keep_their_order() -> None:
    assert check_words(["b", "a", "b"], param="tags") == ("b", "a")


@pytest.mark.parametrize("tags", ["abc", [""], ["a\nb"], ["x" * 129], [f"t{i}" for i in range(65)]])
def test_unusable_tags_are_refused(tags: list[str]) -> None:
    with pytest.raises(InvalidRequest):
        check_words(tags, param="tags")


def test_a_time_without_zone_or_outside_the_calendar_is_refused() -> None:
    for text in ("2026-01-01T00:00:00", "9999-12-31T23:59:59-12:00"):
        with pytest.raises(InvalidRequest):
            check_time(datetime.fromisoformat(text), param="expires_at")


@pytest.mark.parametrize(
    "edge", [Edge("Next", "m"), Edge("next", ""), Edge("next", "m", 1.5), Edge("n", "m", -0.1)]
)
def test_an_unusable_edge_is_refused(edge: Edge) -> None:
    with pytest.raises(InvalidRequest):
        validate_edges([edge])


def test_the_same_edge_twice_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="repeats"):
        validate_edges([Edge("next", "m", 0.1), Edge("next", "m", 0.2)])


def test_the_message_names_the_memory_and_the_field_that_is_wrong() -> None:
    batch = [NewMemory("fine"), NewMemory("fine", source=Source(kind="NO"))]
    with pytest.raises(InvalidRequest) as caught:
        checked_batch(batch)
    assert caught.value.param == "memories[1].source.kind"


def test_an_empty_batch_is_refused_and_one_of_1001_is_too_large() -> None:
    with pytest.raises(InvalidRequest):
        checked_batch([])
    with pytest.raises(TooLarge, match="1001"):
        checked_batch([NewMemory("x")] * 1001)


def test_a_patch_keeps_what_was_not_given_apart_from_what_was_emptied() -> None:
    patch = checked_patch(MemoryPatch(tags=(), expires_at=None))
    assert patch.text is UNSET
    assert patch.tags == ()
    assert patch.expires_at is None


@pytest.mark.parametrize(
    "patch",
    [
        CubePatch(name=""),
        CubePatch(name="a\nb"),
        CubePatch(name="x" * 201),
        CubePatch(description="\x00"),
        CubePatch(preamble="x" * 65_537),
        CubePatch(labels=("",)),
    ],
)
def test_an_unusable_cube_field_is_refused(patch: CubePatch) -> None:
    with pytest.raises(MemosError):
        checked_cube_patch(patch)
