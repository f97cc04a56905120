"""`memos-vllm doctor`, the part about the catalog's database."""

from __future__ import annotations

from memos_vllm.cli import output
from memos_vllm.cli.findings import Finding, Level
from memos_vllm.errors import MemosError

NAME = "catalog"
_OLDEST = 12
_CONNECT_SECONDS = 5.0
# What PostgreSQL says, and what to do about it.
_ADVICE = (
    ("password authentication failed", "check user and password in the URL or PGPASSWORD"),
    ("no password supplied", "give it in MEMOS_CATALOG_URL or PGPASSWORD"),
    ("pg_hba.conf", "the server lets no such user in from here: add a line to its pg_hba.conf"),
    ("role", "make the user with createuser, or name another"),
    ("does not exist", "make the database with createdb"),
    ("too many clients", "raise max_connections"),
    ("starting up", "it is starting; try again"),
    ("refused", "is it running, and do host and port fit?"),
    ("No such file", "is it running, and do host and port fit?"),
    ("resolve", "the host's name is not known here"),
    ("timeout", "nothing answers there; is a firewall between?"),
)


def check_catalog(url: str | None) -> Finding:
    """Whether the catalog's database can be used; the password is never repeated."""
    if url is None or url.startswith("sqlite"):
        return Finding(Level.OK, NAME, "SQLite" if url else "SQLite in the data folder")
    from sqlalchemy.exc import SQLAlchemyError

    from memos_vllm.control.catalog import create_catalog_engine

    try:
        engine = create_catalog_engine(url, busy_timeout_seconds=_CONNECT_SECONDS)
    except MemosError as error:
        return Finding(Level.FAIL, NAME, str(error))
    if engine.dialect.name != "postgresql":
        return Finding(Level.WARN, NAME, f"{engine.dialect.name} was never tried; use PostgreSQL")
    try:
        with engine.connect() as connection:
            version, writable, user, settings = connection.exec_driver_sql(_QUESTIONS).one()
    except SQLAlchemyError as error:
        said = str(getattr(error, "orig", None) or type(error).__name__).strip()
        advice = next((advice for words, advice in _ADVICE if words in said), None)
        reason = output.one_line(said.partition("\n")[0], limit=200)
        return Finding(Level.FAIL, NAME, f"{reason}; {advice}" if advice else reason)
    finally:
        engine.dispose()
    return _judge(version, writable=writable, user=user, settings=settings)


_QUESTIONS = """
SELECT current_setting('server_version_num')::int / 10000,
       has_schema_privilege(current_schema(), 'CREATE'),
       current_user::text,
       json_build_object(
           'encoding', current_setting('server_encoding'),
           'fsync', current_setting('fsync'),
           'synchronous_commit', current_setting('synchronous_commit'),
           'read_only', current_setting('default_transaction_read_only'),
           'ctype', (SELECT datctype FROM pg_database WHERE datname = current_database())
       )
"""


def _judge(version: int, *, writable: bool | None, user: str, settings: dict[str, str]) -> Finding:
    about = f"PostgreSQL {version}"
    if settings["encoding"] != "UTF8":
        return Finding(
            Level.FAIL,
            NAME,
            f"{about} keeps this database in {settings['encoding']}, which does not hold every "
            "text; make one with createdb --encoding=UTF8 --template=template0",
        )
    if not writable or settings["read_only"] == "on":
        return Finding(
            Level.FAIL,
            NAME,
            f"{about} lets {user} make no tables here; "
            f'GRANT CREATE ON SCHEMA public TO "{user}", or use a database of its own',
        )
    careless = [name for name in ("fsync", "synchronous_commit") if settings[name] == "off"]
    if careless:
        return Finding(
            Level.WARN,
            NAME,
            f"{about} runs with {' and '.join(careless)} off: what was acknowledged can be lost",
        )
    if settings["ctype"] in {"C", "POSIX"}:
        return Finding(
            Level.WARN,
            NAME,
            f"{about} answers, but this database folds the case of ASCII letters only (it was "
            f"made with locale {settings['ctype']})",
        )
    if version < _OLDEST:
        return Finding(Level.WARN, NAME, f"{about} is older than any that was tried (15)")
    return Finding(Level.OK, NAME, f"{about} answers")
