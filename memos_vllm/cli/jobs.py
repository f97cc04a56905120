"""`memos-vllm jobs ...`, and how commands wait for a job."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from memos_vllm.cli import output
from memos_vllm.cli.options import ApiKey, AsJson, CubeId, Limit, Url, WaitSeconds, connect

if TYPE_CHECKING:
    from memos_vllm.client import MOS, JobInfo

app = typer.Typer(
    help="Show, await and cancel the work that a server does for cubes.",
    no_args_is_help=True,
    rich_markup_mode=None,
)

JobId = Annotated[str, typer.Argument(metavar="JOB", help="The job's id.")]


@app.command("list")
def list_jobs(
    cube: CubeId,
    *,
    limit: Limit = None,
    url: Url = None,
    api_key: ApiKey = None,
    as_json: AsJson = False,
) -> None:
    """List a cube's jobs, the newest first."""
    with connect(url, api_key) as mos:
        jobs = list(mos.cube(cube).jobs(limit=limit))
    if as_json:
        output.say_json_list([job.raw for job in jobs])
        return
    heads = ("id", "kind", "state", "progress", "message")
    rows = [(job.id, job.kind, job.state, f"{job.progress:.0%}", job.message) for job in jobs]
    output.say_table(heads, rows)


@app.command()
def show(job: JobId, *, url: Url = None, api_key: ApiKey = None, as_json: AsJson = False) -> None:
    """Show a job."""
    with connect(url, api_key) as mos:
        found = mos.job(job)
    _say(found, as_json=as_json)


@app.command()
def wait(
    job: JobId,
    *,
    timeout: WaitSeconds = 600.0,
    url: Url = None,
    api_key: ApiKey = None,
    as_json: AsJson = False,
) -> None:
    """Wait until a job has ended; exit 1 unless it succeeded."""
    with connect(url, api_key) as mos:
        ended = follow(mos, mos.job(job), timeout_seconds=timeout, silent=as_json)
    _say(ended, as_json=as_json)
    if ended.state != "succeeded":
        raise typer.Exit(1)


@app.command()
def cancel(job: JobId, *, url: Url = None, api_key: ApiKey = None, as_json: AsJson = False) -> None:
    """Stop a job that has not ended."""
    with connect(url, api_key) as mos:
        stopped = mos.cancel_job(job)
    _say(stopped, as_json=as_json)


def follow(mos: MOS, job: JobInfo, *, timeout_seconds: float, silent: bool) -> JobInfo:
    """The job as it ended, with its progress shown meanwhile.

    Raises:
        JobFailed, JobTimeout.
    """
    if job.ended:
        return job
    with output.progress(f"{job.kind} {job.cube_id or ''}".rstrip(), silent=silent) as report:
        return mos.wait_for_job(
            job.id,
            timeout_seconds=timeout_seconds,
            on_progress=lambda seen: report(seen.progress, seen.message),
        )


def _say(job: JobInfo, *, as_json: bool) -> None:
    if as_json:
        output.say_json(job.raw)
        return
    said = job.error or job.message
    output.say(f"{job.id}: {job.kind} {job.state}, {job.progress:.0%}{': ' if said else ''}{said}")
