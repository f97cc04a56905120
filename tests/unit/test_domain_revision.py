"""What is kept, edited, added and gone when a document is sent again."""

from __future__ import annotations

import random
import time
from dataclasses import dataclass

from hypothesis import given, settings
from hypothesis import strategies as st
from ingest_samples import paragraph

from memos_vllm.domain.revision import Pair, Revision, diff_chunks
from memos_vllm.plaintext.ingest.chunking import digest_text


@dataclass(frozen=True)
class Stored:
    text: str

    @property
    def digest(self) -> str:
        return digest_text(self.text)


def diff(old: list[str], new: list[str]) -> Revision:
    return diff_chunks([Stored(text) for text in old], [Stored(text) for text in new])


def sample(count: int) -> list[str]:
    source = random.Random(count)
    return [paragraph(source) for _ in range(count)]


def test_the_same_chunks_are_all_kept() -> None:
    texts = sample(5)
    revision = diff(texts, texts)
    assert revision.kept == tuple(Pair(index, index) for index in range(5))
    assert not revision.changes_text


def test_white_space_is_no_change() -> None:
    assert not diff(["a b"], ["a\n  b"]).changes_text


def test_a_changed_sentence_is_an_edit_of_its_chunk() -> None:
    old = sample(6)
    new = [*old[:2], old[2].replace(".", " today.", 1), *old[3:]]
    revision = diff(old, new)
    assert revision.edited == (Pair(2, 2),)
    assert revision.added == revision.gone == ()


def test_another_text_in_the_same_place_is_no_edit() -> None:
    old = sample(3)
    revision = diff(old, [old[0], "Nothing of this was there before, not one word.", old[2]])
    assert revision.edited == ()
    assert (revision.added, revision.gone) == ((1,), (1,))


def test_an_insertion_moves_the_others_and_changes_none() -> None:
    old = sample(5)
    revision = diff(old, [*old[:2], "Something new.", *old[2:]])
    assert revision.kept[2:] == (Pair(2, 3), Pair(3, 4), Pair(4, 5))
    assert (revision.added, revision.gone, revision.edited) == ((2,), (), ())


def test_an_edit_beside_an_insertion_is_found() -> None:
    old = sample(4)
    edited = "Now: " + old[2]
    revision = diff(old, [old[0], old[1], "Quite another thing altogether.", edited, old[3]])
    assert revision.edited == (Pair(2, 3),)
    assert revision.added == (2,)


def test_two_edits_in_a_row_keep_their_order() -> None:
    old = sample(5)
    revision = diff(old, [old[0], f"{old[1]} More.", f"{old[2]} More.", old[3], old[4]])
    assert revision.edited == (Pair(1, 1), Pair(2, 2))


def test_a_section_that_moved_is_kept_and_an_edit_inside_it_found() -> None:
    old = sample(8)
    moved = [*old[4:], *old[:4]]
    assert not diff(old, moved).changes_text
    moved[1] += " More."
    revision = diff(old, moved)
    assert revision.edited == (Pair(5, 1),)
    assert revision.gone == revision.added == ()


def test_an_edit_at_the_start_of_a_section_that_moved_is_found() -> None:
    old = sample(8)
    revision = diff(old, [old[4] + " More.", *old[5:], *old[:4]])
    assert revision.edited == (Pair(4, 0),)


def test_one_good_match_is_worth_more_than_two_bad_ones() -> None:
    old = ["a b c d e f g h i j", "k l m n o p q r s t"]
    new = ["k l m n o a b c y z", "p q r u v w x y z z"]
    assert diff(old, new).edited == (Pair(1, 0),)


def test_a_chunk_that_was_split_is_edited_once() -> None:
    moved, first, split, last = sample(4)
    new = [first, split + " One.", moved, split + " Two.", last]
    revision = diff([moved, first, split, last], new)
    assert revision.edited == (Pair(2, 1),)
    assert revision.added == (3,)


def test_repeated_chunks_are_matched_one_by_one() -> None:
    revision = diff(["x", "x", "y"], ["x", "y", "x", "x"])
    assert len(revision.kept) == 3
    assert len(revision.added) == 1
    assert revision.gone == ()


TEXTS = st.lists(st.sampled_from([f"the {word} text is here" for word in "abcdef"]), max_size=12)


@settings(max_examples=60)
@given(TEXTS, TEXTS)
def test_every_position_has_exactly_one_fate(old: list[str], new: list[str]) -> None:
    revision = diff(old, new)
    pairs = (*revision.kept, *revision.edited)
    assert sorted([*(pair.old for pair in pairs), *revision.gone]) == list(range(len(old)))
    assert sorted([*(pair.new for pair in pairs), *revision.added]) == list(range(len(new)))
    assert all(old[pair.old] == new[pair.new] for pair in revision.kept)


def test_a_rewritten_book_is_compared_in_reasonable_time() -> None:
    old = [f"{number} {text}" for number, text in enumerate(sample(20) * 100)]
    new = [f"{number} other {text}" for number, text in enumerate(sample(20) * 100)]
    started = time.perf_counter()
    revision = diff(old, new)
    assert time.perf_counter() - started < 10
    assert len(revision.edited) > 1900
