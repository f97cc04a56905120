"""The catalog: one SQL database, opened so that what it acknowledged is on the disk."""

from __future__ import annotations

import logging
import os
import sqlite3
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cached_property
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, Dialect, Engine, create_engine, event, func, select
from sqlalchemy.engine import URL, ExceptionContext, make_url
from sqlalchemy.exc import ArgumentError, DataError, DBAPIError, IntegrityError, ProgrammingError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.orm import Session

from memos_vllm.control.tables import AuditHeadRow, IdentityRow
from memos_vllm.errors import ConfigurationError, Unavailable

logger = logging.getLogger(__name__)

BUSY_TIMEOUT_SECONDS = 10.0
# A writer that says nothing for so long has died with its machine, or was cut off from us.
_SILENT_WRITER_SECONDS = 15.0
# Of libpq: in seconds, but for the last one.
_KEEPALIVES = {
    "keepalives_idle": 10,
    "keepalives_interval": 5,
    "keepalives_count": 3,
    "tcp_user_timeout": 20_000,
}
_WRITER = "memos_writer"


class Catalog:
    """A migrated database, with one writer at a time and any number of readers.

    SQLite runs in WAL mode with synchronous=FULL: a commit returns after the log was fsynced.
    Writers take the write lock when they begin, so a transaction never fails halfway for
    another's sake. Thread-safe; a forked child opens its own.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._sqlite = engine.dialect.name == "sqlite"
        self._turn: AbstractContextManager[Any]
        if self._sqlite:
            self._reader = engine
            # SQLite's own lock polls; waiting here first lets threads of a process take turns.
            self._turn = threading.Lock()
        else:
            # Said for each, since a server may have another default.
            self._reader = engine.execution_options(
                isolation_level="REPEATABLE READ", postgresql_readonly=True
            )
            engine = engine.execution_options(isolation_level="READ COMMITTED")
            self._turn = nullcontext()
        self._writer = engine.execution_options(**{_WRITER: True})
        self._joined = threading.local()

    @classmethod
    def open(cls, url: str, *, busy_timeout_seconds: float = BUSY_TIMEOUT_SECONDS) -> Catalog:
        """Open the database at a SQLAlchemy URL, create it if need be, and migrate it.

        Args:
            busy_timeout_seconds: how long a writer waits for another process's.
        Raises:
            ConfigurationError: no such driver or folder, or the catalog is newer than this code.
            Unavailable: the database does not answer.
        """
        from memos_vllm.control.migrate import upgrade_catalog

        engine = create_catalog_engine(url, busy_timeout_seconds=busy_timeout_seconds)
        try:
            with _as_unavailable():
                upgrade_catalog(engine)
        except BaseException:
            engine.dispose()
            raise
        return cls(engine)

    @property
    def engine(self) -> Engine:
        """The engine underneath, for migrations and inspection."""
        return self._engine

    @cached_property
    def secret(self) -> bytes:
        """What only this catalog knows; kept once it was read."""
        with self.read() as session:
            return str(session.scalars(select(IdentityRow.secret)).one()).encode()

    @contextmanager
    def read(self) -> Iterator[Session]:
        """A session that sees one state of the catalog.

        Raises:
            Unavailable: the database does not answer.
        """
        if (joined := self._joined_session() or self._snapshot_session()) is not None:
            yield joined
            return
        with _as_unavailable(), Session(self._reader, expire_on_commit=False) as session:
            yield session

    @contextmanager
    def snapshot(self) -> Iterator[None]:
        """Every `read` of this thread within the block sees the same state of the catalog.

        Raises:
            Unavailable: the database does not answer.
        """
        if self._joined_session() is not None or self._snapshot_session() is not None:
            yield
            return
        with self.read() as session:
            self._joined.snapshot = session
            try:
                yield
            finally:
                self._joined.snapshot = None

    @contextmanager
    def write(self) -> Iterator[Session]:
        """A session that is committed when the block ends, and rolled back when it raises.

        Raises:
            Unavailable: the write lock or the disk was not to be had; nothing was changed.
        """
        if (joined := self._joined_session()) is not None:
            yield joined
            # What the next part of the transaction reads must be there.
            joined.flush()
            return
        with (
            _as_unavailable(),
            self._turn,
            Session(self._writer, expire_on_commit=False) as session,
            session.begin(),
        ):
            if not self._sqlite:
                # The row that every change must move makes writers queue, as SQLite's lock does.
                # The server takes it back from one that is stopped while it holds it.
                seconds = func.set_config(
                    "idle_in_transaction_session_timeout", f"{_SILENT_WRITER_SECONDS}s", True
                )
                session.execute(select(AuditHeadRow, seconds).with_for_update(of=AuditHeadRow))
            yield session

    @contextmanager
    def together(self) -> Iterator[Session]:
        """As `write`, and every `read` and `write` of this thread within the block joins it.

        So what they do is committed together, or not at all.
        """
        if (joined := self._joined_session()) is not None:
            yield joined
            return
        with self.write() as session:
            self._joined.session = session
            self._joined.scrub = False
            try:
                yield session
            finally:
                self._joined.session = None
        if self._joined.scrub:
            self.scrub()

    def _joined_session(self) -> Session | None:
        session: Session | None = getattr(self._joined, "session", None)
        return session

    def _snapshot_session(self) -> Session | None:
        session: Session | None = getattr(self._joined, "snapshot", None)
        return session

    def scrub(self) -> bool:
        """Empty SQLite's write-ahead log, where removed pages would otherwise live on.

        Within `together` that is done once its transaction is committed.

        Returns:
            False when a reader held on to the log beyond the busy timeout. True on other
            databases, whose vacuum is their operator's.
        """
        if not self._sqlite:
            return True
        if self._joined_session() is not None:
            self._joined.scrub = True
            return True
        with _as_unavailable(), self._turn:
            # A checkpoint cannot run inside a transaction, so it goes past SQLAlchemy's.
            connection = self._engine.raw_connection()
            try:
                cursor = connection.cursor()
                cursor.execute("PRAGMA wal_checkpoint(TRUNCATE)")
                ((busy, _in_log, _moved),) = cursor.fetchall()
            finally:
                connection.close()
        if busy:
            logger.warning("the catalog's log is in use by a reader and was not emptied yet")
        return not busy

    def rewrite(self, tables: Sequence[str]) -> bool:
        """Leave nothing in the database's files of rows that are gone.

        SQLite overwrites what is deleted, but where it has moved a row from one page to another a
        copy may be left behind in the first: VACUUM writes all pages anew. Writers wait meanwhile.
        On PostgreSQL these tables are vacuumed, so that no page counts dead rows as rows.

        Returns:
            False when a reader held on to SQLite's log, which then holds more than it should.
        Raises:
            Unavailable: the write lock or the disk was not to be had.
        """
        if not self._sqlite:
            with (
                _as_unavailable(),
                self._engine.execution_options(isolation_level="AUTOCOMMIT").connect() as link,
            ):
                for table in tables:
                    link.exec_driver_sql(f"VACUUM {table}")
            return True
        with self._turn:
            # It cannot run inside a transaction, so it goes past SQLAlchemy's.
            connection = self._engine.raw_connection()
            try:
                _vacuum(connection.cursor())
            except sqlite3.Error as error:
                raise Unavailable(f"the catalog was not rewritten ({error}); try again") from error
            finally:
                connection.close()
        return self.scrub()

    def close(self) -> None:
        """Close every idle connection; the last one out folds SQLite's log into the file."""
        self._engine.dispose()


def create_catalog_engine(
    url: str, *, busy_timeout_seconds: float = BUSY_TIMEOUT_SECONDS
) -> Engine:
    """An engine with this catalog's durability settings; creates SQLite's file and its folder.

    Raises:
        ConfigurationError: the URL, its driver or its folder cannot be used.
    """
    try:
        parsed = make_url(url)
        if parsed.drivername in {"postgresql", "postgres"}:
            parsed = parsed.set(drivername="postgresql+psycopg")
        sqlite = parsed.get_backend_name() == "sqlite"
        if sqlite:
            _prepare_file(parsed)
        # Parameters are memories: they stay out of messages and logs.
        engine = create_engine(
            parsed,
            hide_parameters=True,
            pool_size=16,
            max_overflow=48,
            # The connection that was used last has its pages at hand.
            pool_use_lifo=True,
            pool_pre_ping=not sqlite,
        )
    except ModuleNotFoundError as error:
        raise ConfigurationError(
            f"the catalog's driver {error.name} is not installed; PostgreSQL's comes with "
            "pip install 'memos-vllm[postgres]'"
        ) from error
    except (ArgumentError, ImportError, ValueError) as error:
        raise ConfigurationError(
            f"the catalog URL cannot be used ({type(error).__name__}); give something like "
            "sqlite:////var/lib/memos/catalog.sqlite or postgresql://user@host/database, and "
            "install the driver that it names"
        ) from error
    if sqlite:
        _listen(engine, busy_timeout_seconds=busy_timeout_seconds)
    elif engine.dialect.name == "postgresql":
        _adapt_postgresql(engine, busy_timeout_seconds=busy_timeout_seconds)
    return engine


def sqlite_file(url: str) -> Path | None:
    """Where an SQLite catalog lies; None for any other, and for a URL that names nothing."""
    try:
        parsed = make_url(url)
    except ArgumentError:
        return None
    sqlite = parsed.get_backend_name() == "sqlite"
    return Path(parsed.database) if sqlite and parsed.database else None


def _adapt_postgresql(engine: Engine, *, busy_timeout_seconds: float) -> None:
    """Have PostgreSQL give up where SQLite would, and say as little of what it was given."""

    @event.listens_for(engine, "do_connect")
    def _on_connecting(
        _dialect: Dialect, _record: object, _arguments: list[Any], options: dict[str, Any]
    ) -> None:
        # libpq waits for at least two seconds; what the URL says wins.
        options.setdefault("connect_timeout", max(2, int(busy_timeout_seconds)))
        # A server whose machine is gone says nothing: without these one waits for a quarter hour.
        for name, value in _KEEPALIVES.items():
            options.setdefault(name, value)

    @event.listens_for(engine, "connect")
    def _on_connect(connection: Any, _record: object) -> None:
        with connection.cursor() as cursor:
            cursor.execute(f"SET lock_timeout = {int(busy_timeout_seconds * 1000)}")
        connection.commit()

    @event.listens_for(engine, "handle_error")
    def _on_error(context: ExceptionContext) -> None:
        # The details of a message quote the row: "Failing row contains (...)".
        primary = getattr(
            getattr(context.original_exception, "diag", None), "message_primary", None
        )
        if primary is not None and context.sqlalchemy_exception is not None:
            context.original_exception.args = (primary,)
            name = type(context.original_exception).__name__
            context.sqlalchemy_exception.args = (f"({name}) {primary}",)


def _listen(engine: Engine, *, busy_timeout_seconds: float) -> None:
    @event.listens_for(engine, "connect")
    def _on_connect(connection: sqlite3.Connection, _record: object) -> None:
        _configure_sqlite(connection, busy_timeout_seconds=busy_timeout_seconds)

    @event.listens_for(engine, "begin")
    def _on_begin(connection: Connection) -> None:
        writer = connection.get_execution_options().get(_WRITER, False)
        connection.exec_driver_sql("BEGIN IMMEDIATE" if writer else "BEGIN")


def _prepare_file(url: URL) -> None:
    """Create SQLite's file for its owner's eyes only; the log beside it inherits the mode."""
    if not url.database or url.database == ":memory:":
        raise ConfigurationError(
            "the catalog needs a file: an SQLite database in memory is lost with its process"
        )
    path = Path(url.database)
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))
    except OSError as error:
        raise ConfigurationError(
            f"the catalog file {path} cannot be opened for writing: {error.strerror}"
        ) from error


def _configure_sqlite(connection: sqlite3.Connection, *, busy_timeout_seconds: float) -> None:
    # Transactions begin where we say so, not where the driver guesses.
    connection.isolation_level = None
    connection.execute(f"PRAGMA busy_timeout={int(busy_timeout_seconds * 1000)}")
    _use_write_ahead_log(connection, deadline=time.monotonic() + busy_timeout_seconds)
    for setting in (
        "synchronous=FULL",
        "foreign_keys=ON",
        # What is erased is overwritten, not only unlinked.
        "secure_delete=ON",
        "trusted_schema=OFF",
        "temp_store=MEMORY",
        # KiB. The searches of 10,000 memories read 8 MB of it again and again.
        "cache_size=-16384",
    ):
        connection.execute(f"PRAGMA {setting}")
    # SQLite folds the case of ASCII only.
    connection.create_function("lower", 1, _lower, deterministic=True)


def _vacuum(cursor: Any) -> None:
    # What is large must not be held in memory, nor lie on another disk than the catalog does. The
    # file has no name, and is gone with the statement.
    ((_, _, path),) = [row for row in cursor.execute("PRAGMA database_list") if row[1] == "main"]
    folder = str(Path(path).parent).replace("'", "''")
    cursor.execute(f"PRAGMA temp_store_directory='{folder}'")
    cursor.execute("PRAGMA temp_store=FILE")
    try:
        cursor.execute("VACUUM")
    finally:
        cursor.execute("PRAGMA temp_store=MEMORY")


def _lower(value: str | None) -> str | None:
    return None if value is None else str(value).lower()


def _use_write_ahead_log(connection: sqlite3.Connection, *, deadline: float) -> None:
    # Two processes that turn the log on at once can be told "locked" without any waiting.
    while True:
        try:
            mode = connection.execute("PRAGMA journal_mode=WAL").fetchone()[0]
        except sqlite3.OperationalError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.01)
            continue
        if mode != "wal":
            raise ConfigurationError(
                f"SQLite cannot keep a write-ahead log here (it offers '{mode}'); put the data "
                "folder on a local disk"
            )
        return


@contextmanager
def _as_unavailable() -> Iterator[None]:
    """Turn a failing database into `Unavailable`; bugs of ours and broken constraints pass."""
    try:
        yield
    except (IntegrityError, ProgrammingError, DataError):
        raise
    except (DBAPIError, PoolTimeout) as error:
        cause = getattr(error, "orig", None) or error
        logger.error("the catalog failed: %s", type(cause).__name__, exc_info=error)
        raise Unavailable(f"the catalog does not answer ({_reason(cause)}); try again") from error


def _reason(cause: BaseException) -> str:
    # SQLite's messages name tables and states; other databases' may quote a row or a host.
    return str(cause) if isinstance(cause, sqlite3.Error) else type(cause).__name__
