"""Requests that follow the API's own OpenAPI document, or just miss it, at cubes that exist.

Schemathesis makes the requests and compares the answers with the document. Random ids would only
ever reach a 404, so most of them are replaced by ids of cubes, memories, jobs and keys that are
there, and most texts by texts without control characters, which the domain would refuse.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from schemathesis import Case, GenerationMode, Response
from schemathesis.checks import load_all_checks, not_a_server_error
from schemathesis.schemas import APIOperation, BaseSchema
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)

load_all_checks()
# Junk; `Known.archive` is a real one.
schemathesis.openapi.media_type("application/zstd", st.binary(max_size=64))

UNAVAILABLE = 503
CHECKS = [
    status_code_conformance,
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
]
# So many requests on one set of cubes, since some of them delete what they meet.
REQUESTS_A_SEED = 10
# Of members that may name something, what names nothing.
_KEPT = {"all", "plaintext", "activation", "parametric"}
# What parameters and members of bodies name, where they are not called after it.
_NAMED: Mapping[str, str] = {
    "memory_ids": "memory_id",
    "target": "memory_id",
    "from": "other_cube_id",
    "with": "other_cube_id",
    "memcube_id": "cube_id",
    "owner": "principal",
}

Draw = Callable[[st.SearchStrategy[Any]], Any]


class Caller(Protocol):
    """As httpx.Client and Starlette's test client are."""

    def request(self, method: str, url: str, **options: Any) -> Any:
        """Send one request."""


@dataclass
class Known:
    """What there is to be named, by the parameter that names it.

    Args:
        prefix: of the cubes' ids.
    """

    caller: Caller
    prefix: str = "fuzz"
    named: dict[str, list[str]] = field(default_factory=dict)
    archive: bytes = b""
    _serial: Iterator[int] = field(default_factory=itertools.count)

    def seed(self) -> None:
        """Make cubes with something in every state."""
        here, there = self.fresh(), self.fresh()
        for cube in (here, there):
            self._ask("POST", "/v1/memcubes", json={"id": cube, "labels": ["open"]})
        texts = [f"Desk {number} of {here} opens at {number} o'clock." for number in range(12)]
        memories = [{"text": text, "tags": ["desk"]} for text in texts]
        hidden = {"text": "Only for some.", "labels": ["secret"]}
        added = self._ask(
            "POST", f"/v1/memcubes/{here}/memories", json={"memories": [*memories, hidden]}
        )
        ids = [one["id"] for one in added["data"]]
        self._ask("POST", f"/v1/memcubes/{here}/merge", json={"memory_ids": ids[:2]})
        self._ask("POST", f"/v1/memcubes/{here}/memories/{ids[2]}/archive")
        turn = {"role": "user", "content": "Hello."}
        self._ask("POST", f"/v1/memcubes/{here}/turns", json={"messages": [turn]})
        self._ask("POST", f"/v1/memcubes/{there}/keep", json={"from": here, "memory_ids": "all"})
        self._ask("PUT", f"/v1/memcubes/{here}/grants/ann", json={"role": "editor"})
        job = self._ask("POST", f"/v1/memcubes/{here}/reindex", params={"wait": 5})
        cursors = [
            self._ask("GET", path, params={"limit": 1})["next_cursor"]
            for path in ("/v1/memcubes", f"/v1/memcubes/{here}/memories", "/v1/audit")
        ]
        if not self.archive:
            self.archive = self.caller.request("GET", f"/v1/memcubes/{here}/export").content
        keys = self._ask("GET", "/v1/keys")["data"]
        self.named = {
            "cube_id": [here],
            "other_cube_id": [there],
            # Active ones first, and most of them: then archived, merged and hidden ones.
            "memory_id": [*ids[3:], *ids[:3]],
            "job_id": [job["id"]],
            "key_id": [key["id"] for key in keys],
            "principal": ["ann", "bob"],
            "cursor": [one for one in cursors if one],
            "if-match": ["4", '"4"', "5", "*", "999999999999999999"],
            # One for each request but the last two.
            "idempotency-key": [f"key-{next(self._serial)}" for _ in range(REQUESTS_A_SEED - 1)],
        }

    def _ask(self, method: str, path: str, **options: Any) -> Any:
        reply = self.caller.request(method, path, **options)
        assert reply.status_code < 300, f"{method} {path}: {reply.text}"
        return reply.json()

    def fresh(self) -> str:
        """The id of a cube that is not there."""
        return f"{self.prefix}-{next(self._serial)}"

    def one(self, name: str, draw: Draw) -> str | None:
        """One of those that a parameter of this name may name; None when there is none."""
        kind = _NAMED.get(name, name.lower())
        there = self.named.get(kind, [])
        if kind == "idempotency-key" and len(there) > 1:
            return there.pop()
        return there[draw(st.integers(0, 15)) % len(there)] if there else None


def operations(schema: BaseSchema) -> dict[str, APIOperation]:
    """Those of a document by their labels, such as `GET /v1/memcubes`."""
    return {one.ok().label: one.ok() for one in schema.get_all_operations()}


def labels(document: Mapping[str, Any]) -> list[str]:
    """The labels of every operation of a document."""
    paths = document["paths"].items()
    return [f"{method.upper()} {path}" for path, methods in paths for method in methods]


def fuzz(
    operation: APIOperation,
    known: Known,
    *,
    examples: int,
    shape: Callable[[Case, Known, Draw], None] = lambda case, known, draw: None,
    excused: Callable[[Case, Response], bool] = lambda case, reply: False,
    **options: Any,
) -> Counter[int]:
    """Send so many requests that follow the document and half as many that do not.

    They are the same every time, but for the ids of what is there.

    Args:
        shape: changes a case before it is sent.
        excused: whether an answer is no fault of ours, whatever it is.
        options: for `Case.call`.
    Returns:
        How often each status was answered.
    Raises:
        An exception group or an assertion with the request: an answer is not as documented.
    """
    statuses: Counter[int] = Counter()
    sent = itertools.count()

    def send(case: Case, draw: Draw) -> None:
        if next(sent) % REQUESTS_A_SEED == 0:
            known.seed()
        _name_what_is_there(case, known, draw)
        shape(case, known, draw)
        reply = case.call(**options)
        statuses[reply.status_code] += 1
        if excused(case, reply):
            return
        case.validate_response(
            reply,
            checks=[*CHECKS] if _is_down(reply) else [not_a_server_error, *CHECKS],
        )
        if reply.status_code >= 400:
            _assert_error(reply)

    modes = {GenerationMode.POSITIVE: examples}
    if list(operation.iter_parameters()) or operation.body:
        modes[GenerationMode.NEGATIVE] = examples // 2
    for mode, count in modes.items():

        @settings(
            max_examples=count,
            derandomize=True,
            deadline=None,
            database=None,
            suppress_health_check=list(HealthCheck),
            # A failure names its request; to make that smaller, the catalog would have to stand
            # still.
            phases=[Phase.generate],
        )
        @given(case=operation.as_strategy(generation_mode=mode), data=st.data())
        def run(case: Case, data: Any) -> None:
            send(case, data.draw)

        run()
    return statuses


def send_archive(case: Case, known: Known, draw: Draw) -> None:
    """Give an import a body, and mostly an id that is free."""
    case.body = _damaged(known.archive, draw)
    if draw(_usually):
        case.query["id"] = known.fresh()


def send_document(case: Case, known: Known, draw: Draw) -> None:
    """Mostly give a form a file and nothing unknown; what chance draws has neither."""
    del known
    if isinstance(case.body, dict) and draw(_usually):
        kept = {name: case.body[name] for name in ("file", "labels", "tags") if name in case.body}
        case.body = {"file": "A document.", **kept}


def _damaged(archive: bytes, draw: Draw) -> bytes:
    """An archive that is whole, cut short, altered in one byte, or nothing of the kind."""
    place = draw(st.integers(0, len(archive) - 1))
    flipped = bytes([archive[place] ^ draw(st.integers(1, 255))])
    return draw(
        st.sampled_from(
            [
                archive,
                archive[:place],
                archive[:place] + flipped + archive[place + 1 :],
                archive[place:],
                archive + flipped,
            ]
        )
    )


def _is_down(reply: Response) -> bool:
    """Whether a part is down and the reply says when to try again, as documented."""
    return reply.status_code == UNAVAILABLE and int(reply.headers.get("retry-after", ["0"])[0]) >= 1


def _assert_error(reply: Response) -> None:
    """Every refusal has OpenAI's shape, and says something."""
    error = reply.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}, error
    assert error["message"], error
    assert error["type"], error


_usually = st.integers(0, 7).map(bool)


def _name_what_is_there(case: Case, known: Known, draw: Draw) -> None:
    for place in (case.path_parameters, case.query, case.headers):
        for name in list(place):
            if draw(_usually) and (there := known.one(name, draw)) is not None:
                place[name] = there
    if isinstance(case.body, dict | list):
        case.body = _tamed(case.body, known, draw, tame=draw(_usually))


def _tamed(value: Any, known: Known, draw: Draw, *, tame: bool) -> Any:
    """A body with ids of what is there and, if `tame`, texts that may be stored."""
    if isinstance(value, dict):
        return {key: _member(key, item, known, draw, tame=tame) for key, item in value.items()}
    if isinstance(value, list):
        return [_tamed(item, known, draw, tame=tame) for item in value]
    if isinstance(value, str) and tame and not (value.isprintable() and value.strip()):
        return "".join(filter(str.isprintable, value)).strip() or "x"
    return value


def _member(key: str, item: Any, known: Known, draw: Draw, *, tame: bool) -> Any:
    named = key in _NAMED and not (isinstance(item, str) and item in _KEPT)
    if named and draw(_usually):
        if isinstance(item, str):
            return known.one(key, draw) or item
        if isinstance(item, list):
            some = [known.one(key, draw) or one for one in item]
            return list(dict.fromkeys(some)) if draw(_usually) else some
    return _tamed(item, known, draw, tame=tame)
