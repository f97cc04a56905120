"""Users, agents and sessions as cubes, by a convention of names.

    user.ANN        what is private to one user, over all sessions
    agent.PLANNER   the same of an agent
    session.ID      one conversation or task, while it goes on
    anything else   a domain: what several of them share, such as a handbook

A session chats over its domains, its user's cube and its own, in this order: the domain's memory
stands in attention first, so that everyone shares it. What is said goes to the session's own cube;
when it is closed, what is worth keeping goes over to the user's, with lineage.
"""

from __future__ import annotations

import re
import uuid
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Literal, Self, cast

import httpx

from memos_vllm.client.chat import Remember
from memos_vllm.client.cube import AsyncCube, Cube, CubeCalls, keep_call
from memos_vllm.client.errors import ApiConflict
from memos_vllm.client.flow import operation
from memos_vllm.client.objects import CubeInfo, MemoryInfo, page_of
from memos_vllm.client.session import Session
from memos_vllm.client.steps import Flow
from memos_vllm.client.wire import Call, path_part
from memos_vllm.errors import InvalidRequest

Kind = Literal["user", "agent", "session"]

_NAME = re.compile(r"[a-z0-9._-]{1,55}")
_PAGE = 1000


def cube_id_of(kind: Kind, name: str) -> str:
    """The id of somebody's cube.

    Raises:
        InvalidRequest: no id can be made of the name.
    """
    if _NAME.fullmatch(name) is None:
        raise InvalidRequest(
            f"the name of a {kind} is 1 to 55 of a-z, 0-9, '.', '_' and '-', so that it can be "
            "part of a cube's id; map other names to such ones",
            param="name",
        )
    return f"{kind}.{name}"


def ensure_cube(session: Session, cube_id: str) -> Flow[None]:
    """Make a cube unless it is there."""
    call = Call("POST", "/v1/memcubes", CubeInfo.from_json, body={"id": cube_id})
    try:
        yield from session.call(call)
    except ApiConflict:
        # Whether it may be used, its first use tells.
        return


def worth_keeping(memory: MemoryInfo) -> bool:
    """Facts, notes, and the user's own words; not what the assistant said, nor plain questions."""
    role = memory.metadata.get("role")
    return role is None or (role == "user" and not memory.text.rstrip().endswith("?"))


class SessionCalls(CubeCalls):
    """The calls of a session, as flows; it is a handle of the session's own cube as well.

    Attributes:
        user_cube_id: where `close` keeps what is worth it.
        domain_ids: cubes that come first in every chat, the first one's memory in attention.
    """

    user_cube_id: str
    domain_ids: tuple[str, ...]

    @operation
    def close(
        self,
        *,
        keep: Callable[[MemoryInfo], bool] = worth_keeping,
        forget: bool = False,
    ) -> Flow[list[MemoryInfo]]:
        """Have the user's cube keep what is worth it; doing it again adds only what is new.

        Args:
            keep: says which of the session's active memories.
            forget: delete the session's cube afterwards. What was kept stays, without its lineage.
        Returns:
            The user's memories.
        """
        chosen: list[str] = []
        cursor: str | None = None
        while True:
            page = yield from self._session.call(
                Call(
                    "GET",
                    f"{self._path}/memories",
                    page_of(MemoryInfo.from_json),
                    query={"state": "active", "limit": _PAGE, "cursor": cursor},
                )
            )
            chosen += [memory.id for memory in page.items if keep(memory)]
            if (cursor := page.next_cursor) is None:
                break
        kept: list[MemoryInfo] = []
        user_path = f"/v1/memcubes/{path_part(self.user_cube_id, 'cube')}"
        for start in range(0, len(chosen), _PAGE):
            part = chosen[start : start + _PAGE]
            kept += yield from self._session.call(
                keep_call(user_path, part, from_cube=self.id, reason="a session was closed")
            )
        if forget:
            yield from self._session.call(Call("DELETE", self._path, lambda _: None))
        return kept

    def _name(self, user_cube_id: str, domain_ids: Sequence[str]) -> None:
        self.user_cube_id = user_cube_id
        self.domain_ids = tuple(domain_ids)

    def _chat_cubes(self, cubes: Sequence[str]) -> Sequence[str]:
        return (*self.domain_ids, self.user_cube_id, self.id, *cubes)

    def _remembering(self, remember: Remember) -> Remember:
        """Everything that is said in a session is kept in it."""
        mode = remember if isinstance(remember, str) else "fast"
        return {"mode": mode, "into": self.id}


class CubeSession(SessionCalls, Cube):
    """A session; made by `MOS.open_session`. Leaving a `with` block closes it, unless it raised."""

    def __init__(
        self, names: tuple[str, str, Sequence[str]], session: Session, http: httpx.Client
    ) -> None:
        session_id, user_cube_id, domain_ids = names
        super().__init__(session_id, session, http)
        self._name(user_cube_id, domain_ids)

    def _handle(self, cube_id: str) -> Self:
        # A copy of the session's cube is no session.
        return cast(Self, Cube(cube_id, self._session, self._http))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is None:
            self.close()


class AsyncCubeSession(SessionCalls, AsyncCube):
    """CubeSession, awaited."""

    def __init__(
        self, names: tuple[str, str, Sequence[str]], session: Session, http: httpx.AsyncClient
    ) -> None:
        session_id, user_cube_id, domain_ids = names
        super().__init__(session_id, session, http)
        self._name(user_cube_id, domain_ids)

    def _handle(self, cube_id: str) -> Self:
        return cast(Self, AsyncCube(cube_id, self._session, self._http))

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is None:
            await self.close()


def session_names(
    user: str, domains: Sequence[str], session_id: str | None
) -> tuple[str, str, tuple[str, ...]]:
    """Ids of the session's cube, of the user's, and of the domains'."""
    if isinstance(domains, str):
        domains = (domains,)
    own = cube_id_of("session", session_id or uuid.uuid4().hex)
    return own, cube_id_of("user", user), tuple(domains)
