"""`memos-vllm cube ...`"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from memos_vllm.cli import cartridge, jobs, output
from memos_vllm.cli.options import (
    ApiKey,
    AsJson,
    CubeId,
    IfVersion,
    Limit,
    Url,
    Wait,
    WaitSeconds,
    Yes,
    confirm,
    connect,
)

if TYPE_CHECKING:
    from memos_vllm.client import MOS, Cube, CubeInfo, JobInfo

app = typer.Typer(
    help="Make, show and delete cubes, and move their memory between tiers.",
    no_args_is_help=True,
    rich_markup_mode=None,
)

app.command("export")(cartridge.export_cube)
app.command("import")(cartridge.import_cube)
app.command()(cartridge.clone)
app.command()(cartridge.move)
app.command()(cartridge.diff)

Name = Annotated[str | None, typer.Option(help="A name for people.", show_default=False)]
Description = Annotated[str | None, typer.Option(help="What it is for.", show_default=False)]
Preamble = Annotated[
    str | None, typer.Option(help="Text before the memories in every prompt.", show_default=False)
]
Chosen = Annotated[
    list[str] | None,
    typer.Argument(metavar="MEMORY", help="Memory ids; all of the cube when left out."),
]


@app.command("list")
def list_cubes(
    *,
    limit: Limit = None,
    url: Url = None,
    api_key: ApiKey = None,
    as_json: AsJson = False,
) -> None:
    """List the cubes that you may read."""
    with connect(url, api_key) as mos:
        cubes = list(mos.cubes(limit=limit))
    if as_json:
        output.say_json_list([cube.raw for cube in cubes])
        return
    heads = ("id", "memories", "activation", "tokens", "updated", "name")
    output.say_table(heads, [_row(cube) for cube in cubes])


@app.command()
def create(
    cube_id: Annotated[
        str | None,
        typer.Argument(
            metavar="CUBE", help="The new id; made up when left out.", show_default=False
        ),
    ] = None,
    *,
    name: Name = None,
    description: Description = None,
    preamble: Preamble = None,
    label: Annotated[
        list[str] | None, typer.Option(help="A label; may be repeated.", show_default=False)
    ] = None,
    url: Url = None,
    api_key: ApiKey = None,
    as_json: AsJson = False,
) -> None:
    """Make a cube and print its id."""
    with connect(url, api_key) as mos:
        cube = mos.create_cube(
            cube_id, name=name, description=description, preamble=preamble, labels=label or ()
        )
        if as_json:
            output.say_json(cube.info().raw)
        else:
            output.say(cube.id)


@app.command()
def update(
    cube: CubeId,
    *,
    name: Name = None,
    description: Description = None,
    preamble: Preamble = None,
    label: Annotated[
        list[str] | None,
        typer.Option(help="A label; may be repeated; replaces all.", show_default=False),
    ] = None,
    if_version: IfVersion = None,
    url: Url = None,
    api_key: ApiKey = None,
    as_json: AsJson = False,
) -> None:
    """Change what a cube is called and how its prompts begin."""
    given = {"name": name, "description": description, "preamble": preamble, "labels": label}
    changed: dict[str, Any] = {field: value for field, value in given.items() if value is not None}
    if not changed:
        raise typer.BadParameter("give --name, --description, --preamble or --label")
    with connect(url, api_key) as mos:
        info = mos.cube(cube).update(**changed, version=if_version)
    if as_json:
        output.say_json(info.raw)
    else:
        output.say(f"{info.id}: version {info.version}")


@app.command()
def show(cube: CubeId, *, url: Url = None, api_key: ApiKey = None, as_json: AsJson = False) -> None:
    """Show a cube."""
    with connect(url, api_key) as mos:
        info = mos.get_cube(cube)
    if as_json:
        output.say_json(info.raw)
        return
    activation = info.activation
    lines = {
        "id": info.id,
        "name": info.name,
        "description": info.description,
        "owner": info.owner,
        "version": info.version,
        "memories": f"{info.memories.active} active, {info.memories.archived} archived, "
        f"{info.memories.merged} merged",
        "tiers": f"{info.tiers.plaintext} plaintext, {info.tiers.activation} activation, "
        f"{info.tiers.parametric} parametric",
        "activation": f"{activation.state}, {activation.tokens:,} tokens, "
        f"{output.size(activation.bytes)}, {activation.resident_tokens:,} tokens resident",
        "created": info.created_at.isoformat(timespec="seconds"),
        "updated": info.updated_at.isoformat(timespec="seconds"),
    }
    for field, value in lines.items():
        if value not in {None, ""}:
            output.say(f"{field}: {output.one_line(str(value))}")


@app.command()
def delete(
    cube: CubeId,
    *,
    yes: Yes = False,
    if_version: IfVersion = None,
    url: Url = None,
    api_key: ApiKey = None,
    as_json: AsJson = False,
) -> None:
    """Delete a cube with its memories and everything compiled from it."""
    with connect(url, api_key) as mos:
        info = mos.get_cube(cube)
        count = info.memories.active + info.memories.archived + info.memories.merged
        confirm(f"Delete cube {info.id} with {count} memories for good?", yes=yes)
        mos.delete_cube(cube, version=if_version)
    if as_json:
        output.say_json({"id": cube, "object": "memcube", "deleted": True})
    else:
        output.say(f"deleted {cube}")


@app.command()
def promote(
    cube: CubeId,
    memories: Chosen = None,
    *,
    to: Annotated[str, typer.Option(metavar="TIER", help="activation or parametric.")] = (
        "activation"
    ),
    wait: Wait = True,
    timeout: WaitSeconds = 600.0,
    url: Url = None,
    api_key: ApiKey = None,
    as_json: AsJson = False,
) -> None:
    """Move memories to a hotter tier; to activation, their KV is computed once and kept."""
    with connect(url, api_key) as mos:
        _move_tier(
            mos,
            mos.cube(cube),
            lambda handle: handle.promote(memories or "all", to=to),
            wait=wait,
            timeout_seconds=timeout,
            as_json=as_json,
        )


@app.command()
def demote(
    cube: CubeId,
    memories: Chosen = None,
    *,
    from_tier: Annotated[
        str, typer.Option("--from", metavar="TIER", help="activation or parametric.")
    ] = "activation",
    wait: Wait = True,
    timeout: WaitSeconds = 600.0,
    url: Url = None,
    api_key: ApiKey = None,
    as_json: AsJson = False,
) -> None:
    """Move memories back to plaintext."""
    with connect(url, api_key) as mos:
        _move_tier(
            mos,
            mos.cube(cube),
            lambda handle: handle.demote(memories or "all", from_tier=from_tier),
            wait=wait,
            timeout_seconds=timeout,
            as_json=as_json,
        )


@app.command()
def reindex(
    cube: CubeId,
    *,
    wait: Wait = True,
    timeout: WaitSeconds = 600.0,
    url: Url = None,
    api_key: ApiKey = None,
    as_json: AsJson = False,
) -> None:
    """Have the search index take in each memory of a cube again; texts are untouched."""
    with connect(url, api_key) as mos:
        job = mos.cube(cube).reindex()
        if wait:
            job = jobs.follow(mos, job, timeout_seconds=timeout, silent=as_json)
    if as_json:
        output.say_json(job.raw)
    elif job.ended:
        output.say(f"{cube}: {job.message or job.state}")
    else:
        _say_going_on(cube, job)


@app.command()
def stats(
    cube: CubeId, *, url: Url = None, api_key: ApiKey = None, as_json: AsJson = False
) -> None:
    """Counts, tokens and bytes per tier, hits, and what prefill was saved."""
    with connect(url, api_key) as mos:
        figures = mos.cube(cube).stats()
    if as_json:
        output.say_json(figures)
        return
    for name, value in _flat(figures):
        output.say(f"{name}: {value}")


def _move_tier(
    mos: MOS,
    cube: Cube,
    start: Callable[[Cube], JobInfo],
    *,
    wait: bool,
    timeout_seconds: float,
    as_json: bool,
) -> None:
    job = start(cube)
    if wait:
        job = jobs.follow(mos, job, timeout_seconds=timeout_seconds, silent=as_json)
    if as_json:
        output.say_json(job.raw)
    elif job.ended:
        activation = cube.info().activation
        output.say(f"{cube.id}: activation {activation.state}, {activation.tokens:,} tokens")
    else:
        _say_going_on(cube.id, job)


def _say_going_on(cube_id: str, job: JobInfo) -> None:
    output.say(f"{cube_id}: {job.kind} job {job.id} is {job.state}")


def _row(cube: CubeInfo) -> Sequence[object]:
    return (
        cube.id,
        cube.memories.active,
        cube.activation.state,
        cube.activation.tokens,
        cube.updated_at.isoformat(timespec="seconds"),
        cube.name or "",
    )


def _flat(figures: object, prefix: str = "") -> list[tuple[str, object]]:
    """Nested objects as dotted names; what only names the object is left out."""
    if not isinstance(figures, dict):
        return [(prefix, figures)]
    lines: list[tuple[str, object]] = []
    for name, value in figures.items():
        if name != "object":
            lines += _flat(value, f"{prefix}.{name}" if prefix else name)
    return lines
