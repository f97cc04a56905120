"""The process behind `memos-vllm serve`: it starts the control plane and vLLM, and ends both.

vLLM's server is a child, so that a server that is killed does not take the control plane along,
and several API servers share one. Everything ends with this process: Ray's processes and vLLM's
are told by the kernel when it dies. In a Ray that it joined the actors stay, as other servers may
use them.
"""

from __future__ import annotations

import hashlib
import json
import logging
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from contextlib import ExitStack
from types import FrameType

from memos_vllm.config import ServerSettings, set_ray_environment, set_run_environment
from memos_vllm.engine.run_folder import Address, RunFolder
from memos_vllm.engine.secrets import make_ray_token
from memos_vllm.engine.serve import own_settings
from memos_vllm.errors import ConfigurationError, MemosError

logger = logging.getLogger(__name__)

_FAILED = 1
_MISUSED = 2
# vLLM lets requests under way end.
_STOP_SECONDS = 60.0
# What decides whether servers of one Ray cluster may share their actors.
_SHARED_SETTINGS = (
    "qdrant_url",
    "qdrant_namespace",
    "embedder",
    "reranker",
    "resolved_catalog_url",
)


def main(argv: Sequence[str]) -> int:
    """Serve until stopped.

    Args:
        argv: the model, our options and any of `vllm serve`, as on the command line.
    Returns:
        The process's exit code: 0 stopped, 1 failed, 2 misused.
    """
    if any(argument.startswith("--help") for argument in argv):
        return _start_server(argv).wait()
    logging.basicConfig(level=logging.INFO, format="%(levelname)s memos-vllm: %(message)s")
    try:
        settings = own_settings(argv)
        with ExitStack() as last:
            folder = RunFolder(settings.run_dir)
            last.callback(folder.close)
            return _serve(argv, settings, folder)
    except MemosError as error:
        print(f"memos-vllm serve: {error}", file=sys.stderr)
        return _MISUSED if isinstance(error, ConfigurationError) else _FAILED


def _serve(argv: Sequence[str], settings: ServerSettings, folder: RunFolder) -> int:
    set_run_environment(folder.run)
    if settings.ray_address is None:
        set_ray_environment(make_ray_token(settings.secrets_dir))
    # vLLM takes longer to start, so it begins first.
    server = _Server(argv)
    folder.note_server(server.pid)
    with ExitStack() as last:
        last.callback(server.end)
        server.stop_on_signals()
        _start_control_plane(settings, folder, last)
        # Ray has put its own in their place.
        server.stop_on_signals()
        return server.wait()


def _start_control_plane(settings: ServerSettings, folder: RunFolder, last: ExitStack) -> None:
    from memos_vllm.control import actors

    last.callback(actors.leave_ray)
    local = settings.ray_address is None
    address = actors.start_ray(folder.ray_folder) if local else str(settings.ray_address)
    if not local:
        actors.join_ray(address)
    namespace = namespace_of(settings)
    control = actors.start_actors(settings, namespace)
    if local:
        last.callback(control.close)
    folder.publish(Address(folder.run, address, namespace))
    logger.info("control plane ready; Ray at %s, actors in namespace %s", address, namespace)


def namespace_of(settings: ServerSettings) -> str:
    """The same for servers of one catalog and index, and another for any other."""
    said = json.dumps([str(getattr(settings, name)) for name in _SHARED_SETTINGS])
    return f"memos-{hashlib.sha256(said.encode()).hexdigest()[:32]}"


class _Server:
    """vLLM's server, as a child."""

    def __init__(self, argv: Sequence[str]) -> None:
        self._child = _start_server(argv)
        self._asked_to_stop = False

    @property
    def pid(self) -> int:
        return self._child.pid

    def stop_on_signals(self) -> None:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._stop)

    def wait(self) -> int:
        """Until it ends; the exit code to go on with."""
        code = self._child.wait()
        if self._asked_to_stop:
            return 0
        if code < 0:
            logger.error("the server was killed by %s", signal.Signals(-code).name)
            return _FAILED
        return code

    def end(self) -> None:
        """Have it end, if it has not yet."""
        self._stop()
        self._child.wait()

    def _stop(self, _number: int = 0, _frame: FrameType | None = None) -> None:
        if self._child.poll() is not None:
            return
        if self._asked_to_stop:
            self._child.kill()
            return
        self._asked_to_stop = True
        self._child.terminate()
        timer = threading.Timer(_STOP_SECONDS, self._child.kill)
        timer.daemon = True
        timer.start()


def _start_server(argv: Sequence[str]) -> subprocess.Popen[bytes]:
    # Ctrl-C reaches this process alone, which then stops both in their order.
    return subprocess.Popen(
        [sys.executable, "-m", "memos_vllm.engine", *argv], start_new_session=True
    )
