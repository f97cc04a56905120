"""Kills parts of a server at random, under a writing load, and says what was lost.

`python -m tests.soak.drill --kills 50` runs the long one; `make soak` a short one.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from memos_vllm.config import RUN_VARIABLE
from memos_vllm.process import ServerProcess

CUBE = "drill"
ACTORS = ("Mos", "PlaintextStore", "PromotionScheduler")
# With the server's processes the whole server goes down, and is started again.
SERVER_PARTS = ("api-server", "engine-core", "supervisor")
_BACK_SECONDS = 60.0
_SETTLED_SECONDS = 120.0


@dataclass
class Report:
    """What came of a drill."""

    acknowledged: int = 0
    lost: list[str] = field(default_factory=list)
    doubled: list[str] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)
    not_found: list[str] = field(default_factory=list)
    audit: dict[str, Any] = field(default_factory=dict)
    orphans: list[str] = field(default_factory=list)
    kills: Counter[str] = field(default_factory=Counter)
    recovery_seconds: dict[str, list[float]] = field(default_factory=dict)

    @property
    def ok(self) -> bool:
        bad = (self.lost, self.doubled, self.unknown, self.not_found, self.orphans)
        return not any(bad) and bool(self.audit.get("ok"))


class Writer(threading.Thread):
    """Adds one memory after the other; each is sent again, under its key, until it is answered."""

    def __init__(
        self, url: str, *, cube_id: str = CUBE, headers: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(daemon=True)
        self.cube_id = cube_id
        self._url = url
        self._headers = dict(headers or {})
        self._end = threading.Event()
        self.sent: list[str] = []
        self.acknowledged: list[str] = []

    def run(self) -> None:
        with httpx.Client(
            base_url=self._url, headers=self._headers, timeout=30.0, trust_env=False
        ) as client:
            while not self._end.is_set():
                number = len(self.sent)
                text = f"The drill noted word{number:05d} at step {number}."
                self.sent.append(text)
                while not self._try(client, number, text) and not self._end.is_set():
                    time.sleep(0.05)

    def _try(self, client: httpx.Client, number: int, text: str) -> bool:
        with contextlib.suppress(httpx.HTTPError):
            reply = client.post(
                f"/v1/memcubes/{self.cube_id}/memories",
                json={"memories": [{"text": text}]},
                headers={"Idempotency-Key": f"{self.cube_id}-{number}"},
            )
            if reply.status_code == httpx.codes.CREATED:
                self.acknowledged.append(text)
                return True
            assert reply.status_code in {409, 500, 502, 503}, reply.text
        return False

    def wait_for_more(self, what: str) -> float:
        """Until writes go on that were sent from now on; how long that took, in seconds."""
        before, began = len(self.acknowledged), time.monotonic()
        # The first may have been under way.
        wait(lambda: len(self.acknowledged) > before + 1, f"writes after {what}")
        return round(time.monotonic() - began, 2)

    def finish(self) -> None:
        """Stop after the write under way."""
        self._end.set()
        self.join(_BACK_SECONDS)


def run_drill(server: ServerProcess, *, kills: int, seed: int) -> Report:
    """Kill parts of a running server; it is running again at the end.

    Args:
        server: killed and started again as a whole when one of its own processes was the victim.
    """
    chance = random.Random(seed)
    report = Report()
    client = httpx.Client(base_url=server.url, timeout=30.0, trust_env=False)
    client.post("/v1/memcubes", json={"id": CUBE}).raise_for_status()
    writer = Writer(server.url)
    writer.start()
    rest = [*ACTORS, *SERVER_PARTS]
    for _ in range(kills):
        time.sleep(chance.uniform(0.2, 2.0))
        # Each once, then at random.
        victim = rest.pop(0) if rest else chance.choice(ACTORS + SERVER_PARTS)
        report.kills[victim] += 1
        pid = _pid_of(victim, server, client)
        runs, segments = _runs_of(server.pid), server.shared_memory()
        os.kill(pid, signal.SIGKILL)
        began = time.monotonic()
        if victim in SERVER_PARTS:
            report.orphans += _start_again(server, runs)
            for segment in segments:
                segment.unlink(missing_ok=True)
        writer.wait_for_more(victim)
        report.recovery_seconds.setdefault(victim, []).append(round(time.monotonic() - began, 2))
        print(f"{victim}: writes go on after {time.monotonic() - began:.1f} s", file=sys.stderr)
    writer.finish()
    compare(client, writer, report)
    return report


def _start_again(server: ServerProcess, runs: set[str]) -> list[str]:
    """What is left of the killed server once it has been started again by the same command."""
    server.wait_until_ended()
    server.start()
    return [
        Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()[:80]
        for pid in _marked(runs)
    ]


def compare(client: httpx.Client, writer: Writer, report: Report, *, others: int = 0) -> None:
    """Note in the report what of the load is not in the catalog as it should be, nor found.

    Args:
        others: how many memories of other cubes the index holds.
    """
    cube = f"/v1/memcubes/{writer.cube_id}"
    stored = Counter(_all_texts(client, cube))
    report.acknowledged = len(writer.acknowledged)
    report.lost = [text for text in writer.acknowledged if text not in stored]
    report.doubled = [text for text, times in stored.items() if times > 1]
    report.unknown = [text for text in stored if text not in writer.sent]
    report.audit = client.get("/v1/audit/verify").json()
    expected = sum(stored.values()) + others
    wait(lambda: _points(client) == expected, "the index to follow", _SETTLED_SECONDS)
    for text in random.Random(0).sample(sorted(stored), min(30, len(stored))):
        found = client.post(f"{cube}/search", json={"query": text.split()[3], "top_k": 1}).json()[
            "data"
        ]
        if not found or found[0]["memory"]["text"] != text:
            report.not_found.append(text)


def _points(client: httpx.Client) -> int | None:
    status = client.get("/v1/memos/status").json()["stores"]["plaintext"]
    serving: dict[str, Any] = status.get("serving") or {}
    points: int | None = serving.get("points")
    return points


def _all_texts(client: httpx.Client, cube: str) -> list[str]:
    texts: list[str] = []
    cursor = None
    while True:
        parameters = {"limit": 1000, **({"cursor": cursor} if cursor else {})}
        page = client.get(f"{cube}/memories", params=parameters).json()
        texts += [memory["text"] for memory in page["data"]]
        if (cursor := page["next_cursor"]) is None:
            return texts


def _pid_of(victim: str, server: ServerProcess, client: httpx.Client) -> int:
    if victim in ACTORS:
        found: list[int] = []

        def known() -> bool:
            with contextlib.suppress(httpx.HTTPError):
                actor = client.get("/v1/memos/status").json().get("actors", {}).get(victim, {})
                found.extend([actor["pid"]] if "pid" in actor else [])
            return bool(found)

        wait(known, f"{victim} to be there")
        return found[0]
    if victim == "supervisor":
        return server.pid
    api_server = next(pid for pid in _children(server.pid) if b"memos_vllm.engine" in _command(pid))
    if victim == "api-server":
        return api_server
    return next(pid for pid in _children(api_server) if _command(pid).startswith(b"VLLM::Engine"))


def _children(pid: int) -> list[int]:
    found = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        found += [int(child) for child in (task / "children").read_text().split()]
    return found


def _command(pid: int) -> bytes:
    return Path(f"/proc/{pid}/cmdline").read_bytes()


def _runs_of(supervisor: int) -> set[str]:
    """The marks of this run, from the environment of the supervisor's children."""
    return {run for pid in _children(supervisor) if (run := _run_of(pid))}


def _marked(runs: set[str]) -> list[int]:
    pids = [int(folder.name) for folder in Path("/proc").glob("[0-9]*")]
    return [pid for pid in pids if _run_of(pid) in runs]


def _run_of(pid: int) -> str | None:
    with contextlib.suppress(OSError):
        for entry in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"):
            if entry.startswith(f"{RUN_VARIABLE}=".encode()):
                return entry.decode()
    return None


def wait(condition: Callable[[], bool], what: str, seconds: float = _BACK_SECONDS) -> None:
    """Until the condition holds; fails when that takes too long."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"waited {seconds:.0f} s for {what}"
        time.sleep(0.05)


def main() -> int:
    """Run a drill of its own on a prepared model."""
    from memos_vllm.models.prepare import prepare
    from memos_vllm.process import memos_command
    from tests.server.conftest import BASE_ENVIRONMENT, BASE_OPTIONS, SMALL_MODEL

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="memos-drill-") as folder:
        data = str(Path(folder) / "data")
        command = memos_command(str(prepare(SMALL_MODEL)), "--data-dir", data, *BASE_OPTIONS)
        server = ServerProcess(
            command, log_path=Path(folder) / "server.log", environment=BASE_ENVIRONMENT
        )
        with server:
            report = run_drill(server, kills=given.kills, seed=given.seed)
    print(report)
    return 0 if report.ok else 1


if __name__ == "__main__":
    sys.exit(main())
