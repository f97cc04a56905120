"""The second line of defence: a server whose request guard can be got around.

A middleware of this test's stands behind the guard and renames a harmless field, so that what a
client puts into it reaches the engine as `kv_transfer_params`. Only a ticket signed with this data
folder's key, for this request and this salt, and taken once, permits anything. The chat template of
this server also refuses some texts.
"""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from cube_kit import (
    activation,
    add_memories,
    ask,
    chat_body,
    client_of,
    cube_state,
    fresh_id,
    make_cube,
    metric,
    refused,
)

from memos_vllm.engine.names import MIDDLEWARE
from memos_vllm.engine.secrets import artifact_scope, cache_salt, load_keys
from memos_vllm.engine.ticket import TICKET_KEY, TicketSigner
from memos_vllm.process import ServerProcess

# SmolLM2's own, but for a word that it does not like.
TEMPLATE = """{% for message in messages %}\
{% if 'FORBIDDEN' in message['content'] %}{{ raise_exception('this word is refused') }}{% endif %}\
{% if loop.first and messages[0]['role'] != 'system' %}\
{{ '<|im_start|>system\\nYou are a helpful AI assistant.<|im_end|>\\n' }}{% endif %}\
{{'<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n'}}\
{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""


# A field that the guard does not know, and what the server makes of it behind the guard.
SMUGGLED = "smuggled_params"
SMUGGLER = f"""
class Smuggler:
    def __init__(self, app):
        self.app = app

    async def __call__(self, scope, receive, send):
        async def renamed():
            message = await receive()
            if message["type"] == "http.request":
                message["body"] = message["body"].replace(b"{SMUGGLED}", b"kv_transfer_params")
            return message

        if scope["type"] == "http":
            lengthless = [pair for pair in scope["headers"] if pair[0] != b"content-length"]
            scope = {{**scope, "headers": lengthless}}
        await self.app(scope, renamed, send)
"""


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tickets")


@pytest.fixture(scope="module")
def tricked(
    start_server: Callable[..., ServerProcess],
    data_dir: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[ServerProcess]:
    template = tmp_path_factory.mktemp("template") / "picky.jinja"
    template.write_text(TEMPLATE, encoding="utf-8")
    (template.parent / "smuggling.py").write_text(SMUGGLER, encoding="utf-8")
    server = start_server(
        "--chat-template",
        str(template),
        "--enable-prompt-tokens-details",
        # The last one named is the first to see a request.
        *("--middleware", "smuggling.Smuggler", "--middleware", MIDDLEWARE),
        data_dir=data_dir,
        environment={
            "PYTHONPATH": os.pathsep.join([str(template.parent), os.environ.get("PYTHONPATH", "")]),
        },
    )
    yield server
    server.stop()


@pytest.fixture
def http(tricked: ServerProcess) -> Iterator[httpx.Client]:
    with client_of(tricked) as client:
        yield client


@pytest.fixture(scope="module")
def cube(tricked: ServerProcess) -> Iterator[str]:
    with client_of(tricked) as client:
        yield make_cube(client, "ticket")[0]


class Forger:
    """Someone who knows more than anyone should: the keys, the scope, the salt, the head."""

    def __init__(self, http: httpx.Client, data_dir: Path, cube: str) -> None:
        self.http = http
        self.keys = load_keys(data_dir / "secrets")
        reply = ask(http, cube, return_token_ids=True)
        self.tokens: list[int] = reply["prompt_token_ids"]
        self.head_tokens: int = activation(reply)["tokens"]
        self.salts = [cache_salt(self.keys.salt, [(cube, epoch)]) for epoch in range(3)]
        self.scopes = [artifact_scope(self.keys.salt, [(cube, epoch)]) for epoch in range(3)]

    def ticket(
        self,
        name: str,
        *,
        key: bytes | None = None,
        salt: str | None = None,
        ttl_seconds: float = 60.0,
        epoch: int = 0,
    ) -> str:
        return TicketSigner(key or self.keys.ticket, ttl_seconds=ttl_seconds).sign(
            request_id=f"cmpl-{name}-0",
            samples=1,
            scope=self.scopes[epoch],
            cache_salt=salt or self.salts[epoch],
            head_tokens=self.head_tokens,
            save=True,
        )

    def use(self, ticket: object, *, name: str, salt: str | None) -> dict[str, Any]:
        """Send the cube's very prompt as a plain completion with this ticket."""
        body = {"model": "smol", "prompt": self.tokens, "max_tokens": 1, "temperature": 0}
        answer = self.http.post(
            "/v1/completions",
            json={
                **body,
                SMUGGLED: {TICKET_KEY: ticket},
                **({} if salt is None else {"cache_salt": salt}),
            },
            headers={"X-Request-Id": name},
        )
        assert answer.status_code == 200, answer.text
        reply: dict[str, Any] = answer.json()
        return reply


@pytest.fixture
def forger(http: httpx.Client, data_dir: Path, cube: str) -> Forger:
    return Forger(http, data_dir, cube)


def served(http: httpx.Client) -> float:
    """Memory requests that the connector has served."""
    # The engine's next step brings the counts.
    ask(http, max_tokens=1)
    return metric(http, "memos_requests_total")


def dropped(http: httpx.Client) -> float:
    """Parameters that the connector refused, for whatever reason."""
    ask(http, max_tokens=1)
    return metric(http, "memos_params_dropped_total") + metric(http, "memos_tickets_rejected_total")


def test_only_the_real_key_opens_and_only_once(http: httpx.Client, forger: Forger) -> None:
    # Which epoch a new cube has is the catalog's business; the real one is the one that hits.
    name = uuid.uuid4().hex
    before = served(http)
    opened = []
    for epoch in range(3):
        ticket = forger.ticket(f"{name}{epoch}", epoch=epoch)
        forger.use(ticket, name=f"{name}{epoch}", salt=forger.salts[epoch])
        opened.append((ticket, f"{name}{epoch}", forger.salts[epoch]))
    assert served(http) == before + 3, "a ticket that is right in all was not taken"

    for ticket, request, salt in opened:
        replayed = forger.use(ticket, name=request, salt=salt)
        assert replayed.get("kv_transfer_params") is None
    assert served(http) == before + 3
    assert metric(http, "memos_tickets_rejected_total", kind="already used") == 3


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        ("key", "forged, or signed with another key"),
        ("request", "bound to another request"),
        ("salt", "bound to another cache salt"),
        ("no salt", "bound to another cache salt"),
        ("time", "expired"),
        ("bytes", "forged, or signed with another key"),
    ],
)
def test_a_ticket_with_one_thing_wrong_permits_nothing(
    http: httpx.Client, forger: Forger, wrong: str, reason: str
) -> None:
    name = uuid.uuid4().hex
    salt: str | None = forger.salts[0]
    ticket = forger.ticket(name)
    if wrong == "key":
        ticket = forger.ticket(name, key=b"k" * 32)
    elif wrong == "request":
        ticket = forger.ticket("another")
    elif wrong == "salt":
        salt = "mine"
    elif wrong == "no salt":
        salt = None
    elif wrong == "time":
        ticket = forger.ticket(name, ttl_seconds=-1.0)
    else:
        payload, mac = ticket.split(".")
        ticket = f"{payload[:-4]}AAAA.{mac}"
    before = served(http)
    rejected = metric(http, "memos_tickets_rejected_total", kind=reason)

    reply = forger.use(ticket, name=name, salt=salt)

    assert served(http) == before
    assert metric(http, "memos_tickets_rejected_total", kind=reason) == rejected + 1
    assert reply.get("kv_transfer_params") is None


@pytest.mark.parametrize(
    "value",
    [
        {"a": 1},
        {TICKET_KEY: None},
        {TICKET_KEY: ["x"]},
        {TICKET_KEY: "a.b"},
        {TICKET_KEY: "é.é"},
        {TICKET_KEY: "."},
        {TICKET_KEY: "x" * 100_000},
        {"do_remote_prefill": True, "remote_block_ids": [1], "remote_engine_id": "e"},
    ],
    ids=lambda value: json.dumps(value)[:32],
)
def test_parameters_that_are_no_ticket_are_dropped_by_the_engine(
    http: httpx.Client, value: object
) -> None:
    before = dropped(http)
    plain = ask(http, question="Say yes.")

    reply = ask(http, question="Say yes.", **{SMUGGLED: value})

    assert reply["choices"] == plain["choices"]
    assert dropped(http) == before + 1
    assert metric(http, "memos_hook_failures_total") == 0


@pytest.mark.parametrize("value", ["text", 7, 1.5, True, [1]], ids=json.dumps)
def test_the_engine_outlives_parameters_that_vllm_itself_stumbles_over(
    http: httpx.Client, value: object
) -> None:
    """vLLM 0.32 answers 500 to these, before its engine sees them: one reason for the guard."""
    hostile = {"vllm_xargs": {SMUGGLED: value}}

    answer = http.post("/v1/chat/completions", json=chat_body(question="Say yes.", **hostile))

    assert answer.status_code in {400, 500}
    assert ask(http, question="Say yes.")["choices"]
    assert metric(http, "memos_hook_failures_total") == 0


# --- a template that refuses ---------------------------------------------------------------


@pytest.mark.parametrize("streamed", [False, True])
def test_a_chat_that_the_template_refuses_is_a_400(
    http: httpx.Client, cube: str, streamed: bool
) -> None:
    question = "Is this FORBIDDEN?"
    plain = http.post("/v1/chat/completions", json=chat_body(question=question))

    error = refused(http, cube, question=question, stream=streamed)

    assert plain.status_code == 400
    assert "this word is refused" in error["message"]


def test_memory_that_the_template_refuses_is_not_promoted(http: httpx.Client) -> None:
    cube_id, _ = make_cube(http, "refused", promote=False)
    add_memories(http, cube_id, ["This is FORBIDDEN."])

    answer = http.post(
        f"/v1/memcubes/{cube_id}/promote", json={"to": "activation", "memory_ids": "all"}
    )

    assert answer.status_code == 400
    assert answer.json()["error"]["code"] == "template_error"
    assert "this word is refused" in answer.json()["error"]["message"]
    assert cube_state(http, cube_id)["tiers"]["activation"] == 0


def test_memory_that_became_unrenderable_is_a_400_and_mends_with_the_next_edit(
    http: httpx.Client,
) -> None:
    cube_id, (first, *_) = make_cube(http, fresh_id("mended"))
    path = f"/v1/memcubes/{cube_id}/memories/{first}"

    http.patch(path, json={"text": "Now it is FORBIDDEN."})
    error = refused(http, cube_id)
    http.patch(path, json={"text": "Now it is fine."})

    assert "this word is refused" in error["message"]
    assert activation(ask(http, cube_id))["tokens"] > 0
