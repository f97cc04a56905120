"""Every route does what its own OpenAPI page says, whatever it is sent, and never fails."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import schemathesis
from api_harness import build_app, finish_jobs, open_app
from fastapi.testclient import TestClient
from fuzz_kit import Known, fuzz, labels, operations, send_archive, send_document
from schemathesis.schemas import APIOperation

from memos_vllm.api import keys

# Of bodies that chance alone would hardly ever get right.
SHAPES = {
    "POST /v1/memcubes/import": send_archive,
    "POST /v1/memcubes/{cube_id}/documents": send_document,
}
# Every job there has ended by the time that it is known.
NEVER_SUCCEEDS = "DELETE /v1/jobs/{job_id}"
EXAMPLES = 12


def _nothing() -> Any:
    raise AssertionError("the page is made without a server")


LABELS = labels(build_app(_nothing, _nothing).openapi())


@dataclass
class Fuzzed:
    """The routes of one app, and what there is behind them."""

    routes: dict[str, APIOperation]
    known: Known


@pytest.fixture(scope="module")
def fuzzed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fuzzed]:
    folder = tmp_path_factory.mktemp("fuzz")
    with open_app(folder, search=True) as (app, mos, gateway, _):
        gateway.on_wake = lambda: finish_jobs(mos)
        schema = schemathesis.openapi.from_asgi("/openapi.json", app)
        with TestClient(app) as client:
            yield Fuzzed(operations(schema), Known(client))


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """No other process believes in keys here."""
    monkeypatch.setattr(keys, "LEASE_SECONDS", 0.0)


@pytest.mark.parametrize("label", LABELS)
def test_every_answer_is_one_that_the_page_announces(fuzzed: Fuzzed, label: str) -> None:
    shape = {"shape": SHAPES[label]} if label in SHAPES else {}
    statuses: Counter[int] = fuzz(fuzzed.routes[label], fuzzed.known, examples=EXAMPLES, **shape)
    # It was not only turned away.
    assert label == NEVER_SUCCEEDS or any(status < 300 for status in statuses), statuses
