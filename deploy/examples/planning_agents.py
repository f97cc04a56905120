"""Two agents and a plan: one writes it, the other reads it and does the work.

The plan is a cube. `agent.planner` may edit it, `agent.worker` only read it: what it finds out is
kept in a cube of its own. The server holds them to it, whatever the agents' code does, and its log
says who did what.

    MEMOS_API_KEY=ADMINISTRATORS_KEY python deploy/examples/planning_agents.py

MEMOS_URL names the server. Each run makes a plan of its own.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from datetime import UTC, datetime, timedelta

from memos_vllm import MOS
from memos_vllm.client import ApiNotFound, ChatReply, MemoryInfo

PLANNER, WORKER = "agent.planner", "agent.worker"


def make_plan(admin: MOS) -> str:
    """The cube that both share, and who may do what with it."""
    plan = admin.create_cube(name="Moving the office to Leeds")
    plan.share(PLANNER, role="editor")
    plan.share(WORKER, role="reader")
    return plan.id


def admit(admin: MOS, agent: str) -> str:
    """An agent's key, good for this day's work; the cube of the same name is the agent's own."""
    made = admin.create_key(agent, kind="agent", expires_at=datetime.now(UTC) + timedelta(days=1))
    admin.agent_cube(agent.removeprefix("agent.")).move(agent)
    return made.token


def write_step(planner: MOS, plan_id: str, step: str) -> MemoryInfo:
    """Add a step; once this returns, everybody who may read the plan finds it."""
    (memory,) = planner.cube(plan_id).add(step, tags=["step"], reason="planned")
    return memory


def read_steps(worker: MOS, plan_id: str, about: str) -> list[str]:
    """What the plan says about something, best first."""
    return [hit.memory.text for hit in worker.cube(plan_id).search(about, top_k=3)]


def work(worker: MOS, plan_id: str, task: str) -> ChatReply:
    """Have the model work from the plan; what comes of it is kept in the worker's own cube."""
    return worker.chat(
        task,
        cubes=[plan_id, WORKER],
        remember={"mode": "fast", "into": WORKER},
        options={"max_tokens": 40, "temperature": 0},
    )


def attempt(call: Callable[[], object]) -> str:
    """What becomes of a call that may not be allowed."""
    try:
        call()
    except ApiNotFound as error:
        return f"{error.status_code} {error}"
    return "done"


def main() -> None:
    url = os.environ.get("MEMOS_URL", "http://127.0.0.1:8000")
    with MOS(url) as admin:
        keys = [admit(admin, agent) for agent in (PLANNER, WORKER)]
        plan_id = make_plan(admin)
        with MOS(url, keys[0]) as planner, MOS(url, keys[1]) as worker:
            write_step(planner, plan_id, "Step 1: order the removal van for the third of May.")
            print(f"worker reads: {read_steps(worker, plan_id, 'When does the van come?')}")
            write_step(planner, plan_id, "Step 2: label every desk with its new room number.")
            print(f"worker reads: {read_steps(worker, plan_id, 'What about the desks?')}")
            reply = work(worker, plan_id, "What has to be done with the desks?")
            print(f"worker: {' '.join(reply.text.split())}")
            mine = "Step 3: give the worker a day off."
            print(f"worker writes: {attempt(lambda: write_step(worker, plan_id, mine))}")

            admin.cube(plan_id).unshare(WORKER)
            again = attempt(lambda: read_steps(worker, plan_id, "When does the van come?"))
            print(f"worker, once out of the plan: {again}")
        for entry in reversed(list(admin.cube(plan_id).audit())):
            print(f"log: {entry['actor']} {entry['action']} {entry['subject'] or ''}")


if __name__ == "__main__":
    main()
