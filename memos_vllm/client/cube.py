"""One MemCube: its memories, its tiers, and chats with it. Every call is written here once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, Literal, TypeAlias

import httpx

from memos_vllm.client.chat import AwaitedChat, BlockingChat
from memos_vllm.client.fields import Fields
from memos_vllm.client.flow import Listing, listing, operation
from memos_vllm.client.jobs import JOB_TIMEOUT_SECONDS, wait_for_job
from memos_vllm.client.objects import CubeInfo, JobInfo, Json, MemoryInfo, Page, page_of
from memos_vllm.client.plaintext import PlaintextCalls
from memos_vllm.client.session import Session
from memos_vllm.client.steps import Flow
from memos_vllm.client.wire import Call, encode_time, path_part
from memos_vllm.domain.patch import UNSET, Unset
from memos_vllm.errors import InvalidRequest

# A text, or a memory object of the API with at least "text".
MemoryInput: TypeAlias = str | Mapping[str, object]
MemoryIds: TypeAlias = Literal["all"] | Sequence[str]


def if_match(version: int | None) -> dict[str, str]:
    return {} if version is None else {"If-Match": str(version)}


def given(**fields: object) -> dict[str, object]:
    """The fields that were given, as JSON values."""
    return {
        name: encode_time(value, param=name) if isinstance(value, datetime) else value
        for name, value in fields.items()
        if value is not UNSET
    }


def raw_object(body: object) -> Json:
    return Fields(body, "object").raw


def nothing(_body: object) -> None:
    return None


class CubeCalls(PlaintextCalls):
    """The calls of a cube, as flows; `Cube` and `AsyncCube` run them."""

    id: str

    @property
    def _path(self) -> str:
        return f"/v1/memcubes/{path_part(self.id, 'cube')}"

    def _memory_path(self, memory_id: str) -> str:
        return f"{self._path}/memories/{path_part(memory_id, 'memory')}"

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.id!r})"

    @operation
    def info(self) -> Flow[CubeInfo]:
        """The cube as it is now."""
        return self._session.call(Call("GET", self._path, CubeInfo.from_json))

    @operation
    def update(
        self,
        *,
        name: str | Unset = UNSET,
        description: str | Unset = UNSET,
        preamble: str | Unset = UNSET,
        labels: Sequence[str] | Unset = UNSET,
        version: int | None = None,
    ) -> Flow[CubeInfo]:
        """Change what is given.

        Args:
            version: refuse with ApiStaleVersion unless the cube is at this version.
        """
        body = given(name=name, description=description, preamble=preamble, labels=labels)
        return self._session.call(self._patch(self._path, body, version, CubeInfo.from_json))

    @operation
    def delete(self, *, version: int | None = None) -> Flow[None]:
        """Delete the cube and everything compiled from it."""
        return self._session.call(Call("DELETE", self._path, nothing, headers=if_match(version)))

    @operation
    def stats(self) -> Flow[Json]:
        """Counts, tokens and bytes per tier, hits, and what prefill was saved."""
        return self._session.call(Call("GET", f"{self._path}/stats", raw_object))

    @operation
    def add(
        self,
        memories: MemoryInput | Sequence[MemoryInput],
        *,
        tags: Sequence[str] | None = None,
        source: Mapping[str, object] | None = None,
        labels: Sequence[str] | None = None,
        metadata: Mapping[str, object] | None = None,
        edges: Sequence[Mapping[str, object]] | None = None,
        expires_at: datetime | None = None,
        reason: str | None = None,
    ) -> Flow[list[MemoryInfo]]:
        """Add one memory or up to 1,000; all of them or none.

        Args:
            memories: a text, a memory object as in the API, or several of these.
            tags, source, labels, metadata, edges, expires_at: for each memory that does not
                bring its own.
            reason: why, for the history.
        Returns:
            The new memories, in the order given; a list also for a single one.
        """
        shared = {
            name: value
            for name, value in given(
                tags=tags,
                source=source,
                labels=labels,
                metadata=metadata,
                edges=edges,
                expires_at=expires_at,
            ).items()
            if value is not None
        }
        if isinstance(memories, str | Mapping):
            memories = [memories]
        items = [{**shared, **_as_memory(memory)} for memory in memories]
        call = Call(
            "POST",
            f"{self._path}/memories",
            lambda body: list(page_of(MemoryInfo.from_json)(body).items),
            body={"memories": items} | ({} if reason is None else {"reason": reason}),
        )
        return self._session.call(call)

    @listing
    def memories(
        self,
        *,
        state: str | None = None,
        tier: str | None = None,
        tag: str | None = None,
        query: str | None = None,
        limit: int | None = None,
    ) -> Listing[MemoryInfo]:
        """The cube's memories, fetched page by page as they are iterated over.

        Args:
            state: active, merged or archived; any when not given.
            tier: plaintext, activation or parametric; any when not given.
            query: only memories whose text holds these words.
            limit: at most this many in all.
        """

        def fetch(size: int, cursor: str | None) -> Flow[Page[MemoryInfo]]:
            query_fields = {
                "state": state,
                "tier": tier,
                "tag": tag,
                "q": query,
                "limit": size,
                "cursor": cursor,
            }
            path = f"{self._path}/memories"
            return self._session.call(
                Call("GET", path, page_of(MemoryInfo.from_json), query=query_fields)
            )

        return Listing(fetch, limit=limit)

    @operation
    def memory(self, memory_id: str) -> Flow[MemoryInfo]:
        """One memory."""
        return self._session.call(Call("GET", self._memory_path(memory_id), MemoryInfo.from_json))

    @operation
    def update_memory(
        self,
        memory_id: str,
        *,
        text: str | Unset = UNSET,
        tags: Sequence[str] | Unset = UNSET,
        source: Mapping[str, object] | Unset = UNSET,
        labels: Sequence[str] | Unset = UNSET,
        metadata: Mapping[str, object] | Unset = UNSET,
        edges: Sequence[Mapping[str, object]] | Unset = UNSET,
        expires_at: datetime | Unset | None = UNSET,
        reason: str | Unset = UNSET,
        version: int | None = None,
    ) -> Flow[MemoryInfo]:
        """Make a new version with what is given; what was compiled from the old one is stale.

        Args:
            expires_at: None removes the expiry.
            reason: why, for the history.
            version: refuse with ApiStaleVersion unless the memory is at this version.
        """
        body = given(
            text=text,
            tags=tags,
            source=source,
            labels=labels,
            metadata=metadata,
            edges=edges,
            expires_at=expires_at,
            reason=reason,
        )
        call = self._patch(self._memory_path(memory_id), body, version, MemoryInfo.from_json)
        return self._session.call(call)

    @operation
    def merge(
        self, memory_ids: Sequence[str], *, text: str | None = None, reason: str | None = None
    ) -> Flow[MemoryInfo]:
        """Put one new memory in the place of 2 to 256 active ones, with lineage both ways.

        Args:
            text: what it says; their texts, one below the other, when not given.
            reason: why, for the history.
        """
        body = {"memory_ids": list(memory_ids), "text": text, "reason": reason}
        call = Call(
            "POST",
            f"{self._path}/merge",
            MemoryInfo.from_json,
            body={name: value for name, value in body.items() if value is not None},
        )
        return self._session.call(call)

    @operation
    def archive(self, memory_id: str, *, version: int | None = None) -> Flow[MemoryInfo]:
        """Take a memory out of use; `restore` brings it back."""
        return self._move(memory_id, "archive", version)

    @operation
    def restore(self, memory_id: str, *, version: int | None = None) -> Flow[MemoryInfo]:
        """Bring an archived memory back."""
        return self._move(memory_id, "restore", version)

    @operation
    def erase(self, memory_id: str, *, version: int | None = None) -> Flow[None]:
        """Remove a memory's text, its history and all that was compiled from it, for good."""
        call = Call(
            "DELETE",
            self._memory_path(memory_id),
            nothing,
            query={"erase": "true"},
            headers=if_match(version),
        )
        return self._session.call(call)

    @listing
    def history(self, memory_id: str) -> Listing[Json]:
        """Every version of a memory: who, when, why."""
        path = f"{self._memory_path(memory_id)}/history"

        def fetch(size: int, cursor: str | None) -> Flow[Page[Json]]:
            query = {"limit": size, "cursor": cursor}
            return self._session.call(Call("GET", path, page_of(raw_object), query=query))

        return Listing(fetch)

    @listing
    def jobs(self, *, limit: int | None = None) -> Listing[JobInfo]:
        """The cube's jobs."""

        def fetch(size: int, cursor: str | None) -> Flow[Page[JobInfo]]:
            query = {"limit": size, "cursor": cursor}
            path = f"{self._path}/jobs"
            return self._session.call(Call("GET", path, page_of(JobInfo.from_json), query=query))

        return Listing(fetch, limit=limit)

    @listing
    def audit(self, *, limit: int | None = None) -> Listing[Json]:
        """The cube's audit entries, newest first."""

        def fetch(size: int, cursor: str | None) -> Flow[Page[Json]]:
            query = {"limit": size, "cursor": cursor}
            path = f"{self._path}/audit"
            return self._session.call(Call("GET", path, page_of(raw_object), query=query))

        return Listing(fetch, limit=limit)

    @operation
    def promote(
        self,
        memory_ids: MemoryIds = "all",
        *,
        to: str,
        wait: bool = False,
        timeout_seconds: float = JOB_TIMEOUT_SECONDS,
    ) -> Flow[JobInfo]:
        """Move memories to a hotter tier.

        Args:
            memory_ids: "all" for every active memory without labels.
            to: "activation" or "parametric".
            wait: return when the job has ended, not when it is queued.
            timeout_seconds: longest time to wait.
        Raises:
            JobFailed: waited for, and it failed or was cancelled.
            JobTimeout: waited for, and it is still going.
        """
        return self._move_tier("promote", {"to": to}, memory_ids, wait, timeout_seconds)

    @operation
    def demote(
        self,
        memory_ids: MemoryIds = "all",
        *,
        from_tier: str = "activation",
        wait: bool = False,
        timeout_seconds: float = JOB_TIMEOUT_SECONDS,
    ) -> Flow[JobInfo]:
        """Move memories back to plaintext; arguments and errors as of `promote`."""
        return self._move_tier("demote", {"from": from_tier}, memory_ids, wait, timeout_seconds)

    def _move(self, memory_id: str, verb: str, version: int | None) -> Flow[MemoryInfo]:
        path = f"{self._memory_path(memory_id)}/{verb}"
        return self._session.call(
            Call("POST", path, MemoryInfo.from_json, headers=if_match(version))
        )

    def _move_tier(
        self,
        verb: str,
        tier: Mapping[str, object],
        memory_ids: MemoryIds,
        wait: bool,
        timeout_seconds: float,
    ) -> Flow[JobInfo]:
        if isinstance(memory_ids, str) and memory_ids != "all":
            raise InvalidRequest(
                f"memory_ids is 'all' or a list of memory ids, not '{memory_ids}'",
                param="memory_ids",
            )
        chosen = memory_ids if isinstance(memory_ids, str) else list(memory_ids)
        call = Call(
            "POST",
            f"{self._path}/{verb}",
            JobInfo.from_json,
            body={**tier, "memory_ids": chosen},
        )
        job = yield from self._session.call(call)
        if not wait:
            return job
        return (yield from wait_for_job(self._session, job, timeout_seconds=timeout_seconds))

    @staticmethod
    def _patch(path: str, body: dict[str, object], version: int | None, parse: Any) -> Call[Any]:
        # A PATCH whose answer was lost has made a version already; a repeat would make another.
        return Call("PATCH", path, parse, body=body, headers=if_match(version), repeatable=False)


class Cube(CubeCalls, BlockingChat):
    """A handle of one MemCube; made by `MOS.cube` and `MOS.create_cube`."""

    def __init__(self, cube_id: str, session: Session, http: httpx.Client) -> None:
        super().__init__(session, http)
        self.id = cube_id

    def _chat_cubes(self, cubes: Sequence[str]) -> Sequence[str]:
        return (self.id, *cubes)


class AsyncCube(CubeCalls, AwaitedChat):
    """Cube, awaited."""

    def __init__(self, cube_id: str, session: Session, http: httpx.AsyncClient) -> None:
        super().__init__(session, http)
        self.id = cube_id

    def _chat_cubes(self, cubes: Sequence[str]) -> Sequence[str]:
        return (self.id, *cubes)


def _as_memory(memory: MemoryInput) -> dict[str, object]:
    if isinstance(memory, str):
        return {"text": memory}
    if not isinstance(memory, Mapping):
        raise InvalidRequest(
            f"a memory is a text or an object with 'text', not {type(memory).__name__}",
            param="memories",
        )
    return given(**memory)
