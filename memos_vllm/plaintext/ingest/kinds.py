"""Which format a file has, from its name, its declared type and its first bytes.

The name decides, and the bytes must agree with it. The bytes alone decide only when the name says
nothing: a PDF called `notes.txt` is more likely a mistake, or a trick, than a text.
"""

from __future__ import annotations

import re
from pathlib import PurePosixPath

from memos_vllm.errors import InvalidRequest
from memos_vllm.plaintext.ingest.document import FileKind

TAKEN = "plain text (.txt), Markdown (.md), HTML (.html), PDF (.pdf) and Word (.docx)"

MEDIA_TYPES = {
    FileKind.TEXT: "text/plain",
    FileKind.MARKDOWN: "text/markdown",
    FileKind.HTML: "text/html",
    FileKind.PDF: "application/pdf",
    FileKind.DOCX: "application/vnd.openxmlformats-officedocument.wordprocessingml.document",
}

_BY_SUFFIX = {
    ".txt": FileKind.TEXT,
    ".text": FileKind.TEXT,
    ".log": FileKind.TEXT,
    ".md": FileKind.MARKDOWN,
    ".markdown": FileKind.MARKDOWN,
    ".mdown": FileKind.MARKDOWN,
    ".html": FileKind.HTML,
    ".htm": FileKind.HTML,
    ".xhtml": FileKind.HTML,
    ".pdf": FileKind.PDF,
    ".docx": FileKind.DOCX,
}
_BY_MEDIA_TYPE = {
    **{media_type: kind for kind, media_type in MEDIA_TYPES.items()},
    "text/x-markdown": FileKind.MARKDOWN,
    "application/xhtml+xml": FileKind.HTML,
    "application/x-pdf": FileKind.PDF,
}
_REFUSED_SUFFIXES = frozenset(
    [
        ".doc",
        ".docm",
        ".dot",
        ".dotx",
        ".rtf",
        ".odt",
        ".ott",
        ".pages",
        ".epub",
        ".mobi",
        ".djvu",
        ".ps",
        ".eps",
        ".tex",
        ".mht",
        ".mhtml",
        ".eml",
        ".msg",
        ".xls",
        ".xlsx",
        ".xlsm",
        ".ods",
        ".csv",
        ".tsv",
        ".ppt",
        ".pptx",
        ".odp",
        ".key",
        ".zip",
        ".gz",
        ".tgz",
        ".bz2",
        ".xz",
        ".zst",
        ".7z",
        ".rar",
        ".tar",
        ".jar",
        ".exe",
        ".dll",
        ".so",
        ".bin",
        ".iso",
        ".png",
        ".jpg",
        ".jpeg",
        ".gif",
        ".webp",
        ".bmp",
        ".tif",
        ".tiff",
        ".svg",
        ".heic",
        ".mp3",
        ".wav",
        ".flac",
        ".ogg",
        ".m4a",
        ".mp4",
        ".mov",
        ".avi",
        ".mkv",
        ".webm",
        ".sqlite",
        ".db",
        ".parquet",
        ".pkl",
        ".npy",
        ".json",
        ".jsonl",
        ".xml",
        ".yaml",
        ".yml",
        ".ipynb",
    ]
)
# What the name promises, and what else the same bytes may rightly be called.
_ARCHIVE = "a zip archive"
_OLD_OFFICE = "an old Office file, or an Office file with a password"
_MAGIC: tuple[tuple[bytes, str], ...] = (
    (b"%PDF-", "a PDF"),
    (b"PK\x03\x04", _ARCHIVE),
    (b"PK\x05\x06", _ARCHIVE),
    (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", _OLD_OFFICE),
    (b"{\\rtf", "an RTF file"),
    (b"\x1f\x8b", "a gzip file"),
    (b"BZh", "a bzip2 file"),
    (b"\xfd7zXZ\x00", "an xz file"),
    (b"\x28\xb5\x2f\xfd", "a zstd file"),
    (b"7z\xbc\xaf\x27\x1c", "a 7-Zip archive"),
    (b"Rar!\x1a\x07", "a RAR archive"),
    (b"\x7fELF", "a program"),
    (b"MZ\x90\x00", "a program"),
    (b"\xcf\xfa\xed\xfe", "a program"),
    (b"\xca\xfe\xba\xbe", "a program"),
    (b"\x89PNG\r\n\x1a\n", "a picture"),
    (b"\xff\xd8\xff", "a picture"),
    (b"GIF87a", "a picture"),
    (b"GIF89a", "a picture"),
    (b"II*\x00", "a picture"),
    (b"MM\x00*", "a picture"),
    (b"RIFF", "a sound, a film or a picture"),
    (b"ID3", "a sound"),
    (b"OggS", "a sound"),
    (b"fLaC", "a sound"),
    (b"\x00\x00\x00\x18ftyp", "a film"),
    (b"\x00\x00\x00\x20ftyp", "a film"),
    (b"SQLite format 3\x00", "a database"),
    (b"%!PS", "a PostScript file"),
    (b"GGUF", "a model"),
    (b"wOFF", "a font"),
    (b"wOF2", "a font"),
)
# Words that a text may well begin with; they count only where a NUL follows soon.
_NEEDS_NUL = frozenset({b"BZh", b"RIFF", b"ID3", b"OggS", b"fLaC", b"GGUF", b"wOFF", b"wOF2"})
# Readers of PDF look for the header in the first kilobyte, and so do we.
_PDF_HEADER_REACH = 1024
_HTML_OPENING = re.compile(
    rb"(?:\xef\xbb\xbf)?\s*(?:<!--.{0,2000}?-->\s*)*<(?:!doctype html|html)\b",
    re.IGNORECASE | re.DOTALL,
)


def detect_kind(data: bytes, *, filename: str, media_type: str | None) -> FileKind:
    """The format of a file.

    Args:
        filename: as the caller named it; only its last part and its suffix are looked at.
        media_type: as the caller declared it; used when the name has no suffix that is known.
    Raises:
        InvalidRequest: the format is not taken, or the bytes are not what the name says.
    """
    suffix = PurePosixPath(filename.replace("\\", "/").lower()).suffix
    if suffix in _REFUSED_SUFFIXES:
        raise _not_taken(f"a {suffix} file")
    named = _BY_SUFFIX.get(suffix)
    promise = f"is named {suffix}"
    if named is None and media_type is not None:
        named = _BY_MEDIA_TYPE.get(media_type.partition(";")[0].strip().lower())
        promise = "was declared as another type"
    found, description = _recognise(data)
    if named is None:
        if found is None and description is not None:
            raise _not_taken(description)
        return found or FileKind.TEXT
    _check_promise(named, found, description, promise)
    return named


def _check_promise(
    named: FileKind, found: FileKind | None, description: str | None, promise: str
) -> None:
    if named in {FileKind.PDF, FileKind.DOCX}:
        if found is not named:
            what = description or "something else"
            raise InvalidRequest(
                f"the file {promise} and its bytes are {what}; a password or a broken download "
                f"can be the reason: save it again without one. Taken are {TAKEN}",
                param="file",
            )
    elif description is not None and found is not FileKind.HTML:
        raise InvalidRequest(
            f"the file {promise} and its bytes are {description}; give it its own suffix if it is "
            f"one of {TAKEN}, or save it as text in UTF-8",
            param="file",
        )


def _recognise(data: bytes) -> tuple[FileKind | None, str | None]:
    """The format that the bytes alone show, and what to call them; (None, None) for text."""
    head = data[:_PDF_HEADER_REACH]
    for magic, description in _MAGIC:
        if not head.startswith(magic) or (magic in _NEEDS_NUL and b"\x00" not in head):
            continue
        if description == "a PDF":
            return FileKind.PDF, description
        if description == _ARCHIVE:
            return _recognise_archive(data)
        return None, description
    # Some programs write bytes before the header; a text may quote one, so it holds a NUL too.
    if b"%PDF-1." in head and b"\x00" in data:
        return FileKind.PDF, "a PDF"
    if _HTML_OPENING.match(head):
        return FileKind.HTML, "HTML"
    return None, None


def _recognise_archive(data: bytes) -> tuple[FileKind | None, str]:
    # Names stand uncompressed in a zip; the reader checks the directory properly.
    if b"word/document" in data:
        return FileKind.DOCX, "a Word document"
    for name, description in (
        (b"xl/workbook", "an Excel workbook"),
        (b"ppt/presentation", "a PowerPoint presentation"),
        (b"mimetypeapplication/epub", "an e-book"),
        (b"mimetypeapplication/vnd.oasis", "an OpenDocument file"),
    ):
        if name in data:
            return None, description
    return None, _ARCHIVE


def _not_taken(what: str) -> InvalidRequest:
    return InvalidRequest(
        f"{what} cannot be read; taken are {TAKEN}: save or export it as one of these",
        param="file",
    )
