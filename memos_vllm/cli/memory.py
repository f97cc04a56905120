"""`memos-vllm memory ...`"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from memos_vllm.cli import adding, jobs, output, searching
from memos_vllm.cli.options import (
    ApiKey,
    AsJson,
    CubeId,
    IfVersion,
    Labels,
    Limit,
    MemoryId,
    Reason,
    Tags,
    Url,
    Wait,
    WaitSeconds,
    Yes,
    confirm,
    connect,
)
from memos_vllm.cli.reading import read_text_file

if TYPE_CHECKING:
    from memos_vllm.client import MemoryInfo

app = typer.Typer(
    help="Add, find, show, change and remove a cube's memories.",
    no_args_is_help=True,
    rich_markup_mode=None,
)

app.command()(adding.add)
app.command("add-turns")(adding.add_turns)
app.command()(searching.search)


@app.command("list")
def list_memories(
    cube: CubeId,
    *,
    state: Annotated[
        str | None, typer.Option(help="active, merged or archived.", show_default=False)
    ] = None,
    tier: Annotated[
        str | None,
        typer.Option(help="plaintext, activation or parametric.", show_default=False),
    ] = None,
    tag: Annotated[str | None, typer.Option(help="With this tag.", show_default=False)] = None,
    query: Annotated[
        str | None,
        typer.Option("--query", "-q", help="Whose text holds these words.", show_default=False),
    ] = None,
    limit: Limit = None,
    url: Url = None,
    api_key: ApiKey = None,
    as_json: AsJson = False,
) -> None:
    """List a cube's memories."""
    with connect(url, api_key) as mos:
        found = mos.cube(cube).memories(state=state, tier=tier, tag=tag, query=query, limit=limit)
        memories = list(found)
    if as_json:
        output.say_json_list([memory.raw for memory in memories])
        return
    heads = ("id", "state", "tier", "version", "tags", "text")
    output.say_table(heads, [_row(memory) for memory in memories])


@app.command()
def show(
    cube: CubeId,
    memory: MemoryId,
    *,
    url: Url = None,
    api_key: ApiKey = None,
    as_json: AsJson = False,
) -> None:
    """Show a memory."""
    with connect(url, api_key) as mos:
        found = mos.cube(cube).memory(memory)
    if as_json:
        output.say_json(found.raw)
        return
    source = ", ".join(f"{name} {value}" for name, value in found.source.items() if value)
    lines = {
        "id": found.id,
        "state": found.state,
        "tier": found.tier,
        "version": found.version,
        "tags": ", ".join(found.tags),
        "labels": ", ".join(found.labels),
        "source": source,
        "hits": found.hits,
        "created": f"{found.created_at.isoformat(timespec='seconds')} by {found.created_by}",
        "updated": found.updated_at.isoformat(timespec="seconds"),
        "expires": found.expires_at,
    }
    for name, value in lines.items():
        if value not in {None, ""}:
            output.say(f"{name}: {output.one_line(str(value))}")
    output.say("")
    output.say(found.text)


@app.command()
def update(
    cube: CubeId,
    memory: MemoryId,
    *,
    text: Annotated[str | None, typer.Option(help="The new text.", show_default=False)] = None,
    file: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="The new text's file, - for stdin.", show_default=False),
    ] = None,
    tag: Tags = None,
    label: Labels = None,
    reason: Reason = None,
    if_version: IfVersion = None,
    url: Url = None,
    api_key: ApiKey = None,
    as_json: AsJson = False,
) -> None:
    """Make a new version of a memory."""
    from memos_vllm.client import UNSET

    if text is not None and file is not None:
        raise typer.BadParameter("give --text or --file, not both")
    if file is not None:
        text = read_text_file(file)
    if text is None and not tag and not label:
        raise typer.BadParameter("give what to change: --text, --file, --tag or --label")
    with connect(url, api_key) as mos:
        changed = mos.cube(cube).update_memory(
            memory,
            text=UNSET if text is None else text,
            tags=tag or UNSET,
            labels=label or UNSET,
            reason=UNSET if reason is None else reason,
            version=if_version,
        )
    _say_moved(changed, as_json=as_json)


@app.command()
def merge(
    cube: CubeId,
    memories: Annotated[
        list[str], typer.Argument(metavar="MEMORY...", help="The memories' ids, two or more.")
    ],
    *,
    text: Annotated[
        str | None,
        typer.Option(help="What the new memory says; their texts if absent.", show_default=False),
    ] = None,
    reason: Reason = None,
    url: Url = None,
    api_key: ApiKey = None,
    as_json: AsJson = False,
) -> None:
    """Put one new memory in the place of several; they keep their history."""
    with connect(url, api_key) as mos:
        new = mos.cube(cube).merge(memories, text=text, reason=reason)
    _say_moved(new, as_json=as_json)


@app.command()
def keep(
    cube: CubeId,
    memories: Annotated[
        list[str] | None,
        typer.Argument(metavar="MEMORY", help="The memories' ids; all when left out."),
    ] = None,
    *,
    from_cube: Annotated[
        str, typer.Option("--from", metavar="OTHER", help="The cube that has them.")
    ],
    reason: Reason = None,
    url: Url = None,
    api_key: ApiKey = None,
    as_json: AsJson = False,
) -> None:
    """Take memories over from another cube, such as a session's, with lineage."""
    with connect(url, api_key) as mos:
        kept = mos.cube(cube).keep(memories or "all", from_cube=from_cube, reason=reason)
    if as_json:
        output.say_json_list([memory.raw for memory in kept])
        return
    for memory in kept:
        output.say(f"{memory.id} {output.one_line(memory.text, limit=80)}")


@app.command()
def archive(
    cube: CubeId,
    memory: MemoryId,
    *,
    if_version: IfVersion = None,
    url: Url = None,
    api_key: ApiKey = None,
    as_json: AsJson = False,
) -> None:
    """Take a memory out of use; restore brings it back."""
    with connect(url, api_key) as mos:
        changed = mos.cube(cube).archive(memory, version=if_version)
    _say_moved(changed, as_json=as_json)


@app.command()
def restore(
    cube: CubeId,
    memory: MemoryId,
    *,
    if_version: IfVersion = None,
    url: Url = None,
    api_key: ApiKey = None,
    as_json: AsJson = False,
) -> None:
    """Bring an archived memory back."""
    with connect(url, api_key) as mos:
        changed = mos.cube(cube).restore(memory, version=if_version)
    _say_moved(changed, as_json=as_json)


@app.command()
def erase(
    cube: CubeId,
    memory: MemoryId,
    *,
    yes: Yes = False,
    if_version: IfVersion = None,
    wait: Wait = True,
    timeout: WaitSeconds = 600.0,
    url: Url = None,
    api_key: ApiKey = None,
    as_json: AsJson = False,
) -> None:
    """Remove a memory's text, history and KV for good, and show how that is known."""
    with connect(url, api_key) as mos:
        found = mos.cube(cube).memory(memory)
        confirm(f"Erase {memory} ({output.one_line(found.text, limit=50)}) for good?", yes=yes)
        erased = mos.cube(cube).erase(memory, version=if_version)
        job = None
        if erased is not None and wait:
            job = jobs.follow(mos, mos.job(erased.job_id), timeout_seconds=timeout, silent=as_json)
    if as_json:
        said = {"id": memory, "object": "memory", "cube_id": cube, "erased": True}
        if erased is not None:
            said.update(erased.raw)
        output.say_json(said if job is None else {**said, "job": job.raw})
        return
    output.say(f"erased {memory}")
    if job is None and erased is not None:
        output.say_dim(f"erase job {erased.job_id} removes what it led to elsewhere")
    for proof in () if job is None else job.proofs:
        output.say_dim(f"{proof['what']}: {proof['checked']}")


@app.command()
def history(
    cube: CubeId,
    memory: MemoryId,
    *,
    url: Url = None,
    api_key: ApiKey = None,
    as_json: AsJson = False,
) -> None:
    """Show every version of a memory: who, when, why."""
    with connect(url, api_key) as mos:
        versions = list(mos.cube(cube).history(memory))
    if as_json:
        output.say_json_list(versions)
        return
    names = ("version", "changed_at", "changed_by", "change", "reason", "text")
    heads = ("version", "when", "who", "what", "why", "text")
    rows = [[version.get(name) or "" for name in names] for version in versions]
    output.say_table(heads, rows)


def _say_moved(memory: MemoryInfo, *, as_json: bool) -> None:
    if as_json:
        output.say_json(memory.raw)
    else:
        output.say(f"{memory.id} is {memory.state} at version {memory.version}")


def _row(memory: MemoryInfo) -> Sequence[object]:
    text = output.one_line(memory.text, limit=200)
    return memory.id, memory.state, memory.tier, memory.version, ",".join(memory.tags), text
