"""Tickets: nothing but a fresh one for this very request is taken."""

from __future__ import annotations

import base64
import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memos_vllm.engine.ticket import Ticket, TicketSigner, TicketVerifier
from memos_vllm.errors import TicketRejected

KEY = bytes(range(32))
TTL = 300.0


class Clock:
    def __init__(self) -> None:
        self.now = 1_800_000_000.0

    def __call__(self) -> float:
        return self.now


class Office:
    """A signer and a verifier that share a key and a clock."""

    def __init__(self, *, key: bytes = KEY) -> None:
        self.clock = Clock()
        self.signer = TicketSigner(KEY, ttl_seconds=TTL, clock=self.clock)
        self.verifier = TicketVerifier(key, clock=self.clock)

    def sign(self, request_id: str = "chatcmpl-1", **changes: Any) -> str:
        fields = {"samples": 1, "scope": "5c0be", "cache_salt": "salt", "head_tokens": 7}
        return self.signer.sign(request_id=request_id, save=True, **{**fields, **changes})

    def take(
        self, token: object, request_id: str = "chatcmpl-1-0a1B2c3D", **changes: Any
    ) -> Ticket:
        return self.verifier.take(token, request_id=request_id, **{"cache_salt": "salt", **changes})


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


def test_a_fresh_ticket_is_taken_with_all_that_it_says() -> None:
    office = Office()
    ticket = office.take(office.sign(head_tokens=3072, session="call-17"))
    assert (ticket.scope, ticket.head_tokens, ticket.save, ticket.samples) == (
        "5c0be",
        3072,
        True,
        1,
    )
    assert ticket.session is not None
    assert "call-17" not in ticket.session


def test_a_ticket_shows_neither_salt_nor_request_id_nor_session() -> None:
    token = Office().sign(
        "chatcmpl-secret-request", cache_salt="secret-salt", session="secret-call"
    )
    payload = token.split(".")[0]
    text = base64.urlsafe_b64decode(payload + "=" * (-len(payload) % 4)).decode()
    assert "secret" not in text


def test_a_ticket_is_taken_once() -> None:
    office = Office()
    token = office.sign()
    office.take(token)
    with pytest.raises(TicketRejected, match="already used"):
        office.take(token)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"request_id": "chatcmpl-2-0a1B2c3D"}, "another request"),
        ({"request_id": "0_chatcmpl-1-0a1B2c3D"}, "another request"),
        ({"request_id": ""}, "another request"),
        ({"cache_salt": "other"}, "another cache salt"),
        ({"cache_salt": None}, "another cache salt"),
        ({"cache_salt": ""}, "another cache salt"),
    ],
)
def test_a_ticket_of_another_request_is_refused_and_stays_usable(
    changes: dict[str, Any], reason: str
) -> None:
    office = Office()
    token = office.sign()
    with pytest.raises(TicketRejected, match=reason):
        office.take(token, **changes)
    office.take(token)


def test_an_expired_ticket_is_refused() -> None:
    office = Office()
    token = office.sign()
    office.clock.now += TTL + 0.1
    with pytest.raises(TicketRejected, match="expired"):
        office.take(token)


def test_a_ticket_signed_with_another_key_is_refused() -> None:
    office = Office(key=bytes(32))
    with pytest.raises(TicketRejected, match="forged"):
        office.take(office.sign())


@given(data=st.data())
@settings(max_examples=200, deadline=None)
def test_a_ticket_with_any_byte_changed_or_cut_is_refused(data: st.DataObject) -> None:
    office = Office()
    token = office.sign()
    payload, mac = token.split(".")
    raw = [base64.urlsafe_b64decode(part + "=" * (-len(part) % 4)) for part in (payload, mac)]
    part = data.draw(st.sampled_from([0, 1]))
    index = data.draw(st.integers(0, len(raw[part]) - 1))
    if data.draw(st.booleans()):
        flipped = raw[part][index] ^ data.draw(st.integers(1, 255))
        raw[part] = raw[part][:index] + bytes([flipped]) + raw[part][index + 1 :]
    else:
        raw[part] = raw[part][:index]
    forged = ".".join(base64.urlsafe_b64encode(piece).rstrip(b"=").decode() for piece in raw)
    with pytest.raises(TicketRejected):
        office.take(forged)
    with pytest.raises(TicketRejected):
        office.take(token[: data.draw(st.integers(0, len(token) - 1))])
    office.take(token)


@given(token=json_values)
@settings(max_examples=300, deadline=None)
def test_whatever_stands_for_a_ticket_is_refused_in_one_way(token: object) -> None:
    with pytest.raises(TicketRejected):
        Office().take(token)


@pytest.mark.parametrize(
    "token",
    [
        "",
        ".",
        "a.b",
        "a.b.c",
        "é.é",
        "\ud800.\ud800",
        "=.=",
        "A" * 5000 + ".A",
        "%%%%.%%%%",
        "\0.\0",
    ],
)
def test_text_that_is_no_ticket_is_refused(token: str) -> None:
    with pytest.raises(TicketRejected):
        Office().take(token)


@given(
    header=st.text(
        alphabet=st.characters(min_codepoint=1, max_codepoint=255), min_size=1, max_size=60
    )
    | st.sampled_from(
        ["0_x", "12_chatcmpl-1", "a-12345678", "-abcdefgh", "_", "-", " ", "x" * 500]
    ),
    samples=st.integers(1, 9),
    suffix=st.text(alphabet="0123456789abcdef", min_size=8, max_size=8),
)
@settings(max_examples=300, deadline=None)
def test_any_x_request_id_works_for_each_of_n_samples(
    header: str, samples: int, suffix: str
) -> None:
    """vLLM appends random characters, and an index in front for n > 1."""
    office = Office()
    name = f"chatcmpl-{header}"
    token = office.sign(name, samples=samples)
    ids = (
        [f"{name}-{suffix}"]
        if samples == 1
        else [f"{index}_{name}-{suffix}" for index in range(samples)]
    )
    for engine_id in ids:
        office.take(token, engine_id)
    for engine_id in (*ids, f"{samples}_{name}-{suffix}", f"0_{name}x-{suffix}"):
        with pytest.raises(TicketRejected):
            office.take(token, engine_id)


def test_ids_that_vllm_does_not_randomise_work_too() -> None:
    office = Office()
    office.take(office.sign("chatcmpl-1"), "chatcmpl-1")
    office.take(office.sign("chatcmpl-1", samples=2), "1_chatcmpl-1")


@pytest.mark.parametrize("text", ["\ud800", "\udfff-12345678", "🂡", "\0"])
def test_text_that_is_no_unicode_is_bound_like_any_other(text: str) -> None:
    office = Office()
    token = office.sign(text, cache_salt=text, session=text)
    with pytest.raises(TicketRejected):
        office.take(token, text + "x", cache_salt=text)
    office.take(token, text, cache_salt=text)


def test_the_table_of_used_tickets_holds_one_lifetime_and_no_more() -> None:
    office = Office()
    for index in range(3000):
        office.take(office.sign(f"r{index}"), f"r{index}-0a1B2c3D")
        office.clock.now += 1.0
    assert len(office.verifier._used) <= TTL + 2


def test_a_used_ticket_is_refused_until_it_expires_and_as_expired_after() -> None:
    office = Office()
    token = office.sign()
    office.take(token)
    for _ in range(int(TTL / 10)):
        with pytest.raises(TicketRejected, match="already used"):
            office.take(token)
        office.clock.now += 10.0
        office.take(office.sign("other"), "other")
    office.clock.now += 1.0
    with pytest.raises(TicketRejected, match="expired"):
        office.take(token)


def test_refused_tickets_are_not_remembered() -> None:
    office = Office()
    for index in range(200):
        with pytest.raises(TicketRejected):
            office.take(office.sign(f"r{index}"), "another")
    assert not office.verifier._used


def test_a_ticket_of_another_version_is_refused() -> None:
    office = Office()
    payload = json.dumps({"v": 2}).encode()
    import memos_vllm.engine.ticket as module

    token = module._b64(payload) + "." + module._b64(module._mac(KEY, payload))
    with pytest.raises(TicketRejected, match="another version"):
        office.take(token)
