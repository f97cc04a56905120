"""Whatever clients send and whatever breaks: no hook raises, no request is stuck."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from engine_kit import BLOCK, SALT, Engine, open_store, tokens
from hypothesis import given, settings
from hypothesis import strategies as st

from memos_vllm.activation.residency import Residency
from memos_vllm.activation.store import ArtifactStore, ArtifactStoreFull
from memos_vllm.engine.stats import _COUNTERS
from memos_vllm.engine.ticket import TICKET_KEY

HEAD = 4 * BLOCK + 3
PROMPT = [*tokens(HEAD), *tokens(20, seed=2)]


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("model")


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory, model_folder: Path) -> Iterator[Engine]:
    """One engine that all hostile input is sent to, as to a server."""
    engine = Engine(tmp_path_factory.mktemp("data"), model_folder=model_folder)
    yield engine
    engine.assert_at_rest()
    engine.close()


@pytest.fixture
def start(tmp_path: Path, model_folder: Path) -> Iterator[Callable[[], Engine]]:
    engines: list[Engine] = []

    def starter() -> Engine:
        engines.append(Engine(tmp_path / "data", model_folder=model_folder))
        return engines[-1]

    yield starter
    for engine in engines:
        engine.close()


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=10,
)
_ids = iter(range(10**9))


def send(engine: Engine, params: Any, *, salt: str | None = None) -> str:
    request_id = f"x{next(_ids)}"
    request = engine.add(request_id, PROMPT[:20], params=params, salt=salt, max_tokens=1)
    assert request.kv_transfer_params is None
    engine.run()
    assert request_id in engine.finished
    assert request_id not in engine.replies
    return request_id


@given(params=json_values)
@settings(max_examples=60, deadline=None)
def test_any_json_as_kv_transfer_params_is_dropped_and_counted(engine: Engine, params: Any) -> None:
    before = engine.counted("params_dropped:unknown")
    send(engine, params)
    assert engine.counted("params_dropped:unknown") == before + (params is not None)
    assert not any(name.startswith("hook_failures") for name in engine.counters)


@given(ticket=json_values)
@settings(max_examples=60, deadline=None)
def test_any_json_as_a_ticket_is_rejected_and_counted(engine: Engine, ticket: Any) -> None:
    before = engine.counted("tickets_rejected:not a ticket")
    send(engine, {TICKET_KEY: ticket}, salt=SALT)
    assert engine.counted("tickets_rejected:not a ticket") == before + 1
    assert not any(name.startswith("hook_failures") for name in engine.counters)


@pytest.mark.parametrize(
    "params",
    [
        "x",
        7,
        0,
        [],
        {},
        [TICKET_KEY],
        {"do_remote_prefill": True, "remote_block_ids": [1, 2]},
        {"do_remote_decode": True},
        {TICKET_KEY: {}, "do_remote_prefill": True},
        {"a": {"b": {"c": [1] * 1000}}},
        "x" * 1_000_000,
        {TICKET_KEY: "A" * 1_000_000 + ".A"},
    ],
    ids=lambda value: type(value).__name__,
)
def test_params_of_other_connectors_and_huge_ones_do_nothing(engine: Engine, params: Any) -> None:
    send(engine, params)


@pytest.mark.parametrize("salt", [None, "", "mine", "\ud800"])
def test_a_stolen_ticket_with_another_salt_is_rejected(engine: Engine, salt: str | None) -> None:
    request_id = f"s{next(_ids)}"
    params = engine.ticket(request_id, HEAD)
    engine.add(request_id, PROMPT, params=params, salt=None, max_tokens=1).cache_salt = salt
    engine.run()
    assert request_id not in engine.replies
    assert not any(name.startswith("hook_failures") for name in engine.counters)


def test_a_ticket_of_another_request_or_used_before_gives_nothing(engine: Engine) -> None:
    params = engine.ticket("owner", HEAD)
    engine.add("thief", PROMPT, params=params, salt=SALT, max_tokens=1)
    engine.run()
    assert "thief" not in engine.replies
    engine.add("owner", PROMPT, params=params, salt=SALT, max_tokens=1)
    engine.run()
    assert "owner" in engine.replies
    del engine.replies["owner"]
    engine.add("owner", PROMPT, params=params, salt=SALT, max_tokens=1)
    engine.run()
    assert "owner" not in engine.replies


def test_other_extra_arguments_of_a_request_stay(engine: Engine) -> None:
    request = engine.add("extras", PROMPT, params={"x": 1}, max_tokens=1)
    assert request.sampling_params is not None
    assert request.sampling_params.extra_args == {}
    engine.run()


class BrokenError(Exception):
    """What an injected fault raises: a class that nobody expects."""


def broken(*_: Any, **__: Any) -> Any:
    raise BrokenError("injected")


STORE_PARTS = ["lookup", "pin", "unpin", "forget", "mark_used", "commit", "refresh", "stats"]
RESIDENCY_PARTS = ["remember", "keep", "resident_blocks", "resident_by_scope"]


def use_memory(engine: Engine) -> None:
    """Compute, hit, load and lose memory, abort at every stage."""
    engine.ask("a", PROMPT, head=HEAD, session="call")
    engine.ask("b", PROMPT, head=HEAD)
    engine.scheduler.reset_prefix_cache(reset_connector=True)
    for name in "cdef":
        engine.add(name, PROMPT, head=HEAD)
    engine.step()
    engine.abort("e")
    engine.run()
    engine.add("g", PROMPT, head=HEAD)
    engine.abort("g")
    engine.run()
    assert {"a", "b", "c", "d", "f"} <= set(engine.finished)


@pytest.mark.parametrize("warm", [False, True], ids=["from the start", "with a full store"])
@pytest.mark.parametrize(
    ("kind", "part"),
    [
        *((ArtifactStore, part) for part in STORE_PARTS),
        *((Residency, part) for part in RESIDENCY_PARTS),
    ],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_a_part_that_fails_with_every_call_stops_no_request(
    start: Callable[[], Engine],
    monkeypatch: pytest.MonkeyPatch,
    kind: type,
    part: str,
    warm: bool,
) -> None:
    if warm:
        start().ask("warm", PROMPT, head=HEAD)
    engine = start()
    monkeypatch.setattr(kind, part, broken)
    use_memory(engine)
    if part not in {"unpin"}:
        engine.assert_at_rest()
    monkeypatch.undo()
    assert engine.ask("z", PROMPT, head=HEAD)["source"] in {"resident", "store", "computed"}


def test_a_part_that_fails_is_counted(
    start: Callable[[], Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = start()
    monkeypatch.setattr(ArtifactStore, "lookup", broken)
    use_memory(engine)
    failures = {n: c for n, c in engine.counters.items() if n.startswith("hook_failures:")}
    assert sum(failures.values()) >= 3


@pytest.mark.parametrize("part", ["forget", "quarantine", "unpin", "mark_used"])
@pytest.mark.parametrize("damaged", [False, True], ids=["good artifact", "bad artifact"])
def test_the_end_of_a_load_is_noted_whatever_the_store_says(
    start: Callable[[], Engine], monkeypatch: pytest.MonkeyPatch, part: str, damaged: bool
) -> None:
    start().ask("a", PROMPT, head=HEAD)
    engine = start()
    if damaged:
        (shard,) = (engine.folder / "artifacts" / "data").rglob("*.safetensors")
        shard.unlink()
    monkeypatch.setattr(ArtifactStore, part, broken)
    engine.hold_loads = True
    for name in "bc":
        engine.add(name, PROMPT, head=HEAD)
    engine.step()
    engine.hold_loads = False
    engine.run()
    assert engine.replies["b"]["source"] == ("computed" if damaged else "store")
    assert engine.replies["c"]["source"] in {"resident", "computed"}


def test_a_failing_lookup_at_allocation_does_not_leave_the_request_waiting(
    start: Callable[[], Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The request was promised a load, so it waits for one to be reported."""
    start().ask("a", PROMPT, head=HEAD)
    engine = start()
    match = engine.half.match

    def match_then_break(request: Any, count: int) -> Any:
        answer = match(request, count)
        monkeypatch.setattr(ArtifactStore, "lookup", broken)
        return answer

    monkeypatch.setattr(engine.half, "match", match_then_break)
    assert engine.ask("b", PROMPT, head=HEAD)["source"] == "computed"
    engine.assert_at_rest()


def test_a_commit_that_fails_is_reported_without_another_request(
    start: Callable[[], Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = start()

    def full(*_: Any, **__: Any) -> Any:
        raise ArtifactStoreFull("a", "the disk is full")

    monkeypatch.setattr(ArtifactStore, "commit", full)
    engine.ask("a", PROMPT, head=HEAD)
    assert engine.counters["saves:failed"] == 1
    engine.assert_at_rest()
    # It is left alone for a while, and tried again later.
    engine.ask("b", PROMPT, head=HEAD)
    assert engine.counters["saves:failed"] == 1
    # A bake, which somebody asked for, tries at once.
    engine.ask("bake", PROMPT, head=HEAD, retry_save=True)
    assert engine.counters["saves:failed"] == 2
    monkeypatch.undo()
    saves = engine.half._saves
    now = saves._clock() + 31.0
    monkeypatch.setattr(saves, "_clock", lambda: now)
    engine.ask("c", PROMPT, head=HEAD)
    assert engine.counters["saves:ok"] == 1


def test_a_head_that_is_being_committed_is_not_saved_twice(
    start: Callable[[], Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = start()
    commit = open_store(engine).commit
    calls: list[int] = []
    proceed = threading.Event()

    def slow(*arguments: Any, **options: Any) -> Any:
        calls.append(1)
        proceed.wait(30)
        return commit(*arguments, **options)

    monkeypatch.setattr(open_store(engine), "commit", slow)
    engine.add("a", PROMPT, head=HEAD)
    for _ in range(8):
        engine.step()
    engine.add("b", PROMPT, head=HEAD)
    for _ in range(8):
        engine.step()
    proceed.set()
    engine.run()
    assert len(calls) == 1
    engine.assert_at_rest()


def test_everything_that_is_counted_has_a_metric(engine: Engine) -> None:
    names = {name.partition(":")[0] for name in engine.counters}
    assert names <= set(_COUNTERS)
    assert {"params_dropped", "tickets_rejected"} <= names
