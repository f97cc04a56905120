"""The databases that the catalog runs on, for tests: SQLite, and a private PostgreSQL."""

from __future__ import annotations

import os
import shutil
import signal
import sqlite3
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import Any, Protocol

from memos_vllm.control.catalog import Catalog
from memos_vllm.control.tables import Base

# Newest first; Debian keeps a server's programs out of the PATH.
_DEBIAN = sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)
_SHARED_MEMORY = Path("/dev/shm")
_START_SECONDS = 30.0
# PostgreSQL refuses to run as root: Debian's package makes this user.
_SERVER_USER = "postgres"

Rows = list[tuple[Any, ...]]


class Database(Protocol):
    """Where a test's catalog lies."""

    name: str

    def create(self, folder: Path) -> str:
        """The URL of the migrated catalog that belongs to `folder`; empty the first time."""

    def new(self, folder: Path) -> str:
        """The URL of a database that nobody has opened yet."""

    def sql(self, url: str, *statements: str) -> Rows:
        """Run SQL behind the catalog's back; the rows of the last statement."""

    def contents(self, url: str) -> bytes:
        """All that is stored: SQLite's files as they are, of others what any query could find."""

    def remove(self, url: str) -> None:
        """Nobody needs this catalog any more."""


class Sqlite:
    """A file in the test's folder, which is removed with it."""

    name = "sqlite"

    def create(self, folder: Path) -> str:
        """See Database."""
        path = folder / "catalog" / "catalog.sqlite"
        if not path.exists():
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            path.touch(mode=0o600)
            path.write_bytes(_migrated())
        return f"sqlite:///{path}"

    def new(self, folder: Path) -> str:
        """See Database."""
        return f"sqlite:///{folder / 'new' / 'catalog.sqlite'}"

    def sql(self, url: str, *statements: str) -> Rows:
        """See Database."""
        with closing(sqlite3.connect(url.removeprefix("sqlite:///"))) as connection, connection:
            rows: Rows = []
            for statement in statements:
                rows = connection.execute(statement).fetchall()
            return rows

    def contents(self, url: str) -> bytes:
        """See Database."""
        folder = Path(url.removeprefix("sqlite:///")).parent
        return b"".join(path.read_bytes() for path in sorted(folder.iterdir()))

    def remove(self, url: str) -> None:
        """See Database."""


@cache
def _migrated() -> bytes:
    """An empty catalog; migrating one takes longer than most tests."""
    with tempfile.TemporaryDirectory(prefix="memos-empty-") as folder:
        path = Path(folder) / "catalog.sqlite"
        Catalog.open(f"sqlite:///{path}").close()
        return path.read_bytes()


SQLITE = Sqlite()


class Postgres:
    """A PostgreSQL server of this process's own, reached by a socket in a folder of its own.

    It fsyncs as any server does. Every catalog is a copy of one migrated database.
    """

    name = "postgresql"

    def __init__(self, programs: Path) -> None:
        self._programs = programs
        self._in_use: dict[Path, str] = {}
        where = _SHARED_MEMORY if _SHARED_MEMORY.is_dir() else None
        # Short, since it holds a socket.
        self.folder = Path(tempfile.mkdtemp(prefix="memos-pg-", dir=where))
        if os.geteuid() == 0:
            shutil.chown(self.folder, _SERVER_USER)
        self._server: subprocess.Popen[bytes] | None = None

    def initialize(self) -> None:
        """Make an empty server."""
        self._run(
            "initdb", "--username=memos", "--auth=trust", "--encoding=UTF8", "--locale=C.UTF-8",
            "--no-instructions", "-D", str(self.folder / "data"),
        )  # fmt: skip

    def start(self) -> None:
        """Start the server, and wait until it answers."""
        with (self.folder / "log").open("ab") as log:
            self._server = subprocess.Popen(
                [
                    *self._command("postgres"), "-D", str(self.folder / "data"),
                    "-k", str(self.folder), "-c", "listen_addresses=", "-c", "max_connections=200",
                    "-c", "shared_buffers=32MB", "-c", "autovacuum=off",
                ],
                stdout=log,
                stderr=log,
            )  # fmt: skip
        deadline = time.monotonic() + _START_SECONDS
        import psycopg

        while True:
            try:
                psycopg.connect(self._address("postgres")).close()
                return
            except psycopg.OperationalError:
                assert self._server.poll() is None, (self.folder / "log").read_text()
                assert time.monotonic() < deadline, (self.folder / "log").read_text()
                time.sleep(0.02)

    def stop(self, *, crash: bool = False) -> None:
        """Close every connection and end the server, in order or so that it has to recover."""
        if self._server is not None:
            self._server.send_signal(signal.SIGQUIT if crash else signal.SIGINT)
            self._server.wait(timeout=_START_SECONDS)
            self._server = None

    def create(self, folder: Path) -> str:
        """See Database."""
        return self._copy(folder, self._template())

    def new(self, folder: Path, how: str = "") -> str:
        """See Database.

        Args:
            how: more of the statement that makes it, such as another locale.
        """
        return self._copy(folder / "new", f"template0 {how}")

    def _copy(self, folder: Path, template: str) -> str:
        if folder not in self._in_use:
            name = f"t{sha256(os.fsencode(folder)).hexdigest()[:16]}"
            self._maintain(f"CREATE DATABASE {name} TEMPLATE {template}")
            self._in_use[folder] = name
        return self.url(self._in_use[folder])

    def sql(self, url: str, *statements: str) -> Rows:
        """See Database."""
        import psycopg

        with psycopg.connect(url) as connection:
            rows: Rows = []
            for statement in statements:
                cursor = connection.execute(statement.encode())
                rows = cursor.fetchall() if cursor.description else []
            return rows

    def contents(self, url: str) -> bytes:
        """See Database."""
        import psycopg

        with psycopg.connect(url) as connection, connection.cursor() as cursor:
            found = b""
            for table in Base.metadata.tables:
                with cursor.copy(f"COPY {table} TO STDOUT (FORMAT binary)".encode()) as rows:
                    found += b"".join(rows)
            return found

    def remove(self, url: str) -> None:
        """See Database."""
        folder = next((one for one, name in self._in_use.items() if self.url(name) == url), None)
        if folder is not None:
            self._maintain(f"DROP DATABASE {self._in_use.pop(folder)} WITH (FORCE)")

    def url(self, name: str) -> str:
        """The address of a database, as users write it."""
        return f"postgresql://memos@/{name}?host={self.folder}"

    def close(self) -> None:
        """Leave nothing behind."""
        self.stop()
        shutil.rmtree(self.folder)

    @cache  # noqa: B019  (one server lives as long as the tests do)
    def _template(self) -> str:
        url = self.new(self.folder)
        Catalog.open(url).close()
        return url.partition("@/")[2].partition("?")[0]

    def _maintain(self, statement: str) -> None:
        import psycopg

        with psycopg.connect(self._address("postgres"), autocommit=True) as connection:
            connection.execute(statement.encode())

    def _address(self, name: str) -> str:
        return f"host={self.folder} user=memos dbname={name}"

    def _run(self, program: str, *arguments: str) -> None:
        subprocess.run(
            [*self._command(program), *arguments], check=True, capture_output=True, cwd="/"
        )

    def _command(self, program: str) -> list[str]:
        """The program, ended with this process, and as nobody's root."""
        command = ["setpriv", "--pdeathsig", "INT"]
        if os.geteuid() == 0:
            command += ["--reuid", _SERVER_USER, "--regid", _SERVER_USER, "--clear-groups"]
        return [*command, str(self._programs / program)]


def why_no_postgres() -> str | None:
    """Why no PostgreSQL can be started here, None when one can."""
    if _programs() is None:
        return "PostgreSQL's server is not installed (Debian: apt-get install postgresql)"
    if shutil.which("setpriv") is None:
        return "setpriv is not installed, by which PostgreSQL is ended with the tests"
    if os.geteuid() == 0:
        import pwd

        try:
            pwd.getpwnam(_SERVER_USER)
        except KeyError:
            return f"PostgreSQL refuses to run as root, and there is no user {_SERVER_USER}"
    return None


def _programs() -> Path | None:
    found = shutil.which("initdb")
    if found is not None and (Path(found).parent / "postgres").exists():
        return Path(found).resolve().parent
    return next((folder for folder in _DEBIAN if (folder / "initdb").exists()), None)


@contextmanager
def running_postgres() -> Iterator[Postgres]:
    """A server for as long as the block runs."""
    programs = _programs()
    assert programs is not None
    postgres = Postgres(programs)
    try:
        postgres.initialize()
        postgres.start()
        yield postgres
    finally:
        postgres.close()
