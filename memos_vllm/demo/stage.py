"""Where the demo plays: its folder, its lock, and the server that it starts, kills and stops."""

from __future__ import annotations

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from memos_vllm.bench.machine import vllm_for_cpu
from memos_vllm.errors import ConfigurationError
from memos_vllm.process import ServerProcess, memos_command

SERVED_NAME = "smollm2-135m-instruct"
_START_SECONDS = 420.0

# A pool of 15,360 tokens, so that a flood turns it over in seconds; a quarter of it may be memory.
_CPU_POOL = ("--num-gpu-blocks-override", "120")
_GPU_POOL = ("--block-size", "16", "--num-gpu-blocks-override", "960")
_OPTIONS = (
    "--served-model-name",
    SERVED_NAME,
    "--max-num-seqs",
    "8",
    # Start-up in half the time; it changes no answer.
    "--enforce-eager",
    # Plain vLLM, too, says how much of a prompt was cached.
    "--enable-prompt-tokens-details",
)
_ENVIRONMENT = {"VLLM_CPU_KVCACHE_SPACE": "1"}


class Stage:
    """A demo folder in use by this process, with at most one server.

    Args:
        folder: holds the server's data, its log and the lock.
        model: the prepared model's folder.
    """

    def __init__(self, folder: Path, *, model: Path) -> None:
        command = memos_command(
            str(model), "--data-dir", str(folder / "data"), *pool_options(), *_OPTIONS
        )
        self.log_path = folder / "server.log"
        self.server = ServerProcess(command, log_path=self.log_path, environment=_ENVIRONMENT)

    def start(self) -> None:
        """Start the server, again after a kill.

        Raises:
            ServerFailed: with the end of its log.
        """
        self.server.start(timeout_seconds=_START_SECONDS)


@contextmanager
def locked_folder(folder: Path) -> Iterator[Path]:
    """Make the folder and hold it for this process; the system lets go of it in any case.

    Raises:
        ConfigurationError: another demo uses it.
    """
    folder = folder.expanduser().absolute()
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "demo.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigurationError(
                f"another demo is using {folder}; wait for it, or name another folder "
                "with --data-dir"
            ) from None
        yield folder


def pool_options() -> tuple[str, ...]:
    """Options that make the KV pool small, for the build of vLLM that is installed."""
    return _CPU_POOL if vllm_for_cpu() else _GPU_POOL
