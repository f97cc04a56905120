"""A support assistant: one handbook for everyone, and a private memory for each customer.

Each customer is a principal, and the assistant uses the key of the customer whom it talks to. So
the server decides what it can find: no bug of the assistant, and nothing that it is talked into,
reaches another customer's memory.

    MEMOS_API_KEY=ADMINISTRATORS_KEY python deploy/examples/support_assistant.py

MEMOS_URL names the server. Run again, customers come back to what they said.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta

from memos_vllm import MOS
from memos_vllm.client import ApiConflict, ApiNotFound, ChatReply

HANDBOOK = "support-handbook"
# Whole blocks stay in attention, of 128 tokens on a CPU: less than one is computed each time.
FACTS = [
    "Refunds take five working days and go back to the card that paid.",
    "A parcel can be sent back for free within thirty days; the label is in the parcel.",
    "Delivery within the country takes two days, and abroad seven days.",
    "Express delivery costs nine euros and arrives on the next working day before noon.",
    "The telephone desk is open from eight in the morning until six in the evening.",
    "On Sundays and on public holidays only the chat is answered.",
    "A broken device is replaced within two years; a photograph of the damage is enough.",
    "Batteries and lamps are replaced within six months, and never sent by air.",
    "An order can be changed until it is packed, which is about one hour after it was placed.",
    "Gift cards are good for three years and cannot be paid out.",
    "Companies may pay by invoice within fourteen days once their tax number was checked.",
    "A customer's address is changed only after the last order's number was named.",
]

SHORT = {"max_tokens": 40, "temperature": 0}


def make_handbook(admin: MOS) -> None:
    """The cube that all share; its KV is computed here, once."""
    try:
        handbook = admin.create_cube(HANDBOOK, name="Support handbook")
    except ApiConflict:
        return  # An earlier run made it.
    handbook.add(FACTS)
    handbook.promote("all", to="activation", wait=True)


def admit(admin: MOS, customer: str) -> str:
    """A customer's key; the handbook is theirs to read, and `user.NAME` is theirs alone."""
    made = admin.create_key(customer, expires_at=datetime.now(UTC) + timedelta(days=1))
    # Made here and given away, so that nobody else can take the name before.
    admin.user_cube(customer).move(customer)
    admin.cube(HANDBOOK).share(customer, role="reader")
    return made.token


def talk(url: str, key: str, customer: str, *messages: str) -> list[ChatReply]:
    """One session. When it is closed, what the customer said is kept in `user.NAME`."""
    with MOS(url, key) as mos, mos.open_session(customer, domains=[HANDBOOK]) as session:
        return [session.chat(text, options=SHORT) for text in messages]


def try_to_read(url: str, key: str, cube_id: str, question: str) -> str:
    """What somebody gets who names another customer's cube."""
    with MOS(url, key) as mos:
        try:
            return mos.chat(question, cubes=[HANDBOOK, cube_id]).text
        except ApiNotFound as error:
            return f"{error.status_code} {error}"


def show(customer: str, messages: Sequence[str], replies: Sequence[ChatReply]) -> None:
    for message, reply in zip(messages, replies, strict=True):
        assert reply.memos is not None
        used = reply.memos.activation
        print(f"{customer}: {message}\n  assistant: {' '.join(reply.text.split())}")
        print(f"  handbook: {used.cached_tokens} of {used.tokens} tokens {used.source};", end=" ")
        print(f"found: {[found.id for found in reply.memos.retrieved]}")


def main() -> None:
    url = os.environ.get("MEMOS_URL", "http://127.0.0.1:8000")
    with MOS(url) as admin:
        make_handbook(admin)
        ann, ben = admit(admin, "ann"), admit(admin, "ben")

    told = "My order is 4711 and I want it delivered to my sister in Leeds."
    asked = "Where do I want my order delivered?"
    show("ann", [told], talk(url, ann, "ann", told))
    print("-- a session later")
    show("ann", [asked], talk(url, ann, "ann", asked))
    show("ben", [asked], talk(url, ben, "ben", asked))
    print(f"ben, naming user.ann: {try_to_read(url, ben, 'user.ann', asked)}")


if __name__ == "__main__":
    main()
