"""Jobs: read one, cancel one, wait for one."""

from __future__ import annotations

from collections.abc import Callable

from memos_vllm.client.errors import JobFailed, JobTimeout
from memos_vllm.client.objects import JobInfo
from memos_vllm.client.session import Session
from memos_vllm.client.steps import Flow, Pause
from memos_vllm.client.wire import Call, path_part

JOB_TIMEOUT_SECONDS = 600.0
FIRST_POLL_SECONDS = 0.05
LONGEST_POLL_SECONDS = 1.0


def read_job(session: Session, job_id: str) -> Flow[JobInfo]:
    path = f"/v1/jobs/{path_part(job_id, 'job')}"
    return (yield from session.call(Call("GET", path, JobInfo.from_json)))


def wait_for_job(
    session: Session,
    job: JobInfo,
    *,
    timeout_seconds: float,
    on_progress: Callable[[JobInfo], None] | None = None,
) -> Flow[JobInfo]:
    """Poll until the job has ended.

    Args:
        on_progress: called with the job each time it was read.
    Raises:
        JobTimeout: still going after `timeout_seconds`; it goes on in the server.
        JobFailed: it failed or was cancelled.
    """
    deadline = session.clock() + timeout_seconds
    pause = FIRST_POLL_SECONDS
    while True:
        if on_progress is not None:
            on_progress(job)
        if job.ended:
            break
        left = deadline - session.clock()
        if left <= 0:
            raise JobTimeout(
                f"{job.kind} job {job.id} is still {job.state} after {timeout_seconds:g} s; "
                "it goes on in the server",
                job=job,
            )
        yield Pause(min(pause, left))
        pause = min(pause * 1.5, LONGEST_POLL_SECONDS)
        job = yield from read_job(session, job.id)
    if job.state != "succeeded":
        reason = job.error or job.message or "the server gave no reason"
        raise JobFailed(f"{job.kind} job {job.id} {_ended_how(job)}: {reason}", job=job)
    return job


def _ended_how(job: JobInfo) -> str:
    return "was cancelled" if job.state == "cancelled" else job.state
