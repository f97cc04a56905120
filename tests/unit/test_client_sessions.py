"""Sessions over a user's cube and domains, through both clients, against the real routes."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from live_server import LiveServer, live_server

from memos_vllm import MOS, ApiError, AsyncMOS
from memos_vllm.client import MemoryInfo
from memos_vllm.client.sessions import cube_id_of
from memos_vllm.errors import InvalidRequest

TALK = [
    {"role": "user", "content": "I moved to Leeds."},
    {"role": "assistant", "content": "Noted, Leeds it is."},
]


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    with live_server(tmp_path_factory.mktemp("sessions")) as server:
        yield server


@pytest.fixture
def mos(live: LiveServer) -> Iterator[MOS]:
    with MOS(live.url) as client:
        yield client


def texts(memories: list[MemoryInfo]) -> list[str]:
    return [memory.text for memory in memories]


def test_a_session_chats_over_its_domain_its_user_and_itself(live: LiveServer, mos: MOS) -> None:
    session = mos.open_session("ann", domains=["handbook"], session_id="s1")
    session.chat("Where do I live?")
    assert live.chats[-1]["memcube_id"] == ["handbook", "user.ann", "session.s1"]
    assert live.chats[-1]["memos"]["remember"] == {"mode": "fast", "into": "session.s1"}
    session.chat("And now?", remember="fine")
    assert live.chats[-1]["memos"]["remember"] == {"mode": "fine", "into": "session.s1"}


def test_closing_a_session_has_the_user_keep_all_but_the_assistants_words(mos: MOS) -> None:
    with mos.open_session("ben") as session:
        session.add_turns(TALK, session_id="t")
        session.add("Ben prefers mail.")
    kept = list(mos.cube("user.ben").memories())
    assert set(texts(kept)) == {"I moved to Leeds.", "Ben prefers mail."}
    assert all(memory.raw["lineage"]["derived_from"] for memory in kept)
    # Again, as after a crash in between.
    session.close()
    assert len(list(mos.cube("user.ben").memories())) == 2


def test_what_is_worth_keeping_is_the_callers_choice_and_the_rest_may_be_forgotten(
    mos: MOS,
) -> None:
    session = mos.open_session("cid")
    session.add(["keep me", "not me"])
    kept = session.close(keep=lambda memory: memory.text == "keep me", forget=True)
    assert texts(kept) == ["keep me"]
    with pytest.raises(ApiError):
        session.info()
    assert texts(list(mos.cube("user.cid").memories())) == ["keep me"]


def test_a_session_that_fails_keeps_nothing_and_can_be_opened_again(mos: MOS) -> None:
    def fail() -> None:
        with mos.open_session("dee", session_id="s9") as session:
            session.add("half a thought")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert list(mos.cube("user.dee").memories()) == []
    with mos.open_session("dee", session_id="s9"):
        pass
    assert texts(list(mos.cube("user.dee").memories())) == ["half a thought"]


def test_cubes_of_users_and_agents_are_made_once(mos: MOS) -> None:
    mos.agent_cube("planner").add("step one")
    assert mos.agent_cube("planner").info().id == "agent.planner"
    assert texts(list(mos.agent_cube("planner").memories())) == ["step one"]
    assert mos.user_cube("eve").info().id == "user.eve"


@pytest.mark.parametrize("name", ["", "Ann", "a b", "x" * 56, "ä"])
def test_a_name_that_makes_no_id_is_refused(name: str) -> None:
    with pytest.raises(InvalidRequest, match="the name of a user"):
        cube_id_of("user", name)


async def test_the_awaited_client_has_the_same_sessions(live: LiveServer) -> None:
    async with AsyncMOS(live.url) as mos:
        async with await mos.open_session("fay", domains="handbook") as session:
            await session.chat("Hello")
            await session.add("Fay rides a bike.")
        kept = [memory.text async for memory in (await mos.user_cube("fay")).memories()]
    assert kept == ["Fay rides a bike."]
