"""Any process may be killed at any moment, and nothing that was acknowledged is lost."""

from __future__ import annotations

from collections.abc import Callable

from drill import ACTORS, SERVER_PARTS, run_drill

from memos_vllm.process import ServerProcess


def test_killing_each_part_under_writes_loses_nothing_and_leaves_nothing(
    start_server: Callable[..., ServerProcess],
) -> None:
    server = start_server()
    report = run_drill(server, kills=len(ACTORS + SERVER_PARTS), seed=5)
    assert report.ok, report
    assert report.acknowledged > 50
    # An actor is back before anybody loses patience.
    for actor in ACTORS:
        assert max(report.recovery_seconds[actor]) < 10, report.recovery_seconds
    server.stop()
