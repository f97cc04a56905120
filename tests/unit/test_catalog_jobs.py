"""Jobs: claimed once, kept by a lease, ended once."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from catalog_kit import ADMIN, Desk, open_desk, start_python
from databases import Database

from memos_vllm.control.jobs import MAX_ATTEMPTS
from memos_vllm.domain.job import Job, JobState
from memos_vllm.domain.memory import Tier
from memos_vllm.errors import Conflict, NotFound


@pytest.fixture
def desk(tmp_path: Path, database: Database) -> Iterator[Desk]:
    with open_desk(tmp_path, database) as opened:
        yield opened


def queue(desk: Desk, cube_id: str = "c") -> Job:
    desk.add("text", cube_id=cube_id)
    return desk.mos.promote(ADMIN, cube_id, to=Tier.ACTIVATION)


def test_jobs_are_claimed_in_order_and_only_once(desk: Desk) -> None:
    desk.mos.create_cube(ADMIN, cube_id="d")
    first, second = queue(desk), queue(desk, "d")
    claimed = [desk.mos.claim_job(owner, lease_seconds=30) for owner in ("a", "b", "a")]
    assert [job and job.id for job in claimed] == [first.id, second.id, None]
    assert claimed[0] is not None
    assert (claimed[0].state, claimed[0].attempts, claimed[0].lease_owner) == ("running", 1, "a")


def test_two_processes_that_claim_at_once_share_the_jobs_without_overlap(desk: Desk) -> None:
    jobs = set()
    for number in range(12):
        desk.mos.create_cube(ADMIN, cube_id=f"n{number}")
        jobs.add(queue(desk, f"n{number}").id)
    code = (
        "import sys\n"
        "from memos_vllm.control.mos import Mos\n"
        "mos = Mos.open(sys.argv[1])\n"
        "while job := mos.claim_job(sys.argv[2], lease_seconds=600):\n"
        "    print(job.id)\n"
    )
    workers = [start_python(code, desk.url, name) for name in ("a", "b")]
    claimed = [worker.communicate(timeout=60)[0].split() for worker in workers]
    assert [worker.returncode for worker in workers] == [0, 0]
    assert sorted(claimed[0] + claimed[1]) == sorted(jobs)


def test_a_renewed_lease_is_kept_and_reports_progress(desk: Desk) -> None:
    job = queue(desk)
    desk.mos.claim_job("a", lease_seconds=10)
    desk.clock.advance(8)
    assert desk.mos.renew_job(job.id, "a", lease_seconds=10, progress=0.5, message="half")
    desk.clock.advance(8)
    assert desk.mos.claim_job("b", lease_seconds=10) is None
    seen = desk.mos.get_job(ADMIN, job.id)
    assert (seen.progress, seen.message, seen.state) == (0.5, "half", "running")


def test_a_lease_that_ran_out_goes_to_the_next_and_the_first_can_end_nothing(desk: Desk) -> None:
    job = queue(desk)
    desk.mos.claim_job("a", lease_seconds=10)
    desk.clock.advance(10)
    taken = desk.mos.claim_job("b", lease_seconds=10)
    assert taken is not None
    assert (taken.id, taken.attempts) == (job.id, 2)
    assert not desk.mos.renew_job(job.id, "a", lease_seconds=10, progress=1.0, message="late")
    assert not desk.mos.finish_job(job.id, "a", state=JobState.SUCCEEDED, message="late")
    assert desk.mos.get_job(ADMIN, job.id).state is JobState.RUNNING
    assert desk.mos.finish_job(job.id, "b", state=JobState.SUCCEEDED, message="done")
    done = desk.mos.get_job(ADMIN, job.id)
    assert (done.state, done.progress, done.lease_owner) == ("succeeded", 1.0, None)
    assert not desk.mos.finish_job(job.id, "b", state=JobState.FAILED, message="twice")


def test_a_job_that_nobody_brings_to_an_end_fails_with_the_reason(desk: Desk) -> None:
    job = queue(desk)
    for _ in range(MAX_ATTEMPTS):
        assert desk.mos.claim_job("crashing", lease_seconds=1) is not None
        desk.clock.advance(2)
    assert desk.mos.claim_job("crashing", lease_seconds=1) is None
    failed = desk.mos.get_job(ADMIN, job.id)
    assert failed.state is JobState.FAILED
    assert failed.error is not None
    assert str(MAX_ATTEMPTS) in failed.error


def test_a_cancelled_job_is_taken_from_its_worker(desk: Desk) -> None:
    job = queue(desk)
    desk.mos.claim_job("a", lease_seconds=10)
    assert desk.mos.cancel_job(ADMIN, job.id).state is JobState.CANCELLED
    assert not desk.mos.renew_job(job.id, "a", lease_seconds=10, progress=0.1, message="")
    assert not desk.mos.finish_job(job.id, "a", state=JobState.SUCCEEDED, message="")
    assert desk.mos.cancel_job(ADMIN, job.id).state is JobState.CANCELLED
    assert desk.mos.claim_job("b", lease_seconds=10) is None


def test_a_finished_job_cannot_be_cancelled(desk: Desk) -> None:
    job = queue(desk)
    desk.mos.claim_job("a", lease_seconds=10)
    desk.mos.finish_job(job.id, "a", state=JobState.FAILED, message="failed", error="no disk")
    with pytest.raises(Conflict, match="failed already"):
        desk.mos.cancel_job(ADMIN, job.id)
    assert desk.mos.get_job(ADMIN, job.id).error == "no disk"


def test_a_job_goes_with_its_cube(desk: Desk) -> None:
    job = queue(desk)
    desk.mos.claim_job("a", lease_seconds=10)
    desk.mos.delete_cube(ADMIN, "c")
    assert not desk.mos.renew_job(job.id, "a", lease_seconds=10, progress=0.1, message="")
    for job_id in (job.id, "job_x", "../x"):
        with pytest.raises(NotFound):
            desk.mos.get_job(ADMIN, job_id)


def test_jobs_are_listed_newest_first_in_pages(desk: Desk) -> None:
    ids = []
    for number in range(3):
        desk.mos.create_cube(ADMIN, cube_id=f"n{number}")
        ids.append(queue(desk, f"n{number}").id)
    first = desk.mos.list_jobs(ADMIN, limit=2)
    second = desk.mos.list_jobs(ADMIN, limit=2, cursor=first.next_cursor)
    assert [job.id for job in [*first.items, *second.items]] == ids[::-1]
    assert second.next_cursor is None
    assert [job.id for job in desk.mos.list_jobs(ADMIN, cube_id="n1").items] == [ids[1]]
    with pytest.raises(NotFound):
        desk.mos.list_jobs(ADMIN, cube_id="nope")


def test_a_claim_reads_one_job_however_many_wait(desk: Desk) -> None:
    from sqlalchemy import event

    from memos_vllm.control.tables import JobRow

    for number in range(5):
        desk.mos.create_cube(ADMIN, cube_id=f"d{number}")
        desk.add("one", cube_id=f"d{number}")
        desk.promote(cube_id=f"d{number}")
    loaded: list[object] = []

    def on_load(row: JobRow, _: object) -> None:
        loaded.append(row)

    event.listen(JobRow, "load", on_load)
    try:
        job = desk.mos.claim_job("w", lease_seconds=30)
    finally:
        event.remove(JobRow, "load", on_load)
    assert job is not None
    assert (job.cube_id, len(loaded)) == ("d0", 1)
