"""`memos-vllm chat CUBE [MESSAGE]`"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated

import typer

from memos_vllm.cli import output
from memos_vllm.cli.options import ApiKey, AsJson, CubeId, Url, connect
from memos_vllm.cli.reading import decode
from memos_vllm.errors import MemosError

if TYPE_CHECKING:
    from memos_vllm.client import ChatMemos, Cube


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
    interactive = message is None and sys.stdin.isatty() and not as_json
    if message is None and not interactive:
        message = decode(sys.stdin.buffer.read(), "stdin").strip()
    if message is not None and not message.strip():
        raise typer.BadParameter("the message is blank")
    with connect(url, api_key) as mos:
        conversation = _Conversation(
            mos.cube(cube), messages, model=model, activation=activation, options=options
        )
        if message is None:
            mos.get_cube(cube)
            conversation.run()
        elif as_json:
            conversation.answer_json(message)
        else:
            conversation.answer(message)


class _Conversation:
    def __init__(
        self,
        cube: Cube,
        messages: list[dict[str, object]],
        *,
        model: str | None,
        activation: bool,
        options: dict[str, object],
    ) -> None:
        self._cube = cube
        self._messages = messages
        self._model = model
        self._activation = activation
        self._options = options

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
        with self._cube.chat_stream(
            self._messages, model=self._model, activation=self._activation, options=self._options
        ) as stream:
            for delta in stream:
                sys.stdout.write(output.printable(delta))
                sys.stdout.flush()
        sys.stdout.write("\n")
        sys.stdout.flush()
        output.say_dim(describe(stream.memos))
        self._messages.append({"role": "assistant", "content": stream.text})

    def answer_json(self, message: str) -> None:
        self._messages.append({"role": "user", "content": message})
        reply = self._cube.chat(
            self._messages, model=self._model, activation=self._activation, options=self._options
        )
        output.say_json(reply.raw)


def describe(memos: ChatMemos | None) -> str:
    """One line about the memory that an answer was built on."""
    if memos is None:
        return "memory: the server did not say"
    use = memos.activation
    parts = [f"memory: {use.tokens:,} tokens, {use.cached_tokens:,} cached, source {use.source}"]
    if memos.retrieved:
        parts.append(f"{len(memos.retrieved)} retrieved")
    return ", ".join(parts)
