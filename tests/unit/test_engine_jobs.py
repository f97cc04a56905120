"""Jobs are done one at a time by the handler of their kind, over a real catalog."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from catalog_kit import ADMIN, Desk, open_desk

from memos_vllm.domain.job import Job, JobKind, JobState
from memos_vllm.domain.turn import NewTurn
from memos_vllm.engine import job_runner
from memos_vllm.engine.job_runner import Handler, JobRunner, Report
from memos_vllm.errors import MemosError, NotFound, Unavailable


@pytest.fixture
def desk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Desk]:
    monkeypatch.setattr(job_runner, "_POLL_SECONDS", 0.02)
    monkeypatch.setattr(job_runner, "_RENEW_SECONDS", 0.02)
    with open_desk(tmp_path) as opened:
        yield opened


@asynccontextmanager
async def running(desk: Desk, **handlers: Handler) -> AsyncIterator[JobRunner]:
    runner = JobRunner(desk.mos, {JobKind(name): handler for name, handler in handlers.items()})
    task = asyncio.create_task(runner.run())
    try:
        yield runner
        assert not task.done(), "the runner has stopped"
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


def queue(desk: Desk, cube_id: str = "c") -> Job:
    return desk.mos.queue_reindex(ADMIN, cube_id)


async def until(desk: Desk, job: Job, reached: Callable[[Job], bool]) -> Job:
    deadline = time.monotonic() + 10
    while True:
        now = desk.mos.get_job(ADMIN, job.id)
        if reached(now):
            return now
        assert time.monotonic() < deadline, now
        await asyncio.sleep(0.005)


async def finished(desk: Desk, job: Job) -> Job:
    return await until(desk, job, lambda now: now.state.finished)


async def done(job: Job, report: Report) -> str:
    return "all done"


async def test_a_job_goes_to_the_handler_of_its_kind(desk: Desk) -> None:
    seen: list[tuple[str, Job]] = []

    async def reindex(job: Job, report: Report) -> str:
        seen.append(("reindex", job))
        return "indexed"

    async def bake(job: Job, report: Report) -> str:
        seen.append(("bake", job))
        return "baked"

    desk.add("one")
    job = queue(desk)
    desk.promote()
    async with running(desk, reindex=reindex, bake=bake):
        ended = await finished(desk, job)
        await asyncio.sleep(0)
        (other,) = [item for item in desk.mos.list_jobs(ADMIN).items if item.kind is JobKind.BAKE]
        baked = await finished(desk, other)
    assert (ended.state, ended.message, ended.error) == (JobState.SUCCEEDED, "indexed", None)
    assert ended.progress == 1.0
    assert baked.message == "baked"
    # In the order in which they were queued.
    assert [(name, item.id) for name, item in seen] == [("reindex", job.id), ("bake", baked.id)]


async def test_a_kind_that_nobody_does_fails_and_the_next_job_is_done(desk: Desk) -> None:
    desk.add("one")
    job = queue(desk)
    desk.promote()
    async with running(desk, bake=done):
        ended = await finished(desk, job)
        (other,) = [item for item in desk.mos.list_jobs(ADMIN).items if item.id != job.id]
        assert (await finished(desk, other)).state is JobState.SUCCEEDED
    assert ended.state is JobState.FAILED
    assert ended.error == "this server does not do reindex jobs"


@pytest.mark.parametrize(
    ("failure", "state", "error"),
    [
        (MemosError("the store is full"), JobState.FAILED, "the store is full"),
        (Unavailable("the index is down"), JobState.FAILED, "the index is down"),
        (NotFound("memory", "mem_1"), JobState.CANCELLED, "memory 'mem_1' does not exist"),
        (ValueError("the secret text"), JobState.FAILED, "the server's log holds the reason"),
        (AssertionError("the secret text"), JobState.FAILED, "the server's log holds the reason"),
        (asyncio.CancelledError(), JobState.FAILED, "it was cut off by the engine"),
    ],
)
async def test_a_job_that_fails_says_why_and_the_runner_goes_on(
    desk: Desk, failure: BaseException, state: JobState, error: str
) -> None:
    failures = [failure]

    async def handle(job: Job, report: Report) -> str:
        if failures:
            raise failures.pop()
        return "all done"

    async with running(desk, reindex=handle):
        ended = await finished(desk, queue(desk))
        assert (ended.state, ended.error) == (state, error)
        assert (await finished(desk, queue(desk))).state is JobState.SUCCEEDED


async def test_facts_are_read_again_when_what_was_down_is_back(desk: Desk) -> None:
    failures: list[MemosError] = [Unavailable("the index is down"), MemosError("no JSON")]

    async def handle(job: Job, report: Report) -> str:
        if failures:
            raise failures.pop(0)
        return "all done"

    async with running(desk, extract=handle):
        turns = [NewTurn("user", "Hello.")]
        _, job = desk.mos.remember_turn(ADMIN, "c", turns, session_id=None, read=True)
        assert job is not None
        waiting = await until(desk, job, lambda now: "tried again" in now.message)
        assert (waiting.state, waiting.attempts) == (JobState.RUNNING, 1)
        assert "the index is down" in waiting.message
        desk.clock.advance(6)
        ended = await finished(desk, job)
        assert (ended.state, ended.error, ended.attempts) == (JobState.FAILED, "no JSON", 2)


async def test_progress_reaches_who_watches_and_the_lease_is_kept(desk: Desk) -> None:
    go_on = asyncio.Event()

    async def handle(job: Job, report: Report) -> str:
        report(0.25, "a quarter")
        await go_on.wait()
        return "all done"

    job = queue(desk)
    async with running(desk, reindex=handle):
        under_way = await until(desk, job, lambda now: now.progress == 0.25)
        assert (under_way.state, under_way.message) == (JobState.RUNNING, "a quarter")
        desk.clock.advance(20)
        first = under_way.lease_until
        assert first is not None
        await until(desk, job, lambda now: (now.lease_until or first) > first)
        desk.clock.advance(20)
        # It is this owner's: nobody else may claim it.
        assert desk.mos.claim_job("another", lease_seconds=30) is None
        go_on.set()
        ended = await finished(desk, job)
    assert (ended.state, ended.attempts) == (JobState.SUCCEEDED, 1)


async def test_a_cancelled_job_reaches_its_handler_and_stays_cancelled(desk: Desk) -> None:
    started, stopped = asyncio.Event(), asyncio.Event()

    async def handle(job: Job, report: Report) -> str:
        started.set()
        try:
            await asyncio.sleep(60)
        finally:
            stopped.set()
        return "never"

    job = queue(desk)
    async with running(desk, reindex=handle):
        await asyncio.wait_for(started.wait(), 5)
        desk.mos.cancel_job(ADMIN, job.id)
        await asyncio.wait_for(stopped.wait(), 5)
        assert desk.mos.get_job(ADMIN, job.id).state is JobState.CANCELLED
        # The runner is free for the next one.
        started.clear()
        queue(desk)
        await asyncio.wait_for(started.wait(), 5)
    assert desk.mos.get_job(ADMIN, job.id).message == "cancelled"


async def test_a_job_whose_cube_is_deleted_is_stopped(desk: Desk) -> None:
    started, stopped = asyncio.Event(), asyncio.Event()

    async def handle(job: Job, report: Report) -> str:
        started.set()
        try:
            await asyncio.sleep(60)
        finally:
            stopped.set()
        return "never"

    queue(desk)
    async with running(desk, reindex=handle):
        await asyncio.wait_for(started.wait(), 5)
        desk.mos.delete_cube(ADMIN, "c")
        await asyncio.wait_for(stopped.wait(), 5)


async def test_a_runner_that_stops_leaves_its_job_to_the_next(desk: Desk) -> None:
    started = asyncio.Event()

    async def handle(job: Job, report: Report) -> str:
        started.set()
        await asyncio.sleep(60)
        return "never"

    job = queue(desk)
    async with running(desk, reindex=handle):
        await asyncio.wait_for(started.wait(), 5)
    assert desk.mos.get_job(ADMIN, job.id).state is JobState.RUNNING
    desk.clock.advance(60)
    async with running(desk, reindex=done):
        ended = await finished(desk, job)
    assert (ended.state, ended.attempts) == (JobState.SUCCEEDED, 2)


@pytest.mark.parametrize("method", ["claim_job", "renew_job", "finish_job"])
async def test_a_catalog_that_is_busy_for_a_while_ends_neither_runner_nor_job(
    desk: Desk, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, method: str
) -> None:
    real, failures = getattr(desk.mos, method), [1, 2]
    loop, over = asyncio.get_running_loop(), asyncio.Event()

    def busy(*args: Any, **kwargs: Any) -> Any:
        if failures:
            failures.pop()
            if not failures:
                loop.call_soon_threadsafe(over.set)
            raise Unavailable("the catalog does not answer (database is locked); try again")
        return real(*args, **kwargs)

    async def handle(job: Job, report: Report) -> str:
        if method == "renew_job":
            await over.wait()
        # What follows finds the lease run out when the end could not be noted.
        desk.clock.advance(31)
        return "all done"

    monkeypatch.setattr(desk.mos, method, busy)
    job = queue(desk)
    with caplog.at_level(logging.WARNING):
        async with running(desk, reindex=handle):
            ended = await finished(desk, job)
    assert ended.state is JobState.SUCCEEDED
    assert ended.attempts == (3 if method == "finish_job" else 1)
    assert "does not answer" in caplog.text


async def test_a_bug_while_claiming_does_not_end_the_runner(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, failures = desk.mos.claim_job, [1]

    def broken(*args: Any, **kwargs: Any) -> Any:
        if failures:
            failures.pop()
            raise RuntimeError("a bug")
        return real(*args, **kwargs)

    monkeypatch.setattr(desk.mos, "claim_job", broken)
    async with running(desk, reindex=done):
        assert (await finished(desk, queue(desk))).state is JobState.SUCCEEDED


async def test_a_job_that_is_queued_is_started_when_the_runner_is_woken(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(job_runner, "_POLL_SECONDS", 60.0)
    async with running(desk, reindex=done) as runner:
        await asyncio.sleep(0.05)
        job = queue(desk)
        runner.wake()
        assert (await finished(desk, job)).state is JobState.SUCCEEDED


async def test_a_wake_during_the_look_for_jobs_is_not_lost(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(job_runner, "_POLL_SECONDS", 60.0)
    real, queued = desk.mos.claim_job, list[Job]()
    loop, looked = asyncio.get_running_loop(), asyncio.Event()

    def claim(*args: Any, **kwargs: Any) -> Any:
        found = real(*args, **kwargs)
        if not queued:
            # Queued after this look found nothing, and before it returned.
            queued.append(queue(desk))
            loop.call_soon_threadsafe(runner.wake)
            loop.call_soon_threadsafe(looked.set)
        return found

    monkeypatch.setattr(desk.mos, "claim_job", claim)
    async with running(desk, reindex=done) as runner:
        await asyncio.wait_for(looked.wait(), 5)
        assert (await finished(desk, queued[0])).state is JobState.SUCCEEDED
