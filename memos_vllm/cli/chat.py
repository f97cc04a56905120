"""`memos-vllm chat CUBE [MESSAGE]`"""

from __future__ import annotations

import sys
import uuid
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Any

import typer

from memos_vllm.cli import output
from memos_vllm.cli.options import ApiKey, AsJson, CubeId, Url, connect
from memos_vllm.cli.reading import decode
from memos_vllm.errors import MemosError

if TYPE_CHECKING:
    from memos_vllm.client import ChatMemos, Cube, RetrievedMemory


class RememberMode(StrEnum):
    """How a turn is kept: as it was said, or also as the facts in it."""

    FAST = "fast"
    FINE = "fine"


def chat(
    cube: CubeId,
    message: Annotated[
        str | None,
        typer.Argument(
            metavar="MESSAGE",
            help="Left out: a conversation on a terminal, or the message from stdin.",
            show_default=False,
        ),
    ] = None,
    *,
    model: Annotated[
        str | None, typer.Option(help="The served model's name.", show_default=False)
    ] = None,
    system: Annotated[
        str | None, typer.Option(help="A system text of your own.", show_default=False)
    ] = None,
    max_tokens: Annotated[
        int | None, typer.Option(min=1, help="Longest answer.", show_default=False)
    ] = None,
    temperature: Annotated[
        float | None, typer.Option(min=0.0, help="0 is greedy.", show_default=False)
    ] = None,
    activation: Annotated[
        bool, typer.Option("--activation/--no-activation", help="Use activation memory.")
    ] = True,
    retrieve: Annotated[
        bool, typer.Option("--retrieve/--no-retrieve", help="Look up memories for each message.")
    ] = True,
    top_k: Annotated[
        int | None,
        typer.Option(
            "--top-k", min=1, max=1000, help="Look up at most this many.", show_default=False
        ),
    ] = None,
    remember: Annotated[
        RememberMode | None,
        typer.Option(
            help="Keep each turn as memories: as it was said, or also the facts in it.",
            show_default=False,
        ),
    ] = None,
    session: Annotated[
        str | None,
        typer.Option(
            metavar="ID", help="The conversation that this belongs to.", show_default=False
        ),
    ] = None,
    url: Url = None,
    api_key: ApiKey = None,
    as_json: AsJson = False,
) -> None:
    """Ask the model with a cube's memory in its attention."""
    options: dict[str, object] = {}
    if max_tokens is not None:
        options["max_tokens"] = max_tokens
    if temperature is not None:
        options["temperature"] = temperature
    messages: list[dict[str, object]] = []
    if system is not None:
        messages.append({"role": "system", "content": system})
    if top_k is not None and not retrieve:
        raise typer.BadParameter("give --top-k or --no-retrieve, not both")
    interactive = message is None and sys.stdin.isatty() and not as_json
    if message is None and not interactive:
        message = decode(sys.stdin.buffer.read(), "stdin").strip()
    if message is not None and not message.strip():
        raise typer.BadParameter("the message is blank")
    if session is None and interactive and remember is not None:
        # Turns are linked within a session only.
        session = f"chat-{uuid.uuid4().hex[:12]}"
    asked = {
        "model": model,
        "activation": activation,
        "retrieve": {"top_k": top_k} if top_k is not None else retrieve,
        "remember": False if remember is None else remember.value,
        "session_id": session,
        "options": options,
    }
    with connect(url, api_key) as mos:
        conversation = _Conversation(mos.cube(cube), messages, asked)
        if message is None:
            mos.get_cube(cube)
            conversation.run()
        elif as_json:
            conversation.answer_json(message)
        else:
            conversation.answer(message)


class _Conversation:
    """A conversation with a cube; `asked` are the other arguments of each chat."""

    def __init__(
        self, cube: Cube, messages: list[dict[str, object]], asked: dict[str, Any]
    ) -> None:
        self._cube = cube
        self._messages = messages
        self._asked = asked

    def run(self) -> None:
        """Read messages from the terminal until its end."""
        # Importing it gives input() a history and line editing.
        import readline  # noqa: F401

        output.note(f"Talking with {self._cube.id}; Ctrl-D ends it.")
        while True:
            try:
                message = input("> ").strip()
            except EOFError:
                sys.stdout.write("\n")
                return
            if not message:
                continue
            try:
                self.answer(message)
            except MemosError as error:
                # The question is taken back, so that the next one starts from what was answered.
                self._messages.pop()
                output.note(f"error: {error}")

    def answer(self, message: str) -> None:
        """Print the answer as it is generated, then what memory it was built on."""
        self._messages.append({"role": "user", "content": message})
        with self._cube.chat_stream(self._messages, **self._asked) as stream:
            for delta in stream:
                sys.stdout.write(output.printable(delta))
                sys.stdout.flush()
        sys.stdout.write("\n")
        sys.stdout.flush()
        for line in describe(stream.memos):
            output.say_dim(line)
        self._messages.append({"role": "assistant", "content": stream.text})

    def answer_json(self, message: str) -> None:
        self._messages.append({"role": "user", "content": message})
        reply = self._cube.chat(self._messages, stream=False, **self._asked)
        output.say_json(reply.raw)


def describe(memos: ChatMemos | None) -> list[str]:
    """Lines about the memory that an answer was built on, and about what went wrong with it."""
    if memos is None:
        return ["memory: the server did not say"]
    use = memos.activation
    lines = [f"memory: {use.tokens:,} tokens, {use.cached_tokens:,} cached, source {use.source}"]
    if memos.retrieved:
        lines.append(f"found: {'; '.join(_found(memory) for memory in memos.retrieved)}")
    if memos.remembered is not None:
        kept = f"remembered: {len(memos.remembered.memory_ids)} memories"
        job = memos.remembered.job
        lines.append(kept if job is None else f"{kept}; facts are read by job {job}")
    return [*lines, *(f"warning: {output.one_line(warning)}" for warning in memos.warnings)]


def _found(memory: RetrievedMemory) -> str:
    # A plain note has no source to name.
    name = output.one_line(memory.source or memory.id, limit=60)
    return name if memory.number is None else f"[{memory.number}] {name}"
