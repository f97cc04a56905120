"""The Triton kernels of this process are interpreted on the CPU; those of its children are not.

MEMOS_TEST_DEVICE=cuda runs the same tests of the kernels on a GPU: `benchmarks.kernels --gpu`.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch
from databases import SQLITE, Database, Postgres, running_postgres, why_no_postgres

DEVICE = os.environ.get("MEMOS_TEST_DEVICE", "cpu")

if DEVICE == "cpu":
    with pytest.MonkeyPatch.context() as patch:
        # Triton chooses when a kernel, or a function of its own library, is first imported.
        patch.setenv("TRITON_INTERPRET", "1")
        # And again later, when it imports more of itself.
        import triton

        import memos_vllm_kernels.triton_pages  # noqa: F401

        triton.knobs.runtime.interpret = True


@pytest.fixture
def on_device() -> Iterator[torch.device]:
    """Tensors are made where the kernels run."""
    with torch.device(DEVICE) as device:
        yield device


@pytest.fixture(scope="session")
def postgres() -> Iterator[Postgres]:
    """A private PostgreSQL server."""
    if (reason := why_no_postgres()) is not None:
        pytest.skip(reason)
    with running_postgres() as server:
        yield server


@pytest.fixture(scope="session", params=["sqlite", "postgresql"])
def database(request: pytest.FixtureRequest) -> Database:
    """Each database that the catalog runs on."""
    if request.param == SQLITE.name:
        return SQLITE
    server: Postgres = request.getfixturevalue("postgres")
    return server
