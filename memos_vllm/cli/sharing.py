"""`memos-vllm cube share`, `unshare` and `grants`."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

from memos_vllm.cli import output
from memos_vllm.cli.options import ApiKey, AsJson, CubeId, Labels, Url, connect

Who = Annotated[str, typer.Argument(metavar="PRINCIPAL", help="The id that their key has.")]
RoleName = Literal["reader", "editor", "owner", "auditor"]


def share(
    cube_id: CubeId,
    principal: Who,
    *,
    role: Annotated[RoleName, typer.Option(help="What they may do.")] = "reader",
    label: Labels = None,
    url: Url = None,
    api_key: ApiKey = None,
    as_json: AsJson = False,
) -> None:
    """Give somebody a role on a cube, in the place of the one they had."""
    with connect(url, api_key) as mos:
        grant = mos.cube(cube_id).share(principal, role=role, labels=label or ())
    if as_json:
        output.say_json(grant.raw)
    else:
        under = f" with {', '.join(grant.labels)}" if grant.labels else ""
        output.say(f"{grant.principal} is {grant.role} of {grant.cube_id}{under}")


def unshare(
    cube_id: CubeId,
    principal: Who,
    *,
    url: Url = None,
    api_key: ApiKey = None,
    as_json: AsJson = False,
) -> None:
    """Take somebody's role on a cube away."""
    with connect(url, api_key) as mos:
        mos.cube(cube_id).unshare(principal)
    if as_json:
        output.say_json({"cube_id": cube_id, "principal": principal, "deleted": True})
    else:
        output.say(f"{principal} has no role on {cube_id} any more")


def grants(
    cube_id: CubeId, *, url: Url = None, api_key: ApiKey = None, as_json: AsJson = False
) -> None:
    """Show who may do what with a cube."""
    with connect(url, api_key) as mos:
        found = list(mos.cube(cube_id).grants())
    if as_json:
        output.say_json_list([grant.raw for grant in found])
        return
    rows = [
        (
            grant.principal,
            grant.role,
            grant.granted_by,
            grant.granted_at.isoformat(timespec="seconds"),
            ", ".join(grant.labels),
        )
        for grant in found
    ]
    output.say_table(("who", "role", "given by", "when", "labels"), rows)
