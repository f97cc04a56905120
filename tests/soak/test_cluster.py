"""A Ray cluster of several nodes: the one that holds the actors is lost, or cut off and comes back.

One server, PostgreSQL, and a loopback server in the place of Qdrant's live through it all, in the
order of this file.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from drill import Report, Writer, compare, wait
from models import tiny_model
from ray_cluster import RESOURCE, Node, RayCluster, running_cluster
from server.cube_kit import chat_body
from unit.databases import running_postgres, why_no_postgres
from unit.qdrant_shim import Shim, running

from memos_vllm.config import ServerSettings
from memos_vllm.control.actors import (
    ControlPlane,
    join_ray,
    leave_ray,
    start_actors,
    start_ray,
)
from memos_vllm.control.snapshots import GRACE_SECONDS
from memos_vllm.domain.access import Principal
from memos_vllm.domain.ids import PrincipalId
from memos_vllm.engine.supervisor import namespace_of
from memos_vllm.errors import ConfigurationError, NotFound
from memos_vllm.process import ServerProcess, free_port, memos_command, signal_all

RETURN_SECONDS = 30.0
ANN = Principal(PrincipalId("ann"))

pytestmark = pytest.mark.skipif(why_no_postgres() is not None, reason=str(why_no_postgres()))


@dataclass
class Stage:
    """A cluster, what its servers share, and one of these."""

    cluster: RayCluster
    server: ServerProcess
    settings: ServerSettings
    ops: httpx.Client
    ann: dict[str, str]
    written: int = 0

    def actors(self) -> dict[str, dict[str, Any]]:
        """State, process and node of each, as the server sees them."""
        found: dict[str, dict[str, Any]] = self.ops.get("/v1/memos/status").json()["actors"]
        return found

    def place(self) -> set[str]:
        """The nodes where the actors are; those that are being started are nowhere."""
        with contextlib.suppress(httpx.HTTPError, ValueError, KeyError):
            return {actor.get("node", "none") for actor in self.actors().values()}
        return {"none"}

    @contextlib.contextmanager
    def control_plane(self) -> Iterator[ControlPlane]:
        """What the supervisor of another server of the same catalog would have."""
        join_ray(self.cluster.address)
        try:
            yield start_actors(self.settings, namespace_of(self.settings))
        finally:
            leave_ray()


class Chatter(threading.Thread):
    """Chats as Ann with a cube that she may read, one after the other."""

    def __init__(self, stage: Stage, cube_id: str) -> None:
        super().__init__(daemon=True)
        self._stage = stage
        self._cube_id = cube_id
        self._end = threading.Event()
        self.statuses: list[int] = []
        self.slowest = 0.0

    def run(self) -> None:
        with httpx.Client(base_url=self._stage.server.url, trust_env=False) as client:
            while not self._end.is_set():
                began = time.monotonic()
                answer = chat(client, self._cube_id, self._stage.ann)
                self.statuses.append(answer.status_code)
                if answer.status_code != 200:
                    print(answer.text)
                self.slowest = max(self.slowest, time.monotonic() - began)

    def finish(self) -> None:
        """Stop after the chat under way."""
        self._end.set()
        self.join(GRACE_SECONDS)


def chat(client: httpx.Client, cube_id: str, headers: dict[str, str]) -> httpx.Response:
    return client.post(
        "/v1/chat/completions", json=chat_body(cube_id), headers=headers, timeout=GRACE_SECONDS
    )


@pytest.fixture(scope="module")
def cluster() -> Iterator[RayCluster]:
    with running_cluster() as started:
        yield started


@pytest.fixture(scope="module")
def first_node(cluster: RayCluster) -> Node:
    return cluster.add_node()


@pytest.fixture(scope="module")
def stage(
    cluster: RayCluster,
    first_node: Node,
    model_folder: Path,
    start_server: Callable[..., ServerProcess],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Stage]:
    folder = tmp_path_factory.mktemp("cluster")
    model = tiny_model("llama", folder / "model", tokenizer=model_folder)
    with running_postgres() as postgres, running(Shim()) as shim:
        url = postgres.new(folder)
        server = start_server(
            *("--ray-address", cluster.address, "--ray-resource", RESOURCE),
            *("--qdrant-url", shim.url, "--artifact-url", (folder / "artifacts").as_uri()),
            data_dir=folder / "data",
            environment={**cluster.environment, "MEMOS_CATALOG_URL": url},
            model=model,
        )
        settings = ServerSettings(
            data_dir=folder / "other",
            ray_address=cluster.address,
            ray_resource=RESOURCE,
            catalog_url=url,
            qdrant_url=shim.url,
        )
        with httpx.Client(base_url=server.url, timeout=60.0, trust_env=False) as ops:
            ops.headers["Authorization"] = f"Bearer {make_key(ops, 'ops')}"
            ann = {"Authorization": f"Bearer {make_key(ops, 'ann')}"}
            yield Stage(cluster, server, settings, ops, ann)
        server.stop()


def make_key(client: httpx.Client, principal: str) -> str:
    answer = client.post("/v1/keys", json={"principal": principal})
    answer.raise_for_status()
    return str(answer.json()["key"])


@contextlib.contextmanager
def load(stage: Stage, cube_id: str) -> Iterator[tuple[Writer, Chatter]]:
    """Writes to a new cube, of which Ann is a reader, and her chats with it, meanwhile.

    In the end all that was acknowledged is there, once, and found.
    """
    stage.ops.post("/v1/memcubes", json={"id": cube_id}).raise_for_status()
    stage.ops.put(f"/v1/memcubes/{cube_id}/grants/ann", json={"role": "reader"}).raise_for_status()
    writer = Writer(stage.server.url, cube_id=cube_id, headers=dict(stage.ops.headers))
    chatter = Chatter(stage, cube_id)
    writer.start()
    chatter.start()
    try:
        wait(lambda: len(writer.acknowledged) > 30 and bool(chatter.statuses), "the load to begin")
        yield writer, chatter
    finally:
        writer.finish()
        chatter.finish()
    report = Report()
    compare(stage.ops, writer, report, others=stage.written)
    stage.written += len(writer.sent)
    assert report.ok, report
    print(f"{report.acknowledged} writes, {len(chatter.statuses)} chats")
    assert set(chatter.statuses) == {200}


# --- joining -------------------------------------------------------------------------------


def test_files_of_one_node_are_refused_in_a_cluster_of_several(
    cluster: RayCluster, first_node: Node, model_folder: Path, tmp_path: Path
) -> None:
    command = memos_command(
        str(model_folder), "--ray-address", cluster.address, "--data-dir", str(tmp_path)
    )
    done = subprocess.run(
        command,
        env={**os.environ, **cluster.environment},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 2, done.stderr
    assert "this Ray cluster has 2 nodes" in done.stderr
    assert "--catalog-url postgresql://... and --qdrant-url http://..." in done.stderr
    assert "Traceback" not in done.stderr


def test_a_ray_that_is_not_there_or_has_no_node_for_the_actors_is_named(
    cluster: RayCluster, first_node: Node, tmp_path: Path
) -> None:
    with pytest.raises(ConfigurationError, match=r"cannot be joined: .*refused; give HOST:PORT"):
        join_ray(f"127.0.0.1:{free_port()}")
    settings = ServerSettings(
        data_dir=tmp_path,
        ray_resource="nowhere",
        catalog_url="postgresql://host/name",
        qdrant_url="http://host",
    )
    join_ray(cluster.address)
    try:
        with pytest.raises(ConfigurationError, match="offers the resource 'nowhere'"):
            start_actors(settings, "nobody's")
    finally:
        leave_ray()


def test_a_server_without_an_address_joins_no_ray_that_runs_on_its_machine(
    cluster: RayCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", cluster.address)
    with tempfile.TemporaryDirectory(prefix="memos-") as folder:
        try:
            assert start_ray(Path(folder)) != cluster.address
        finally:
            leave_ray()


def test_servers_of_one_catalog_share_the_actors_on_the_nodes_that_offer_the_resource(
    stage: Stage, first_node: Node
) -> None:
    actors = stage.actors()
    assert {actor["node"] for actor in actors.values()} == {first_node.id}
    with stage.control_plane() as other:
        assert {name: one["pid"] for name, one in other.status().items()} == {
            name: one["pid"] for name, one in actors.items()
        }
    # The other has gone, and they have not.
    assert stage.place() == {first_node.id}


# --- losing a node -------------------------------------------------------------------------


def test_when_their_node_is_lost_the_actors_come_back_on_another_and_nothing_is_lost(
    stage: Stage, first_node: Node
) -> None:
    second = stage.cluster.add_node()
    with load(stage, "lost") as (writer, chatter):
        before = len(chatter.statuses)
        stage.cluster.kill(first_node)
        seconds = writer.wait_for_more("the node's end")
        chats = len(chatter.statuses) - before
        print(f"writes go on after {seconds} s, {chats} chats meanwhile")
        wait(lambda: stage.place() == {second.id}, "the actors on the other node")
    print(f"slowest chat {chatter.slowest:.1f} s")
    assert seconds < RETURN_SECONDS
    assert chats > 0


def test_a_mos_that_was_cut_off_and_comes_back_breaks_nothing(stage: Stage) -> None:
    """All of its node stops in the middle of writes; then it goes on while another is in its
    place, and its raylet, which would end it, does not."""
    (place,) = stage.place()
    third = stage.cluster.add_node()
    former = next(node for node in stage.cluster.nodes if node.id == place)
    mos_pid = stage.actors()["Mos"]["pid"]
    with load(stage, "cut") as (writer, _):
        processes = former.processes()
        (former_mos,) = [one for one in processes if one.pid == mos_pid]
        signal_all(processes, signal.SIGSTOP)
        seconds = writer.wait_for_more("the node was cut off")
        print(f"writes go on after {seconds} s")
        wait(lambda: stage.place() == {third.id}, "the actors on the other node")
        signal_all([one for one in processes if one.pid != former.raylet], signal.SIGCONT)
        writer.wait_for_more("the former Mos came back")
    assert former_mos.state() in "RS"
    stage.ops.delete("/v1/memcubes/cut/grants/ann").raise_for_status()
    # Acknowledged, so it holds.
    assert chat(stage.ops, "cut", stage.ann).status_code == 404
    stage.cluster.kill(former)
    assert seconds < RETURN_SECONDS


# --- leaving -------------------------------------------------------------------------------


def test_the_actors_outlive_the_last_server(stage: Stage) -> None:
    pids = {name: one["pid"] for name, one in stage.actors().items()}
    stage.server.stop()
    with stage.control_plane() as control:
        assert {name: one["pid"] for name, one in control.status().items()} == pids
        assert control.mos.get_cube(ANN, "lost").memories.active
        with pytest.raises(NotFound):
            control.mos.get_cube(ANN, "cut")
        control.close()
