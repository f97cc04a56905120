"""Bring a catalog's tables up to this code's schema."""

from __future__ import annotations

from pathlib import Path

from sqlalchemy import Connection, Engine, inspect, text

from memos_vllm.errors import ConfigurationError

# Newest script in migrations/versions; a test holds it to what alembic finds there.
HEAD = "0008"

_SCRIPTS = Path(__file__).parent / "migrations"
# Any constant: it names this lock among PostgreSQL's advisory locks.
_LOCK = 0x6D656D6F73


def upgrade_catalog(engine: Engine) -> None:
    """Run the migrations that are missing, all in one transaction.

    Safe when several processes start at once: one migrates, the others wait and find it done.

    Raises:
        ConfigurationError: the catalog was written by a newer version of this software.
    """
    with engine.connect() as connection:
        found = _revision(connection)
    if found == HEAD:
        return
    with engine.execution_options(memos_writer=True).begin() as connection:
        if engine.dialect.name == "postgresql":
            connection.execute(text("SELECT pg_advisory_xact_lock(:lock)"), {"lock": _LOCK})
        if _revision(connection) != HEAD:
            _run(connection)


def _revision(connection: Connection) -> str | None:
    if not inspect(connection).has_table("alembic_version"):
        return None
    return connection.execute(text("SELECT version_num FROM alembic_version")).scalar()


def _run(connection: Connection) -> None:
    # Imported here: an up-to-date catalog does without alembic's imports.
    from alembic import command
    from alembic.config import Config
    from alembic.util import CommandError

    config = Config()
    config.set_main_option("script_location", str(_SCRIPTS).replace("%", "%%"))
    config.attributes["connection"] = connection
    try:
        command.upgrade(config, "head")
    except CommandError as error:
        raise ConfigurationError(
            "the catalog was written by a newer version of memos_vllm; upgrade the package, or "
            f"use another data folder ({error})"
        ) from error
