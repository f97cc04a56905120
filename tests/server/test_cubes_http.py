"""Cubes and memories over HTTP on a real server, and what their changes do to the next chat."""

from __future__ import annotations

import time
from typing import Any

import httpx
import pytest
from cube_kit import (
    BLOCK_TOKENS,
    activation,
    add_memories,
    ask,
    cube_state,
    fresh_id,
    make_cube,
    metric,
    move,
    note,
    notes_of,
    plainly_cached,
    promote_all,
    prompt_of,
)

BAKE_SECONDS = 60.0


def wait_until_ready(http: httpx.Client, cube_id: str) -> dict[str, Any]:
    deadline = time.monotonic() + BAKE_SECONDS
    while (cube := cube_state(http, cube_id))["activation"]["state"] != "ready":
        assert time.monotonic() < deadline, cube
        time.sleep(0.1)
    return cube


def computed_tokens_of_bake(http: httpx.Client, cube_id: str) -> float:
    """Promote everything; how many memory tokens had to be computed for it."""
    before = metric(http, "memos_tokens_total", kind="computed")
    promote_all(http, cube_id)
    # The engine's next step brings the counts.
    ask(http)
    return metric(http, "memos_tokens_total", kind="computed") - before


# --- create, read, change, delete ----------------------------------------------------------


def test_a_cube_is_created_listed_read_changed_and_deleted(http: httpx.Client) -> None:
    cube_id = fresh_id("crud")
    created = http.post("/v1/memcubes", json={"id": cube_id, "name": "Desks"})
    again = http.post("/v1/memcubes", json={"id": cube_id})
    listed = [cube["id"] for cube in http.get("/v1/memcubes?limit=1000").json()["data"]]
    patched = http.patch(f"/v1/memcubes/{cube_id}", json={"description": "All desks"})
    stale = http.patch(
        f"/v1/memcubes/{cube_id}", json={"name": "x"}, headers={"If-Match": "1"}
    ).status_code
    deleted = http.delete(f"/v1/memcubes/{cube_id}")

    assert (created.status_code, again.status_code) == (201, 409)
    assert cube_id in listed
    assert patched.json()["description"] == "All desks"
    assert patched.json()["name"] == "Desks"
    assert stale == 412
    assert deleted.json()["deleted"] is True
    assert http.get(f"/v1/memcubes/{cube_id}").status_code == 404


def test_memories_are_added_listed_read_changed_archived_restored_and_erased(
    http: httpx.Client,
) -> None:
    cube_id, (red, green, blue) = make_cube(http, "memories", promote=False)
    path = f"/v1/memcubes/{cube_id}/memories"

    assert [memory["id"] for memory in http.get(path).json()["data"]] == [red, green, blue]
    assert http.get(f"{path}/{red}").json()["state"] == "active"
    assert http.patch(f"{path}/{red}", json={"tags": ["new"]}).json()["version"] == 2
    assert [m["id"] for m in http.get(path, params={"tag": "new"}).json()["data"]] == [red]
    assert http.post(f"{path}/{green}/archive").json()["state"] == "archived"
    assert http.post(f"{path}/{green}/restore").json()["state"] == "active"
    assert http.delete(f"{path}/{green}").json()["state"] == "archived"
    assert http.delete(f"{path}/{blue}", params={"erase": "true"}).status_code == 200
    assert http.get(f"{path}/{blue}").status_code == 404
    assert len(http.get(f"{path}/{green}/history").json()["data"]) >= 3
    assert cube_state(http, cube_id)["memories"] == {"active": 1, "merged": 0, "archived": 1}


# --- tiers ---------------------------------------------------------------------------------


def test_a_promotion_that_is_waited_for_ends_ready_and_resident(http: httpx.Client) -> None:
    cube_id, ids = make_cube(http, "waited", promote=False)
    assert cube_state(http, cube_id)["activation"]["state"] == "none"

    job = promote_all(http, cube_id)
    cube = cube_state(http, cube_id)

    assert (job["kind"], job["state"], job["progress"]) == ("bake", "succeeded", 1.0)
    assert cube["tiers"] == {"plaintext": 0, "activation": len(ids), "parametric": 0}
    assert cube["activation"]["state"] == "ready"
    assert cube["activation"]["tokens"] == activation(ask(http, cube_id))["tokens"]
    # bfloat16 KV of SmolLM2: 30 layers, K and V, 3 heads of 64.
    raw = cube["activation"]["tokens"] // BLOCK_TOKENS * BLOCK_TOKENS * 30 * 2 * 3 * 64 * 2
    assert raw < cube["activation"]["bytes"] < 1.02 * raw + 64_000
    stats = http.get(f"/v1/memcubes/{cube_id}/stats").json()
    assert stats["resident_tokens"] > 0
    assert cube["activation"]["resident_tokens"] > 0


def test_a_promotion_that_is_not_waited_for_is_a_job_to_follow(http: httpx.Client) -> None:
    cube_id, _ = make_cube(http, "followed", promote=False)

    job = move(http, cube_id, "promote", to="activation", memory_ids="all")
    with http.stream("GET", f"/v1/jobs/{job['id']}/events") as events:
        names = [line for line in events.iter_lines() if line.startswith("event: ")]

    assert names[-1] == "event: done"
    assert http.get(f"/v1/jobs/{job['id']}").json()["state"] == "succeeded"
    assert wait_until_ready(http, cube_id)["activation"]["tokens"] > 0


def test_some_memories_are_promoted_and_the_others_are_there_only_when_found(
    http: httpx.Client,
) -> None:
    cube_id, (red, _, _) = make_cube(http, "some", promote=False)

    move(http, cube_id, "promote", to="activation", memory_ids=[red], wait=True)
    prompt = prompt_of(http, cube_id, memos={"retrieve": False})

    assert f"red of {cube_id}" in prompt
    assert f"green of {cube_id}" not in prompt
    assert f"green of {cube_id}" in prompt_of(http, cube_id, question="When does green open?")


def test_demotion_takes_the_text_out_of_attention(http: httpx.Client) -> None:
    cube_id, (_, green, _) = make_cube(http, "demoted")

    move(http, cube_id, "demote", **{"from": "activation"}, memory_ids=[green], wait=True)
    prompt = prompt_of(http, cube_id, memos={"retrieve": False})
    assert f"green of {cube_id}" not in prompt
    assert f"red of {cube_id}" in prompt
    assert f"blue of {cube_id}" in prompt

    move(http, cube_id, "demote", **{"from": "activation"}, memory_ids="all", wait=True)
    assert activation(ask(http, cube_id))["source"] == "none"
    assert cube_state(http, cube_id)["activation"] == {
        "state": "none",
        "tokens": 0,
        "bytes": 0,
        "resident_tokens": 0,
    }


# --- changes reach the next chat -----------------------------------------------------------


def test_an_edit_in_the_middle_is_answered_from_and_keeps_the_blocks_before_it(
    http: httpx.Client,
) -> None:
    cube_id, (_, green, _) = make_cube(http, "edited")
    before = activation(ask(http, cube_id))
    path = f"/v1/memcubes/{cube_id}/memories/{green}"

    edited = http.patch(path, json={"text": note(f"violet of {cube_id}")})
    stale = cube_state(http, cube_id)["activation"]["state"]
    reply = ask(http, cube_id, return_token_ids=True)
    prompt = prompt_of(http, cube_id)

    assert edited.json()["version"] == 2
    assert before["source"] == "resident"
    assert stale == "stale"
    assert activation(reply)["source"] == "computed"
    assert 0 < activation(reply)["cached_tokens"] < before["cached_tokens"]
    assert f"violet of {cube_id} desk number 6" in prompt
    assert f"green of {cube_id}" not in prompt
    assert wait_until_ready(http, cube_id)["activation"]["tokens"] == activation(reply)["tokens"]
    assert activation(ask(http, cube_id))["source"] == "resident"


@pytest.mark.parametrize("verb", ["archive", "erase"])
def test_what_is_archived_or_erased_is_gone_from_the_next_prompt(
    http: httpx.Client, verb: str
) -> None:
    cube_id, (_, green, _) = make_cube(http, verb)
    old_tokens = ask(http, cube_id, return_token_ids=True)["prompt_token_ids"]
    path = f"/v1/memcubes/{cube_id}/memories/{green}"

    if verb == "archive":
        assert http.post(f"{path}/archive").status_code == 200
    else:
        assert http.delete(path, params={"erase": "true"}).status_code == 200
    prompt = prompt_of(http, cube_id)

    assert f"green of {cube_id}" not in prompt
    assert f"red of {cube_id}" in prompt
    assert wait_until_ready(http, cube_id)["tiers"]["activation"] == 2
    assert activation(ask(http, cube_id))["source"] == "resident"
    assert plainly_cached(http, old_tokens) == 0


def test_erasing_removes_every_artifact_and_moves_the_cube_to_a_new_cache(
    http: httpx.Client,
) -> None:
    cube_id, (_, _, blue) = make_cube(http, "epoch")
    ask(http, cube_id)

    erased = http.delete(f"/v1/memcubes/{cube_id}/memories/{blue}", params={"erase": "true"})
    reply = ask(http, cube_id)

    assert erased.json()["artifacts_removed"] >= 1
    # Even the blocks before the erased memory belong to the old epoch.
    assert activation(reply)["cached_tokens"] in {0, activation(reply)["tokens"]}
    assert wait_until_ready(http, cube_id)["tiers"]["activation"] == 2


def test_a_new_preamble_opens_the_next_prompt(http: httpx.Client) -> None:
    cube_id, _ = make_cube(http, "preamble")

    http.patch(f"/v1/memcubes/{cube_id}", json={"preamble": "You are the desk clerk."})

    assert "You are the desk clerk." in prompt_of(http, cube_id)


# --- nothing crosses from one cube to another ----------------------------------------------


def test_a_deleted_cube_is_unknown_and_its_successor_sees_nothing_of_it(
    http: httpx.Client,
) -> None:
    cube_id, _ = make_cube(http, "reborn")
    texts = notes_of(cube_id, "red", "green", "blue")
    assert activation(ask(http, cube_id))["source"] == "resident"

    assert http.delete(f"/v1/memcubes/{cube_id}").json()["artifacts_removed"] == 1
    gone = http.post(
        "/v1/chat/completions",
        json={"model": "smol", "messages": [], "memcube_id": cube_id},
    )
    make_cube(http, cube_id=cube_id, texts=texts, promote=False)
    empty = activation(ask(http, cube_id))
    computed = computed_tokens_of_bake(http, cube_id)

    assert gone.status_code == 404
    assert gone.json()["error"]["message"] == f"memcube '{cube_id}' does not exist"
    assert empty["source"] == "none"
    # The same texts, and still nothing of the first life's KV was found.
    assert computed == activation(ask(http, cube_id))["tokens"]


def test_two_cubes_of_the_same_text_share_no_cache(http: httpx.Client) -> None:
    texts = notes_of(fresh_id("same"), "red", "green")
    first, _ = make_cube(http, "twin", texts=texts)
    known = ask(http, first, return_token_ids=True)
    second, _ = make_cube(http, "twin", texts=texts, promote=False)
    computed = computed_tokens_of_bake(http, second)
    reply = ask(http, second, return_token_ids=True)

    assert activation(known)["source"] == activation(reply)["source"] == "resident"
    assert known["prompt_token_ids"] == reply["prompt_token_ids"]
    # All of the second cube's memory was computed, though the same tokens lay in the pool and in
    # the store.
    assert computed == activation(reply)["tokens"]


def test_the_first_chat_of_a_twin_cube_finds_nothing_cached(http: httpx.Client) -> None:
    preamble = " ".join(notes_of(fresh_id("preamble"), "red", "green"))
    cached = []
    for _ in range(2):
        cube_id = fresh_id("twin")
        http.post("/v1/memcubes", json={"id": cube_id, "preamble": preamble})
        # A preamble alone is no activation memory, but it has the cube's salt.
        replies = [ask(http, cube_id), ask(http, cube_id)]
        assert [activation(reply)["source"] for reply in replies] == ["none", "none"]
        cached += [r["usage"]["prompt_tokens_details"]["cached_tokens"] for r in replies]

    assert cached[0] == cached[2] == 0
    assert cached[1] == cached[3] > 0


def test_a_list_bakes_its_first_cube_and_adds_the_others_as_text(http: httpx.Client) -> None:
    first, _ = make_cube(http, "first")
    second, _ = make_cube(http, "second")
    alone = activation(ask(http, first))

    reply = ask(http, [first, second])
    prompt = prompt_of(http, [first, second])

    assert [cube["id"] for cube in reply["memos"]["cubes"]] == [first, second]
    assert activation(reply)["tokens"] == alone["tokens"]
    assert prompt.index("[End of notes]") < prompt.index(f"red of {second}")
    assert prompt.index(f"red of {first}") < prompt.index("[End of notes]")
    assert activation(ask(http, [first, second]))["source"] == "resident"
    assert f"red of {second}" not in prompt_of(http, first)


def test_memory_that_grows_after_the_bake_is_added_by_the_next_promotion(
    http: httpx.Client,
) -> None:
    cube_id, _ = make_cube(http, "grown")
    tokens = activation(ask(http, cube_id))["tokens"]

    add_memories(http, cube_id, notes_of(cube_id, "white"))
    assert activation(ask(http, cube_id))["tokens"] == tokens
    promote_all(http, cube_id)

    assert activation(ask(http, cube_id))["tokens"] > tokens
    assert f"white of {cube_id}" in prompt_of(http, cube_id)


def test_the_audit_log_of_all_this_verifies(http: httpx.Client) -> None:
    make_cube(http, "audited")

    assert http.get("/v1/audit/verify").json()["ok"] is True
