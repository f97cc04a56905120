"""What the process that parses may not do; set from inside, before it sees a byte of the file.

The kernel bounds time, memory and what may be written, and so binds C code too. An audit hook
refuses the rest in Python: sockets, programs, and every file but Python's own modules, which
libraries load when they first need them. This is a fence around careless parsers and not a jail:
code of an attacker that runs in the process still acts as this user.
"""

from __future__ import annotations

import functools
import math
import os
import resource
import signal
import sys

_REFUSED_EVENTS = (
    "socket.",
    "subprocess.",
    "os.system",
    "os.exec",
    "os.fork",
    "os.posix_spawn",
    "os.spawn",
    "os.startfile",
    "os.remove",
    "os.rename",
    "os.rmdir",
    "os.mkdir",
    "os.chmod",
    "os.chown",
    "os.kill",
    "os.link",
    "os.symlink",
    "os.truncate",
    "shutil.",
    "pty.",
    "ctypes.",
    "urllib.",
    "http.",
    "ftplib.",
    "smtplib.",
    "webbrowser.",
)
# The parent's clock ends the process first; this one is for when the parent is gone.
_GRACE_SECONDS = 5
_MOST_FILES = 16
_MODULES = (".py", ".pyc", ".so")
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


def limit_resources(*, timeout_seconds: float, memory_bytes: int) -> None:
    """Bound time and memory, and forbid writing files and dumping core.

    Mutates this process for good. Limits that are already lower stay as they are.
    """
    seconds = math.ceil(timeout_seconds)
    _lower(resource.RLIMIT_CORE, 0)
    _lower(resource.RLIMIT_FSIZE, 0)
    # At the lower of the two the kernel says why; at the higher it kills.
    _lower(resource.RLIMIT_CPU, seconds, hard=seconds + 1)
    _lower(resource.RLIMIT_AS, memory_bytes)
    signal.alarm(seconds + _GRACE_SECONDS)


def close_doors() -> None:
    """From here on nothing is connected to or started, and only modules are opened, to be read.

    Mutates this process for good.
    """
    _lower(resource.RLIMIT_NOFILE, _MOST_FILES)
    _lower(resource.RLIMIT_NPROC, 0)
    folders = {os.path.realpath(folder) for folder in (*sys.path, sys.prefix, sys.base_prefix)}
    allowed = tuple(f"{folder}/" for folder in folders if folder != "/")
    sys.addaudithook(functools.partial(_refuse, allowed))


def _refuse(folders: tuple[str, ...], event: str, arguments: tuple[object, ...]) -> None:
    if event == "open":
        path, _, flags = arguments
        if not isinstance(path, str) or not isinstance(flags, int) or flags & _WRITES:
            raise PermissionError("a parser may not open this")
        # Data of the server may lie in a folder of modules; modules have suffixes of their own.
        if not path.endswith(_MODULES) or not os.path.realpath(path).startswith(folders):
            raise PermissionError("a parser may open nothing but modules")
    elif event.startswith(_REFUSED_EVENTS):
        raise PermissionError(f"a parser may not do this: {event}")


def _lower(kind: int, value: int, *, hard: int | None = None) -> None:
    _, most = resource.getrlimit(kind)
    if most == resource.RLIM_INFINITY:
        most = max(value, hard or 0)
    resource.setrlimit(kind, (min(value, most), min(hard or value, most)))
