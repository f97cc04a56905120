"""Every bad file is a clear refusal that says what to do."""

from __future__ import annotations

import io
import zipfile

import pytest
from ingest_samples import archive, docx, pdf, pdf_with, word_paragraph

from memos_vllm.errors import InvalidRequest, MemosError, TooLarge
from memos_vllm.plaintext.ingest.document import FileKind, IngestLimits
from memos_vllm.plaintext.ingest.kinds import detect_kind
from memos_vllm.plaintext.ingest.pipeline import ingest_document

GOOD_PDF = pdf([["Some text."]])


def refusal(
    data: bytes, filename: str, *, media_type: str | None = None, limits: IngestLimits | None = None
) -> MemosError:
    with pytest.raises((InvalidRequest, TooLarge)) as caught:
        ingest_document(data, filename=filename, media_type=media_type, limits=limits)
    return caught.value


@pytest.mark.parametrize(
    ("data", "filename", "message"),
    [
        (b"", "a.txt", "the file is empty"),
        (b" \n\t ", "a.txt", "holds no text"),
        (b"caf\xe9 au lait", "a.txt", "byte 3 of the file .* save it again as UTF-8"),
        (b"caf\xe9", "a.md", "byte 3 .* not valid UTF-8"),
        (b"text\x00text", "a.txt", "byte 4 is NUL"),
        (bytes(range(1, 32)) * 9, "a.txt", "control characters"),
        (b"\x89PNG\r\n\x1a\nxxxx", "a.txt", "named .txt and its bytes are a picture"),
        (b"MZ\x90\x00\x03", "a.md", "named .md and its bytes are a program"),
        (GOOD_PDF, "a.txt", "named .txt and its bytes are a PDF; give it its own suffix"),
        (GOOD_PDF, "a.docx", "named .docx and its bytes are a PDF"),
        (b"just text", "a.pdf", "named .pdf and its bytes are something else"),
        (GOOD_PDF[:300], "a.pdf", "the PDF is broken: .* export it to a new PDF"),
        (b"%PDF-1.7\n" + b"junk " * 50, "a.pdf", "the PDF is broken"),
        (pdf_with(GOOD_PDF, user_password="x"), "a.pdf", "password; remove the password"),
        (pdf([[], []], image_only=True), "a.pdf", r"no text: .* run OCR"),
        (
            b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1" + b"x" * 99,
            "a.docx",
            "an Office file with a password",
        ),
        (b"x", "a.doc", r"a \.doc file cannot be read; taken are plain text \(\.txt\), Markdown"),
        (b"{\\rtf1 hello}", "letter", "an RTF file cannot be read; taken are"),
        (b"x", "a.pptx", "a .pptx file cannot be read"),
        (archive({"mimetype": b"x"}), "a.zip", "a .zip file cannot be read"),
        (archive({"xl/workbook.xml": b"x"}), "table", "an Excel workbook cannot be read"),
        (archive({"a": b"x"}), "a.docx", "its bytes are a zip archive"),
        (b"PK\x03\x04 word/document", "a.docx", "its zip directory cannot be read"),
        (archive({"word/document.xml": b"<broken"}), "a.docx", "is not well-formed XML"),
        (b"<div>" * 100_000, "a.html", "nests its elements more than 4000 deep; flatten it"),
        (b"- " * 10_000 + b"x", "a.md", "nests its elements more than 4000 deep"),
        (b"> " * 10_000 + b"x", "a.md", "nests its elements more than 4000 deep"),
        (b"<p " + b"a=1 " * 100_000 + b">", "a.html", "a tag with more than 5000 attributes"),
        (b"<script>x</script><style>y</style>", "a.html", "holds no text"),
    ],
)
def test_a_bad_file_is_refused_with_what_to_do(data: bytes, filename: str, message: str) -> None:
    error = refusal(data, filename)
    assert isinstance(error, InvalidRequest)
    assert error.param == "file"
    with pytest.raises(InvalidRequest, match=message):
        raise error


def test_files_over_the_limits_are_too_large() -> None:
    limits = IngestLimits(max_bytes=100, max_text_bytes=40, max_chunks=2, max_pages=1)
    assert "101 bytes and the limit is 100" in str(refusal(b"x" * 101, "a.txt", limits=limits))
    assert "50 bytes of text and the limit is 40" in str(refusal(b"x" * 50, "a.txt", limits=limits))
    sections = b"# A\nx\n# B\ny\n# C\nz"
    assert "more than 2 chunks" in str(refusal(sections, "a.md", limits=limits))
    pages = refusal(pdf([["a"], ["b"]]), "a.pdf", limits=IngestLimits(max_pages=1))
    assert isinstance(pages, TooLarge)
    assert "2 pages and the limit is 1" in str(pages)


def test_sixty_five_kibibytes_of_text_make_a_document_of_many_chunks() -> None:
    text = ("Refunds take five working days. " * 3000)[: 65 * 1024]
    document = ingest_document(text.encode(), filename="a.txt")
    assert len(document.chunks) > 50
    assert "".join(chunk.text for chunk in document.chunks).replace(" ", "") == text.replace(
        " ", ""
    )


def test_a_zip_bomb_is_refused_before_it_is_unpacked() -> None:
    limits = IngestLimits(max_unpacked_bytes=10_000_000)
    ratio = docx(word_paragraph("x") + "<!--" + " " * 8_000_000 + "-->")
    assert len(ratio) < 20_000
    for bomb in (
        ratio,
        docx(word_paragraph("x"), extra={f"media/{n}": b"\0" * 900_000 for n in range(12)}),
        _with_shared_bytes(docx(word_paragraph("x"))),
    ):
        error = refusal(bomb, "a.docx", limits=limits)
        assert isinstance(error, TooLarge)
        assert "zip bombs" in str(error)
    many = docx(word_paragraph("x"), extra={f"p{n}": b"" for n in range(50)})
    error = refusal(many, "a.docx", limits=IngestLimits(max_archive_entries=40))
    assert "has 55 parts and the limit is 40" in str(error)


def _with_shared_bytes(data: bytes) -> bytes:
    """The same archive with a directory that names one part a thousand times."""
    stream = io.BytesIO(data)
    with zipfile.ZipFile(stream, "a") as packed:
        entry = packed.getinfo("word/document.xml")
        for number in range(1000):
            copy = zipfile.ZipInfo(f"word/{number}.xml")
            for name in ("header_offset", "compress_size", "file_size", "CRC", "compress_type"):
                setattr(copy, name, getattr(entry, name))
            packed.filelist.append(copy)
        packed._didModify = True
    return stream.getvalue()


def test_a_part_that_is_longer_than_its_directory_says_is_not_read_on() -> None:
    data = docx(word_paragraph("long text " * 50_000))
    with zipfile.ZipFile(io.BytesIO(data)) as packed:
        size = packed.getinfo("word/document.xml").file_size
    shrunk = data.replace(size.to_bytes(4, "little"), (500).to_bytes(4, "little"))
    assert "broken" in str(refusal(shrunk, "a.docx"))


@pytest.mark.parametrize(
    "prolog",
    [
        '<!DOCTYPE x [<!ENTITY a SYSTEM "file:///etc/passwd">]>',
        '<!DOCTYPE x [<!ENTITY a "ha"><!ENTITY b "&a;&a;&a;&a;&a;&a;&a;&a;&a;&a;">]>',
        '<!DOCTYPE x SYSTEM "http://127.0.0.1:1/x.dtd">',
    ],
)
def test_xml_entities_in_a_word_document_are_refused(prolog: str) -> None:
    reference = "&a;" if "ENTITY a" in prolog else ""
    error = refusal(docx(f"<w:p><w:r><w:t>{reference}</w:t></w:r></w:p>", prolog=prolog), "a.docx")
    assert "declares XML entities" in str(error)


@pytest.mark.parametrize("closing", ["", "</w:tc></w:tr></w:tbl>"])
def test_tables_in_tables_without_end_are_refused(closing: str) -> None:
    body = "<w:tbl><w:tr><w:tc>" * 10_000 + closing * 10_000
    assert isinstance(refusal(docx(body), "a.docx"), InvalidRequest)


def test_a_name_that_says_nothing_leaves_it_to_the_bytes() -> None:
    assert detect_kind(GOOD_PDF, filename="noname", media_type=None) is FileKind.PDF
    assert detect_kind(docx(""), filename="report v1.2", media_type=None) is FileKind.DOCX
    assert detect_kind(b" <!DOCTYPE html><p>", filename="x", media_type=None) is FileKind.HTML
    assert detect_kind(b"# Hello", filename="README", media_type=None) is FileKind.TEXT
    assert detect_kind(b"# Hello", filename="x", media_type="text/markdown") is FileKind.MARKDOWN
    octets = "application/octet-stream"
    assert detect_kind(GOOD_PDF, filename="x", media_type=octets) is FileKind.PDF


def test_a_name_decides_before_the_declared_type() -> None:
    assert detect_kind(b"x", filename="C:\\a\\B.MD", media_type="text/plain") is FileKind.MARKDOWN
    assert detect_kind(b"<html>", filename="a.txt", media_type="text/html") is FileKind.TEXT


def test_words_at_the_start_of_a_text_are_not_taken_for_another_format() -> None:
    for opening in (
        b"RIFF raff",
        b"ID3 tags are",
        b"GGUF is a format",
        b"BZh",
        b"%PDF-1.4 begins a",
    ):
        kind = detect_kind(opening + b" text", filename="x", media_type=None)
        assert kind is (FileKind.PDF if opening.startswith(b"%PDF") else FileKind.TEXT)


def test_messages_do_not_repeat_what_the_file_says() -> None:
    secret = b"the-secret-word"
    for data, name in (
        (secret + b"\xff", "a.txt"),
        (secret + b"\x00", "a.txt"),
        (b"%PDF-1.7 " + secret, "a.pdf"),
        (archive({"word/document.xml": b"<" + secret}), "a.docx"),
    ):
        assert secret.decode() not in str(refusal(data, name))
