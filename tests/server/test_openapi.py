"""A real server answers as its own OpenAPI page says, whatever it is sent, and never fails."""

from __future__ import annotations

import time
from collections import Counter
from typing import Any

import httpx
import pytest
import schemathesis
from cube_kit import chat_body, fresh_id
from fuzz_kit import Draw, Known, fuzz, operations, send_archive
from hypothesis import strategies as st
from schemathesis import Case, Response
from schemathesis.schemas import APIOperation

from memos_vllm.api.body_guard import MEMORY_FIELDS
from memos_vllm.process import ServerProcess

CHAT = "POST /v1/chat/completions"
OWN = r"^/(health$|v1/(memcubes|jobs|keys|principals|audit|memos)(/|$))|^/v1/chat/completions$"
# The first key closes the server to everybody without one.
LEFT_OUT = {"POST /v1/keys"}
EXAMPLES = 6
CHATS = 24
# Of the answer; a whole sentence takes a second.
MOST_TOKENS = 2


@pytest.fixture(scope="module")
def routes(server: ServerProcess) -> dict[str, APIOperation]:
    """This project's own routes of the shared server."""
    schema = schemathesis.openapi.from_url(f"{server.url}/openapi.json").include(path_regex=OWN)
    found = {label: one for label, one in operations(schema).items() if label not in LEFT_OUT}
    assert len(found) > 40
    return found


def _shape(case: Case, known: Known, draw: Draw) -> None:
    """Let nothing take long that would take as long as it is told."""
    if case.operation.label == "POST /v1/memcubes/import":
        send_archive(case, known, draw)
    if isinstance(case.body, dict) and isinstance(case.body.get("wait"), int | float):
        case.body["wait"] = min(case.body["wait"], 5)
    if isinstance(case.query.get("wait"), int | float):
        case.query["wait"] = min(case.query["wait"], 5)


def test_every_route_answers_as_the_page_announces(
    http: httpx.Client, routes: dict[str, APIOperation]
) -> None:
    known = Known(http, prefix=fresh_id("fuzz"))
    failed: dict[str, str] = {}
    total: Counter[int] = Counter()
    for label, route in routes.items():
        if label == CHAT:
            continue
        began = time.monotonic()
        try:
            statuses = fuzz(route, known, examples=EXAMPLES, shape=_shape, timeout=60)
        except Exception as error:  # noqa: BLE001  (reported with those of other routes)
            failed[label] = "".join(map(str, [error, *getattr(error, "exceptions", ())]))[:3000]
        else:
            total += statuses
            print(label, dict(statuses), f"{time.monotonic() - began:.1f} s")
    assert not failed, "\n\n".join(f"{label}: {why}" for label, why in failed.items())
    assert total[200] + total[201] > total.total() / 4, total


def _ask(case: Case, known: Known, draw: Draw) -> None:
    """A chat with memory and a few of the fields that were made up; now and then all of them."""
    made_up: dict[str, Any] = case.body if isinstance(case.body, dict) else {}
    names = draw(st.lists(st.sampled_from(sorted(made_up)), max_size=4)) if made_up else []
    question = draw(st.text(st.characters(exclude_categories=["Cs"]), max_size=40))
    cube = known.one("memcube_id", draw)
    body = {**chat_body(cube, question), **{name: made_up[name] for name in names}}
    body |= {"max_tokens": MOST_TOKENS, "max_completion_tokens": MOST_TOKENS}
    body["n"] = min(body["n"], 2) if isinstance(body.get("n"), int) else 1
    case.body = body


def test_chats_with_memory_answer_as_the_page_announces(
    http: httpx.Client, routes: dict[str, APIOperation]
) -> None:
    known = Known(http, prefix=fresh_id("chat"))

    def vllm_fails_alone(case: Case, reply: Response) -> bool:
        if reply.status_code != 500 or not isinstance(case.body, dict):
            return False
        plain = {name: case.body[name] for name in case.body if name not in MEMORY_FIELDS}
        alone = http.post("/v1/chat/completions", json=plain)
        return alone.status_code == 500 and alone.json() == reply.json()

    statuses = fuzz(
        routes[CHAT], known, examples=CHATS, shape=_ask, excused=vllm_fails_alone, timeout=120
    )
    print(dict(statuses))
    assert statuses[200] > statuses.total() / 4, statuses
    assert http.get("/health").json()["status"] == "ready"
