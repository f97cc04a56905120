"""Where memory and the caller's own words go in a conversation."""

from __future__ import annotations

import copy
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from memos_vllm.activation.prefix import Placement, compose_messages, head_of, probe_messages

BLOCK = "Notes.\n\n[End of notes]\n"
EXTRA = "More.\n\n[End of extra notes]\n"
DEFAULT = "You are a helpful assistant."


def user(text: object) -> dict[str, Any]:
    return {"role": "user", "content": text}


def system(text: object, role: str = "system") -> dict[str, Any]:
    return {"role": role, "content": text}


def test_memory_opens_the_system_turn_and_the_default_text_follows() -> None:
    composed = compose_messages([user("Hi")], block=BLOCK, default_system=DEFAULT)
    assert composed == [system(f"{BLOCK}\n{DEFAULT}"), user("Hi")]


def test_the_callers_system_text_follows_memory_and_replaces_the_default() -> None:
    composed = compose_messages(
        [system("Be brief."), user("Hi")], block=BLOCK, additions=EXTRA, default_system=DEFAULT
    )
    assert composed == [system(f"{BLOCK}\n{EXTRA}\nBe brief."), user("Hi")]


def test_an_empty_system_text_of_the_caller_still_replaces_the_default() -> None:
    composed = compose_messages([system(""), user("Hi")], block=BLOCK, default_system=DEFAULT)
    assert DEFAULT not in composed[0]["content"]


def test_several_leading_system_and_developer_messages_become_one_turn_in_order() -> None:
    given_messages = [system("One."), system("Two.", "developer"), user("Hi")]
    composed = compose_messages(given_messages, block=BLOCK)
    assert composed == [system(f"{BLOCK}\nOne.\n\nTwo."), user("Hi")]


def test_a_system_message_in_mid_conversation_stays_where_it_is() -> None:
    messages = [user("Hi"), system("Now be brief."), user("So?")]
    composed = compose_messages(messages, block=BLOCK, default_system=DEFAULT)
    assert composed == [system(f"{BLOCK}\n{DEFAULT}"), *messages]


def test_text_parts_are_joined_as_vllm_joins_them() -> None:
    parts = [{"type": "text", "text": "One."}, {"type": "text", "text": "Two."}]
    composed = compose_messages([system(parts), user("Hi")], block=BLOCK)
    assert composed[0]["content"] == f"{BLOCK}\nOne.\nTwo."


def test_a_part_that_is_no_text_is_kept_as_it_is() -> None:
    image = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AA=="}}
    messages = [user([image, {"type": "text", "text": "What is it?"}])]
    composed = compose_messages(messages, block=BLOCK, placement=Placement.FIRST_USER)
    assert composed == [
        user([{"type": "text", "text": BLOCK}, image, {"type": "text", "text": "What is it?"}])
    ]


def test_without_a_system_role_everything_opens_the_first_user_turn() -> None:
    composed = compose_messages(
        [system("Be brief."), user("Hi"), {"role": "assistant", "content": "Yes?"}, user("So?")],
        block=BLOCK,
        additions=EXTRA,
        placement=Placement.FIRST_USER,
    )
    assert composed[0] == user(f"{BLOCK}\n{EXTRA}\nBe brief.\n\nHi")
    assert composed[1:] == [{"role": "assistant", "content": "Yes?"}, user("So?")]


def test_without_a_system_role_a_user_turn_is_added_when_none_comes_first() -> None:
    reply = {"role": "assistant", "content": "Hello, I am here."}
    composed = compose_messages([reply, user("Hi")], block=BLOCK, placement=Placement.FIRST_USER)
    assert composed == [user(BLOCK), reply, user("Hi")]


@pytest.mark.parametrize("placement", list(Placement))
def test_without_memory_a_conversation_is_left_alone(placement: Placement) -> None:
    messages = [system("One."), system("Two.", "developer"), user("Hi")]
    composed = compose_messages(messages, block="", default_system=DEFAULT, placement=placement)
    assert composed == messages
    assert composed[0] is not messages[0]


def test_an_empty_conversation_gets_its_memory() -> None:
    assert compose_messages([], block=BLOCK) == [system(BLOCK)]


def test_other_fields_of_a_message_are_kept() -> None:
    messages = [{**system("Be brief."), "name": "ops"}, {**user("Hi"), "name": "ann"}]
    composed = compose_messages(messages, block=BLOCK)
    assert [message["name"] for message in composed] == ["ops", "ann"]


_roles = st.sampled_from(["system", "developer", "user", "assistant", "tool"])


@given(
    st.lists(st.tuples(_roles, st.integers(1, 3), st.booleans()), max_size=8),
    st.sampled_from(list(Placement)),
    st.booleans(),
)
def test_the_callers_text_is_never_lost_or_reordered_or_changed(
    shape: list[tuple[str, int, bool]], placement: Placement, with_additions: bool
) -> None:
    texts = iter(range(1000))
    messages: list[dict[str, Any]] = []
    for role, count, as_parts in shape:
        words = [f"  caller text {next(texts)}.\n" for _ in range(count)]
        parts = [{"type": "text", "text": word} for word in words]
        messages.append({"role": role, "content": parts if as_parts else words[0]})
    before = copy.deepcopy(messages)
    composed = compose_messages(
        messages,
        block=BLOCK,
        additions=EXTRA if with_additions else "",
        default_system=DEFAULT,
        placement=placement,
    )
    assert messages == before
    said = _flat(composed)
    assert said.startswith(BLOCK)
    position = len(BLOCK)
    for text in _texts(messages):
        position = said.index(text, position) + len(text)
    left_out = said.replace(BLOCK, "").replace(EXTRA, "").replace(DEFAULT, "")
    for text in _texts(messages):
        left_out = left_out.replace(text, "", 1)
    assert left_out.strip() == ""


def test_the_head_is_the_longest_common_prefix() -> None:
    assert head_of([1, 2, 3, 4], [1, 2, 9, 4]) == [1, 2]
    assert head_of([1, 2], [1, 2, 3]) == [1, 2]
    assert head_of([1], [2]) == []
    assert head_of([], [1]) == []


def test_probes_differ_from_the_last_line_of_the_block_on() -> None:
    first, second = probe_messages(BLOCK, default_system=DEFAULT)
    assert first[0]["content"] == f"{BLOCK}\n{DEFAULT}"
    assert second[0]["content"].startswith("Notes.\n\n")
    assert "[End of notes]" not in second[0]["content"]
    assert first[1:] == second[1:]


def test_an_empty_block_cannot_be_probed() -> None:
    with pytest.raises(ValueError, match="empty block"):
        probe_messages("")


def _texts(messages: list[dict[str, Any]]) -> list[str]:
    found: list[str] = []
    for message in messages:
        content = message["content"]
        parts = [content] if isinstance(content, str) else content
        found += [part if isinstance(part, str) else part["text"] for part in parts]
    return found


def _flat(messages: list[dict[str, Any]]) -> str:
    return "\n".join(_texts(messages))
