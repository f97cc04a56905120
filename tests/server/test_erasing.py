"""An erasure on a real server: its job proves each removal, and the disk bears it out."""

from __future__ import annotations

import sqlite3
import sys
import time
import uuid
from contextlib import closing
from pathlib import Path
from typing import Any

import httpx
import pytest
from cube_kit import ask, fresh_id, make_cube, metric, move, note

from memos_vllm.domain.erasure import Removed
from memos_vllm.engine.run_folder import log_folders
from memos_vllm.process import ServerProcess

sys.path.append(str(Path(__file__).parent.parent / "unit"))
from disk_search import left_in, text_forms, token_forms

JOB_SECONDS = 120.0


@pytest.fixture
def data_dir(server: ServerProcess) -> Path:
    """The data folder of the shared server."""
    command = server._command
    return Path(command[command.index("--data-dir") + 1])


def job_ended(http: httpx.Client, job_id: str) -> dict[str, Any]:
    deadline = time.monotonic() + JOB_SECONDS
    while True:
        job: dict[str, Any] = http.get(f"/v1/jobs/{job_id}").json()
        if job["state"] in {"succeeded", "failed", "cancelled"}:
            return job
        assert time.monotonic() < deadline, job
        time.sleep(0.1)


def stored_vector(data_dir: Path, memory_id: str) -> bytes:
    """What the catalog keeps of a memory's vector: 16-bit floats."""
    wanted = "SELECT vector FROM memory_vectors JOIN memories ON seq = memory_seq WHERE id = ?"
    with closing(sqlite3.connect(data_dir / "catalog.sqlite")) as catalog:
        ((vector,),) = catalog.execute(wanted, (memory_id,)).fetchall()
    found: bytes = vector
    return found


def test_an_erase_job_proves_that_nothing_of_a_baked_memory_is_left(
    server: ServerProcess, http: httpx.Client, data_dir: Path
) -> None:
    words = f"vermilion {uuid.uuid4().hex}"
    texts = [note(f"the colour {words} here"), note(fresh_id("kept"))]
    cube_id, (secret, _) = make_cube(http, "proved", texts=texts)
    prompt = ask(http, cube_id, return_token_ids=True)["prompt_token_ids"]
    assert http.post(f"/v1/memcubes/{cube_id}/search", json={"query": words}).json()["data"]
    # Its ends may be one token with what stands around it.
    tokenized = http.post("/tokenize", json={"model": "smol", "prompt": words}).json()
    tokens = tokenized["tokens"][2:-2]
    assert any(prompt[n : n + len(tokens)] == tokens for n in range(len(prompt)))
    vector = stored_vector(data_dir, secret)
    wanted = {
        "text": text_forms(words),
        "tokens": token_forms(tokens),
        "vector": [vector[start : start + 64] for start in range(0, len(vector), 64)],
    }
    # The catalog has text and vector; a stored prefix has its token ids.
    assert left_in(data_dir, wanted).keys() == wanted.keys()

    path = f"/v1/memcubes/{cube_id}/memories/{secret}"
    erased = http.delete(path, params={"erase": "true"}).json()
    job = job_ended(http, erased["job_id"])

    assert (job["kind"], job["state"], job["error"]) == ("erase", "succeeded", None)
    proofs = {proof["what"]: proof for proof in job["proofs"]}
    assert proofs.keys() == set(Removed)
    assert (proofs[Removed.TEXT]["count"], proofs[Removed.POINTS]["count"]) == (1, 1)
    assert proofs[Removed.ARTIFACTS]["count"] == erased["artifacts_removed"] >= 1
    assert "none of their blocks" in proofs[Removed.BLOCKS]["checked"]
    # Nothing of it was ever in a log.
    assert proofs[Removed.LOGS]["count"] == 0
    assert words not in str(job)
    folders = [data_dir, *log_folders(data_dir / "run"), server.log_path.parent]
    assert [left_in(folder, wanted) for folder in folders] == [{}] * len(folders)


def test_the_pool_keeps_no_block_of_an_erased_cube_once_its_job_is_done(
    http: httpx.Client,
) -> None:
    cube_id, ids = make_cube(http, "pool")
    ask(http, cube_id)
    kept = metric(http, "memos_resident_blocks")
    move(http, cube_id, "demote", **{"from": "activation", "memory_ids": "all", "wait": True})
    path = f"/v1/memcubes/{cube_id}/memories/{ids[0]}"
    erased = http.delete(path, params={"erase": "true"}).json()
    assert job_ended(http, erased["job_id"])["state"] == "succeeded"
    assert http.get(f"/v1/memcubes/{cube_id}").json()["activation"]["resident_tokens"] == 0
    assert metric(http, "memos_resident_blocks") < kept
