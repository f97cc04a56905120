"""The control plane as Ray actors; the only module that imports ray.

`Mos`, `PlaintextStore` and `PromotionScheduler` are plain classes. Here each gets a process of its
own, which Ray starts again when it dies, and a stand-in that calls it from other processes.
"""

from __future__ import annotations

import logging
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, cast

import ray
from ray.exceptions import RayError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from memos_vllm.config import ServerSettings
from memos_vllm.control.calls import Call, Delivery, Outcome, Remote, perform
from memos_vllm.control.mos import Mos
from memos_vllm.control.scheduler import PromotionScheduler
from memos_vllm.errors import ConfigurationError, MemosError, Unavailable
from memos_vllm.plaintext.assembly import open_plaintext
from memos_vllm.plaintext.store import PlaintextStore

logger = logging.getLogger(__name__)

# Threads of an actor. SQLite has one writer, and those that wait for it keep no reader waiting.
_READERS = 16
_WRITERS = 16
# Memory that calls with large arguments may take, such as a thousand memories of 64 KiB.
_OBJECT_STORE_BYTES = 256 * 1024 * 1024
_ANSWER_SECONDS = 60.0
# A chat has an answer of a moment ago to go on with (`control.snapshots`), or goes on with nothing
# found.
_CHAT_SECONDS = 2.0
_CHATS_RIGHTS = "changed_snapshots"
_PING_SECONDS = 0.5
_CLOSE_SECONDS = 15.0
_JOIN_SECONDS = 5.0
_RETRY_AFTER_SECONDS = 2
_STREAMED_AHEAD = 8
# Of a node's resource that an actor takes: any number of them fit.
_RESOURCE_SHARE = 0.001


def _open_mos(settings: ServerSettings) -> Mos:
    return Mos.open(settings.resolved_catalog_url)


def _open_plaintext(settings: ServerSettings) -> PlaintextStore:
    store = open_plaintext(settings, _open_mos(settings))
    store.start()
    return store


def _open_scheduler(settings: ServerSettings) -> PromotionScheduler:
    scheduler = PromotionScheduler.open(settings.resolved_catalog_url)
    scheduler.start()
    return scheduler


class _Hosted:
    """An object in a process of its own."""

    def __init__(self, opened: Callable[[ServerSettings], Any], settings: ServerSettings) -> None:
        logging.basicConfig(format="%(levelname)s %(name)s: %(message)s")
        logging.getLogger("memos_vllm").setLevel(logging.INFO)
        self._open = lambda: opened(settings)
        self._opening = threading.Lock()
        self._opened: Any = None
        self._since = time.time()
        # What cannot be opened yet is asked for again by each call, and each is told the reason.
        with suppress(MemosError):
            self._target()

    @ray.method(concurrency_group="read")
    def read(self, call: Call) -> Outcome:
        return self._perform(call)

    @ray.method(concurrency_group="write")
    def write(self, call: Call) -> Outcome:
        return self._perform(call)

    @ray.method(concurrency_group="stream")
    def stream(self, call: Call) -> Iterator[Any]:
        yield from getattr(self._target(), call.method)(*call.args, **call.kwargs)

    def _target(self) -> Any:
        with self._opening:
            if self._opened is None:
                self._opened = self._open()
            return self._opened

    def _perform(self, call: Call) -> Outcome:
        try:
            return perform(self._target(), call)
        except MemosError:
            raise
        except Exception as error:
            # It may quote a memory, and need not survive the way to the caller.
            logger.exception("%s failed", call.method)
            raise MemosError(
                f"{call.method} failed; the log of its actor holds the reason"
            ) from error

    @ray.method(concurrency_group="watch")
    def state(self) -> dict[str, object]:
        self._target()
        return {
            "state": "ready",
            "pid": os.getpid(),
            "node": ray.get_runtime_context().get_node_id(),
            "uptime_seconds": round(time.time() - self._since, 1),
        }

    @ray.method(concurrency_group="watch")
    def close(self) -> None:
        if self._opened is not None:
            self._opened.close()


# What is plain here, by the name that its actor has.
_KINDS: dict[str, tuple[type, Callable[[ServerSettings], Any]]] = {
    "Mos": (Mos, _open_mos),
    "PlaintextStore": (PlaintextStore, _open_plaintext),
    "PromotionScheduler": (PromotionScheduler, _open_scheduler),
}


class ControlPlane:
    """The actors as their callers see them: objects of the classes that they host.

    Calls block and raise what the method raised, or Unavailable while the actor is away. A call
    of an actor that dies waits until Ray has started it again, and is then delivered again.
    """

    def __init__(self, namespace: str) -> None:
        self._handles: dict[str, Any] = {
            name: ray.get_actor(name, namespace=namespace) for name in _KINDS
        }
        self.mos = cast(Mos, self._remote("Mos"))
        self.plaintext = cast(PlaintextStore, self._remote("PlaintextStore"))
        self.scheduler = cast(PromotionScheduler, self._remote("PromotionScheduler"))

    def mos_is_down(self) -> bool:
        """Whether Mos is away; one that only takes long still answers this."""
        return self._is_down("Mos")

    def _is_down(self, name: str) -> bool:
        try:
            ray.get(self._handles[name].state.remote(), timeout=_PING_SECONDS)
        except RayError:
            return True
        return False

    def wait_until_open(self) -> None:
        """Raises what keeps an actor from opening its stores."""
        for name, handle in self._handles.items():
            _wait(handle.state.remote(), name, _ANSWER_SECONDS)

    def status(self) -> dict[str, dict[str, object]]:
        """Each actor's state, process and node."""
        asked: dict[str, Any] = {
            name: handle.state.remote() for name, handle in self._handles.items()
        }
        found: dict[str, dict[str, object]] = {}
        for name, answer in asked.items():
            try:
                found[name] = ray.get(answer, timeout=_CHAT_SECONDS)
            except RayTaskError as error:
                found[name] = {"state": str(error.cause)}
            except RayError as error:
                found[name] = {"state": f"not there: {type(error).__name__}"}
        return found

    def close(self) -> None:
        """Have the actors let go of their files, and end them."""
        for name in reversed(_KINDS):
            handle = self._handles[name]
            with suppress(RayError):
                ray.get(handle.close.remote(), timeout=_CLOSE_SECONDS)
            ray.kill(handle)

    def _remote(self, name: str) -> Remote:
        handle = self._handles[name]

        def send(call: Call, delivery: Delivery) -> Outcome:
            deliver = handle.read if delivery is Delivery.READ else handle.write
            answer = deliver.remote(call)
            seconds = _ANSWER_SECONDS
            if _is_a_chats(call):
                late = not ray.wait([answer], timeout=_CHAT_SECONDS)[0]
                if late and (call.method == _CHATS_RIGHTS or self._is_down(name)):
                    seconds = 0.0
            outcome: Outcome = _wait(answer, name, seconds)
            return outcome

        def stream(call: Call) -> Iterator[Any]:
            # Begun again elsewhere it would go on with another state of the catalog.
            streamed = handle.stream.options(
                num_returns="streaming",
                max_task_retries=0,
                _generator_backpressure_num_objects=_STREAMED_AHEAD,
            )
            for part in streamed.remote(call):
                yield _wait(part, name, _ANSWER_SECONDS)

        return Remote(_KINDS[name][0], send=send, stream=stream)


def _is_a_chats(call: Call) -> bool:
    """Whether a chat waits for it: of those who search only a chat says how patient it is."""
    return call.method == _CHATS_RIGHTS or "catch_up_seconds" in call.kwargs


def _wait(answer: Any, name: str, seconds: float) -> Any:
    try:
        return ray.get(answer, timeout=seconds)
    except RayTaskError as error:
        raise error.cause from None
    except RayError as error:
        # The actor is away, or its node died with the answer in its memory.
        raise Unavailable(
            f"{name} does not answer ({type(error).__name__}); try again",
            retry_after_seconds=_RETRY_AFTER_SECONDS,
        ) from error


def start_ray(folder: Path) -> str:
    """Start a Ray of this process alone, on the loopback address; it ends with this process.

    Args:
        folder: for its sockets and logs; a short path, since that of a Unix socket has at most
            107 bytes.
    Returns:
        Its address.
    """
    context = ray.init(
        # Without it, a Ray that runs on this machine already would be joined.
        address="local",
        include_dashboard=False,
        num_cpus=os.cpu_count(),
        object_store_memory=_OBJECT_STORE_BYTES,
        logging_level=logging.WARNING,
        _node_ip_address="127.0.0.1",
        _temp_dir=str(folder),
    )
    found: Any = context
    return str(found.address_info["gcs_address"])


def join_ray(address: str) -> None:
    """Connect this process to a Ray that runs.

    Raises:
        ConfigurationError: there is none, or it does not let us in.
    """
    try:
        # Ray itself would ask for a quarter of an hour.
        host, _, port = address.rpartition(":")
        socket.create_connection((host.strip("[]"), int(port)), _JOIN_SECONDS).close()
        ray.init(
            address=address,
            log_to_driver=False,
            logging_level=logging.WARNING,
            ignore_reinit_error=True,
        )
    except Exception as error:
        raise ConfigurationError(
            f"the Ray cluster at {address} cannot be joined: {error}; give HOST:PORT as "
            "`ray start` printed it, and RAY_AUTH_TOKEN_PATH when it asks for a token"
        ) from error


def leave_ray() -> None:
    """Disconnect; a Ray that this process started ends."""
    ray.shutdown()


def start_actors(settings: ServerSettings, namespace: str) -> ControlPlane:
    """Have the actors of a server, started if they do not run already.

    Raises:
        ConfigurationError: the stores are files of one node, and the cluster has several; or none
            of its nodes may host them.
    """
    nodes = [node for node in cast(Any, ray).nodes() if node["Alive"]]
    files = _file_backends(settings)
    if len(nodes) > 1 and files:
        raise ConfigurationError(
            f"this Ray cluster has {len(nodes)} nodes, and {' and '.join(files)} would be files "
            "of one of them, lost to the others; give a database and a server that all reach: "
            "--catalog-url postgresql://... and --qdrant-url http://..."
        )
    resource = settings.ray_resource
    if resource is not None and not any(node["Resources"].get(resource) for node in nodes):
        raise ConfigurationError(
            f"no node of this Ray cluster offers the resource '{resource}' (--ray-resource); start "
            "the nodes that may host memory's actors with "
            f"ray start --resources='{{\"{resource}\": 1}}'"
        )
    for name, (_, opened) in _KINDS.items():
        kind = cast(Any, ray).remote(concurrency_groups=_GROUPS)(type(name, (_Hosted,), {}))
        kind.options(
            name=name,
            namespace=namespace,
            get_if_exists=True,
            # Found by name from other processes, and kept when this one lets go of its handle.
            lifetime="detached",
            num_cpus=0,
            resources={resource: _RESOURCE_SHARE} if resource else None,
            max_restarts=-1,
            max_task_retries=-1,
            scheduling_strategy=_here() if files else "DEFAULT",
        ).remote(opened, settings)
    control = ControlPlane(namespace)
    control.wait_until_open()
    return control


_GROUPS = {"read": _READERS, "write": _WRITERS, "stream": 4, "watch": 1}


def _file_backends(settings: ServerSettings) -> list[str]:
    files = []
    if settings.resolved_catalog_url.startswith("sqlite"):
        files.append("the catalog (SQLite)")
    if settings.qdrant_url is None:
        files.append("the search index (Qdrant Edge)")
    return files


def _here() -> NodeAffinitySchedulingStrategy:
    return NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
