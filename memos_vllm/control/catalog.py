"""The catalog: one SQL database, opened so that what it acknowledged is on the disk."""

from __future__ import annotations

import logging
import os
import sqlite3
import threading
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, Engine, create_engine, event, select
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError, DataError, DBAPIError, IntegrityError, ProgrammingError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.orm import Session

from memos_vllm.control.tables import AuditHeadRow
from memos_vllm.errors import ConfigurationError, Unavailable

logger = logging.getLogger(__name__)

BUSY_TIMEOUT_SECONDS = 10.0
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
            self._reader = engine.execution_options(isolation_level="REPEATABLE READ")
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
                session.execute(select(AuditHeadRow).with_for_update())
            yield session

    @contextmanager
    def together(self) -> Iterator[Session]:
        """As `write`, and every `read` and `write` of this thread within the block joins it.

        So what they do is committed together, or not at all.
        """
        with self.write() as session:
            self._joined.session = session
            try:
                yield session
            finally:
                self._joined.session = None

    def _joined_session(self) -> Session | None:
        session: Session | None = getattr(self._joined, "session", None)
        return session

    def _snapshot_session(self) -> Session | None:
        session: Session | None = getattr(self._joined, "snapshot", None)
        return session

    def scrub(self) -> bool:
        """Empty SQLite's write-ahead log, where removed pages would otherwise live on.

        Returns:
            False when a reader held on to the log beyond the busy timeout. True on other
            databases, whose vacuum is their operator's.
        """
        if not self._sqlite:
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
    except (ArgumentError, ImportError) as error:
        raise ConfigurationError(
            f"the catalog URL cannot be used ({type(error).__name__}); give something like "
            "sqlite:////var/lib/memos/catalog.sqlite, and install the driver that it names"
        ) from error
    if sqlite:
        _listen(engine, busy_timeout_seconds=busy_timeout_seconds)
    return engine


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
    # SQLite's messages name tables and states; other databases' may quote a row.
    return str(cause) if isinstance(cause, sqlite3.Error) else type(cause).__name__
