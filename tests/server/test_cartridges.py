"""Cubes that leave a server and come back with their activation memory."""

from __future__ import annotations

import io
import time
from typing import Any

import httpx
from cube_kit import activation, ask, cube_state, drop_prefix_cache, fresh_id, make_cube

from memos_vllm.cartridge.artifacts import CarriedArtifact, archived_artifacts, artifact_files
from memos_vllm.cartridge.layout import MANIFEST, Part
from memos_vllm.cartridge.reader import ArchiveReader
from memos_vllm.cartridge.writer import ArchiveFile, write_archive


def exported(http: httpx.Client, cube_id: str, **query: str) -> bytes:
    reply = http.get(f"/v1/memcubes/{cube_id}/export", params=query)
    assert reply.status_code == 200, reply.text
    return reply.content


def imported(http: httpx.Client, archive: bytes, **query: str) -> dict[str, Any]:
    reply = http.post("/v1/memcubes/import", content=archive, params=query)
    assert reply.status_code == 201, reply.text
    cube: dict[str, Any] = reply.json()
    return cube


def delete(http: httpx.Client, cube_id: str) -> None:
    assert http.delete(f"/v1/memcubes/{cube_id}").status_code == 200


def until_ready(http: httpx.Client, cube_id: str) -> None:
    deadline = time.monotonic() + 60
    while cube_state(http, cube_id)["activation"]["state"] != "ready":
        assert time.monotonic() < deadline, cube_state(http, cube_id)
        time.sleep(0.2)


def repacked(archive: bytes, change: dict[str, Any]) -> bytes:
    """The same archive with other facts about its artifacts, and checksums that are right."""
    reader = ArchiveReader(io.BytesIO(archive))
    facts = tuple(it.model_copy(update=change) for it in reader.manifest.artifacts)
    data = reader.manifest.model_copy(update={"artifacts": facts}).model_dump_json().encode()
    files = [ArchiveFile(MANIFEST, len(data), [data])]
    for file in reader.files():
        if file.name.endswith(".jsonl"):
            files.append(ArchiveFile(file.name, file.size_bytes, [file.read(file.size_bytes)]))
        if file.name == Part.AUDIT.file_name:
            break
    again = ArchiveReader(io.BytesIO(archive))
    artifacts = [
        CarriedArtifact(
            artifact.facts,
            artifact.description,
            [(size, io.BytesIO(content.read(size))) for size, content in artifact.shards],
        )
        for artifact in archived_artifacts(again)
    ]
    return b"".join(write_archive([*files, *artifact_files(artifacts)]))


def test_a_deleted_cube_comes_back_under_another_id_without_a_prefill(http: httpx.Client) -> None:
    other, _ = make_cube(http, "untouched")
    ask(http, other)
    before = cube_state(http, other)
    cube_id, _ = make_cube(http, "leaving")
    archive = exported(http, cube_id)
    delete(http, cube_id)
    drop_prefix_cache(http)
    cube = imported(http, archive, id=fresh_id("back"))
    assert (cube["warnings"], cube["activation"]["state"]) == ([], "ready")
    assert cube["ids_mapped"] == 3
    used = activation(ask(http, cube["id"]))
    assert used["source"] == "store"
    assert used["cached_tokens"] > 0
    jobs = http.get(f"/v1/memcubes/{cube['id']}/jobs").json()["data"]
    assert [(job["kind"], job["state"]) for job in jobs] == [("rebuild", "succeeded")]
    # Nothing of another cube moved.
    after = cube_state(http, other)
    assert {**after, "activation": before["activation"]} == before
    assert activation(ask(http, other))["source"] == "store"


def test_a_cube_comes_back_under_its_own_id_in_another_scope(http: httpx.Client) -> None:
    cube_id, ids = make_cube(http, "again")
    archive = exported(http, cube_id)
    delete(http, cube_id)
    cube = imported(http, archive)
    assert (cube["id"], cube["warnings"], cube["ids_mapped"]) == (cube_id, [], 0)
    assert activation(ask(http, cube_id))["source"] == "store"
    memories = http.get(f"/v1/memcubes/{cube_id}/memories").json()["data"]
    assert [memory["id"] for memory in memories] == ids


def test_a_clone_has_its_activation_memory_at_once(http: httpx.Client) -> None:
    cube_id, _ = make_cube(http, "cloned")
    reply = http.post(f"/v1/memcubes/{cube_id}/clone", json={"id": fresh_id("clone")})
    assert reply.status_code == 201, reply.text
    clone = reply.json()
    assert (clone["warnings"], clone["activation"]["state"]) == ([], "ready")
    assert activation(ask(http, clone["id"]))["source"] == "store"


def test_artifacts_that_do_not_fit_are_kept_out_and_computed_anew(http: httpx.Client) -> None:
    cube_id, _ = make_cube(http, "foreign")
    archive = exported(http, cube_id)
    foreign = repacked(archive, {"fingerprint": "0" * 64})
    cube = imported(http, foreign, id=fresh_id("foreign"))
    (warning,) = cube["warnings"]
    assert "of model 0000000000000000" in warning
    until_ready(http, cube["id"])
    cube = imported(http, archive, id=fresh_id("untrusted"), trust_artifacts="false")
    assert cube["warnings"] == ["the archive's artifacts were left out, as asked"]
    until_ready(http, cube["id"])
    cube = imported(http, exported(http, cube_id, include="plaintext"), id=fresh_id("plain"))
    assert cube["warnings"] == []
    until_ready(http, cube["id"])
