"""`memos-vllm audit ...`"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from memos_vllm.cli import output
from memos_vllm.cli.options import ApiKey, AsJson, Url, connect
from memos_vllm.domain.audit import HEAD_OBJECT, AuditHead, AuditVerdict, ChainCheck, SealedRow
from memos_vllm.errors import InvalidRequest

app = typer.Typer(
    help="Read, export and verify the audit log.", no_args_is_help=True, rich_markup_mode=None
)


_CUBE = "The cube's id; the whole log, which is for administrators, when left out."
OneCube = Annotated[str | None, typer.Argument(metavar="CUBE", help=_CUBE, show_default=False)]


@app.command()
def tail(
    cube: OneCube = None,
    *,
    lines: Annotated[
        int, typer.Option("--lines", "-n", min=1, help="How many of the latest entries.")
    ] = 20,
    actor: Annotated[
        str | None, typer.Option(help="Only what they did.", show_default=False)
    ] = None,
    action: Annotated[
        str | None, typer.Option(help="Only this, such as memory.update.", show_default=False)
    ] = None,
    url: Url = None,
    api_key: ApiKey = None,
    as_json: AsJson = False,
) -> None:
    """Show the latest audit entries of a cube, or of all, the newest last."""
    with connect(url, api_key) as mos:
        log = mos.audit if cube is None else mos.cube(cube).audit
        entries = list(log(actor=actor, action=action, limit=lines))[::-1]
    if as_json:
        output.say_json_list(entries)
        return
    names = ["seq", "at", "actor", "action", "subject"]
    if cube is None:
        names.append("cube_id")
    rows = [[entry.get(name) or "" for name in names] for entry in entries]
    output.say_table(("entry", "when", "who", "what", "subject", "cube")[: len(names)], rows)


@app.command()
def export(
    *,
    cube: Annotated[
        str | None, typer.Option("--cube", metavar="CUBE", help=_CUBE, show_default=False)
    ] = None,
    to: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", metavar="FILE", help="Where to write it.", show_default="stdout"
        ),
    ] = None,
    url: Url = None,
    api_key: ApiKey = None,
) -> None:
    """Write the audit log as lines of JSON, the oldest first; `verify FILE` reads the whole one."""
    with connect(url, api_key) as mos:
        parts = mos.export_audit() if cube is None else mos.cube(cube).export_audit()
        if to is None:
            for part in parts:
                sys.stdout.buffer.write(part)
            return
        # Read from the server first: a refusal leaves the file that was there.
        first = next(parts, b"")
        with to.open("wb") as file:
            file.write(first)
            for part in parts:
                file.write(part)


@app.command()
def verify(
    file: Annotated[
        Path | None,
        typer.Argument(
            metavar="FILE",
            help="An exported whole log, checked without a server; the server's own when left out.",
            show_default=False,
            exists=True,
            dir_okay=False,
        ),
    ] = None,
    *,
    url: Url = None,
    api_key: ApiKey = None,
    as_json: AsJson = False,
) -> None:
    """Check the hash chain over the whole audit log; exit 1 if it is broken."""
    if file is not None:
        verdict = dict(asdict(verify_file(file)))
    else:
        with connect(url, api_key) as mos:
            verdict = dict(mos.verify_audit())
    if as_json:
        output.say_json(verdict)
    else:
        output.say(str(verdict.get("message") or ("whole" if verdict.get("ok") else "broken")))
    if not verdict.get("ok"):
        raise typer.Exit(1)


def verify_file(path: Path) -> AuditVerdict:
    """The verdict over an exported whole log.

    Raises:
        InvalidRequest: a line is none of an export, or the last one is missing.
    """
    check, head = ChainCheck(), None
    with path.open("rb") as file:
        for number, text in enumerate(file, start=1):
            try:
                line = json.loads(text)
                if line.get("object") == HEAD_OBJECT:
                    head = AuditHead(int(line["seq"]), str(line["hash"]))
                    continue
                row = SealedRow.from_json(line)
            except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
                raise InvalidRequest(f"line {number} of {path} is no entry of a log") from None
            if (broken := check.add(row)) is not None:
                return broken
    if head is None:
        raise InvalidRequest(
            f"{path} does not say where the log ends: it was cut short, or is the log of one cube; "
            "export the whole log again"
        )
    return check.end(head)
