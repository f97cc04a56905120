"""Calls of `Mos` from other processes: each change happens once."""

from __future__ import annotations

import ast
import inspect
import pickle
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
from catalog_kit import ADMIN, Desk, open_desk
from sqlalchemy import text

from memos_vllm import errors
from memos_vllm.control import calls, mos, scheduler
from memos_vllm.control.calls import (
    Call,
    CallKey,
    Delivery,
    Remote,
    asked_under,
    delivery_of,
    perform,
)
from memos_vllm.control.mos import Mos
from memos_vllm.control.snapshots import GRACE_SECONDS, Snapshots
from memos_vllm.domain.access import Principal
from memos_vllm.domain.ids import PrincipalId
from memos_vllm.domain.memory import NewMemory, Tier
from memos_vllm.domain.turn import NewTurn
from memos_vllm.errors import Conflict, NotFound, StaleVersion, Unavailable

ANN = Principal(PrincipalId("ann"))
KEY = CallKey("local", "k", "f", 60.0)


@pytest.fixture
def desk(tmp_path: Path) -> Iterator[Desk]:
    with open_desk(tmp_path) as opened:
        yield opened


def delivered_twice(target: Mos) -> Mos:
    """`Mos` behind a carrier that delivers every call a second time, and returns that answer."""

    def send(call: Call, _: Delivery) -> calls.Outcome:
        first = perform(target, call)
        second = perform(target, call)
        assert second.value == first.value
        return second

    return cast(Mos, Remote(Mos, send=send, stream=lambda call: iter(())))


def test_a_change_that_is_delivered_twice_happens_once_and_gives_the_same_result(
    desk: Desk,
) -> None:
    remote = delivered_twice(desk.mos)
    cube = remote.create_cube(ADMIN, cube_id="acme", labels=["x"])
    assert cube == desk.mos.get_cube(ADMIN, "acme")
    added = remote.add_memories(
        ADMIN,
        "acme",
        [NewMemory(text="one", metadata={"deep": [1, {"x": None}]}), NewMemory("two")],
    )
    assert [one.text for one in desk.mos.list_memories(ADMIN, "acme").items] == ["one", "two"]
    turns, job = remote.remember_turn(
        ADMIN, "acme", [NewTurn("user", "hi")], session_id="s", read=True
    )
    assert job is not None
    assert job == desk.mos.get_job(ADMIN, job.id)
    assert len(desk.mos.list_memories(ADMIN, "acme").items) == 2 + len(turns)
    merged = remote.merge_memories(ADMIN, "acme", [one.id for one in added])
    assert merged == desk.mos.get_memory(ADMIN, "acme", merged.id)
    promoted = remote.promote(ADMIN, "acme", to=Tier.ACTIVATION, memory_ids=[merged.id])
    assert promoted == desk.mos.get_job(ADMIN, promoted.id)
    erased = remote.erase_memory(ADMIN, "acme", turns[0].id, tombstone_key=b"k" * 32)
    assert erased.id == turns[0].id
    assert remote.delete_cube(ADMIN, "acme").id == "acme"
    assert desk.mos.verify_audit().ok


def test_a_refused_change_leaves_its_key_free(desk: Desk) -> None:
    call = Call("create_cube", (ADMIN,), {"cube_id": "c"}, KEY)
    with pytest.raises(Conflict):
        perform(desk.mos, call)
    other = replace(call, kwargs={"cube_id": "d"})
    assert perform(desk.mos, other).value.id == "d"
    assert perform(desk.mos, other).repeated


def test_a_change_and_its_result_are_committed_together_or_not_at_all(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*_: object) -> bytes:
        raise RuntimeError("killed here")

    call = Call("create_cube", (ADMIN,), {"cube_id": "acme"}, KEY)
    with monkeypatch.context() as patch:
        patch.setattr("memos_vllm.control.idempotency.encode_result", killed)
        with pytest.raises(RuntimeError, match="killed here"):
            perform(desk.mos, call)
    with pytest.raises(NotFound):
        desk.mos.get_cube(ADMIN, "acme")
    assert not perform(desk.mos, call).repeated
    assert perform(desk.mos, call).repeated
    assert desk.mos.verify_audit().ok


def test_what_was_erased_is_in_no_kept_result(desk: Desk) -> None:
    remote = delivered_twice(desk.mos)
    (memory,) = remote.add_memories(ADMIN, "c", [NewMemory("marker-8431")])
    remote.erase_memory(ADMIN, "c", memory.id, tombstone_key=b"k" * 32)
    with desk.mos._catalog.read() as session:
        bodies = session.execute(text("SELECT body FROM idempotency")).scalars().all()
    assert bodies
    assert not any(b"marker-8431" in body for body in bodies if body is not None)


def test_kept_results_go_when_their_time_is_over(desk: Desk) -> None:
    remote = delivered_twice(desk.mos)
    remote.add_memories(ADMIN, "c", [NewMemory("one")])
    desk.clock.advance(seconds=3600)
    remote.add_memories(ADMIN, "c", [NewMemory("two")])
    with desk.mos._catalog.read() as session:
        assert session.execute(text("SELECT count(*) FROM idempotency")).scalar() == 1


def test_a_clients_key_names_the_one_change_within_its_block(desk: Desk) -> None:
    remote = delivered_twice(desk.mos)
    with asked_under(KEY) as asked:
        remote.get_cube(ADMIN, "c")
        remote.create_cube(ADMIN, cube_id="acme")
        with pytest.raises(AssertionError):
            remote.create_cube(ADMIN, cube_id="other")
    assert asked.repeated


def _writing_methods(kind: type) -> set[str]:
    """Public methods whose source opens a transaction that writes."""
    found = set()
    for name, method in inspect.getmembers(kind, inspect.isfunction):
        if name.startswith("_") or name in ("run_once",):
            continue
        source = inspect.cleandoc("\n" + inspect.getsource(method))
        tree = ast.parse(inspect.cleandoc(source) if source.startswith(" ") else source)
        calls_made = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
        if {"_catalog"} <= calls_made and calls_made & {"write", "together"}:
            found.add(name)
    return found


@pytest.mark.parametrize("kind", [mos.Mos, scheduler.PromotionScheduler])
def test_every_method_that_writes_says_what_a_second_delivery_may_do(kind: type) -> None:
    writing = _writing_methods(kind)
    assert len(writing) > 5
    unmarked = {name for name in writing if delivery_of(getattr(kind, name)) is Delivery.READ}
    assert not unmarked


def test_only_public_methods_can_be_called_from_afar(desk: Desk) -> None:
    remote: Any = delivered_twice(desk.mos)
    for name in ("_catalog", "no_such_method"):
        with pytest.raises(AttributeError):
            getattr(remote, name)


@pytest.mark.parametrize(
    "error",
    [
        NotFound("memcube", "x"),
        StaleVersion(expected=1, found=2),
        Unavailable("down", retry_after_seconds=7),
        errors.ContextTooLong(memory_tokens=9, max_model_len=8),
    ],
)
def test_errors_keep_their_fields_on_the_way_to_another_process(error: Exception) -> None:
    arrived = pickle.loads(pickle.dumps(error))
    assert type(arrived) is type(error)
    assert str(arrived) == str(error)
    assert vars(arrived) == vars(error)


class FlakyMos:
    """`Mos` that can be taken away."""

    def __init__(self, desk: Desk) -> None:
        self.desk = desk
        self.down = self.slow = False
        self.sent = 0

    def is_down(self) -> bool:
        return self.down

    def changed_snapshots(self, *args: Any, **kwargs: Any) -> Any:
        if self.down or self.slow:
            raise Unavailable("Mos does not answer")
        found = self.desk.mos.changed_snapshots(*args, **kwargs)
        self.sent += sum(one is not None for one in found)
        return found


def test_a_change_that_comes_too_late_is_not_made(desk: Desk) -> None:
    """To a Mos that was cut off: what the one in its place did under the key is forgotten then."""
    late = time.time() - 91
    for method, key in (("create_cube", KEY), ("sweep_imports", None)):
        with pytest.raises(Unavailable, match="was delivered 91 s after it was sent"):
            perform(desk.mos, Call(method, (ADMIN,), {"cube_id": "late"}, key, sent_at=late))
    with pytest.raises(NotFound):
        desk.mos.get_cube(ADMIN, "late")
    # A reading is right whenever it is done.
    shown = perform(desk.mos, Call("get_cube", (ADMIN, "c"), sent_at=late))
    assert shown.value.id == "c"


def test_snapshots_travel_only_when_they_changed(desk: Desk) -> None:
    flaky = FlakyMos(desk)
    kept = Snapshots(cast(Mos, flaky), is_down=flaky.is_down)
    desk.add("one")
    desk.promote()
    for _ in range(3):
        assert [one.text for one in kept.get(ADMIN, ["c"])[0].memories] == ["one"]
    assert flaky.sent == 1
    desk.add("two")
    desk.promote()
    assert len(kept.get(ADMIN, ["c"])[0].memories) == 2
    assert flaky.sent == 2


def test_a_chat_goes_on_for_a_while_when_mos_is_down_and_only_with_what_was_allowed(
    desk: Desk,
) -> None:
    flaky, now = FlakyMos(desk), [1000.0]
    kept = Snapshots(cast(Mos, flaky), is_down=flaky.is_down, monotonic=lambda: now[0])
    kept.get(ADMIN, ["c"])
    flaky.down = True
    now[0] += GRACE_SECONDS - 1
    assert kept.get(ADMIN, ["c"])[0].id == "c"
    # Who was never allowed is not now.
    with pytest.raises(Unavailable):
        kept.get(ANN, ["c"])
    now[0] += 2
    with pytest.raises(Unavailable):
        kept.get(ADMIN, ["c"])


def test_a_mos_that_is_only_slow_decides_all_the_same(desk: Desk) -> None:
    """It may have taken the right back a moment ago."""
    flaky = FlakyMos(desk)
    kept = Snapshots(cast(Mos, flaky), is_down=flaky.is_down)
    kept.get(ADMIN, ["c"])
    flaky.slow = True
    with pytest.raises(Unavailable):
        kept.get(ADMIN, ["c"])


def test_a_mos_that_is_back_by_now_is_asked_again(desk: Desk) -> None:
    flaky = FlakyMos(desk)

    def has_come_back() -> bool:
        flaky.slow = False
        return False

    kept = Snapshots(cast(Mos, flaky), is_down=has_come_back)
    kept.get(ADMIN, ["c"])
    flaky.slow = True
    assert kept.get(ADMIN, ["c"])[0].id == "c"
    desk.mos.delete_cube(ADMIN, "c")
    flaky.slow = True
    with pytest.raises(NotFound):
        kept.get(ADMIN, ["c"])


def test_what_mos_has_forbidden_does_not_come_back_when_it_is_down(desk: Desk) -> None:
    flaky = FlakyMos(desk)
    kept = Snapshots(cast(Mos, flaky), is_down=flaky.is_down)
    kept.get(ADMIN, ["c"])
    desk.mos.delete_cube(ADMIN, "c")
    with pytest.raises(NotFound):
        kept.get(ADMIN, ["c"])
    flaky.down = True
    with pytest.raises(Unavailable):
        kept.get(ADMIN, ["c"])


def test_a_cube_that_no_chat_names_any_more_is_forgotten_within_the_grace(desk: Desk) -> None:
    """Another server may have erased something of it."""
    flaky, now = FlakyMos(desk), [1000.0]
    kept = Snapshots(cast(Mos, flaky), is_down=flaky.is_down, monotonic=lambda: now[0])
    desk.mos.create_cube(ADMIN, cube_id="d")
    kept.get(ADMIN, ["c", "d"])
    now[0] += GRACE_SECONDS - 1
    kept.get(ADMIN, ["d"])
    kept.sweep()
    assert flaky.sent == 2
    now[0] += 2
    # That a chat went on without Mos confirms nothing.
    flaky.down = True
    kept.get(ADMIN, ["d"])
    kept.sweep()
    assert list(kept._held) == list(kept._confirmed) == ["d"]
    now[0] += GRACE_SECONDS
    kept.sweep()
    assert not kept._held


def test_what_one_server_keeps_of_cubes_is_bounded(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("memos_vllm.control.snapshots.MAX_CUBES", 3)
    kept = Snapshots(desk.mos, is_down=lambda: False)
    for number in range(7):
        desk.mos.create_cube(ADMIN, cube_id=f"n{number}")
        kept.get(ADMIN, [f"n{number}"])
    assert len(kept._held) == 3
    kept.drop("n6")
    assert len(kept._held) == 2
    assert kept.get(ADMIN, ["n0"])[0].id == "n0"
