"""The examples of deploy/examples on a real server with keys: who is told what, and who is not."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from cube_kit import BLOCK_TOKENS, fresh_id, keys_command

import planning_agents as agents
import support_assistant as support
from memos_vllm import MOS, ApiError
from memos_vllm.client import ChatMemos, ChatReply
from memos_vllm.process import ServerProcess

EXAMPLES = Path(support.__file__).parent
SECRET = "My order is 4711 and I want it delivered to my sister in Leeds."
QUESTION = "Where do I want my order delivered?"


@pytest.fixture(scope="module")
def guarded(
    start_server: Callable[..., ServerProcess], tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, str]:
    """A server that had a key before its first start: its URL, and the administrator's key."""
    data_dir = tmp_path_factory.mktemp("scenarios")
    key: str = keys_command(data_dir, "create", "ops")["key"]
    return start_server(data_dir=data_dir).url, key


@pytest.fixture
def admin(guarded: tuple[str, str]) -> Iterator[MOS]:
    with MOS(*guarded) as mos:
        yield mos


@pytest.fixture
def customers(admin: MOS) -> dict[str, str]:
    """Two customers that no other test knows, with their keys."""
    support.make_handbook(admin)
    return {name: support.admit(admin, name) for name in (fresh_id("ann"), fresh_id("ben"))}


def memos_of(reply: ChatReply) -> ChatMemos:
    assert reply.memos is not None
    return reply.memos


def found_ids(replies: list[ChatReply]) -> set[str]:
    return {found.id for reply in replies for found in memos_of(reply).retrieved}


def status_of(call: Callable[[], object]) -> int:
    with pytest.raises(ApiError) as refused:
        call()
    return refused.value.status_code


def test_what_a_customer_said_is_found_in_their_next_session_and_by_nobody_else(
    guarded: tuple[str, str], admin: MOS, customers: dict[str, str]
) -> None:
    url, _ = guarded
    (ann, ann_key), (ben, ben_key) = customers.items()

    support.talk(url, ann_key, ann, SECRET)
    (kept,) = admin.cube(f"user.{ann}").memories()
    # Admitted again, as by another run of the script.
    later = support.talk(url, support.admit(admin, ann), ann, QUESTION)
    others = support.talk(url, ben_key, ben, QUESTION, "What is order 4711?")

    assert kept.text == SECRET
    (origin,) = kept.raw["lineage"]["derived_from"]
    sessions = [cube.id for cube in admin.cubes() if cube.id.startswith("session.")]
    (first,) = [
        cube_id
        for cube_id in sessions
        if origin in {memory.id for memory in admin.cube(cube_id).memories()}
    ]
    assert kept.id in found_ids(later)
    # Not from the session in which it was said, which the later one does not name.
    assert origin not in found_ids(later)
    assert found_ids(others).isdisjoint({kept.id, origin})
    for reply in others:
        assert {cube for cube, _ in memos_of(reply).cubes}.isdisjoint({f"user.{ann}", first})

    with MOS(url, ben_key) as as_ben:
        readable = {cube.id for cube in as_ben.cubes()}
        assert {support.HANDBOOK, f"user.{ben}"} <= readable
        assert readable.isdisjoint({f"user.{ann}", first})
        for hidden in (f"user.{ann}", first):
            for call in (
                as_ben.get_cube,
                lambda cube_id: as_ben.cube(cube_id).search("order 4711"),
                lambda cube_id: list(as_ben.cube(cube_id).memories()),
                lambda cube_id: as_ben.cube(cube_id).add("Mine now."),
                lambda cube_id: as_ben.cube(cube_id).chat(QUESTION),
                lambda cube_id: as_ben.cube(f"user.{ben}").keep("all", from_cube=cube_id),
            ):
                assert status_of(lambda call=call, hidden=hidden: call(hidden)) == 404
        # The same words for what is another's and for what is nobody's.
        texts = {
            support.try_to_read(url, ben_key, name, QUESTION).replace(name, "it")
            for name in (f"user.{ann}", "user.nobody-at-all")
        }
        assert len(texts) == 1
        assert texts.pop().startswith("404 ")
    assert SECRET not in {memory.text for memory in admin.cube(f"user.{ben}").memories()}


def test_customers_share_the_handbooks_kv_and_cannot_write_to_it(
    guarded: tuple[str, str], customers: dict[str, str]
) -> None:
    url, _ = guarded
    alone, opening, following = [], [], []
    for name, key in customers.items():
        with MOS(url, key) as mos:
            handbook = mos.cube(support.HANDBOOK)
            reply = handbook.chat(QUESTION, options={"max_tokens": 4})
            alone.append(memos_of(reply).activation)
            assert status_of(lambda handbook=handbook: handbook.add("Refunds are instant.")) == 404
        first, second = support.talk(url, key, name, QUESTION, "And how long does it take?")
        opening.append(memos_of(first).activation)
        following.append(memos_of(second).activation)

    # The same blocks for all who name the handbook alone; a session, of which nobody else may see
    # so much as the time that it takes, has its own, which come from the one artifact.
    assert [use.source for use in alone] == ["resident", "resident"]
    assert [use.source for use in opening] == ["store", "store"]
    assert [use.source for use in following] == ["resident", "resident"]
    ((tokens, cached),) = {
        (use.tokens, use.cached_tokens) for use in (*alone, *opening, *following)
    }
    assert tokens - BLOCK_TOKENS < cached <= tokens


def test_a_worker_reads_each_step_at_once_writes_none_and_is_out_when_its_grant_is(
    guarded: tuple[str, str], admin: MOS
) -> None:
    url, _ = guarded
    keys = {agent: agents.admit(admin, agent) for agent in (agents.PLANNER, agents.WORKER)}
    plan_id = agents.make_plan(admin)
    with MOS(url, keys[agents.PLANNER]) as planner, MOS(url, keys[agents.WORKER]) as worker:
        steps = []
        for text, question in (
            ("Step 1: order the removal van for the third of May.", "When does the van come?"),
            ("Step 2: label every desk with its room number.", "What is done with the desks?"),
        ):
            steps.append(agents.write_step(planner, plan_id, text))
            assert text in agents.read_steps(worker, plan_id, question)
            reply = agents.work(worker, plan_id, question)
            assert steps[-1].id in found_ids([reply])
            remembered = memos_of(reply).remembered
            assert remembered is not None
            own = {memory.id for memory in worker.cube(agents.WORKER).memories()}
            assert set(remembered.memory_ids) <= own

        plan = worker.cube(plan_id)
        version = worker.get_cube(plan_id).version
        for write in (
            lambda: agents.write_step(worker, plan_id, "Step 3: a day off."),
            lambda: plan.update_memory(steps[0].id, text="Step 1: nothing."),
            lambda: plan.archive(steps[0].id),
            lambda: plan.erase(steps[0].id),
            lambda: plan.merge([step.id for step in steps]),
            lambda: plan.promote("all", to="activation"),
            lambda: plan.add_turns([{"role": "user", "content": "A day off."}]),
            lambda: plan.keep("all", from_cube=agents.WORKER),
            lambda: plan.chat("A day off?", remember=True),
            lambda: plan.share(agents.WORKER, role="editor"),
            lambda: worker.delete_cube(plan_id),
        ):
            assert status_of(write) == 404
        assert worker.get_cube(plan_id).version == version
        assert [memory.text for memory in plan.memories()] == [step.text for step in steps]
        # What the worker keeps for itself is not the planner's to see.
        assert status_of(lambda: planner.get_cube(agents.WORKER)) == 404

        admin.cube(plan_id).unshare(agents.WORKER)
        for call in (
            lambda: agents.read_steps(worker, plan_id, "van"),
            lambda: agents.work(worker, plan_id, "What about the van?"),
            lambda: list(plan.memories()),
            lambda: worker.get_cube(plan_id),
        ):
            assert status_of(call) == 404
        assert agents.read_steps(planner, plan_id, steps[0].text)[0] == steps[0].text

    log = [(row["actor"], row["action"], row["subject"]) for row in admin.cube(plan_id).audit()]
    assert log[::-1] == [
        ("ops", "cube.create", None),
        ("ops", "grant.put", agents.PLANNER),
        ("ops", "grant.put", agents.WORKER),
        *[(agents.PLANNER, "memory.add", step.id) for step in steps],
        ("ops", "grant.delete", agents.WORKER),
    ]
    assert admin.verify_audit()["ok"]


@pytest.mark.parametrize("script", ["support_assistant.py", "planning_agents.py"])
def test_an_example_runs_as_a_script(guarded: tuple[str, str], script: str) -> None:
    url, key = guarded
    environment = {**os.environ, "MEMOS_URL": url, "MEMOS_API_KEY": key}
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / script)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert ": 404 " in done.stdout
