"""What `memos-vllm serve` sets before vLLM takes over."""

from __future__ import annotations

import os
from argparse import Namespace
from types import SimpleNamespace

import pytest

from memos_vllm.engine.serve import compute_on_as_many_cores_as_plain_vllm

RESERVED = "VLLM_CPU_NUM_OF_RESERVED_CPU"


@pytest.mark.parametrize(
    ("cores", "workers", "given", "expected"),
    [
        (8, 1, None, "1"),
        (3, 1, None, "1"),
        # vLLM then uses both cores; reserving one would halve the model's.
        (2, 1, None, None),
        (8, 2, None, "2"),
        (4, 2, None, None),
        (8, 1, "3", "3"),
    ],
)
def test_the_model_gets_the_core_that_vllm_reserves_for_connectors(
    monkeypatch: pytest.MonkeyPatch,
    cores: int,
    workers: int,
    given: str | None,
    expected: str | None,
) -> None:
    # Set first, so that it is taken back whatever the call does.
    monkeypatch.setenv(RESERVED, given or "")
    if given is None:
        monkeypatch.delenv(RESERVED)
    # Two logical CPUs on each core, of which vLLM uses one.
    listed = [SimpleNamespace(id=cpu, physical_core=cpu // 2) for cpu in range(2 * cores)]
    monkeypatch.setattr("vllm.utils.cpu_resource_utils.get_allowed_cpu_list", lambda: listed)

    compute_on_as_many_cores_as_plain_vllm(
        Namespace(tensor_parallel_size=workers, pipeline_parallel_size=1)
    )

    assert os.environ.get(RESERVED) == expected
