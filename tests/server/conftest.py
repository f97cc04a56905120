"""Real servers for the tests below this folder; the default one is shared by the session."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest

from memos_vllm.models.prepare import prepare
from memos_vllm.process import ServerProcess, memos_command, plain_vllm_command

_TESTS = Path(__file__).parent.parent
# tests/models.py, which unit tests do not need, and the examples, which are tests as well.
sys.path[:0] = [str(_TESTS), str(_TESTS.parent / "deploy" / "examples")]

SMALL_MODEL = "smollm2-135m-instruct"
SERVED_NAME = "smol"

# Small enough to flood in seconds: 160 blocks of 128 tokens.
POOL_BLOCKS = 160
BASE_OPTIONS = (
    "--enforce-eager",
    "--served-model-name",
    SERVED_NAME,
    "--num-gpu-blocks-override",
    str(POOL_BLOCKS),
    "--max-num-seqs",
    "32",
)
BASE_ENVIRONMENT = {"VLLM_CPU_KVCACHE_SPACE": "1"}

# The shared server also says what was cached, parses tools, and lets a test drop vLLM's prefix
# cache (POST /reset_prefix_cache), so that an artifact has to be loaded without a restart.
SHARED_OPTIONS = (
    "--enable-prompt-tokens-details",
    "--enable-auto-tool-choice",
    "--tool-call-parser",
    "hermes",
)
SHARED_ENVIRONMENT = {"VLLM_SERVER_DEV_MODE": "1"}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Everything below this folder needs a server."""
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.server)


@pytest.fixture(scope="session")
def model_folder() -> Path:
    """The small model, prepared once per machine."""
    return prepare(SMALL_MODEL)


@pytest.fixture(scope="session")
def start_server(
    model_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Callable[..., ServerProcess]]:
    """Start servers with options of one's own; all are gone when the session ends."""
    started: list[ServerProcess] = []

    def start(
        *options: str,
        data_dir: Path | None = None,
        environment: dict[str, str] | None = None,
        model: Path | None = None,
        by_hand: bool = False,
    ) -> ServerProcess:
        served = str(model or model_folder)
        if by_hand:
            # vLLM's own entry point: what memory needs is among the options.
            command = plain_vllm_command(served, *BASE_OPTIONS, *options)
        else:
            folder = data_dir or tmp_path_factory.mktemp("data")
            command = memos_command(served, "--data-dir", str(folder), *BASE_OPTIONS, *options)
        log_path = tmp_path_factory.mktemp("log") / "server.log"
        server = ServerProcess(
            command, log_path=log_path, environment={**BASE_ENVIRONMENT, **(environment or {})}
        )
        started.append(server)
        return server.start()

    yield start
    for server in started:
        server.stop()


@pytest.fixture(scope="session")
def server(start_server: Callable[..., ServerProcess]) -> ServerProcess:
    """The server that tests share: each uses cubes of its own and restarts nothing."""
    return start_server(*SHARED_OPTIONS, environment=SHARED_ENVIRONMENT)


@pytest.fixture
def http(server: ServerProcess) -> Iterator[httpx.Client]:
    """A plain HTTP client of the shared server."""
    with httpx.Client(base_url=server.url, timeout=120.0, trust_env=False) as client:
        yield client


os.environ.setdefault("NO_PROXY", "127.0.0.1,localhost")
# Ray reads them when it is imported, which the modules of tests do.
os.environ.update(RAY_AUTH_MODE="token", RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER="0")
