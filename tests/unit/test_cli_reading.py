"""How texts, files, folders and stdin become memories."""

from __future__ import annotations

import io
from pathlib import Path

import pytest

from memos_vllm.cli.reading import (
    MAX_TEXT_BYTES,
    BlankFile,
    DocumentFile,
    InputError,
    Split,
    read_items,
    read_messages,
    split_at_headings,
)

HANDBOOK = """\
Welcome.

# Handbook

## Refunds

Five working days.

```sh
# not a heading
```

### By card ###
Three days.

## Empty

## Returns
Leeds.
"""


def read(
    *items: str | Path, texts: tuple[str, ...] = (), split: Split = Split.NONE
) -> list[tuple[str, dict[str, str]]]:
    pieces, documents = read_items([str(item) for item in items], texts=texts, split=split)
    assert documents == []
    return [(piece.text, piece.source) for piece in pieces]


def documents_of(*items: str | Path) -> list[str]:
    pieces, documents = read_items([str(item) for item in items], texts=(), split=Split.AUTO)
    assert pieces == []
    return [document.uri for document in documents]


def test_sections_carry_the_headings_that_lead_to_them() -> None:
    assert list(split_at_headings(HANDBOOK)) == [
        ([], "Welcome."),
        (
            ["Handbook", "Refunds"],
            "## Refunds\n\nFive working days.\n\n```sh\n# not a heading\n```",
        ),
        (["Handbook", "Refunds", "By card"], "### By card ###\nThree days."),
        (["Handbook", "Returns"], "## Returns\nLeeds."),
    ]


@pytest.mark.parametrize("line", ["#hashtag", "    # code", "####### seven", "\\# escaped"])
def test_what_only_looks_like_a_heading_does_not_split(line: str) -> None:
    assert list(split_at_headings(f"{line}\ntext")) == [([], f"{line}\ntext")]


@pytest.mark.parametrize("closing", ["```", "~~~\n```", "```` \n", "``` x\n```"])
def test_a_fence_ends_only_where_markdown_ends_it(closing: str) -> None:
    text = f"```\n# inside\n{closing}\n# Outside\nbody"
    *_, (path, _section) = split_at_headings(text)
    assert path == ["Outside"]


def test_a_file_is_one_memory_that_names_its_file(tmp_path: Path) -> None:
    file = tmp_path / "handbook.md"
    file.write_bytes(b"\xef\xbb\xbf# Refunds\r\nFive days.\r\n")
    assert read(file) == [
        (
            "# Refunds\nFive days.\n",
            {"kind": "file", "uri": file.as_posix(), "title": "handbook.md"},
        )
    ]


def test_a_split_file_is_a_memory_per_section_with_its_place(tmp_path: Path) -> None:
    file = tmp_path / "handbook.md"
    file.write_text(HANDBOOK)
    pieces = read(file, split=Split.HEADINGS)
    assert [source.get("locator") for _, source in pieces] == [
        None,
        "Handbook > Refunds",
        "Handbook > Refunds > By card",
        "Handbook > Returns",
    ]
    assert pieces[-1][1]["title"] == "Returns"


def test_a_folder_gives_its_text_files_in_order_and_nothing_hidden(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("b.md", "a/z.TXT", "a/y.png", ".git/x.md", "a/.hidden.md", "blank.md"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("" if name == "blank.md" else f"text of {name}")
    assert [text for text, _ in read(tmp_path)] == ["text of b.md", "text of a/z.TXT"]
    assert "blank.md is blank and was left out" in capsys.readouterr().err


def test_a_folder_without_texts_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no \.txt or \.md file"):
        read(tmp_path)


def test_what_is_no_file_is_a_text() -> None:
    assert read("Refunds take five days.") == [("Refunds take five days.", {"kind": "note"})]


@pytest.mark.parametrize("name", ["handbok.md", "docs/handbook", "NOTES.TXT"])
def test_a_misspelled_file_is_not_added_as_a_text(name: str) -> None:
    with pytest.raises(InputError, match="there is no file") as caught:
        read(name)
    assert "--text" in str(caught.value)
    assert read(texts=(name,)) == [(name, {"kind": "note"})]


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"\xff\xfe\x00", "not UTF-8"),
        (b"a\x00b", "NUL"),
        (b" \n\t\n", "is blank"),
        (b"x" * (MAX_TEXT_BYTES + 1), "65,537 bytes and a memory holds at most 65,536"),
    ],
)
def test_a_file_that_cannot_be_a_memory_is_named_with_the_reason(
    tmp_path: Path, content: bytes, says: str
) -> None:
    file = tmp_path / "a.md"
    file.write_bytes(content)
    with pytest.raises(InputError, match=says) as caught:
        read(file)
    assert str(file) in str(caught.value)


def test_the_largest_text_is_accepted_and_counted_in_bytes(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_text("é" * (MAX_TEXT_BYTES // 2))
    ((text, _),) = read(file)
    assert len(text.encode()) == MAX_TEXT_BYTES
    with pytest.raises(InputError, match="the text has"):
        read(texts=(text + "é",))


def test_a_section_that_is_too_large_is_named_by_its_heading(tmp_path: Path) -> None:
    file = tmp_path / "a.md"
    file.write_text("# Small\nx\n# Large\n" + "x" * MAX_TEXT_BYTES)
    with pytest.raises(InputError, match="section 'Large' of"):
        read(file, split=Split.HEADINGS)


def test_an_unreadable_path_is_an_error_and_no_traceback(tmp_path: Path) -> None:
    dangling = tmp_path / "link.md"
    dangling.symlink_to(tmp_path / "gone.md")
    with pytest.raises(InputError, match="cannot read"):
        read(dangling)


DOCUMENTS = ("a.pdf", "b.DOCX", "c.html", "d.htm", "e.md", "f.markdown", "g.txt")


@pytest.mark.parametrize("name", DOCUMENTS)
def test_a_file_that_the_server_can_cut_is_a_document(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / name).write_bytes(b"\xff\x00 not read yet")
    monkeypatch.chdir(tmp_path)
    assert documents_of(f"./docs/{name}") == [f"docs/{name}"]


def test_other_files_texts_and_stdin_stay_one_memory_each(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "notes.rst"
    file.write_text("# a\none\n# b\ntwo\n")
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"# c\nthree\n# d\nfour\n")))
    texts = [text for text, _ in read(file, "a text", "-", split=Split.AUTO)]
    assert texts == ["# a\none\n# b\ntwo\n", "a text", "# c\nthree\n# d\nfour\n"]


def test_a_folder_gives_every_document_in_it_and_nothing_hidden(tmp_path: Path) -> None:
    for name in (*DOCUMENTS, "sub/z.md", "y.png", ".git/x.md", ".hidden.pdf"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("text")
    expected = [(tmp_path / name).as_posix() for name in (*DOCUMENTS, "sub/z.md")]
    assert documents_of(tmp_path) == expected
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"holds no \.pdf, \.docx, .* or \.txt file"):
        documents_of(tmp_path / "empty")


def test_a_document_is_read_when_it_is_its_turn_and_blank_ones_are_told_apart(
    tmp_path: Path,
) -> None:
    file = tmp_path / "a.txt"
    file.write_bytes(b"\xfftext")
    assert DocumentFile(file).read() == b"\xfftext"
    file.write_bytes(b" \n")
    with pytest.raises(BlankFile, match=r"a\.txt is blank"):
        DocumentFile(file).read()
    with pytest.raises(InputError, match="cannot read"):
        DocumentFile(tmp_path / "gone.txt").read()
    with file.open("wb") as sparse:
        sparse.truncate((32 << 20) + 1)
    with pytest.raises(InputError, match=r"is over 32\.0 MiB"):
        DocumentFile(file).read()


@pytest.mark.parametrize("split", [Split.NONE, Split.HEADINGS])
def test_a_pdf_is_not_read_as_a_text(tmp_path: Path, split: Split) -> None:
    file = tmp_path / "a.pdf"
    file.write_text("%PDF-1.7")
    with pytest.raises(InputError, match="--split auto"):
        read(file, split=split)


@pytest.mark.parametrize(
    "content",
    [
        '[{"role": "user", "content": "a\u2028b"},\n {"role": "assistant", "content": "c"}]',
        '{"role": "user", "content": "a\u2028b"}\r\n\n{"role": "assistant", "content": "c"}\n',
    ],
)
def test_messages_are_a_json_list_or_one_object_a_line(tmp_path: Path, content: str) -> None:
    file = tmp_path / "talk.json"
    file.write_bytes(content.encode())
    assert [message["content"] for message in read_messages(str(file))] == ["a\u2028b", "c"]


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (" \n", "is blank"),
        ('[{"role": ', "is not JSON"),
        ("[1]", "message 1 of .* is not an object"),
        ('{"role": "user"}\nhello', "line 2 of .* is not JSON"),
        ('{"role": "user"}\n"hello"', "line 2 of .* is not an object"),
        ("[" * 100_000, "is not JSON"),
    ],
)
def test_what_is_no_list_of_messages_is_named_with_its_line(
    tmp_path: Path, content: str, says: str
) -> None:
    file = tmp_path / "talk.jsonl"
    file.write_text(content)
    with pytest.raises(InputError, match=says):
        read_messages(str(file))


def test_an_argument_of_undecodable_bytes_is_refused() -> None:
    with pytest.raises(InputError, match="not valid Unicode"):
        read("caf\udce9 au lait")
