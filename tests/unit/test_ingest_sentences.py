"""Where sentences start: in prose, around abbreviations, and in other scripts."""

from __future__ import annotations

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from memos_vllm.plaintext.ingest.sentences import sentence_starts, split_sentences

# One line per sentence.
PROSE = {
    "plain": "It came. It stayed! Did it go?\nIt came.|It stayed!|Did it go?",
    "titles": "Mr. Okafor met Dr. Lindqvist. She left.\nMr. Okafor met Dr. Lindqvist.|She left.",
    "decimals": "It costs $3.50 now. Pay 1.5 times.\nIt costs $3.50 now.|Pay 1.5 times.",
    "initials": "J. R. R. Tolkien wrote it. Yes.\nJ. R. R. Tolkien wrote it.|Yes.",
    "the word I": "So did I. Then we left.\nSo did I.|Then we left.",
    "acronym inside": "The U.S. Army came. It left.\nThe U.S. Army came.|It left.",
    "acronym at the end": "He lives in the U.S. She does not.\nHe lives in the U.S.|She does not.",
    "company": "Acme Inc. Chief Rao spoke. All heard.\nAcme Inc. Chief Rao spoke.|All heard.",
    "latin": "Use tools, e.g. Hammers. Or i.e. Saws.\nUse tools, e.g. Hammers.|Or i.e. Saws.",
    "dates": "Come on Jan. 5. Bring it.\nCome on Jan. 5.|Bring it.",
    "figures": "See Fig. 3 and No. 7. Then go.\nSee Fig. 3 and No. 7.|Then go.",
    "quotation": '"Why?" he asked. "Because." She left.\n"Why?" he asked.|"Because."|She left.',
    "brackets": "He left (why?) early. (See it.) Then.\nHe left (why?) early.|(See it.)|Then.",
    "ellipsis": "Wait... what? Well… Then go.\nWait... what?|Well…|Then go.",
    "addresses": "See www.example.com/a.b?c=d. Then go.\nSee www.example.com/a.b?c=d.|Then go.",
    "file names": "Open a.txt and Node.js now. Then go.\nOpen a.txt and Node.js now.|Then go.",
    "versions": "Version 2.0.1 is out. Use it.\nVersion 2.0.1 is out.|Use it.",
    "numbered": "1. Open it. 2. Close it.\n1. Open it.|2. Close it.",
    "footnote mark": "It ended.[12] Then it began.\nIt ended.[12]|Then it began.",
    "small letters": "i went there. it was fun. bye\ni went there.|it was fun.|bye",
    "german": "Am 3. Oktober kam z.B. Karl. Er ging.\nAm 3. Oktober kam z.B. Karl.|Er ging.",
    "spanish": "¿Cuánto cuesta? ¡Mucho! La Sra. Gil va.\n¿Cuánto cuesta?|¡Mucho!|La Sra. Gil va.",
    "russian": "А. С. Пушкин родился. Он жил.\nА. С. Пушкин родился.|Он жил.",
    "chinese": "你好。他说：“走吧！”然后走了。\n你好。|他说：“走吧！”|然后走了。",
    "japanese": "「行く。」と言った。そうだ。\n「行く。」と言った。|そうだ。",
    "full width number": "値は３．１４です。次へ。\n値は３．１４です。|次へ。",
    "hindi": "हम गए। वह आया।\nहम गए।|वह आया।",
    "arabic": "كيف حالك؟ أنا بخير.\nكيف حالك؟|أنا بخير.",
    "thai": "สวัสดีครับ ผมชื่อสมชาย\nสวัสดีครับ|ผมชื่อสมชาย",
}


@pytest.mark.parametrize("name", PROSE)
def test_sentences_end_where_a_reader_says(name: str) -> None:
    text, _, expected = PROSE[name].partition("\n")
    assert split_sentences(text) == expected.split("|")


def test_a_line_end_that_a_reader_kept_ends_a_sentence_but_not_before_a_small_letter() -> None:
    assert split_sentences("Roses are red\nViolets are blue\nand so on") == [
        "Roses are red",
        "Violets are blue\nand so on",
    ]


def test_a_missed_cut_is_preferred_to_a_wrong_one() -> None:
    assert split_sentences("She got an A. Ravi did not.") == ["She got an A. Ravi did not."]


@given(st.text(alphabet="aA1.!?…\"')] \n。」とI(", max_size=120))
def test_sentences_keep_every_character_in_order(text: str) -> None:
    starts = sentence_starts(text)
    assert starts == sorted(set(starts))
    assert all(0 < start < len(text) and not text[start].isspace() for start in starts)
    kept = "".join("".join(split_sentences(text)).split())
    assert kept == "".join(text.split())


@pytest.mark.parametrize(
    "unit",
    [". ", "a. ", '."', "(", "A.", ".\n", "1. ", "。", "…", "[1]", ". a", "J. R. ", "3. Mai "],
)
def test_time_grows_with_the_length_and_no_faster(unit: str) -> None:
    text = unit * (400_000 // len(unit))
    started = time.perf_counter()
    sentence_starts(text)
    # A square would take minutes.
    assert time.perf_counter() - started < 3.0
