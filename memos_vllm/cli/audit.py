"""`memos-vllm audit ...`"""

from __future__ import annotations

from typing import Annotated

import typer

from memos_vllm.cli import output
from memos_vllm.cli.options import ApiKey, AsJson, CubeId, Url, connect

app = typer.Typer(
    help="Read and verify the audit log.", no_args_is_help=True, rich_markup_mode=None
)


@app.command()
def tail(
    cube: CubeId,
    *,
    lines: Annotated[
        int, typer.Option("--lines", "-n", min=1, help="How many of the latest entries.")
    ] = 20,
    url: Url = None,
    api_key: ApiKey = None,
    as_json: AsJson = False,
) -> None:
    """Show the latest audit entries of a cube, the newest last."""
    with connect(url, api_key) as mos:
        entries = list(mos.cube(cube).audit(limit=lines))[::-1]
    if as_json:
        output.say_json_list(entries)
        return
    names = ("seq", "at", "actor", "action", "subject")
    rows = [[entry.get(name) or "" for name in names] for entry in entries]
    output.say_table(("entry", "when", "who", "what", "subject"), rows)


@app.command()
def verify(*, url: Url = None, api_key: ApiKey = None, as_json: AsJson = False) -> None:
    """Check the hash chain over the whole audit log; exit 1 if it is broken."""
    with connect(url, api_key) as mos:
        verdict = mos.verify_audit()
    if as_json:
        output.say_json(verdict)
    else:
        output.say(str(verdict.get("message") or ("whole" if verdict.get("ok") else "broken")))
    if not verdict.get("ok"):
        raise typer.Exit(1)
