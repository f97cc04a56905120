"""A text is found again by keyed pieces, wherever it stands and however it was cut."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from memos_vllm.domain.needles import MIN_PIECE_BYTES, find_needles, needles_of
from memos_vllm.engine import log_search
from memos_vllm.engine.log_search import LogSearch

KEY = b"the tests' key"
TEXT = "The passphrase of the customer in room 12 is quicksilver over cinnabar."


def search(folder: Path) -> LogSearch:
    return LogSearch(lambda: [folder, folder / "not there"])


@given(before=st.binary(max_size=200), after=st.binary(max_size=200))
def test_a_text_is_found_between_any_bytes(before: bytes, after: bytes) -> None:
    needles = list(needles_of(TEXT, key=KEY))
    found = find_needles(before + TEXT.encode() + after, needles, key=KEY)
    assert found[0][0] == len(before)
    assert len(found) >= len(needles)


def test_other_texts_other_keys_and_the_same_letters_in_another_order_are_not_found() -> None:
    needles = list(needles_of(TEXT, key=KEY))
    assert find_needles(TEXT[::-1].encode(), needles, key=KEY) == []
    assert find_needles(TEXT.encode(), needles, key=b"another key") == []
    assert TEXT[:10] not in repr(needles)


def test_texts_that_stand_anywhere_by_accident_are_not_looked_for() -> None:
    for text in ("", "yes", "x" * (MIN_PIECE_BYTES - 1), "-" * 500, " " * 5000):
        assert list(needles_of(text, key=KEY)) == []


def test_a_long_text_has_a_bounded_number_of_pieces() -> None:
    text = " ".join(f"word{number}" for number in range(8000))
    needles = list(needles_of(text, key=KEY))
    assert 128 <= len(needles) <= 256
    assert len(find_needles(text.encode(), needles, key=KEY)) == len(needles)


def test_lines_that_quote_the_text_are_blanked_and_no_others(tmp_path: Path) -> None:
    log = tmp_path / "session" / "worker.log"
    log.parent.mkdir()
    log.write_text(f"before\nKeyError: {TEXT!r}\nbetween\n{TEXT}\nafter")
    size = log.stat().st_size
    searched = search(tmp_path).blank(list(needles_of(TEXT, key=KEY)), key=KEY)
    assert (searched.files, searched.blanked) == (1, 2)
    lines = log.read_text().splitlines()
    assert lines[::2] == ["before", "between", "after"]
    assert all(set(line) == {"*"} for line in lines[1::2])
    # Whoever appends to it goes on where it was.
    assert log.stat().st_size == size


@pytest.mark.parametrize("cut", [1, 10, 23, 24, 39])
def test_a_piece_across_two_reads_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cut: int
) -> None:
    monkeypatch.setattr(log_search, "_CHUNK_BYTES", 31 + cut)
    log = tmp_path / "a.log"
    log.write_text("x" * 30 + f"\n{TEXT}\nend")
    searched = search(tmp_path).blank(list(needles_of(TEXT, key=KEY))[:1], key=KEY)
    assert searched.blanked == 1
    assert TEXT[:24] not in log.read_text()
