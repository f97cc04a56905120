"""Multipart form data, read strictly: what is not clear is refused and never guessed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from memos_vllm.errors import InvalidRequest

if TYPE_CHECKING:
    from python_multipart.multipart import MultipartCallbacks

MEDIA_TYPE: Final = "multipart/form-data"
MAX_PARTS: Final = 258
_MAX_HEADER_BYTES = 16 * 1024


@dataclass(frozen=True, slots=True)
class Part:
    """One part of a form; `filename` is None for a plain field."""

    name: str
    content: bytes
    filename: str | None = None
    media_type: str | None = None

    @property
    def text(self) -> str:
        """The content as UTF-8; raises InvalidRequest."""
        return _text(self.content, what=f"the field '{self.name[:64]}'", param=self.name)


def read_form(body: bytes, *, content_type: str) -> list[Part]:
    """The parts of a form in order.

    Linear in the size of the body: half a second for 32 MiB of almost nothing but boundaries.
    Call it in a worker thread.

    Args:
        content_type: the request's header, which names the boundary.
    Raises:
        InvalidRequest: no form, a form that breaks off, more than `MAX_PARTS`, or a name that is
            not UTF-8.
    """
    kind, options = parse_options_header(content_type)
    if kind.decode("latin-1").strip() != MEDIA_TYPE:
        raise InvalidRequest(
            f"send the document as {MEDIA_TYPE} with a part named 'file', such as: "
            "curl -F file=@handbook.pdf"
        )
    boundary = options.get(b"boundary", b"")
    if not boundary:
        raise _unreadable("its Content-Type names no boundary")
    reader = _Reader()
    try:
        MultipartParser(boundary, reader.callbacks).write(body)
    except FormParserError as error:
        raise _unreadable("it is not what its boundary announces") from error
    if not reader.ended:
        raise _unreadable("it breaks off before its last boundary")
    return reader.parts


class _Reader:
    """Collects parts while the parser calls back."""

    def __init__(self) -> None:
        self.parts: list[Part] = []
        self.ended = False
        self._headers: dict[bytes, bytes] = {}
        self._header: list[bytes] = [b"", b""]
        self._header_bytes = 0
        self._pieces: list[bytes] = []
        self.callbacks: MultipartCallbacks = {
            "on_part_begin": self._begin,
            "on_header_field": lambda data, start, end: self._add_header(0, data[start:end]),
            "on_header_value": lambda data, start, end: self._add_header(1, data[start:end]),
            "on_header_end": self._end_header,
            "on_part_data": lambda data, start, end: self._pieces.append(data[start:end]),
            "on_part_end": self._end,
            "on_end": self._end_form,
        }

    def _begin(self) -> None:
        if len(self.parts) == MAX_PARTS:
            raise InvalidRequest(f"the form has more than {MAX_PARTS} parts; send fewer")
        self._headers, self._header, self._header_bytes, self._pieces = {}, [b"", b""], 0, []

    def _add_header(self, place: int, piece: bytes) -> None:
        self._header_bytes += len(piece)
        if self._header_bytes > _MAX_HEADER_BYTES:
            raise _unreadable(f"a part has more than {_MAX_HEADER_BYTES} bytes of headers")
        self._header[place] += piece

    def _end_header(self) -> None:
        name, value = self._header
        self._headers[name.lower()] = value
        self._header = [b"", b""]

    def _end(self) -> None:
        _, options = parse_options_header(self._headers.get(b"content-disposition"))
        if not options.get(b"name"):
            raise _unreadable("a part has no name in its Content-Disposition")
        filename = options.get(b"filename")
        media_type = self._headers.get(b"content-type")
        self.parts.append(
            Part(
                name=_text(options[b"name"], what="the name of a part"),
                content=b"".join(self._pieces),
                filename=None if filename is None else _text(filename, what="the file's name"),
                media_type=None if media_type is None else media_type.decode("latin-1"),
            )
        )

    def _end_form(self) -> None:
        self.ended = True


def files_and_fields(parts: Sequence[Part]) -> tuple[list[Part], list[Part]]:
    """Parts with a file name, and the others."""
    files = [part for part in parts if part.filename is not None]
    return files, [part for part in parts if part.filename is None]


def _text(value: bytes, *, what: str, param: str | None = None) -> str:
    try:
        return value.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InvalidRequest(
            f"{what} is not UTF-8: byte {error.start} is wrong", param=param
        ) from error


def _unreadable(why: str) -> InvalidRequest:
    return InvalidRequest(f"the form cannot be read: {why}")
