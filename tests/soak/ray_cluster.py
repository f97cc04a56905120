"""A Ray cluster of several nodes on this machine, which nodes can be taken away from."""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

from memos_vllm.process import Process, family_of, signal_all

# What a node must offer to host the actors; the head does not.
RESOURCE = "memos"
_STORE_BYTES = 80 * 1024 * 1024
# As the README advises: a node that says nothing for three seconds, three times, is dead.
_HEALTH = {"period_ms": 1000, "timeout_ms": 3000, "failure_threshold": 3, "initial_delay_ms": 1000}


class Node:
    """One node: a raylet, its agents and the workers that it started."""

    def __init__(self, node: Any) -> None:
        self.ray = node
        self.id: str = node.node_id
        (raylet,) = node.all_processes["raylet"]
        self.raylet: int = raylet.process.pid

    def processes(self) -> list[Process]:
        """All of them, as far as they live."""
        started = [info for kind in self.ray.all_processes.values() for info in kind]
        return [one for info in started for one in family_of(info.process.pid)]


class RayCluster:
    """A head, and the nodes that were added to it.

    Attributes:
        environment: what a server needs to be let in.
        nodes: those that may host the actors, as they were added.
    """

    def __init__(self, folder: Path) -> None:
        from ray.cluster_utils import Cluster

        self.environment = {"RAY_AUTH_TOKEN_PATH": str(folder / "token")}
        self._cluster = Cluster()
        self.nodes: list[Node] = []
        self._start(num_cpus=1, include_dashboard=False)
        self.address: str = self._cluster.address

    def add_node(self) -> Node:
        """A node that may host the actors."""
        node = Node(self._start(num_cpus=1, resources={RESOURCE: 1}))
        self.nodes.append(node)
        return node

    def kill(self, node: Node) -> None:
        """SIGKILL everything of it, as when its machine is lost."""
        # Its workers' parent dies with it.
        processes = node.processes()
        self._cluster.remove_node(node.ray, allow_graceful=False)
        signal_all(processes, signal.SIGKILL)

    def _start(self, **options: Any) -> Any:
        return self._cluster.add_node(
            node_ip_address="127.0.0.1", object_store_memory=_STORE_BYTES, **options
        )

    def close(self) -> None:
        """End all that is left of it."""
        self._cluster.shutdown()


@contextmanager
def running_cluster() -> Iterator[RayCluster]:
    """A cluster of a head alone, with a token, in a folder of its own."""
    # Short, since it holds sockets.
    folder = Path(tempfile.mkdtemp(prefix="memos-cl-"))
    (folder / "ray").mkdir()
    (folder / "token").touch(mode=0o600)
    (folder / "token").write_text(secrets.token_hex(32))
    environment = {
        "RAY_TMPDIR": str(folder),
        "RAY_AUTH_TOKEN_PATH": str(folder / "token"),
        "RAY_USAGE_STATS_ENABLED": "0",
        **{f"RAY_health_check_{name}": str(value) for name, value in _HEALTH.items()},
    }
    with mock.patch.dict(os.environ, environment):
        cluster = RayCluster(folder)
        try:
            yield cluster
        finally:
            cluster.close()
            shutil.rmtree(folder, ignore_errors=True)
