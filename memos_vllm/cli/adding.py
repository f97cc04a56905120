"""`memos-vllm memory add` and `memos-vllm memory add-turns`"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated

import typer

from memos_vllm.cli import output
from memos_vllm.cli.options import ApiKey, AsJson, CubeId, Labels, Reason, Tags, Url, connect
from memos_vllm.cli.reading import (
    BlankFile,
    DocumentFile,
    InputError,
    Piece,
    Split,
    read_items,
    read_messages,
)
from memos_vllm.errors import ApiError, InvalidRequest, TooLarge

if TYPE_CHECKING:
    from memos_vllm.client import Cube, DocumentInfo, MemoryInfo

# Small enough to show progress and to lose little when the connection breaks.
BATCH = 100
# What the server takes in one call.
MAX_TURNS = 1000
# Answers that are about the one file that was sent; any other would meet the next file too.
FILE_STATUSES = frozenset({400, 409, 413, 415, 422, 500})


def add(
    cube: CubeId,
    items: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="TEXT|FILE|FOLDER|-",
            help="Texts, files, folders of .pdf, .docx, .html, .md and .txt files, or - for stdin.",
            show_default=False,
        ),
    ] = None,
    *,
    text: Annotated[
        list[str] | None,
        typer.Option(help="A text, also if a file has that name.", show_default=False),
    ] = None,
    split: Annotated[
        Split,
        typer.Option(
            help="auto: the server cuts files along their structure, and a file that is sent "
            "again changes only what changed; none: one memory a text file; headings: one a "
            "section of Markdown."
        ),
    ] = Split.AUTO,
    tag: Tags = None,
    label: Labels = None,
    reason: Reason = None,
    url: Url = None,
    api_key: ApiKey = None,
    as_json: AsJson = False,
) -> None:
    """Add texts and documents; one bad document keeps no other back."""
    if not items and not text:
        raise typer.BadParameter("give a text, a file, a folder, or - for stdin")
    pieces, documents = read_items(items or [], texts=text or [], split=split)
    sender = _Sender(tags=tag or [], labels=label or [], reason=reason, silent=as_json)
    with connect(url, api_key) as mos:
        try:
            sender.send_texts(mos.cube(cube), pieces)
            sender.send_documents(mos.cube(cube), documents)
        except BaseException:
            if sender.num_added:
                total = len(pieces) + len(documents)
                output.note(f"{sender.num_added} of {total} were added before this:")
                sender.say(as_json=as_json)
            raise
    sender.say(as_json=as_json)
    if sender.failures:
        if len(documents) > 1:
            output.note(f"{len(sender.failures)} of {len(documents)} files were not added")
        raise typer.Exit(1)


def add_turns(
    cube: CubeId,
    file: Annotated[
        str,
        typer.Argument(
            metavar="FILE|-", help="Chat messages: a JSON list, or one JSON object a line."
        ),
    ],
    *,
    session: Annotated[
        str | None,
        typer.Option(
            metavar="ID",
            help="Names the conversation; turns added to it later come after these.",
            show_default=False,
        ),
    ] = None,
    reason: Reason = None,
    url: Url = None,
    api_key: ApiKey = None,
    as_json: AsJson = False,
) -> None:
    """Add a conversation: a memory for each message, with its speaker and time."""
    messages = read_messages(file)
    if len(messages) > MAX_TURNS and session is None:
        raise InputError(
            f"{file} holds {len(messages):,} messages and one call takes {MAX_TURNS:,}; give "
            "--session, so that several calls add to one conversation"
        )
    size = BATCH if session is not None else MAX_TURNS
    added: list[MemoryInfo] = []
    with connect(url, api_key) as mos:
        silent = as_json or len(messages) <= size
        with output.progress(f"adding to {cube}", silent=silent) as report:
            try:
                for start in range(0, len(messages), size):
                    batch = messages[start : start + size]
                    added += mos.cube(cube).add_turns(batch, session_id=session, reason=reason)
                    report(len(added) / len(messages), f"{len(added)} of {len(messages)}")
            except BaseException:
                if added:
                    output.note(f"{len(added)} of {len(messages)} were added before this:")
                raise
    if as_json:
        output.say_json_list([memory.raw for memory in added])
        return
    for memory in added:
        output.say(memory.id)


@dataclass(frozen=True, slots=True)
class _Failure:
    uri: str
    reason: str


@dataclass
class _Sender:
    """Sends what was read, and keeps what became of it."""

    tags: list[str]
    labels: list[str]
    reason: str | None
    silent: bool
    memories: list[MemoryInfo] = field(default_factory=list)
    documents: list[tuple[str, DocumentInfo]] = field(default_factory=list)
    failures: list[_Failure] = field(default_factory=list)

    @property
    def num_added(self) -> int:
        return len(self.memories) + len(self.documents)

    def send_texts(self, cube: Cube, pieces: Sequence[Piece]) -> None:
        silent = self.silent or len(pieces) <= BATCH
        with output.progress(f"adding to {cube.id}", silent=silent) as report:
            for start in range(0, len(pieces), BATCH):
                batch = pieces[start : start + BATCH]
                self.memories += cube.add(
                    [{"text": piece.text, "source": piece.source} for piece in batch],
                    tags=self.tags,
                    labels=self.labels,
                    reason=self.reason,
                )
                done = len(self.memories)
                report(done / len(pieces), f"{done} of {len(pieces)}")

    def send_documents(self, cube: Cube, files: Sequence[DocumentFile]) -> None:
        # A single one may take a minute, which a terminal should show and a log need not.
        silent = self.silent or not files or (len(files) == 1 and not sys.stderr.isatty())
        with output.progress(f"adding to {cube.id}", silent=silent) as report:
            for done, file in enumerate(files):
                report(done / len(files), f"{done} of {len(files)} files, {file.path.name}")
                self._send_document(cube, file)
            report(1.0, f"{len(files)} of {len(files)} files")

    def _send_document(self, cube: Cube, file: DocumentFile) -> None:
        from memos_vllm.client import ReplyTimeout

        try:
            document = cube.add_document(
                file.read(),
                filename=file.path.name,
                uri=file.uri,
                tags=self.tags,
                labels=self.labels,
                reason=self.reason,
            )
        except BlankFile as error:
            if file.found:
                output.note(f"{error} and was left out")
            else:
                self.failures.append(_Failure(file.uri, str(error)))
        except (InputError, InvalidRequest, TooLarge, ReplyTimeout) as error:
            self.failures.append(_Failure(file.uri, str(error)))
        except ApiError as error:
            if error.status_code not in FILE_STATUSES:
                raise
            self.failures.append(_Failure(file.uri, str(error)))
        else:
            self.documents.append((file.uri, document))

    def say(self, *, as_json: bool) -> None:
        """Print what became of it; not earlier, as a progress bar would be in the way."""
        if as_json:
            failed = [
                {"object": "document", "uri": it.uri, "outcome": "failed", "error": it.reason}
                for it in self.failures
            ]
            added = [memory.raw for memory in self.memories]
            output.say_json_list([*added, *(info.raw for _, info in self.documents), *failed])
            return
        for memory in self.memories:
            output.say(memory.id)
        for uri, document in self.documents:
            output.say(f"{document.id} {document.outcome} {uri}: {_extent(document)}")
            for remark in document.notes:
                output.note(f"{uri}: {output.one_line(remark)}")
        for failure in self.failures:
            output.note(f"error: {failure.uri}: {output.one_line(failure.reason)}")


def _extent(document: DocumentInfo) -> str:
    """How many chunks a document has, and which of them are not as before."""
    chunks = f"{document.chunks:,} chunk{'' if document.chunks == 1 else 's'}"
    if document.outcome != "updated":
        return chunks
    return (
        f"{chunks} ({document.added:,} new, {document.changed:,} changed, "
        f"{document.archived:,} archived)"
    )
