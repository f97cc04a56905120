"""The connector's worker side, called in the order in which vLLM's model runners call it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from vllm.config import CUDAGraphMode

from memos_vllm.engine import connector as module
from memos_vllm.engine.connector import MemCubeConnector
from memos_vllm.engine.transfer import StepMetadata


class RecordingWorker:
    def __init__(self) -> None:
        self.calls: list[str] = []

    def begin_step(self, *, layer_by_layer: bool) -> None:
        self.calls.append("begin, layer by layer" if layer_by_layer else "begin, all layers")

    def start_loads(self, jobs: Any) -> None:
        self.calls.append("start loads")

    def start_saves(self, jobs: Any) -> None:
        self.calls.append("start saves")

    def wait_for_layer(self, index: int) -> None:
        self.calls.append(f"layer {index}")

    def wait_for_progress(self) -> None:
        self.calls.append("give way")

    def finished_loads(self) -> tuple[set[str], set[str]]:
        return set(), set()


@pytest.fixture
def connector() -> MemCubeConnector:
    made = MemCubeConnector.__new__(MemCubeConnector)
    made._worker = RecordingWorker()  # type: ignore[assignment]
    made._scheduler = None
    made._layer_index = {"layers.0": 0, "layers.1": 1}
    made._connector_metadata = None
    return made


def step(connector: MemCubeConnector, metadata: StepMetadata, context: Any) -> list[str]:
    """As vLLM does it: loads that are not needed by this step begin behind its forward pass."""
    connector.bind_connector_metadata(metadata)
    for name in ("layers.0", "layers.1", "somebody else's"):
        connector.wait_for_layer_load(name)
    connector.start_load_kv(context)
    connector.wait_for_save()
    connector.get_transfer_results(set())
    return connector._worker.calls  # type: ignore[union-attr]


def test_a_step_waits_for_loads_before_it_computes(
    connector: MemCubeConnector, monkeypatch: pytest.MonkeyPatch
) -> None:
    context = SimpleNamespace(cudagraph_runtime_mode=CUDAGraphMode.PIECEWISE)
    monkeypatch.setattr(module, "is_forward_context_available", lambda: True)
    monkeypatch.setattr(module, "get_forward_context", lambda: context)
    assert step(connector, StepMetadata(), context) == [
        "begin, layer by layer",
        "layer 0",
        "layer 1",
        "start loads",
        "start saves",
    ]


@pytest.mark.parametrize("has_context", [True, False])
def test_a_step_replayed_as_one_graph_waits_for_all_layers(
    connector: MemCubeConnector, monkeypatch: pytest.MonkeyPatch, has_context: bool
) -> None:
    context = SimpleNamespace(cudagraph_runtime_mode=CUDAGraphMode.FULL)
    monkeypatch.setattr(module, "is_forward_context_available", lambda: has_context)
    monkeypatch.setattr(module, "get_forward_context", lambda: context)
    assert step(connector, StepMetadata(), context)[0] == "begin, all layers"


def test_only_a_step_that_computes_nothing_gives_way(connector: MemCubeConnector) -> None:
    assert "give way" not in step(connector, StepMetadata(), None)
    assert step(connector, StepMetadata(computes_nothing=True), None)[-1] == "give way"
