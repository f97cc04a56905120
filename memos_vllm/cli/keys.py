"""`memos-vllm keys ...`: on the catalog itself, or on a server that is named."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from memos_vllm.cli import output
from memos_vllm.cli.options import ApiKey, AsJson, Url, connect
from memos_vllm.domain.access import LOCAL_ADMIN, PrincipalKind
from memos_vllm.domain.keys import ApiKey as KeyRecord
from memos_vllm.domain.keys import draw_key, public_part
from memos_vllm.errors import ConfigurationError

if TYPE_CHECKING:
    from memos_vllm.control.mos import Mos

app = typer.Typer(
    help="Make, list and revoke API keys. Works on the data folder, whether a server runs or not; "
    "with --url or --api-key it asks that server.",
    no_args_is_help=True,
    rich_markup_mode=None,
)

_SPAN = re.compile(r"([0-9]{1,6})([smhdw])")
_UNITS = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days", "w": "weeks"}
_PAGE = 1000

DataDir = Annotated[
    Path | None,
    typer.Option(
        metavar="FOLDER",
        help="The server's data folder; MEMOS_DATA_DIR, or the user's.",
        show_default=False,
    ),
]
CatalogUrl = Annotated[
    str | None,
    typer.Option(
        metavar="URL",
        help="The catalog's SQLAlchemy URL; MEMOS_CATALOG_URL, or SQLite in the data folder.",
        show_default=False,
    ),
]


class Kind(StrEnum):
    USER = "user"
    AGENT = "agent"
    SERVICE = "service"


def _lifetime(text: str) -> timedelta:
    match = _SPAN.fullmatch(text.strip())
    if match is None:
        raise typer.BadParameter("give a number and s, m, h, d or w, such as 30d")
    return timedelta(**{_UNITS[match[2]]: int(match[1])})


@app.command()
def create(
    name: Annotated[
        str, typer.Argument(metavar="NAME", help="The principal that the key stands for.")
    ],
    *,
    admin: Annotated[
        bool | None,
        typer.Option(
            "--admin/--no-admin",
            help="An administrator or not; left out, only the very first key is one.",
            show_default=False,
        ),
    ] = None,
    kind: Annotated[
        Kind | None,
        typer.Option(help="What stands behind it; a user if left out.", show_default=False),
    ] = None,
    expires: Annotated[
        timedelta | None,
        typer.Option(
            metavar="SPAN",
            parser=_lifetime,
            help="How long it is good for, such as 12h, 30d or 52w; for good if left out.",
            show_default=False,
        ),
    ] = None,
    data_dir: DataDir = None,
    catalog_url: CatalogUrl = None,
    url: Url = None,
    api_key: ApiKey = None,
    as_json: AsJson = False,
) -> None:
    """Make a key and print it. It is shown this once and stored nowhere."""
    try:
        expires_at = None if expires is None else datetime.now(UTC) + expires
    except OverflowError:
        raise typer.BadParameter("that is beyond the calendar", param_hint="--expires") from None
    if _asks_a_server(url, api_key, data_dir, catalog_url):
        with connect(url, api_key) as mos:
            made = mos.create_key(name, admin=admin, kind=kind, expires_at=expires_at)
        token, key = made.token, dict(made.info.raw)
    else:
        drawn = draw_key()
        with _catalog(data_dir, catalog_url) as catalog:
            first = not catalog.has_keys()
            created = catalog.create_key(
                LOCAL_ADMIN,
                name,
                drawn.digest,
                admin=admin,
                kind=None if kind is None else PrincipalKind(kind),
                expires_at=expires_at,
            )
        token, key = drawn.token, _as_json(created)
        if first:
            _await_running_servers()
    if as_json:
        output.say_json({**key, "key": token})
        return
    output.say(token)
    role = "administrator" if key["admin"] else key["kind"]
    output.note(f"for {key['principal']} ({role}); keep it now, it is not shown again")


@app.command("list")
def list_keys(
    *,
    data_dir: DataDir = None,
    catalog_url: CatalogUrl = None,
    url: Url = None,
    api_key: ApiKey = None,
    as_json: AsJson = False,
) -> None:
    """List every key that was ever made; the keys themselves are known to their owners only."""
    if _asks_a_server(url, api_key, data_dir, catalog_url):
        with connect(url, api_key) as mos:
            keys = [dict(key.raw) for key in mos.api_keys()]
    else:
        with _catalog(data_dir, catalog_url) as catalog:
            keys = [_as_json(key) for key in _all_keys(catalog)]
    if as_json:
        output.say_json_list(keys)
        return
    names = ("id", "prefix", "principal", "kind", "state", "last_used_at", "expires_at")
    rows = [
        ["admin" if name == "kind" and key["admin"] else key[name] or "" for name in names]
        for key in keys
    ]
    heads = ("key", "starts with", "principal", "kind", "state", "last used", "expires")
    output.say_table(heads, rows)


@app.command()
def revoke(
    key: Annotated[
        str, typer.Argument(metavar="KEY", help="The key's id, or what it starts with.")
    ],
    *,
    data_dir: DataDir = None,
    catalog_url: CatalogUrl = None,
    url: Url = None,
    api_key: ApiKey = None,
    as_json: AsJson = False,
) -> None:
    """Make a key worthless; when this returns no running server takes it any more."""
    if _asks_a_server(url, api_key, data_dir, catalog_url):
        with connect(url, api_key) as mos:
            revoked = dict(mos.revoke_key(key).raw)
    else:
        with _catalog(data_dir, catalog_url) as catalog:
            revoked = _as_json(catalog.revoke_key(LOCAL_ADMIN, public_part(key)))
        _await_running_servers()
    if as_json:
        output.say_json(revoked)
    else:
        output.say(f"revoked {revoked['id']} of {revoked['principal']}")


def _asks_a_server(
    url: str | None, api_key: str | None, data_dir: Path | None, catalog_url: str | None
) -> bool:
    """Whether a server was named; MEMOS_URL and MEMOS_API_KEY, which serve other commands, do not.

    Raises:
        typer.BadParameter: a catalog was named as well.
    """
    named = url is not None or api_key is not None
    if named and (data_dir is not None or catalog_url is not None):
        raise typer.BadParameter("give a server (--url, --api-key) or a catalog, not both")
    return named


@contextmanager
def _catalog(data_dir: Path | None, catalog_url: str | None) -> Iterator[Mos]:
    """The catalog that a server with these options and this environment would use."""
    from pydantic import ValidationError

    from memos_vllm.config import ServerSettings
    from memos_vllm.control.mos import Mos

    given: dict[str, Any] = {"data_dir": data_dir, "catalog_url": catalog_url}
    try:
        settings = ServerSettings(**{name: value for name, value in given.items() if value})
    except ValidationError as error:
        first = error.errors()[0]
        raise ConfigurationError(f"MEMOS_{str(first['loc'][0]).upper()}: {first['msg']}") from error
    if not settings.catalog_url and not (settings.data_dir / "catalog.sqlite").exists():
        output.note(
            f"memos-vllm: no server has used {settings.data_dir} yet; this makes its catalog, for "
            "servers with this --data-dir"
        )
    mos = Mos.open(settings.resolved_catalog_url)
    try:
        yield mos
    finally:
        mos.close()


def _await_running_servers() -> None:
    """Return when servers over this catalog have learned what was changed."""
    from memos_vllm.control.keys import LEASE_SECONDS

    time.sleep(LEASE_SECONDS)


def _all_keys(catalog: Mos) -> Iterator[KeyRecord]:
    cursor: str | None = None
    while True:
        page = catalog.list_keys(LOCAL_ADMIN, limit=_PAGE, cursor=cursor)
        yield from page.items
        if (cursor := page.next_cursor) is None:
            return


def _as_json(key: KeyRecord) -> dict[str, Any]:
    """As the server would answer it."""
    times = {
        name: value.isoformat().replace("+00:00", "Z")
        for name, value in asdict(key).items()
        if isinstance(value, datetime)
    }
    return {"object": "key", **asdict(key), **times}
