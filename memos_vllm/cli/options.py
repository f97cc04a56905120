"""Options that many commands share, and the client that they describe."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from memos_vllm.client import MOS

Url = Annotated[
    str | None,
    typer.Option(
        "--url",
        metavar="URL",
        help="The server's address; MEMOS_URL, or http://127.0.0.1:8000.",
        show_default=False,
    ),
]
ApiKey = Annotated[
    str | None,
    typer.Option(
        "--api-key",
        metavar="KEY",
        help="Your key; MEMOS_API_KEY keeps it out of the process list.",
        show_default=False,
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
Yes = Annotated[bool, typer.Option("--yes", "-y", help="Do not ask on the terminal.")]
CubeId = Annotated[str, typer.Argument(metavar="CUBE", help="The cube's id.")]
MemoryId = Annotated[str, typer.Argument(metavar="MEMORY", help="The memory's id.")]
Wait = Annotated[bool, typer.Option("--wait/--no-wait", help="Wait for the job to end.")]
WaitSeconds = Annotated[
    float, typer.Option("--timeout", metavar="SECONDS", min=0.0, help="Longest time to wait.")
]
Limit = Annotated[int | None, typer.Option(min=1, help="At most this many.", show_default=False)]
Tags = Annotated[
    list[str] | None, typer.Option("--tag", help="A tag; may be repeated.", show_default=False)
]
Labels = Annotated[
    list[str] | None, typer.Option("--label", help="A label; may be repeated.", show_default=False)
]
Reason = Annotated[str | None, typer.Option(help="Why, for the history.", show_default=False)]
IfVersion = Annotated[
    int | None,
    typer.Option(
        "--if-version",
        metavar="N",
        help="Refuse unless it is at this version.",
        show_default=False,
    ),
]


@contextmanager
def connect(url: str | None, api_key: str | None) -> Iterator[MOS]:
    """The client that these options and the environment describe, closed at the end."""
    from memos_vllm.client import MOS
    from memos_vllm.config import ClientSettings

    settings = ClientSettings()
    with MOS(url or settings.url, api_key or settings.api_key) as mos:
        yield mos


def confirm(question: str, *, yes: bool) -> None:
    """Ask before something that cannot be undone; a script has nobody to ask.

    Raises:
        typer.Exit: with 1, after a no.
    """
    if yes or not sys.stdin.isatty():
        return
    if not typer.confirm(question, err=True):
        typer.echo("nothing was changed", err=True)
        raise typer.Exit(1)
