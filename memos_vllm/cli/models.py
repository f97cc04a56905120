"""`memos-vllm models ...`"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from memos_vllm.cli import output
from memos_vllm.cli.options import AsJson

app = typer.Typer(help="Get models ready to serve.", no_args_is_help=True, rich_markup_mode=None)


@app.callback()
def models() -> None:
    """Get models ready to serve."""


@app.command()
def prepare(
    name: Annotated[
        str,
        typer.Argument(
            help="smollm2-135m-instruct, minilm-l6-v2-int8 (search's embedder), a folder, or a hub "
            "id org/name."
        ),
    ],
    *,
    target: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="Where to put it.", show_default=False),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Fetch and convert a model, and print the folder to give to `memos-vllm serve`."""
    from memos_vllm.models.prepare import prepare as prepare_model

    folder = prepare_model(name, target=target, progress=None if as_json else output.note)
    if as_json:
        output.say_json({"path": str(folder)})
    else:
        output.say(str(folder))
