"""Artifacts that are bad, disks that are full, servers that are killed: the answer stays right.

One data folder lives through it all, in the order of this file. The server runs a tiny model,
which is baked in no time, in float32, in which greedy answers do not depend on where the KV came
from.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import httpx
import pytest
from cube_kit import (
    BLOCK_TOKENS,
    activation,
    ask,
    client_of,
    cube_state,
    drop_prefix_cache,
    fresh_id,
    make_cube,
    metric,
    move,
    note,
    notes_of,
    promote_all,
    text_of,
)
from models import tiny_model

from memos_vllm.activation.store.manifest import artifact_key, decode_manifest, encode_manifest
from memos_vllm.engine.secrets import load_keys
from memos_vllm.process import ServerProcess, family_of

LEASE_SECONDS = 30.0
SAVE_RETRY_SECONDS = 30.0
STOP_SECONDS = 20.0
ANSWER_TOKENS = 8


@dataclass
class BakedCube:
    """A promoted cube, its artifact's files, and what it answers while all is well."""

    id: str
    manifest: Path
    shard: Path
    answer: str
    whole_tokens: int

    @property
    def key(self) -> str:
        return self.manifest.stem


class Workshop:
    """The server and its data folder, across restarts."""

    def __init__(self, server: ServerProcess, data_dir: Path) -> None:
        self.server = server
        self.data_dir = data_dir
        # Cubes that tests leave to later ones, by purpose.
        self.cubes: dict[str, BakedCube] = {}
        self.job_under_way = ""
        self.failed_save_at = 0.0

    @property
    def artifacts(self) -> Path:
        return self.data_dir / "artifacts"

    def manifests(self) -> set[Path]:
        return set((self.artifacts / "manifests").glob("*.json"))

    def bake(self, http: httpx.Client, topic: str) -> BakedCube:
        before = self.manifests()
        cube_id, _ = make_cube(http, topic)
        (manifest,) = self.manifests() - before
        (shard,) = json.loads(manifest.read_bytes())["manifest"]["shards"]
        reply = ask(http, cube_id, max_tokens=ANSWER_TOKENS)
        whole = activation(reply)["tokens"] // BLOCK_TOKENS * BLOCK_TOKENS
        shard_path = self.artifacts / shard["file_name"]
        return BakedCube(cube_id, manifest, shard_path, text_of(reply), whole)

    def log_lines(self, *words: str) -> list[str]:
        lines = self.server.log_path.read_text(errors="replace").splitlines()
        return [line for line in lines if all(word in line for word in words)]


@pytest.fixture(scope="module")
def workshop(
    start_server: Callable[..., ServerProcess],
    model_folder: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Workshop]:
    data_dir = tmp_path_factory.mktemp("faults")
    model = tiny_model("llama", tmp_path_factory.mktemp("tiny"), tokenizer=model_folder)
    server = start_server(
        "--dtype",
        "float32",
        "--enable-prompt-tokens-details",
        data_dir=data_dir,
        environment={"VLLM_SERVER_DEV_MODE": "1"},
        model=model,
    )
    yield Workshop(server, data_dir)
    server.stop()


@pytest.fixture
def http(workshop: Workshop) -> Iterator[httpx.Client]:
    with client_of(workshop.server) as client:
        yield client


# --- ways to spoil an artifact -------------------------------------------------------------


def flip_a_byte_of_kv(cube: BakedCube, _: Workshop) -> None:
    with cube.shard.open("r+b") as file:
        file.seek(cube.shard.stat().st_size // 2)
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 1]))


def truncate_the_shard(cube: BakedCube, _: Workshop) -> None:
    os.truncate(cube.shard, cube.shard.stat().st_size // 2)


def delete_the_shard(cube: BakedCube, _: Workshop) -> None:
    cube.shard.unlink()


def delete_all_of_it(cube: BakedCube, _: Workshop) -> None:
    cube.manifest.unlink()
    cube.shard.unlink()


def tamper_with_the_manifest(cube: BakedCube, _: Workshop) -> None:
    text = cube.manifest.read_bytes()
    cube.manifest.write_bytes(text.replace(b'"total_layers":4', b'"total_layers":3'))


def put_another_cubes_kv_there(cube: BakedCube, workshop: Workshop) -> None:
    shutil.copyfile(workshop.cubes["donor"].shard, cube.shard)


def put_another_cubes_manifest_there(cube: BakedCube, workshop: Workshop) -> None:
    shutil.copyfile(workshop.cubes["donor"].manifest, cube.manifest)


def claim_another_renderer(cube: BakedCube, workshop: Workshop) -> None:
    """What an older release left behind: signed with the right key, of another version."""
    key = load_keys(workshop.data_dir / "secrets").artifact
    manifest = decode_manifest(cube.manifest.read_bytes(), key=cube.key, mac_key=key)
    identity = replace(manifest.identity, renderer_version=manifest.identity.renderer_version - 1)
    renamed = artifact_key(identity, manifest.token_ids)
    data = encode_manifest(replace(manifest, key=renamed, identity=identity), mac_key=key)
    cube.manifest.with_name(f"{renamed}.json").write_bytes(data)
    cube.manifest.unlink()


Fault = Callable[[BakedCube, Workshop], None]
# Met at load, while the index in memory still offers the artifact.
LIVE_FAULTS: list[Fault] = [
    flip_a_byte_of_kv,
    truncate_the_shard,
    delete_the_shard,
    delete_all_of_it,
    tamper_with_the_manifest,
    put_another_cubes_kv_there,
    put_another_cubes_manifest_there,
]
# Met at a start, by the scan or by the first load.
COLD_FAULTS: list[Fault] = [*LIVE_FAULTS, claim_another_renderer]


def test_a_donor_cube_is_baked(http: httpx.Client, workshop: Workshop) -> None:
    workshop.cubes["donor"] = workshop.bake(http, "donor")

    assert workshop.cubes["donor"].shard.stat().st_size > 1 << 20


# --- while the server runs -----------------------------------------------------------------


@pytest.mark.parametrize("fault", LIVE_FAULTS, ids=lambda fault: fault.__name__)
def test_an_artifact_that_went_bad_is_recomputed_and_rebuilt(
    http: httpx.Client, workshop: Workshop, fault: Fault
) -> None:
    cube = workshop.bake(http, "live")
    loads = failed_loads(http)
    drop_prefix_cache(http)
    fault(cube, workshop)

    reply = ask(http, cube.id, max_tokens=ANSWER_TOKENS)

    assert text_of(reply) == cube.answer
    assert activation(reply)["source"] == "computed"
    assert activation(reply)["cached_tokens"] == 0
    if fault is not delete_all_of_it:
        # A manifest that is gone may be noticed before a load is tried.
        assert failed_loads(http) == loads + 1
        assert len(workshop.log_lines(cube.key, "is recomputed")) == 1
    wait_until_rebuilt(http, cube)


def failed_loads(http: httpx.Client) -> float:
    # The engine's next step brings the counts.
    ask(http, max_tokens=1)
    return metric(http, "memos_loads_total", kind="unusable") + metric(
        http, "memos_loads_total", kind="failed"
    )


def wait_until_rebuilt(http: httpx.Client, cube: BakedCube, *, seconds: float = 30.0) -> None:
    """Until the answer comes from a new artifact, and is right."""
    deadline = time.monotonic() + seconds
    while not (cube.manifest.exists() and cube.shard.exists()):
        assert time.monotonic() < deadline, "the artifact was not rebuilt"
        ask(http, cube.id, max_tokens=1)
        time.sleep(0.1)
    drop_prefix_cache(http)
    reply = ask(http, cube.id, max_tokens=ANSWER_TOKENS)
    assert text_of(reply) == cube.answer
    assert activation(reply)["source"] == "store"
    assert activation(reply)["cached_tokens"] == cube.whole_tokens


def test_many_chats_that_meet_one_bad_artifact_all_answer_right(
    http: httpx.Client, workshop: Workshop
) -> None:
    cube = workshop.bake(http, "crowd")
    drop_prefix_cache(http)
    flip_a_byte_of_kv(cube, workshop)

    with ThreadPoolExecutor(6) as pool:
        replies = list(pool.map(lambda _: ask(http, cube.id, max_tokens=ANSWER_TOKENS), range(6)))

    assert {text_of(reply) for reply in replies} == {cube.answer}
    assert len(workshop.log_lines(cube.key, "is recomputed")) == 1
    wait_until_rebuilt(http, cube)


# --- no room -------------------------------------------------------------------------------


def test_a_full_disk_fails_the_bake_and_not_the_chat(
    http: httpx.Client, workshop: Workshop
) -> None:
    cube_id = fresh_id("full")
    texts = notes_of(cube_id, "red", "green", "blue", lines=24)
    make_cube(http, cube_id=cube_id, texts=texts, promote=False)
    known, not_saved = workshop.manifests(), len(workshop.log_lines("was not saved"))
    with no_room_for_artifacts(workshop.server):
        answer = http.post(
            f"/v1/memcubes/{cube_id}/promote",
            json={"to": "activation", "memory_ids": "all", "wait": 60},
        )
        workshop.failed_save_at = time.monotonic()
        reply = ask(http, cube_id, max_tokens=ANSWER_TOKENS)

    job = answer.json()
    assert (job["state"], bool(job["error"])) == ("failed", True)
    assert activation(reply)["source"] == "resident"
    assert workshop.manifests() == known
    assert list((workshop.artifacts / "tmp").iterdir()) == []
    assert metric(http, "memos_saves_total", kind="failed") >= 1
    assert len(workshop.log_lines("was not saved")) == not_saved + 1
    assert cube_state(http, cube_id)["activation"]["state"] == "stale"
    workshop.cubes["full"] = BakedCube(cube_id, Path(), Path(), text_of(reply), 0)


@contextlib.contextmanager
def no_room_for_artifacts(server: ServerProcess, *, size_bytes: int = 4 << 20) -> Iterator[None]:
    """No file of any process of vLLM may grow over 4 MiB: as a full disk, to a save."""
    processes = [pid for pid in server.pids() if is_vllm(pid)]
    assert len(processes) > 2
    for process in processes:
        resource.prlimit(process, resource.RLIMIT_FSIZE, (size_bytes, resource.RLIM_INFINITY))
    try:
        yield
    finally:
        unlimited = (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
        for process in processes:
            resource.prlimit(process, resource.RLIMIT_FSIZE, unlimited)


def test_once_there_is_room_again_the_bake_succeeds(http: httpx.Client, workshop: Workshop) -> None:
    cube = workshop.cubes["full"]
    since = time.monotonic() - workshop.failed_save_at
    time.sleep(max(0.0, SAVE_RETRY_SECONDS + 1 - since))

    promote_all(http, cube.id)
    drop_prefix_cache(http)
    reply = ask(http, cube.id, max_tokens=ANSWER_TOKENS)

    assert text_of(reply) == cube.answer
    assert activation(reply)["source"] == "store"


# --- killed and started again --------------------------------------------------------------


def test_after_a_kill_good_artifacts_load_and_bad_ones_are_recomputed(
    http: httpx.Client, workshop: Workshop
) -> None:
    workshop.cubes["good"] = good = workshop.bake(http, "good")
    spoiled = {fault: workshop.bake(http, "cold") for fault in COLD_FAULTS}
    server = workshop.server
    server.kill()
    for fault, cube in spoiled.items():
        fault(cube, workshop)

    server.start()

    first = ask(http, good.id, max_tokens=ANSWER_TOKENS)
    assert activation(first)["source"] == "store"
    assert activation(first)["cached_tokens"] == good.whole_tokens
    assert text_of(first) == good.answer
    for fault, cube in spoiled.items():
        reply = ask(http, cube.id, max_tokens=ANSWER_TOKENS)
        assert text_of(reply) == cube.answer, fault
        assert activation(reply)["source"] == "computed", fault
        assert activation(reply)["cached_tokens"] == 0, fault
    for fault, cube in spoiled.items():
        wait_until_rebuilt(http, cube)
        at_load = workshop.log_lines(cube.key, "is recomputed")
        at_start = workshop.log_lines(f"quarantined manifests/{cube.manifest.name}")
        if fault is flip_a_byte_of_kv:
            # The scan reads no KV; the load does, once.
            assert len(at_load) == 1
        else:
            gone = fault in (delete_all_of_it, claim_another_renderer)
            assert (at_load, len(at_start)) == ([], 0 if gone else 1), fault
    assert http.get("/v1/memos/status").json()["stores"]["artifacts"]["quarantined"] > 0


def test_a_kill_in_the_middle_of_a_bake_loses_nothing(
    http: httpx.Client, workshop: Workshop
) -> None:
    texts = [note(f"long {number}", lines=210) for number in range(2)]
    cube_id, _ = make_cube(http, "killed", texts=texts, promote=False)
    job = move(http, cube_id, "promote", to="activation", memory_ids="all")
    deadline = time.monotonic() + 30
    while http.get(f"/v1/jobs/{job['id']}").json()["state"] != "running":
        assert time.monotonic() < deadline
    before = workshop.manifests()
    workshop.server.kill()
    assert workshop.manifests() == before, "the bake was over before the kill"

    workshop.server.start()

    interrupted = http.get(f"/v1/jobs/{job['id']}").json()
    assert interrupted["state"] in {"running", "succeeded"}
    deadline = time.monotonic() + LEASE_SECONDS + 60
    while http.get(f"/v1/jobs/{job['id']}").json()["state"] != "succeeded":
        assert time.monotonic() < deadline, http.get(f"/v1/jobs/{job['id']}").text
        time.sleep(0.25)
    assert cube_state(http, cube_id)["activation"]["state"] == "ready"
    assert activation(ask(http, cube_id))["source"] == "resident"
    assert http.get("/v1/audit/verify").json()["ok"] is True


# --- another model on the same data folder -------------------------------------------------


def test_a_server_that_is_told_to_stop_leaves_nothing_behind(
    http: httpx.Client, workshop: Workshop
) -> None:
    server = workshop.server
    ask(http, workshop.cubes["good"].id)
    processes = family_of(server.pid)
    segments = {path for process in processes for path in shared_memory_of(process.pid)}
    assert len(processes) > 1
    assert segments

    started = time.monotonic()
    os.kill(server.pid, signal.SIGTERM)
    while any(process.is_alive() for process in processes):
        assert time.monotonic() - started < STOP_SECONDS, "it did not stop in time"
        time.sleep(0.1)

    assert [path for path in segments if path.exists()] == []
    server.stop()


@pytest.fixture(scope="module")
def other_model_http(
    start_server: Callable[..., ServerProcess],
    workshop: Workshop,
    model_folder: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[httpx.Client]:
    """Another model, after the first server has stopped."""
    workshop.server.stop()
    folder = tiny_model("llama", tmp_path_factory.mktemp("other"), tokenizer=model_folder, seed=1)
    server = start_server(
        "--dtype",
        "float32",
        data_dir=workshop.data_dir,
        environment={"VLLM_SERVER_DEV_MODE": "1"},
        model=folder,
    )
    with client_of(server) as client:
        yield client
    server.stop()


def test_another_model_computes_its_own_and_leaves_the_firsts_alone(
    other_model_http: httpx.Client, workshop: Workshop
) -> None:
    http, good = other_model_http, workshop.cubes["good"]

    computed = ask(http, good.id, max_tokens=ANSWER_TOKENS)
    own = wait_for_artifact_of_another_model(workshop)
    drop_prefix_cache(http)
    loaded = ask(http, good.id, max_tokens=ANSWER_TOKENS)

    assert activation(computed)["source"] == "computed"
    assert activation(computed)["cached_tokens"] == 0
    assert activation(loaded)["source"] == "store"
    assert text_of(loaded) == text_of(computed)
    assert own
    assert good.manifest.exists()


def wait_for_artifact_of_another_model(workshop: Workshop) -> set[Path]:
    first = _fingerprint(workshop.cubes["good"].manifest)
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        if own := {path for path in workshop.manifests() if _fingerprint(path) != first}:
            return own
        time.sleep(0.1)
    return set()


def _fingerprint(path: Path) -> str:
    fields: dict[str, Any] = json.loads(path.read_bytes())
    return str(fields["manifest"]["identity"]["fingerprint"])


# --- processes -----------------------------------------------------------------------------


def is_vllm(process: int) -> bool:
    command = Path(f"/proc/{process}/cmdline").read_bytes()
    return b"memos_vllm.engine" in command or command.startswith(b"VLLM::")


def shared_memory_of(process: int) -> set[Path]:
    """The /dev/shm files that a process has mapped."""
    lines: list[str] = []
    with contextlib.suppress(OSError):
        lines = Path(f"/proc/{process}/maps").read_text().splitlines()
    return {
        Path(path)
        for path in (line.split(maxsplit=5)[-1] for line in lines)
        if path.startswith("/dev/shm/") and not path.endswith(" (deleted)")
    }
