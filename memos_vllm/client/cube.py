"""One MemCube: its memories, its tiers, and chats with it. Every call is written here once."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, Literal, Self, TypeAlias

import httpx

from memos_vllm.client.audit import aexport_parts, audit_listing, audit_query, export_parts
from memos_vllm.client.cartridge import CubeArrival, FilePath, OnBytes, download
from memos_vllm.client.chat import AwaitedChat, BlockingChat
from memos_vllm.client.flow import Listing, listing, operation
from memos_vllm.client.jobs import JOB_TIMEOUT_SECONDS, wait_for_job
from memos_vllm.client.objects import (
    CubeInfo,
    ErasedInfo,
    GrantInfo,
    JobInfo,
    Json,
    MemoryInfo,
    Page,
    page_of,
    raw_object,
)
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


def nothing(_body: object) -> None:
    return None


class CubeCalls(PlaintextCalls):
    """The calls of a cube, as flows; `Cube` and `AsyncCube` run them."""

    id: str
    arrival: CubeArrival | None

    @abstractmethod
    def _handle(self, cube_id: str) -> Self:
        """A handle of another cube."""

    @property
    def _path(self) -> str:
        return f"/v1/memcubes/{path_part(self.id, 'cube')}"

    def _memory_path(self, memory_id: str) -> str:
        return f"{self._path}/memories/{path_part(memory_id, 'memory')}"

    def _grant_path(self, principal: str) -> str:
        return f"{self._path}/grants/{path_part(principal, 'principal')}"

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
    def export(
        self,
        path: FilePath,
        *,
        include: Sequence[str] | None = None,
        on_bytes: OnBytes | None = None,
    ) -> Flow[Path]:
        """Write the cube to a `.memcube` file, which appears once it is whole and verified.

        Args:
            include: plaintext, activation, parametric; everything when not given.
            on_bytes: told how many bytes were received.
        Returns:
            The file's path.
        """
        return download(self._session, self._path, path, include=include, on_bytes=on_bytes)

    @operation
    def clone(self, cube_id: str, *, name: str | None = None) -> Flow[Self]:
        """A copy under another id, with memories under new ids; `arrival` has both."""
        body = {"id": cube_id} | ({} if name is None else {"name": name})
        call = Call("POST", f"{self._path}/clone", CubeArrival.from_json, body=body, slow=True)
        arrival = yield from self._session.call(call)
        copy = self._handle(arrival.info.id)
        copy.arrival = arrival
        return copy

    @operation
    def move(self, owner: str) -> Flow[CubeInfo]:
        """Make another principal the owner."""
        call = Call("POST", f"{self._path}/move", CubeInfo.from_json, body={"owner": owner})
        return self._session.call(call)

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
            memories_of,
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
    def keep(
        self, memory_ids: MemoryIds, *, from_cube: str, reason: str | None = None
    ) -> Flow[list[MemoryInfo]]:
        """Take memories over from another cube, such as a session's, with lineage.

        Args:
            memory_ids: active memories of that cube, at most 1,000; "all" that this key may see.
        Returns:
            This cube's memories; what it said already is not added again.
        """
        return self._session.call(
            keep_call(self._path, memory_ids, from_cube=from_cube, reason=reason)
        )

    @operation
    def archive(self, memory_id: str, *, version: int | None = None) -> Flow[MemoryInfo]:
        """Take a memory out of use; `restore` brings it back."""
        return self._move(memory_id, "archive", version)

    @operation
    def restore(self, memory_id: str, *, version: int | None = None) -> Flow[MemoryInfo]:
        """Bring an archived memory back."""
        return self._move(memory_id, "restore", version)

    @operation
    def erase(self, memory_id: str, *, version: int | None = None) -> Flow[ErasedInfo | None]:
        """Remove a memory's text, its history and all that was compiled from it, for good.

        The text is gone on return. The job that is named removes what it led to elsewhere, and
        proves it: `mos.wait_for_job(erased.job_id).proofs`.

        Returns:
            None when only the answer was lost and a second try found that it was done; the job is
            among the cube's.
        """
        call = Call(
            "DELETE",
            self._memory_path(memory_id),
            lambda body: None if body is None else ErasedInfo.from_json(body),
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

    @operation
    def share(self, principal: str, *, role: str, labels: Sequence[str] = ()) -> Flow[GrantInfo]:
        """Give a principal a role on the cube, in the place of the one it had.

        Args:
            principal: the id of somebody who has a key, or will get one.
            role: reader, editor, owner or auditor.
            labels: what a reader or editor sees, and may set, besides what has no label.
        """
        body = {"role": role, "labels": list(labels)}
        return self._session.call(
            Call("PUT", self._grant_path(principal), GrantInfo.from_json, body=body)
        )

    @operation
    def unshare(self, principal: str) -> Flow[None]:
        """Take a principal's grant away; raises ApiConflict for the last owner."""
        return self._session.call(Call("DELETE", self._grant_path(principal), nothing))

    @listing
    def grants(self) -> Listing[GrantInfo]:
        """Who may do what with the cube, for its owners; your own grant otherwise."""

        def fetch(size: int, cursor: str | None) -> Flow[Page[GrantInfo]]:
            query = {"limit": size, "cursor": cursor}
            path = f"{self._path}/grants"
            return self._session.call(Call("GET", path, page_of(GrantInfo.from_json), query=query))

        return Listing(fetch)

    @listing
    def audit(
        self,
        *,
        actor: str | None = None,
        action: str | None = None,
        since: datetime | None = None,
        until: datetime | None = None,
        limit: int | None = None,
    ) -> Listing[Json]:
        """The cube's audit entries, newest first; arguments as of `MOS.audit`."""
        query = audit_query(actor=actor, action=action, since=since, until=until)
        return audit_listing(self._session, f"{self._path}/audit", query, limit=limit)

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
        call = Call(
            "POST",
            f"{self._path}/{verb}",
            JobInfo.from_json,
            body={**tier, "memory_ids": _chosen(memory_ids)},
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
    """A handle of one MemCube; made by `MOS.cube`, `MOS.create_cube` and `MOS.import_cube`.

    Attributes:
        arrival: how it came here, when this handle is that of an import or a clone.
    """

    def __init__(self, cube_id: str, session: Session, http: httpx.Client) -> None:
        super().__init__(session, http)
        self.id = cube_id
        self.arrival = None
        self._http = http

    def _handle(self, cube_id: str) -> Self:
        return type(self)(cube_id, self._session, self._http)

    def export_audit(self) -> Iterator[bytes]:
        """The cube's audit entries, oldest first, as lines of JSON; in parts as they come."""
        return export_parts(self, f"{self._path}/audit/export")

    def _chat_cubes(self, cubes: Sequence[str]) -> Sequence[str]:
        return (self.id, *cubes)


class AsyncCube(CubeCalls, AwaitedChat):
    """Cube, awaited."""

    def __init__(self, cube_id: str, session: Session, http: httpx.AsyncClient) -> None:
        super().__init__(session, http)
        self.id = cube_id
        self.arrival = None
        self._http = http

    def _handle(self, cube_id: str) -> Self:
        return type(self)(cube_id, self._session, self._http)

    def export_audit(self) -> AsyncIterator[bytes]:
        """`Cube.export_audit`, awaited."""
        return aexport_parts(self, f"{self._path}/audit/export")

    def _chat_cubes(self, cubes: Sequence[str]) -> Sequence[str]:
        return (self.id, *cubes)


def keep_call(
    path: str, memory_ids: MemoryIds, *, from_cube: str, reason: str | None
) -> Call[list[MemoryInfo]]:
    """See `CubeCalls.keep`; `path` is that of the cube that keeps."""
    body = {"from": from_cube, "memory_ids": _chosen(memory_ids), "reason": reason}
    return Call(
        "POST",
        f"{path}/keep",
        memories_of,
        body={name: value for name, value in body.items() if value is not None},
    )


def memories_of(body: object) -> list[MemoryInfo]:
    """Every memory of a list object."""
    return list(page_of(MemoryInfo.from_json)(body).items)


def _chosen(memory_ids: MemoryIds) -> str | list[str]:
    if not isinstance(memory_ids, str):
        return list(memory_ids)
    if memory_ids != "all":
        raise InvalidRequest(
            f"memory_ids is 'all' or a list of memory ids, not '{memory_ids}'", param="memory_ids"
        )
    return memory_ids


def _as_memory(memory: MemoryInput) -> dict[str, object]:
    if isinstance(memory, str):
        return {"text": memory}
    if not isinstance(memory, Mapping):
        raise InvalidRequest(
            f"a memory is a text or an object with 'text', not {type(memory).__name__}",
            param="memories",
        )
    return given(**memory)
