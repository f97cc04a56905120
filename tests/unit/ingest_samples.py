"""Small files built byte by byte: PDFs, Word documents, and texts with a known shape."""

from __future__ import annotations

import io
import random
import zipfile
from collections.abc import Mapping, Sequence

from pypdf import PdfReader, PdfWriter

Line = tuple[str, float]

_W = "http://schemas.openxmlformats.org/wordprocessingml/2006/main"
_RELATIONS = "http://schemas.openxmlformats.org/package/2006/relationships"
_OFFICE = "http://schemas.openxmlformats.org/officeDocument/2006/relationships"
_WORDS = (
    "refund parcel order customer invoice account password delivery warehouse courier voucher "
    "receipt ticket agent policy warranty deposit balance transfer statement address contract"
).split()


def sentence(source: random.Random, *, words: int = 12) -> str:
    """A sentence without meaning that ends like one."""
    return " ".join(source.choice(_WORDS) for _ in range(words)).capitalize() + "."


def paragraph(source: random.Random, *, sentences: int = 4) -> str:
    return " ".join(sentence(source) for _ in range(sentences))


def pdf(pages: Sequence[Sequence[Line | str]], *, image_only: bool = False) -> bytes:
    """A PDF of one font; a line is text, or (text, size of its letters)."""
    objects: list[bytes] = [b"<< /Type /Catalog /Pages 2 0 R >>", b""]
    kids: list[str] = []
    objects.append(b"<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica >>")
    for lines in pages:
        content = b"0 0 100 100 re f" if image_only else _drawn(lines)
        objects.append(b"<< /Length %d >>\nstream\n%s\nendstream" % (len(content), content))
        objects.append(
            b"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 612 792] /Contents %d 0 R "
            b"/Resources << /Font << /F1 3 0 R >> >> >>" % len(objects)
        )
        kids.append(f"{len(objects)} 0 R")
    objects[1] = f"<< /Type /Pages /Kids [{' '.join(kids)}] /Count {len(kids)} >>".encode()
    return _assembled(objects)


def _drawn(lines: Sequence[Line | str]) -> bytes:
    pieces = [b"BT"]
    height = 750.0
    for line in lines:
        text, size = (line, 10.0) if isinstance(line, str) else line
        escaped = text.replace("\\", r"\\").replace("(", r"\(").replace(")", r"\)")
        pieces.append(b"/F1 %.1f Tf 1 0 0 1 50 %.1f Tm" % (size, height))
        pieces.append(b"(" + escaped.encode("cp1252") + b") Tj")
        height -= 1.4 * size
    pieces.append(b"ET")
    return b"\n".join(pieces)


def _assembled(objects: Sequence[bytes]) -> bytes:
    body = bytearray(b"%PDF-1.7\n")
    offsets: list[int] = []
    for number, content in enumerate(objects, start=1):
        offsets.append(len(body))
        body += b"%d 0 obj\n%s\nendobj\n" % (number, content)
    table = len(body)
    body += b"xref\n0 %d\n0000000000 65535 f \n" % (len(objects) + 1)
    for offset in offsets:
        body += b"%010d 00000 n \n" % offset
    body += b"trailer << /Size %d /Root 1 0 R >>\nstartxref\n%d\n%%%%EOF\n" % (
        len(objects) + 1,
        table,
    )
    return bytes(body)


def pdf_with(
    data: bytes,
    *,
    title: str | None = None,
    outline: Sequence[tuple[str, int]] = (),
    user_password: str | None = None,
) -> bytes:
    """The same PDF with a title, an outline of (line, page from 0), or encrypted with AES."""
    writer = PdfWriter()
    writer.append(PdfReader(io.BytesIO(data)))
    if title is not None:
        writer.add_metadata({"/Title": title})
    for entry, page in outline:
        writer.add_outline_item(title=entry, page_number=page)
    if user_password is not None:
        writer.encrypt(user_password, owner_password="owner", algorithm="AES-256")
    stream = io.BytesIO()
    writer.write(stream)
    return stream.getvalue()


def docx(
    body: str,
    *,
    title: str | None = None,
    extra: Mapping[str, bytes] | None = None,
    relations: str = "",
    prolog: str = "",
) -> bytes:
    """A Word document around the XML of its body.

    Args:
        extra: parts by name, put in as they are.
        relations: elements for the relations of the main part.
        prolog: what stands before the root element of the main part.
    """
    parts: dict[str, bytes] = {
        "[Content_Types].xml": (
            b'<Types xmlns="http://schemas.openxmlformats.org/package/2006/content-types">'
            b'<Override PartName="/word/document.xml" ContentType="application/vnd.openxmlformats-'
            b'officedocument.wordprocessingml.document.main+xml"/></Types>'
        ),
        "_rels/.rels": (
            f'<Relationships xmlns="{_RELATIONS}"><Relationship Id="r1" '
            f'Type="{_OFFICE}/officeDocument" Target="word/document.xml"/>'
            '<Relationship Id="r2" Type="http://schemas.openxmlformats.org/package/2006/'
            'relationships/metadata/core-properties" Target="docProps/core.xml"/></Relationships>'
        ).encode(),
        "word/_rels/document.xml.rels": (
            f'<Relationships xmlns="{_RELATIONS}">{relations}'
            f'<Relationship Id="r1" Type="{_OFFICE}/styles" Target="styles.xml"/>'
            f'<Relationship Id="r2" Type="{_OFFICE}/footnotes" Target="footnotes.xml"/>'
            "</Relationships>"
        ).encode(),
        "word/styles.xml": _STYLES.encode(),
        "word/document.xml": (
            f'{prolog}<w:document xmlns:w="{_W}" '
            'xmlns:mc="http://schemas.openxmlformats.org/markup-compatibility/2006">'
            f"<w:body>{body}</w:body></w:document>"
        ).encode(),
    }
    if title is not None:
        parts["docProps/core.xml"] = (
            '<cp:coreProperties xmlns:cp="http://schemas.openxmlformats.org/package/2006/metadata/'
            'core-properties" xmlns:dc="http://purl.org/dc/elements/1.1/">'
            f"<dc:title>{title}</dc:title></cp:coreProperties>"
        ).encode()
    return archive({**parts, **(extra or {})})


_STYLES = f"""<w:styles xmlns:w="{_W}">
<w:style w:type="paragraph" w:styleId="H1"><w:name w:val="heading 1"/></w:style>
<w:style w:type="paragraph" w:styleId="H2"><w:name w:val="heading 2"/></w:style>
<w:style w:type="paragraph" w:styleId="Own"><w:name w:val="My chapter"/><w:basedOn w:val="H2"/>
</w:style>
<w:style w:type="paragraph" w:styleId="Title"><w:name w:val="Title"/></w:style>
<w:style w:type="paragraph" w:styleId="LB"><w:name w:val="List Bullet"/></w:style>
<w:style w:type="paragraph" w:styleId="TOC1"><w:name w:val="toc 1"/></w:style>
</w:styles>"""


def archive(parts: Mapping[str, bytes]) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as packed:
        for name, content in parts.items():
            packed.writestr(name, content)
    return stream.getvalue()


def word_paragraph(text: str, *, style: str | None = None) -> str:
    """A paragraph of one run, as it stands in a body."""
    named = f'<w:pPr><w:pStyle w:val="{style}"/></w:pPr>' if style else ""
    return f'<w:p>{named}<w:r><w:t xml:space="preserve">{text}</w:t></w:r></w:p>'


def word_table(rows: Sequence[Sequence[str]], *, first_row_is_header: bool = True) -> str:
    look = f'<w:tblPr><w:tblLook w:firstRow="{int(first_row_is_header)}"/></w:tblPr>'
    cells = "".join(
        "<w:tr>" + "".join(f"<w:tc>{word_paragraph(text)}</w:tc>" for text in row) + "</w:tr>"
        for row in rows
    )
    return f"<w:tbl>{look}{cells}</w:tbl>"
