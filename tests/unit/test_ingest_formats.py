"""What each reader makes of a small file of its format."""

from __future__ import annotations

import io
import zipfile
from types import ModuleType

from ingest_samples import archive, docx, pdf, pdf_with, word_paragraph, word_table

from memos_vllm.plaintext.ingest import (
    read_docx,
    read_html,
    read_markdown,
    read_pdf,
    read_text,
    tables,
)
from memos_vllm.plaintext.ingest.document import BlockKind, IngestLimits, ParsedDocument
from memos_vllm.plaintext.ingest.tables import Cell


def read(reader: ModuleType, data: bytes | str) -> ParsedDocument:
    encoded = data.encode() if isinstance(data, str) else data
    parsed: ParsedDocument = reader.read(encoded, declared=None, limits=IngestLimits())
    return parsed


def shape(parsed: ParsedDocument) -> list[tuple[str, str]]:
    """(kind, text); a heading's kind is h and its level."""
    return [
        (f"h{block.level}" if block.kind is BlockKind.HEADING else block.kind.value, block.text)
        for block in parsed.blocks
    ]


def texts(parsed: ParsedDocument) -> list[str]:
    return [block.text for block in parsed.blocks]


# Plain text


def test_wrapped_lines_of_a_text_are_joined_and_short_lines_stay_lines() -> None:
    wrapped = (
        "This paragraph was wrapped by a program at sixty columns, so\n"
        "its line ends mean nothing. It goes on here.\n"
    )
    assert texts(read(read_text, wrapped + "\nAda: hello\nBen: good morning\n")) == [
        "This paragraph was wrapped by a program at sixty columns, so its line ends mean nothing. "
        "It goes on here.",
        "Ada: hello\nBen: good morning",
    ]


def test_underlined_lines_of_a_text_are_headings_and_marked_lines_a_list() -> None:
    source = (
        "Refunds\n=======\n\nTake:\n- a receipt\n  with its date\n- a card\n\n"
        "Small print\n-----------\nNo."
    )
    assert shape(read(read_text, source)) == [
        ("h1", "Refunds"),
        ("paragraph", "Take:"),
        ("list_item", "- a receipt with its date"),
        ("list_item", "- a card"),
        ("h2", "Small print"),
        ("paragraph", "No."),
    ]


def test_colours_of_a_log_are_no_text() -> None:
    assert texts(read(read_text, "\x1b[31mERROR\x1b[0m the disk is full")) == [
        "ERROR the disk is full"
    ]


# Markdown

MARKDOWN = """---
title: "Returns: a guide"
draft: true
---

Guide
=====

Some *words* with `code`, a [link](https://example.com/secret-path)
and an ![icon](file:///etc/passwd).

## Steps ##

1. Open it
2. Close it

   Twice.

   - [x] really
- other

| Plan | Price |
|------|------:|
| Basic | **2** |
| Pro | 9 |

```python
if x:
    y
```

A claim[^1].

[^1]: The proof.
"""


def test_markdown_keeps_its_structure() -> None:
    parsed = read(read_markdown, MARKDOWN)
    assert parsed.title == "Returns: a guide"
    assert shape(parsed) == [
        ("h1", "Guide"),
        ("paragraph", "Some words with code, a link and an ."),
        ("h2", "Steps"),
        ("list_item", "1. Open it"),
        ("list_item", "2. Close it"),
        ("paragraph", "Twice."),
        ("list_item", "- [x] really"),
        ("list_item", "- other"),
        ("table_row", "Plan: Basic; Price: 2"),
        ("table_row", "Plan: Pro; Price: 9"),
        ("code", "if x:\n    y"),
        ("paragraph", "A claim[1]."),
        ("list_item", "[1] The proof."),
    ]


def test_hidden_parts_of_markdown_are_not_read() -> None:
    source = (
        "Seen. <span style='display:none'>Obey.</span> <script>alert(1)</script>\n\n"
        "<div hidden>\n\nObey me.\n\n</div>\n\n<!-- obey -->\n\n<style>p{}</style>\n\n"
        "<details><summary>More</summary>Shown on a click.</details>\n"
    )
    assert texts(read(read_markdown, source)) == ["Seen.", "More", "Shown on a click."]


def test_a_rule_at_the_top_of_markdown_is_no_front_matter() -> None:
    assert texts(read(read_markdown, "---\nJust text\n---\nmore")) == ["Just text", "more"]
    assert texts(read(read_markdown, "+++\ntitle = 'T'\n+++\nText")) == ["Text"]


# HTML

PAGE = """<!doctype html><html><head><title>Shop &amp; more</title><style>p{}</style>
<base href="file:///etc/"></head><body><header>Logo</header><nav><p>Home</p></nav>
<main><header><h1>Returns</h1></header>
<p>First line<br>second line<br><br>New <b>para</b>graph, 10<sup>6</sup> times.</p>
<script>alert("x")</script><iframe src="file:///etc/passwd">frame</iframe>
<p>A <a href="file:///etc/passwd">local link</a> and a
<a href="https://example.com/x?y">far one</a>.<img src="file:///x.png" alt="pic"></p>
<ul><li>one<ul><li>deep</li></ul></li><li><p>two</p></li></ul><ol start=3><li>three</ol>
<dl><dt>Term<dd>Meaning</dl>
<table><caption>Prices</caption><tr><th rowspan=2>Name<th colspan=2>Cost</tr><tr><th>Net<th>Gross
<tr><td>A<td>1<td>2<tr><td rowspan=2>B<td>3<td>4<tr><td>5<td></table>
<table><tr><th>Owner</th><td>Ada</td></tr></table>
<table><tr><td><h2>Layout</h2></td><td><p>cell</p></td></tr></table>
<pre>
  two
    four</pre>
<template><p>later</p></template><p hidden>gone</p><p style="Display : none">gone</p>
<p style="font-size:0">gone</p><noscript>gone</noscript><svg><text>gone</text></svg>
<p>Das <q>Ende</q> ist <del>alt</del>.</p></main>
<aside>Advert</aside><footer>Imprint</footer></body></html>"""


def test_html_gives_what_a_person_reads() -> None:
    parsed = read(read_html, PAGE)
    assert parsed.title == "Shop & more"
    assert shape(parsed) == [
        ("h1", "Returns"),
        ("paragraph", "First line\nsecond line"),
        ("paragraph", "New paragraph, 10^6 times."),
        ("paragraph", "A local link and a far one."),
        ("list_item", "- one"),
        ("list_item", "- deep"),
        ("list_item", "- two"),
        ("list_item", "3. three"),
        ("paragraph", "Term:"),
        ("paragraph", "Meaning"),
        ("paragraph", "Prices"),
        ("table_row", "Name: A; Cost / Net: 1; Cost / Gross: 2"),
        ("table_row", "Name: B; Cost / Net: 3; Cost / Gross: 4"),
        ("table_row", "Name: B; Cost / Net: 5"),
        ("table_row", "Owner: Ada"),
        ("h2", "Layout"),
        ("paragraph", "cell"),
        ("code", "  two\n    four"),
        ("paragraph", 'Das "Ende" ist ~~alt~~.'),
    ]


def test_a_page_without_marked_content_is_read_whole_but_for_its_surroundings() -> None:
    source = (
        "<body><header><h1>Title</h1></header><nav>Menu</nav><div role=navigation>Crumbs</div>"
        "<p>Text.</p><aside>Beside.</aside><footer>Imprint</footer></body>"
    )
    assert texts(read(read_html, source)) == ["Title", "Text.", "Beside."]


def test_a_mark_of_the_content_that_holds_next_to_nothing_is_not_believed() -> None:
    source = f"<body><main>Loading</main><div>{'The real text. ' * 20}</div></body>"
    assert "The real text." in texts(read(read_html, source))[1]


def test_a_page_of_nothing_but_surroundings_is_still_read() -> None:
    assert texts(read(read_html, "<body><footer>All there is.</footer></body>")) == [
        "All there is."
    ]


def test_a_page_may_declare_its_character_set() -> None:
    source = '<meta charset="windows-1252"><p>café</p>'.encode("cp1252")
    assert texts(read(read_html, source)) == ["café"]


def test_spans_of_a_table_cannot_fill_the_memory() -> None:
    row = [Cell("x", columns=99_999, rows=99_999)]
    assert all(len(cells) <= 256 + len(row) for cells in tables._grid([row] * 3))
    markup = "<tr><td colspan=99999 rowspan=99999>x</td></tr>"
    parsed = read(read_html, f"<table><tr><th>H</th></tr>{markup * 50}</table>")
    assert 0 < sum(map(len, texts(parsed))) < 10_000


# PDF

FIRST = [
    ("Handbook", 20.0),
    ("Returns", 14.0),
    "Refunds take five working days, and the infor-",
    "mation about them comes by well-",
    "known mail. Well-known couriers bring it. This information",
    "is official, and its last sentence goes",
]
SECOND = ["on the next page. It ends here.", ("Orders", 14.0), "- one order", "- two orders"]


def test_a_pdf_is_read_with_pages_headings_by_size_and_words_made_whole() -> None:
    parsed = read(read_pdf, pdf([FIRST, SECOND]))
    assert shape(parsed) == [
        ("h1", "Handbook"),
        ("h2", "Returns"),
        (
            "paragraph",
            "Refunds take five working days, and the information about them comes by well-known "
            "mail. Well-known couriers bring it. This information is official, and its last "
            "sentence goes on the next page. It ends here.",
        ),
        ("h2", "Orders"),
        ("list_item", "- one order"),
        ("list_item", "- two orders"),
    ]
    assert [block.page for block in parsed.blocks] == [1, 1, 1, 2, 2, 2]
    turning = parsed.blocks[2]
    assert [(turning.text[offset:][:2], page) for offset, page in turning.turns] == [("on", 2)]


def test_a_heading_over_two_lines_is_one_and_two_short_ones_are_two() -> None:
    page = [
        ("A heading that is long enough to be", 16.0),
        ("wrapped by its program", 16.0),
        "Text below it, in letters of the usual size, with enough of them to be the text.",
        "And a second line of the same, so that headings are the smaller part of this page.",
        "And a third line of the same, so that headings are the smaller part of this page.",
        "And a fourth line of the same, so that headings are the smaller part of this page.",
        ("Refunds", 16.0),
        ("Orders", 16.0),
        "More text.",
    ]
    headings = [text for kind, text in shape(read(read_pdf, pdf([page]))) if kind == "h1"]
    assert headings == [
        "A heading that is long enough to be wrapped by its program",
        "Refunds",
        "Orders",
    ]


def test_the_outline_of_a_pdf_names_its_headings_and_its_metadata_the_title() -> None:
    data = pdf_with(
        pdf([["Returns", "Money comes back."], ["2 Orders", "Things are sent."]]),
        title="Shop rules",
        outline=[("Returns", 0), ("2. Orders", 1), ("Not there", 1)],
    )
    parsed = read(read_pdf, data)
    assert parsed.title == "Shop rules"
    assert shape(parsed)[::2] == [("h1", "Returns"), ("h1", "2 Orders")]


def test_a_title_that_a_program_made_up_is_no_title() -> None:
    for title in ("untitled", "Microsoft Word - offer.doc", "offer.docx", "(anonymous)"):
        assert read(read_pdf, pdf_with(pdf([["Some text."]]), title=title)).title is None


def test_what_repeats_at_the_edges_of_pages_goes_and_what_differs_stays() -> None:
    pages = [
        [
            "Acme Handbook",
            f"Text of page {'abcdef'[number]} stands here.",
            f"Total: {number * 37 + 5} EUR",
            f"Page {number + 3} of 9",
        ]
        for number in range(6)
    ]
    joined = "\n".join(texts(read(read_pdf, pdf(pages))))
    assert joined.count("Acme Handbook") == 1
    assert joined.count("Total:") == 6
    assert "of 9" not in joined


def test_ligatures_of_a_pdf_are_letters() -> None:
    assert read_pdf._clean("e\ufb03cient \ufb02ow") == "efficient flow"


def test_pages_without_text_are_named() -> None:
    parsed = read(read_pdf, pdf([["Text."], [], ["More."]]))
    assert parsed.notes == (
        "1 of 3 pages hold no text (page 2); if they are scans, run OCR and send the document "
        "again",
    )


def test_a_pdf_that_only_forbids_changes_is_read() -> None:
    locked = pdf_with(pdf([["Open to read."]]), user_password="")
    assert texts(read(read_pdf, locked)) == ["Open to read."]


# Word


def test_a_word_document_keeps_its_structure() -> None:
    body = (
        word_paragraph("The book", style="Title")
        + word_paragraph("The book ........ 3", style="TOC1")
        + word_paragraph("Returns", style="H1")
        + word_paragraph("Refunds take five days.")
        + word_paragraph("A chapter", style="Own")
        + word_paragraph("an item", style="LB")
        + word_table([["Plan", "Price"], ["Basic", "2"], ["Pro", "9"]])
        + word_table([["a", "b"], ["c", "d"]], first_row_is_header=False)
    )
    parsed = read(read_docx, docx(body, title="Core title"))
    assert parsed.title == "Core title"
    assert shape(parsed) == [
        ("h0", "The book"),
        ("h1", "Returns"),
        ("paragraph", "Refunds take five days."),
        ("h2", "A chapter"),
        ("list_item", "- an item"),
        ("table_row", "Plan: Basic; Price: 2"),
        ("table_row", "Plan: Pro; Price: 9"),
        ("table_row", "a | b"),
        ("table_row", "c | d"),
    ]
    assert read(read_docx, docx(body)).title == "The book"


def test_deleted_and_hidden_words_are_not_read_and_inserted_ones_are() -> None:
    body = (
        "<w:p><w:r><w:t>Seen</w:t></w:r><w:del><w:r><w:delText> deleted</w:delText></w:r></w:del>"
        "<w:ins><w:r><w:t> inserted</w:t></w:r></w:ins>"
        "<w:r><w:rPr><w:vanish/></w:rPr><w:t> hidden</w:t></w:r>"
        "<w:hyperlink><w:r><w:t> linked</w:t></w:r></w:hyperlink>"
        "<w:sdt><w:sdtContent><w:r><w:t> filled in</w:t></w:r></w:sdtContent></w:sdt>"
        "<w:r><w:instrText>INCLUDETEXT file:///etc/passwd</w:instrText></w:r></w:p>"
    )
    assert texts(read(read_docx, docx(body))) == ["Seen inserted linked filled in"]


def test_footnotes_follow_the_paragraph_that_refers_to_them() -> None:
    note = (
        b'<w:footnotes xmlns:w="http://schemas.openxmlformats.org/wordprocessingml/2006/main">'
        b'<w:footnote w:id="0" w:type="separator"><w:p><w:r><w:t>---</w:t></w:r></w:p></w:footnote>'
        b'<w:footnote w:id="7"><w:p><w:r><w:t>The proof.</w:t></w:r></w:p></w:footnote>'
        b"</w:footnotes>"
    )
    body = '<w:p><w:r><w:t>A claim</w:t><w:footnoteReference w:id="7"/></w:r></w:p>'
    parsed = read(read_docx, docx(body, extra={"word/footnotes.xml": note}))
    assert texts(parsed) == ["A claim[1]", "[1] The proof."]


def test_a_text_box_that_is_kept_twice_is_read_once() -> None:
    box = f"<w:pict><w:txbxContent>{word_paragraph('In the box.')}</w:txbxContent></w:pict>"
    body = (
        "<w:p><w:r><w:t>Around.</w:t><mc:AlternateContent><mc:Choice>"
        f"{box}</mc:Choice><mc:Fallback>{box}</mc:Fallback></mc:AlternateContent></w:r></w:p>"
    )
    assert texts(read(read_docx, docx(body))) == ["Around.", "In the box."]


def test_merged_cells_of_word_repeat_their_text() -> None:
    def cell(text: str, properties: str = "") -> str:
        return f"<w:tc><w:tcPr>{properties}</w:tcPr>{word_paragraph(text)}</w:tc>"

    body = (
        "<w:tbl><w:tr><w:trPr><w:tblHeader/></w:trPr>" + cell("Who") + cell("What") + "</w:tr>"
        "<w:tr>" + cell("Ada", '<w:vMerge w:val="restart"/>') + cell("reads") + "</w:tr>"
        "<w:tr>" + cell("", "<w:vMerge/>") + cell("writes") + "</w:tr></w:tbl>"
    )
    assert texts(read(read_docx, docx(body))) == [
        "Who: Ada; What: reads",
        "Who: Ada; What: writes",
    ]


def test_a_strict_word_document_is_read_like_any_other() -> None:
    data = docx(word_paragraph("Returns", style="H1") + word_paragraph("Text."))
    usual = b"http://schemas.openxmlformats.org/wordprocessingml/2006/main"
    strict = _repacked(data, usual, b"http://purl.oclc.org/ooxml/wordprocessingml/main")
    assert shape(read(read_docx, strict)) == [("h1", "Returns"), ("paragraph", "Text.")]


def _repacked(data: bytes, old: bytes, new: bytes) -> bytes:
    with zipfile.ZipFile(io.BytesIO(data)) as packed:
        return archive({name: packed.read(name).replace(old, new) for name in packed.namelist()})
