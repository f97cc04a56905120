"""Word: paragraphs, headings by style, lists, tables and notes, in the order of the text.

What is deleted, hidden or kept elsewhere (comments, headers, linked or embedded files) is not read.
Strict documents (ISO 29500) use other names and are brought to the usual ones first.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from memos_vllm.plaintext.ingest import blocks
from memos_vllm.plaintext.ingest.cleaning import clean_line
from memos_vllm.plaintext.ingest.document import Block, BlockKind, IngestLimits, ParsedDocument
from memos_vllm.plaintext.ingest.docx_package import DocxPackage, broken
from memos_vllm.plaintext.ingest.docx_styles import Style, Styles, W
from memos_vllm.plaintext.ingest.tables import Cell, table_blocks

_MC = "{http://schemas.openxmlformats.org/markup-compatibility/2006}"
_TITLE = "{http://purl.org/dc/elements/1.1/}title"
_STRICT = "{http://purl.oclc.org/ooxml/wordprocessingml/main}"

_CONTAINERS = frozenset(
    f"{W}{name}" for name in ("sdt", "sdtContent", "ins", "moveTo", "customXml", "smartTag")
)
_INLINE = _CONTAINERS | {f"{W}{name}" for name in ("hyperlink", "fldSimple", "dir", "bdo")}
_CHARACTERS = {
    f"{W}tab": " ",
    f"{W}ptab": " ",
    f"{W}br": "\n",
    f"{W}cr": "\n",
    f"{W}noBreakHyphen": "-",
}
_NOTES = {f"{W}footnoteReference": "footnotes", f"{W}endnoteReference": "endnotes"}
_SEPARATORS = frozenset({"separator", "continuationSeparator", "continuationNotice"})


def read(data: bytes, *, declared: str | None, limits: IngestLimits) -> ParsedDocument:
    """A Word document as blocks.

    Raises:
        InvalidRequest: no Word document, broken, locked by a password, or with XML entities.
        TooLarge: it would unpack to more than `limits` allow.
    """
    package = DocxPackage(data, limits)
    root = package.read_xml(package.main)
    body = None if root is None else _usual_names(root).find(f"{W}body")
    if body is None:
        raise broken("it has no body")
    reader = _Reader(package)
    reader.read_blocks(body)
    return ParsedDocument(title=_core_title(package) or reader.title, blocks=tuple(reader.blocks))


def _usual_names(root: Any) -> Any:
    """Rename the elements and attributes of a strict document, in place."""
    if root.tag.startswith(_STRICT):
        for element in root.iter(f"{_STRICT}*"):
            element.tag = W + element.tag[len(_STRICT) :]
            for name, value in element.attrib.items():
                if name.startswith(_STRICT):
                    element.set(W + name[len(_STRICT) :], value)
    return root


def _core_title(package: DocxPackage) -> str | None:
    name = package.related("", "core-properties")
    root = package.read_xml(name) if name is not None else None
    title = None if root is None else root.findtext(_TITLE)
    return clean_line(title) or None if title else None


class _Reader:
    """Walks a body; `blocks` and `title` are what it found."""

    def __init__(self, package: DocxPackage) -> None:
        self.blocks: list[Block] = []
        self.title: str | None = None
        self._styles = Styles(self._part(package, "styles"))
        self._notes = {kind: _notes_by_id(self._part(package, kind)) for kind in _NOTES.values()}
        self._num_notes = 0
        self._boxes: list[Any] = []
        self._referred: list[tuple[int, Any]] = []

    def _part(self, package: DocxPackage, kind: str) -> Any | None:
        name = package.related(package.main, kind)
        root = package.read_xml(name) if name is not None else None
        return None if root is None else _usual_names(root)

    def read_blocks(self, parent: Any) -> None:
        for child in parent:
            if child.tag == f"{W}p":
                self._read_paragraph(child)
            elif child.tag == f"{W}tbl":
                self._read_table(child)
            elif child.tag in _CONTAINERS:
                self.read_blocks(child)
            elif child.tag == f"{_MC}AlternateContent":
                self.read_blocks(_chosen(child))

    def _read_paragraph(self, paragraph: Any) -> None:
        properties = paragraph.find(f"{W}pPr")
        style = self._styles.of_paragraph(properties)
        text = "" if style.is_hidden else "".join(self._inline(paragraph))
        self.blocks.extend(self._block(text, style))
        self._read_asides()

    def _read_asides(self) -> None:
        """Notes and text boxes that a paragraph refers to, right below it."""
        referred, self._referred = self._referred, []
        for number, note in referred:
            text = " ".join("".join(self._inline(each)) for each in note.iter(f"{W}p"))
            self.blocks.extend(blocks.prose(f"[{number}] {text.strip()}", kind=BlockKind.LIST_ITEM))
        boxes, self._boxes = self._boxes, []
        for box in boxes:
            self.read_blocks(box)

    def _block(self, text: str, style: Style) -> list[Block]:
        if style.is_title and self.title is None and not self.blocks:
            self.title = clean_line(text) or None
            return blocks.heading(text, level=0)
        if style.level or style.is_title:
            return blocks.heading(text, level=max(style.level, 1))
        if style.is_list and text.strip():
            return blocks.prose(f"- {text.strip()}", kind=BlockKind.LIST_ITEM)
        return blocks.prose(text)

    def _inline(self, parent: Any) -> Iterator[str]:
        """The text of a paragraph, without what is deleted or hidden."""
        for child in parent:
            if child.tag == f"{W}r":
                if not self._styles.is_hidden_run(child.find(f"{W}rPr")):
                    yield from self._run(child)
            elif child.tag in _INLINE:
                yield from self._inline(child)
            elif child.tag == f"{_MC}AlternateContent":
                yield from self._inline(_chosen(child))

    def _run(self, run: Any) -> Iterator[str]:
        for child in run:
            if child.tag == f"{W}t":
                yield child.text or ""
            elif child.tag in _CHARACTERS:
                yield _CHARACTERS[child.tag]
            elif child.tag in _NOTES:
                note = self._notes[_NOTES[child.tag]].get(child.get(f"{W}id"))
                if note is not None:
                    self._num_notes += 1
                    self._referred.append((self._num_notes, note))
                    yield f"[{self._num_notes}]"
            elif child.tag in {f"{W}drawing", f"{W}pict", f"{W}object"}:
                self._boxes.extend(_outermost(child, f"{W}txbxContent"))
            elif child.tag == f"{_MC}AlternateContent":
                yield from self._run(_chosen(child))

    def _read_table(self, table: Any) -> None:
        rows: list[list[Cell]] = []
        header_rows = 0
        for row in _within(table, "tr"):
            is_header = row.find(f"{W}trPr/{W}tblHeader") is not None
            header_rows += is_header and header_rows == len(rows)
            rows.append([self._cell(cell, is_header) for cell in _within(row, "tc")])
        look = table.find(f"{W}tblPr/{W}tblLook")
        if header_rows == 0 and len(rows) > 1 and look is not None and _first_row_is_header(look):
            header_rows = 1
        self.blocks.extend(table_blocks(rows, header_rows=header_rows))
        # The paragraphs of boxes inside cells are in the text of the cells.
        self._boxes.clear()
        self._read_asides()

    def _cell(self, cell: Any, is_header: bool) -> Cell:
        properties = cell.find(f"{W}tcPr")
        columns, continues = 1, False
        if properties is not None:
            span = properties.find(f"{W}gridSpan")
            value = "" if span is None else span.get(f"{W}val") or ""
            columns = int(value) if value.isascii() and value.isdigit() and len(value) < 5 else 1
            merge = properties.find(f"{W}vMerge")
            continues = merge is not None and merge.get(f"{W}val") in {None, "continue"}
        # Paragraphs of tables inside the cell as well, in their order.
        text = " ".join("".join(self._inline(each)) for each in cell.iter(f"{W}p"))
        return Cell(text, columns=columns, is_header=is_header, continues=continues)


def _within(parent: Any, name: str) -> Iterator[Any]:
    """Rows of a table, or cells of a row, those in content controls too."""
    for child in parent:
        if child.tag == W + name:
            yield child
        elif child.tag in _CONTAINERS:
            yield from _within(child, name)


def _outermost(parent: Any, tag: str) -> Iterator[Any]:
    """Descendants with a tag, without those inside another of them."""
    for child in parent:
        if child.tag == tag:
            yield child
        else:
            yield from _outermost(child, tag)


def _first_row_is_header(look: Any) -> bool:
    flag = look.get(f"{W}firstRow")
    if flag is not None:
        return flag in {"1", "true", "on"}
    try:
        return bool(int(look.get(f"{W}val") or "0", 16) & 0x20)
    except ValueError:
        return False


def _chosen(alternate: Any) -> Any:
    """One of the forms in which the same content is kept, for old readers and new."""
    fallback = alternate.find(f"{_MC}Fallback")
    choice = alternate.find(f"{_MC}Choice")
    return choice if choice is not None else fallback if fallback is not None else alternate


def _notes_by_id(root: Any | None) -> dict[str, Any]:
    if root is None:
        return {}
    return {note.get(f"{W}id"): note for note in root if note.get(f"{W}type") not in _SEPARATORS}
