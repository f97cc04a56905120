"""What `memos-vllm serve` sets before vLLM takes over."""

from __future__ import annotations

import os
import re
from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace

import pytest
from pydantic import ValidationError

from memos_vllm.activation.store import ArtifactStore
from memos_vllm.activation.store.claim import claim_folder
from memos_vllm.config import ServerSettings
from memos_vllm.engine.serve import (
    _transfer_config,
    compute_on_as_many_cores_as_plain_vllm,
    own_parser,
)
from memos_vllm.errors import ConfigurationError

RESERVED = "VLLM_CPU_NUM_OF_RESERVED_CPU"


@pytest.mark.parametrize(
    ("cores", "workers", "given", "expected"),
    [
        (8, 1, None, "1"),
        (3, 1, None, "1"),
        # vLLM then uses both cores; reserving one would halve the model's.
        (2, 1, None, None),
        (8, 2, None, "2"),
        (4, 2, None, None),
        (8, 1, "3", "3"),
    ],
)
def test_the_model_gets_the_core_that_vllm_reserves_for_connectors(
    monkeypatch: pytest.MonkeyPatch,
    cores: int,
    workers: int,
    given: str | None,
    expected: str | None,
) -> None:
    # Set first, so that it is taken back whatever the call does.
    monkeypatch.setenv(RESERVED, given or "")
    if given is None:
        monkeypatch.delenv(RESERVED)
    # Two logical CPUs on each core, of which vLLM uses one.
    listed = [SimpleNamespace(id=cpu, physical_core=cpu // 2) for cpu in range(2 * cores)]
    monkeypatch.setattr("vllm.utils.cpu_resource_utils.get_allowed_cpu_list", lambda: listed)

    compute_on_as_many_cores_as_plain_vllm(
        Namespace(tensor_parallel_size=workers, pipeline_parallel_size=1)
    )

    assert os.environ.get(RESERVED) == expected


def test_the_catalogs_password_is_not_in_the_config_that_vllm_logs() -> None:
    settings = ServerSettings(catalog_url="postgresql://memos:xyzzy@db/memos")
    config = _transfer_config(None, settings, explicit_policy=False)
    assert "xyzzy" not in f"{config} {settings!r} {settings.model_dump()}"


@pytest.mark.parametrize(
    ("given", "folder"),
    [
        (None, "/data/artifacts"),
        ("/mnt/kv", "/mnt/kv"),
        ("file:///mnt/k%20v", "/mnt/k v"),
        ("file://localhost/mnt/kv", "/mnt/kv"),
    ],
)
def test_artifacts_lie_where_the_url_says(given: str | None, folder: str) -> None:
    settings = ServerSettings(data_dir=Path("/data"), artifact_url=given)
    assert settings.artifacts_dir == Path(folder)


@pytest.mark.parametrize("given", ["s3://bucket/kv", "file://elsewhere/kv"])
def test_artifacts_that_cannot_be_mapped_are_refused(given: str) -> None:
    with pytest.raises(ValidationError, match="give file:///"):
        ServerSettings(artifact_url=given)


def test_an_artifact_folder_is_shared_by_servers_with_the_same_keys_only(tmp_path: Path) -> None:
    folder = tmp_path / "shared" / "kv"
    claim_folder(folder, mac_key=bytes(32))
    claim_folder(folder, mac_key=bytes(32))
    with pytest.raises(ConfigurationError, match="a server with other keys"):
        claim_folder(folder, mac_key=bytes([1]) * 32)
    # The mark is none of the store's own business.
    store = ArtifactStore(folder, mac_key=bytes(32))
    assert (store.scan().num_artifacts, store.scan().quarantined) == (0, ())
    store.close()


def test_an_artifact_folder_that_is_none_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigurationError, match="cannot be used"):
        claim_folder(tmp_path / "file", mac_key=bytes(32))


def test_the_page_about_clusters_names_options_that_there_are() -> None:
    page = Path(__file__).parents[2] / "deploy" / "cluster.md"
    command = re.search(r"memos-vllm serve (?:.*\\\n)*.*", page.read_text(encoding="utf-8"))
    assert command is not None
    named = set(re.findall(r"--[a-z-]+", command[0]))
    assert {"--ray-address", "--ray-resource", "--qdrant-url"} <= named
    assert named <= {option for action in own_parser()._actions for option in action.option_strings}
