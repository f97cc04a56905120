"""`memos-vllm memory search`"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated, Any

import typer

from memos_vllm.cli import output
from memos_vllm.cli.options import ApiKey, AsJson, CubeId, Url, connect

if TYPE_CHECKING:
    from memos_vllm.client import SearchHit, SearchResult

MAX_SOURCE_CHARS = 40


def search(
    cube: CubeId,
    query: Annotated[str, typer.Argument(metavar="QUERY", help="What to look for, in words.")],
    *,
    top_k: Annotated[
        int, typer.Option("--top-k", "-k", min=1, max=10_000, help="At most this many.")
    ] = 10,
    filter_json: Annotated[
        str | None,
        typer.Option(
            "--filter",
            metavar="JSON",
            help='Conditions, such as \'{"source": {"kind": "turn"}}\'.',
            show_default=False,
        ),
    ] = None,
    tag: Annotated[
        list[str] | None,
        typer.Option("--tag", help="With this tag, or any of several.", show_default=False),
    ] = None,
    hops: Annotated[int, typer.Option(min=0, max=3, help="Edges to follow from what matches.")] = 1,
    explain: Annotated[
        bool, typer.Option("--explain", help="Show the parts of each score, and how it was found.")
    ] = False,
    url: Url = None,
    api_key: ApiKey = None,
    as_json: AsJson = False,
) -> None:
    """Find memories by meaning, by words and along edges, best first."""
    if not query.strip():
        raise typer.BadParameter("the query is blank")
    where = _conditions(filter_json, tag or [])
    with connect(url, api_key) as mos:
        found = mos.cube(cube).search(query, top_k=top_k, filter=where, hops=hops, explain=explain)
    if as_json:
        output.say_json(found.raw)
        return
    rows = [
        (
            f"{hit.score:.2f}",
            hit.memory.id,
            source_line(hit.memory.source),
            output.one_line(hit.memory.text, limit=200),
        )
        for hit in found
    ]
    below = [_explained(hit) for hit in found] if explain else ()
    if rows:
        output.say_table(("score", "id", "source", "text"), rows, below=below)
    else:
        output.note("nothing was found")
    _say_pending(found)


def source_line(source: Any) -> str:
    """Where a memory comes from, in a few words; empty for a plain note.

    >>> source_line({"kind": "chunk", "title": "Handbook", "locator": "page 7"})
    'Handbook, page 7'
    """
    name = source.get("title") or (None if source.get("kind") == "turn" else source.get("uri"))
    day = (source.get("created_at") or "")[:10]
    parts = [name, source.get("locator") if name else None, source.get("author"), day]
    return output.one_line(", ".join(part for part in parts if part), limit=MAX_SOURCE_CHARS)


def _conditions(filter_json: str | None, tags: list[str]) -> dict[str, Any] | None:
    """The filter that the options ask for together.

    Raises:
        typer.BadParameter: it is not JSON, or not a filter.
    """
    from memos_vllm.domain.filters import parse_filter
    from memos_vllm.errors import InvalidRequest

    parts: list[Any] = []
    if filter_json is not None:
        try:
            parts.append(json.loads(filter_json))
        except (ValueError, RecursionError) as error:
            raise typer.BadParameter(f"the filter is not JSON: {error}") from None
    if tags:
        parts.append({"tags": tags})
    for part in parts:
        try:
            parse_filter(part)
        except InvalidRequest as error:
            raise typer.BadParameter(str(error)) from None
    if not parts:
        return None
    return parts[0] if len(parts) == 1 else {"and": parts}


def _explained(hit: SearchHit) -> list[str]:
    """The parts of a score, and the way to a memory that was not found by itself."""
    lines = [", ".join(f"{name} {value:.3f}" for name, value in hit.scores.items())]
    if hit.via:
        path = ""
        for hop in hit.via:
            edge = f"{hop.kind} {hop.weight:.2f}" + (f" {hop.detail}" if hop.detail else "")
            path += f"{hop.origin} -[{edge}]-> " if hop.forward else f"{hop.origin} <-[{edge}]- "
        lines.append(f"path: {path}{hit.memory.id}")
    return lines


def _say_pending(found: SearchResult) -> None:
    if found.pending is not None:
        waiting = found.pending.changes + found.pending.memories
        output.say_dim(f"{waiting:,} changes are not indexed yet; what is new may be missing here")
