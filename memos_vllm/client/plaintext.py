"""The part of a cube's calls that is about plaintext memory: put things in, find them again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime

from memos_vllm.client.documents import DocumentInfo, DocumentInput, upload_of
from memos_vllm.client.flow import operation
from memos_vllm.client.found import SearchResult
from memos_vllm.client.jobs import JOB_TIMEOUT_SECONDS, wait_for_job
from memos_vllm.client.objects import JobInfo, MemoryInfo, page_of
from memos_vllm.client.session import Session
from memos_vllm.client.steps import Flow
from memos_vllm.client.wire import Call, encode_time
from memos_vllm.errors import InvalidRequest


class PlaintextCalls:
    """Search, documents, chat turns and the index, as flows; a cube says where they go."""

    _session: Session

    @property
    def _path(self) -> str:
        raise NotImplementedError

    @operation
    def search(
        self,
        query: str,
        *,
        top_k: int = 10,
        filter: Mapping[str, object] | None = None,  # noqa: A002 - the API's own name
        hops: int = 1,
        explain: bool = False,
    ) -> Flow[SearchResult]:
        """Find memories by meaning, by words and along edges.

        Args:
            top_k: at most this many, 1 to 10,000.
            filter: conditions on tags, tier, source, times and metadata; a JSON object as in
                the API, such as `{"tags": ["refunds"], "created_at": {"gte": "2026-01-01T..."}}`.
            hops: edges to follow from what matches, 0 to 3.
            explain: return every part of every score.
        Returns:
            The hits, best first; iterate over it.
        Raises:
            ApiBadRequest: a blank query, a filter that does not parse, or a number out of range.
            ApiUnavailable: the search index is down.
        """
        body: dict[str, object] = {"query": query, "top_k": top_k, "hops": hops}
        if filter is not None:
            body["filter"] = dict(filter)
        if explain:
            body["explain"] = True
        return self._session.call(
            Call("POST", f"{self._path}/search", SearchResult.from_json, body=body)
        )

    @operation
    def add_document(
        self,
        document: DocumentInput,
        *,
        filename: str | None = None,
        uri: str | None = None,
        title: str | None = None,
        tags: Sequence[str] = (),
        labels: Sequence[str] = (),
        metadata: Mapping[str, object] | None = None,
        reason: str | None = None,
    ) -> Flow[DocumentInfo]:
        """Cut a file into memories along its structure, with page and headings as provenance.

        The same content again changes nothing; a changed document changes only what changed.

        Args:
            document: a path, bytes, or a file that is open in binary mode; txt, md, html, pdf or
                docx, at most 32 MiB.
            filename: needed for bytes; its suffix says what the file is.
            uri: names the document in this cube; the file name (without its folders) when not
                given, so give it where two files share a name.
            title: what sources show; read from the document when not given.
            tags, labels, metadata: of each memory that it is cut into.
            reason: why, for the history.
        Raises:
            TooLarge: over 32 MiB; nothing was sent.
            ApiBadRequest: the server cannot read it, and says why.
            OSError: the file cannot be read here.
        """
        upload = upload_of(
            document,
            filename=filename,
            uri=uri,
            title=title,
            tags=tags,
            labels=labels,
            metadata=metadata,
            reason=reason,
        )
        path = f"{self._path}/documents"
        # A PDF of a thousand pages takes longer to read than other calls take at all.
        call = Call("POST", path, DocumentInfo.from_json, upload=upload, slow=True)
        return self._session.call(call)

    @operation
    def add_turns(
        self,
        messages: Sequence[Mapping[str, object]],
        *,
        session_id: str | None = None,
        reason: str | None = None,
    ) -> Flow[list[MemoryInfo]]:
        """Keep a conversation: a memory for each turn, linked in the order they were said.

        Args:
            messages: at most 1,000 of OpenAI's messages with text; each may also have `name`
                (who speaks), `created_at` (a datetime, or RFC 3339) and `metadata`.
            session_id: turns of earlier calls with this id come before these.
            reason: why, for the history.
        Returns:
            The new memories, in the same order; all of them are added, or none.
        """
        if isinstance(messages, str | Mapping):
            raise InvalidRequest("messages is a list of messages", param="messages")
        turns = [_turn(message, f"messages[{index}]") for index, message in enumerate(messages)]
        body: dict[str, object] = {"messages": turns}
        if session_id is not None:
            body["session_id"] = session_id
        if reason is not None:
            body["reason"] = reason
        return self._session.call(
            Call(
                "POST",
                f"{self._path}/turns",
                lambda reply: list(page_of(MemoryInfo.from_json)(reply).items),
                body=body,
            )
        )

    @operation
    def reindex(
        self, *, wait: bool = False, timeout_seconds: float = JOB_TIMEOUT_SECONDS
    ) -> Flow[JobInfo]:
        """Have the search index drop this cube and take in each memory again.

        For an index that lags or came from a backup; texts are untouched.

        Args:
            wait: return when the job has ended, not when it is queued.
            timeout_seconds: longest time to wait.
        Raises:
            JobFailed: waited for, and it failed or was cancelled.
            JobTimeout: waited for, and it is still going.
        """
        call = Call("POST", f"{self._path}/reindex", JobInfo.from_json)
        job = yield from self._session.call(call)
        if not wait:
            return job
        return (yield from wait_for_job(self._session, job, timeout_seconds=timeout_seconds))


def _turn(message: object, param: str) -> dict[str, object]:
    """A message of the API; what is None is left out, as OpenAI's own objects hold many such."""
    if not isinstance(message, Mapping):
        raise InvalidRequest(
            f"{param} is an object with role and content, not {type(message).__name__}",
            param=param,
        )
    turn = {str(name): value for name, value in message.items() if value is not None}
    moment = turn.get("created_at")
    if isinstance(moment, datetime):
        turn["created_at"] = encode_time(moment, param=f"{param}.created_at")
    return turn
