"""`memos-vllm cube export|import|clone|move|diff`"""

from __future__ import annotations

import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from memos_vllm.cli import output
from memos_vllm.cli.options import ApiKey, AsJson, CubeId, Url, connect

if TYPE_CHECKING:
    from memos_vllm.client import CubeArrival, MemoryDifference

_STDIO = "-"
_SIGNS = {"only_here": "-", "only_there": "+", "changed": "~"}

NewId = Annotated[str, typer.Argument(metavar="NEW", help="The copy's id.")]


def export_cube(
    cube: CubeId,
    file: Annotated[
        str | None,
        typer.Argument(
            metavar="FILE|-", help="CUBE.memcube when left out; - for stdout.", show_default=False
        ),
    ] = None,
    *,
    include: Annotated[
        list[str] | None,
        typer.Option(
            metavar="TIER",
            help="plaintext, activation or parametric; may be repeated; all when left out.",
            show_default=False,
        ),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace a file that is there.")] = False,
    url: Url = None,
    api_key: ApiKey = None,
    as_json: AsJson = False,
) -> None:
    """Write a cube to a .memcube file, which appears once all of it was verified."""
    target = Path(f"{cube}.memcube" if file is None else file)
    piped = file == _STDIO
    if piped and as_json:
        raise typer.BadParameter("the archive itself goes to stdout; leave out --json or -")
    if not piped and not force and target.exists():
        raise typer.BadParameter(f"{target} is there already; give --force to replace it")
    with (
        tempfile.TemporaryDirectory(prefix="memos-export-") as folder,
        connect(url, api_key) as mos,
    ):
        path = Path(folder) / "cube.memcube" if piped else target
        with _bytes_shown(f"exporting {cube}", silent=as_json) as on_bytes:
            mos.cube(cube).export(path, include=include, on_bytes=on_bytes)
        if piped:
            with path.open("rb") as archive:
                shutil.copyfileobj(archive, sys.stdout.buffer)
            return
    size_bytes = target.stat().st_size
    if as_json:
        output.say_json({"id": cube, "object": "memcube", "path": str(target), "bytes": size_bytes})
    else:
        output.say(f"{target}: {output.size(size_bytes)}")


def import_cube(
    file: Annotated[str, typer.Argument(metavar="FILE|-", help="A .memcube file; - for stdin.")],
    *,
    cube_id: Annotated[
        str | None,
        typer.Option("--id", metavar="CUBE", help="In place of the id it had.", show_default=False),
    ] = None,
    trust_artifacts: Annotated[
        bool,
        typer.Option(
            help="Take over KV and vectors as they are; --no-trust-artifacts computes them anew."
        ),
    ] = True,
    replace: Annotated[
        bool,
        typer.Option("--replace", help="Take the place of the cube of that id; grants stay."),
    ] = False,
    url: Url = None,
    api_key: ApiKey = None,
    as_json: AsJson = False,
) -> None:
    """Make a cube of a .memcube file: all of it or nothing."""
    with tempfile.NamedTemporaryFile(prefix="memos-import-") as spool, connect(url, api_key) as mos:
        path = Path(file)
        if file == _STDIO:
            shutil.copyfileobj(sys.stdin.buffer, spool)
            spool.flush()
            path = Path(spool.name)
        total = path.stat().st_size
        with _bytes_shown("importing", total=total, silent=as_json) as on_bytes:
            cube = mos.import_cube(
                path,
                cube_id,
                trust_artifacts=trust_artifacts,
                replace=replace,
                on_bytes=on_bytes,
            )
    assert cube.arrival is not None, "an import says how it arrived"
    _say_arrival(cube.arrival, as_json=as_json)


def clone(
    cube: CubeId,
    new_id: NewId,
    *,
    name: Annotated[
        str | None, typer.Option(help="The original's when left out.", show_default=False)
    ] = None,
    url: Url = None,
    api_key: ApiKey = None,
    as_json: AsJson = False,
) -> None:
    """Copy a cube under another id."""
    with connect(url, api_key) as mos:
        copy = mos.cube(cube).clone(new_id, name=name)
    assert copy.arrival is not None, "a clone says how it arrived"
    _say_arrival(copy.arrival, as_json=as_json)


def move(
    cube: CubeId,
    owner: Annotated[str, typer.Argument(metavar="OWNER", help="The new owner's id.")],
    *,
    url: Url = None,
    api_key: ApiKey = None,
    as_json: AsJson = False,
) -> None:
    """Hand a cube over to another owner."""
    with connect(url, api_key) as mos:
        info = mos.cube(cube).move(owner)
    if as_json:
        output.say_json(info.raw)
    else:
        output.say(f"{info.id} belongs to {info.owner}")


def diff(
    cube: CubeId,
    other: Annotated[str, typer.Argument(metavar="OTHER", help="The other cube's id.")],
    *,
    url: Url = None,
    api_key: ApiKey = None,
    as_json: AsJson = False,
) -> None:
    """Compare two cubes: - only in CUBE, + only in OTHER, ~ changed."""
    with connect(url, api_key) as mos:
        found = list(mos.diff(cube, other))
    if as_json:
        output.say_json_list([entry.raw for entry in found])
        return
    for entry in found:
        output.say(_difference(entry))


def _difference(entry: MemoryDifference) -> str:
    memory = entry.there or entry.here
    assert memory is not None, "a difference is in one of the cubes"
    fields = f" ({', '.join(entry.fields)})" if entry.fields else ""
    return f"{_SIGNS[entry.kind]} {memory.id}{fields} {output.one_line(memory.text, limit=80)}"


def _say_arrival(arrival: CubeArrival, *, as_json: bool) -> None:
    if as_json:
        output.say_json(arrival.raw)
        return
    info = arrival.info
    count = info.memories.active + info.memories.archived + info.memories.merged
    ids = "new ids" if arrival.memory_ids else "the ids they had"
    output.say(f"{info.id}: {count:,} memories with {ids}, activation {info.activation.state}")
    for warning in arrival.warnings:
        output.note(f"warning: {warning}")


@contextmanager
def _bytes_shown(
    title: str, *, silent: bool, total: int | None = None
) -> Iterator[Callable[[int], None]]:
    """A bar on a terminal; elsewhere nobody reads a line for each megabyte."""
    with output.progress(title, silent=silent or not sys.stderr.isatty()) as report:

        def on_bytes(so_far: int) -> None:
            report(so_far / total if total else 0.0, output.size(so_far))

        yield on_bytes
