"""Turns what the user names (texts, files, folders, stdin) into memories and documents."""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from memos_vllm.cli import output
from memos_vllm.errors import MemosError

MAX_TEXT_BYTES = 64 * 1024
SUFFIXES = (".md", ".txt")
# What the server cuts into memories itself, and of these what no text can be read from here.
DOCUMENT_SUFFIXES = (".pdf", ".docx", ".html", ".htm", ".md", ".markdown", ".txt")
BINARY_SUFFIXES = (".pdf", ".docx")
# A file that is far over what could be split into memories is named by mistake.
MAX_FILE_BYTES = 64 * 1024 * 1024

_HEADING = re.compile(r" {0,3}(#{1,6})(?:[ \t]+(.*?))?(?:[ \t]+#+)?[ \t]*$")
_FENCE = re.compile(r" {0,3}(`{3,}|~{3,})")
# What looks like the name of a file and is most likely a misspelled one, not a text.
_FILE_LIKE = re.compile(r"\S*/\S*|\S+\.(?:md|txt|markdown|rst|pdf|html|docx)", re.IGNORECASE)


class InputError(MemosError):
    """Something that was named cannot become a memory."""


class BlankFile(InputError):
    """A file without anything in it."""


class Split(StrEnum):
    """How a file becomes memories; with `auto` the server cuts it along its structure."""

    AUTO = "auto"
    NONE = "none"
    HEADINGS = "headings"


@dataclass(frozen=True, slots=True)
class Piece:
    """A memory to be: its text and where that is from."""

    text: str
    source: dict[str, str]


@dataclass(frozen=True, slots=True)
class DocumentFile:
    """A file for the server to cut; `found` in a folder, not named itself."""

    path: Path
    found: bool = False

    @property
    def uri(self) -> str:
        return self.path.as_posix()

    def read(self) -> bytes:
        """Its bytes.

        Raises:
            InputError: unreadable, blank or over 32 MiB.
        """
        # Not at the top: it loads httpx.
        from memos_vllm.client.documents import MAX_DOCUMENT_BYTES

        content = _content(self.path, limit=MAX_DOCUMENT_BYTES)
        if not content.strip():
            raise BlankFile(f"{self.path} is blank")
        return content


def read_items(
    items: Sequence[str], *, texts: Sequence[str], split: Split
) -> tuple[list[Piece], list[DocumentFile]]:
    """Everything that was named, in the order named; nothing is sent before all texts are read.

    Args:
        items: files, folders, `-` for stdin; what names none of these is a text itself.
        texts: taken as texts whatever they look like.
    Returns:
        The memories, and with `auto` the files that the server cuts; these are not read yet.
    Raises:
        InputError: unreadable, not UTF-8, blank, too large, or nothing to read in a folder.
    """
    pieces: list[Piece] = []
    documents: list[DocumentFile] = []
    for item in items:
        if item == "-":
            text = decode(sys.stdin.buffer.read(), "stdin")
            pieces += _pieces(text, {"kind": "stdin"}, "stdin", split)
        elif _exists(item):
            path = Path(item)
            if split is Split.AUTO and (found := _documents(path)):
                documents += found
            else:
                pieces += _from_path(path, split)
        elif _FILE_LIKE.fullmatch(item):
            raise InputError(
                f"there is no file '{item}'; if it is a text, give it with --text '{item}'"
            )
        else:
            pieces.append(_piece(item, {"kind": "note"}, "the text"))
    pieces += [_piece(text, {"kind": "note"}, "the text") for text in texts]
    return pieces, documents


def decode(content: bytes, name: str) -> str:
    """UTF-8 text, with the byte order mark taken off and line ends as `\\n`."""
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(
            f"{name} is not UTF-8 text (byte {error.start}); convert it first"
        ) from None
    if "\0" in text:
        raise InputError(f"{name} holds a NUL character and is not a text")
    return text.replace("\r\n", "\n").replace("\r", "\n")


def read_text_file(name: str) -> str:
    """The text of one file, or of stdin for `-`.

    Raises:
        InputError: unreadable or not UTF-8.
    """
    if name == "-":
        return decode(sys.stdin.buffer.read(), "stdin")
    return decode(_content(Path(name)), name)


def read_messages(name: str) -> list[dict[str, object]]:
    """The messages of a file, or of stdin for `-`: a JSON list, or one JSON object a line.

    Raises:
        InputError: unreadable, or not that; it names the line.
    """
    named = "stdin" if name == "-" else name
    text = read_text_file(name)
    if not text.strip():
        raise InputError(f"{named} is blank")
    if text.lstrip().startswith("["):
        messages: list[Any] = _json(text, named)
        places = [f"message {number} of {named}" for number in range(1, len(messages) + 1)]
    else:
        # Not splitlines: JSON leaves other line ends, as U+2028, in its strings.
        lines = enumerate(text.split("\n"), start=1)
        numbered = [(f"line {number} of {named}", line) for number, line in lines if line.strip()]
        places = [place for place, _ in numbered]
        messages = [_json(line, place) for place, line in numbered]
    for place, message in zip(places, messages, strict=True):
        if not isinstance(message, dict):
            raise InputError(f"{place} is not an object with role and content")
    return messages


def _json(text: str, place: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(
            f"{place} is not JSON ({error}); give a JSON list of messages, or one message a line"
        ) from None


def split_at_headings(text: str) -> Iterator[tuple[list[str], str]]:
    """Cut Markdown before each heading that is not in a code fence.

    Yields:
        The headings that lead to a section (its own last; empty for what stands before the
        first one), and the section's text with its heading. Sections without a body are left
        out: their heading is in the path of those below.
    """
    path: list[tuple[int, str]] = []
    lines: list[str] = []
    body = False
    fence = ""
    for line in text.splitlines(keepends=True):
        bare = line.rstrip("\r\n")
        heading = None if fence else _HEADING.match(bare)
        if heading is None:
            fence = _fence_after(bare, fence)
            body = body or bool(bare.strip())
            lines.append(line)
            continue
        if body:
            yield [title for _, title in path], "".join(lines).strip("\n")
        level = len(heading[1])
        path = [(depth, title) for depth, title in path if depth < level]
        path.append((level, (heading[2] or "").strip()))
        lines, body = [line], False
    if body:
        yield [title for _, title in path], "".join(lines).strip("\n")


def _fence_after(line: str, fence: str) -> str:
    """The code fence that is open after this line, empty if none is."""
    match = _FENCE.match(line)
    if match is None:
        return fence
    if not fence:
        return match[1]
    closes = match[1].startswith(fence) and not line[match.end() :].strip()
    return "" if closes else fence


def _exists(item: str) -> bool:
    try:
        return os.path.lexists(item)
    except ValueError:
        return False


def _from_path(path: Path, split: Split) -> list[Piece]:
    if not path.is_dir():
        if path.suffix.lower() in BINARY_SUFFIXES:
            raise InputError(f"{path} is no text; give --split auto to have it cut by the server")
        text = decode(_content(path), str(path))
        return _pieces(text, _file_source(path), str(path), split)
    pieces: list[Piece] = []
    for file in _files_under(path, SUFFIXES):
        text = decode(_content(file), str(file))
        if text.strip():
            pieces += _pieces(text, _file_source(file), str(file), split)
        else:
            output.note(f"{file} is blank and was left out")
    if not pieces:
        raise InputError(f"the folder {path} holds no .txt or .md file with text")
    return pieces


def _documents(path: Path) -> list[DocumentFile]:
    """The documents that this path names; none for a file of another kind.

    Raises:
        InputError: a folder without any.
    """
    if not path.is_dir():
        return [DocumentFile(path)] if path.suffix.lower() in DOCUMENT_SUFFIXES else []
    files = _files_under(path, DOCUMENT_SUFFIXES)
    if not files:
        raise InputError(f"the folder {path} holds no {_one_of(DOCUMENT_SUFFIXES)} file")
    return [DocumentFile(file, found=True) for file in files]


def _one_of(suffixes: Sequence[str]) -> str:
    return f"{', '.join(suffixes[:-1])} or {suffixes[-1]}"


def _files_under(folder: Path, suffixes: Sequence[str]) -> list[Path]:
    files = []
    for root, folders, names in os.walk(folder, onerror=_unreadable):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        files += [
            Path(root) / name
            for name in sorted(names)
            if not name.startswith(".") and Path(name).suffix.lower() in suffixes
        ]
    return files


def _unreadable(error: OSError) -> None:
    raise InputError(f"cannot read {error.filename}: {error.strerror}")


def _content(path: Path, *, limit: int = MAX_FILE_BYTES) -> bytes:
    try:
        with path.open("rb") as file:
            content = file.read(limit + 1)
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from None
    if len(content) > limit:
        raise InputError(f"{path} is over {output.size(limit)}; split it first")
    return content


def _file_source(path: Path) -> dict[str, str]:
    return {"kind": "file", "uri": path.as_posix(), "title": path.name}


def _pieces(text: str, source: dict[str, str], name: str, split: Split) -> list[Piece]:
    if split is not Split.HEADINGS or source.get("uri", "").lower().endswith(".txt"):
        return [_piece(text, source, name)]
    pieces = []
    for headings, section in split_at_headings(text):
        place = dict(source)
        named = name
        if headings:
            place["title"], place["locator"] = headings[-1] or name, " > ".join(headings)
            named = f"section '{headings[-1]}' of {name}"
        pieces.append(_piece(section, place, named))
    if not pieces:
        raise InputError(f"{name} has no text under its headings")
    return pieces


def _piece(text: str, source: dict[str, str], name: str) -> Piece:
    try:
        num_bytes = len(text.encode())
    except UnicodeEncodeError:
        raise InputError(f"{name} is not valid Unicode; is your terminal's locale UTF-8?") from None
    if not text.strip():
        raise InputError(f"{name} is blank")
    if num_bytes > MAX_TEXT_BYTES:
        raise InputError(
            f"{name} has {num_bytes:,} bytes and a memory holds at most {MAX_TEXT_BYTES:,}; "
            "split it, or put it into a .txt or .md file and give --split auto"
        )
    return Piece(text, source)
