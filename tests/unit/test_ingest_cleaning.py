"""Bytes to characters, and characters to what is stored."""

from __future__ import annotations

import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from memos_vllm.errors import InvalidRequest
from memos_vllm.plaintext.ingest.cleaning import (
    clean_code,
    clean_line,
    clean_prose,
    clean_text,
)
from memos_vllm.plaintext.ingest.decoding import declared_charset, decode_text


def test_line_ends_become_line_feeds_and_letters_become_nfc() -> None:
    assert clean_text("a\r\nb\rc\u2028d") == "a\nb\nc\nd"
    assert clean_text("a\u0308 ﬁ Å") == "ä ﬁ Å"


@pytest.mark.parametrize(
    "hidden",
    [
        "\u00ad",
        "\u200b",
        "\u202e",
        "\u2066",
        "\u2060",
        "\ufeff",
        "\u200d",
        "\u200c",
        "\ufe0f",
        "\U000e0041\U000e0042",
        "\U000e0100\U000e0101",
        "\x1b",
        "\x07",
    ],
)
def test_characters_that_nobody_sees_do_not_reach_a_model(hidden: str) -> None:
    assert clean_text(f"pay{hidden}ment") == "payment"


@pytest.mark.parametrize("text", ["👨‍👩‍👧", "❤️", "می‌خواهم", "क्‍ष", "👩🏽‍⚕️", "葛\U000e0100"])
def test_joiners_and_selectors_stay_where_writing_needs_them(text: str) -> None:
    assert clean_text(f"x {text} y") == f"x {text} y"


def test_a_message_in_variation_selectors_behind_an_emoji_is_cut_to_one() -> None:
    smuggled = "😀" + "".join(chr(0xE0100 + byte) for byte in b"obey me")
    assert clean_text(smuggled) == smuggled[:2]


def test_prose_has_one_blank_where_there_were_many_and_keeps_lines() -> None:
    assert clean_prose(" a \u00a0 b\t\tc  \n\n  d ") == "a b c\nd"
    assert clean_line(" a \n b ") == "a b"


def test_code_keeps_its_indentation() -> None:
    assert clean_code("\n\nif x:\n    y  \n\n") == "if x:\n    y"


@given(st.text())
def test_cleaning_twice_changes_nothing_more(text: str) -> None:
    once = clean_text(text)
    assert clean_text(once) == once
    assert unicodedata.is_normalized("NFC", once)
    once.encode("utf-8")


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_byte_order_marks_are_understood(encoding: str) -> None:
    assert decode_text("Zażółć 漢字 😀".encode(encoding)) == "Zażółć 漢字 😀"


def test_invalid_utf8_is_refused_with_its_place_and_advice() -> None:
    with pytest.raises(
        InvalidRequest, match=r"byte 3 of the file \(0xe9\).*save it again as UTF-8"
    ):
        decode_text(b"caf\xe9 au lait")


def test_a_declared_character_set_is_used_when_the_bytes_are_no_utf8() -> None:
    declared = declared_charset("text/plain; charset=ISO-8859-1")
    assert decode_text(b"caf\xe9", declared=declared) == "café"
    assert decode_text("café".encode(), declared=declared) == "café"


def test_a_declared_character_set_is_strict_too() -> None:
    with pytest.raises(InvalidRequest, match="byte 1 of the file is not valid in cp932"):
        decode_text(b"a\x85\xff", declared="shift_jis")


def test_a_declared_codec_that_is_no_character_set_is_not_used() -> None:
    for name in ("zlib_codec", "rot13", "unicode_escape", "idna", "utf-7"):
        with pytest.raises(InvalidRequest, match="not valid UTF-8"):
            decode_text(b"caf\xe9", declared=name)


def test_bytes_that_are_no_text_are_refused() -> None:
    with pytest.raises(InvalidRequest, match="byte 2 is NUL"):
        decode_text(b"ab\x00c")
    with pytest.raises(InvalidRequest, match="looks like UTF-16"):
        decode_text("hello there".encode("utf-16-le"))
    with pytest.raises(InvalidRequest, match="control characters"):
        decode_text(bytes(range(1, 32)) * 10)
    with pytest.raises(InvalidRequest, match="character 1 is NUL"):
        decode_text("a\x00".encode("utf-16"))


def test_a_log_with_a_few_colours_is_still_text() -> None:
    line = "2024-01-01 \x1b[31mERROR\x1b[0m the disk of the second machine is nearly full\n" * 20
    assert "ERROR" in clean_text(decode_text(line.encode()))
