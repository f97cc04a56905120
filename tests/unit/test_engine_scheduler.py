"""The scheduler half in vLLM's real scheduler: every state of a memory request."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from engine_kit import BLOCK, SALT, SCOPE, Engine, open_store, tokens
from vllm.lora.request import LoRARequest
from vllm.v1.outputs import KVConnectorOutput
from vllm.v1.request import RequestStatus

from memos_vllm.activation.store import ArtifactStore
from memos_vllm.activation.store.portable import adopt, describe, open_shard, read_description
from memos_vllm.engine.ticket import TICKET_KEY
from memos_vllm.engine.transfer import LoadReport, StepReport

HEAD = 6 * BLOCK + 5
PROMPT = [*tokens(HEAD), *tokens(20, seed=2)]
WHOLE = 6 * BLOCK

Starter = Callable[..., Engine]


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("model")


@pytest.fixture
def start(tmp_path: Path, model_folder: Path) -> Iterator[Starter]:
    """Start engines over one data folder, one after the other as a restarted server would."""
    engines: list[Engine] = []

    def starter(**options: Any) -> Engine:
        engines.append(Engine(tmp_path / "data", model_folder=model_folder, **options))
        return engines[-1]

    yield starter
    for engine in engines:
        engine.close()


both_schedulers = pytest.mark.parametrize("asynchronous", [False, True], ids=["sync", "async"])


def stored(engine: Engine, count: int = WHOLE, scope: str = SCOPE) -> bool:
    store = open_store(engine)
    store.refresh()
    return store.contains(engine.identity(scope), PROMPT[:count])


def free_ids(engine: Engine) -> list[int]:
    """Free blocks in the order of eviction."""
    queue = engine.pool.free_block_queue
    return [block.block_id for block in queue.get_all_free_blocks()]


@both_schedulers
def test_a_head_is_computed_then_resident_then_loaded_after_a_restart(
    start: Starter, asynchronous: bool
) -> None:
    engine = start(asynchronous=asynchronous)
    first = engine.ask("a", PROMPT, head=HEAD)
    assert (first["source"], first["cached_tokens"], first["tokens"]) == ("computed", 0, HEAD)
    assert stored(engine)
    again = engine.ask("b", PROMPT, head=HEAD)
    assert (again["source"], again["cached_tokens"]) == ("resident", HEAD)
    engine.assert_at_rest()

    restarted = start(asynchronous=asynchronous)
    loaded = restarted.ask("c", PROMPT, head=HEAD)
    assert (loaded["source"], loaded["cached_tokens"]) == ("store", WHOLE)
    assert restarted.counted("loads:ok") == 1
    assert restarted.counted("saves:ok") == 0
    restarted.assert_at_rest()
    assert restarted.finished == {"c": "length"}


@both_schedulers
def test_a_prompt_in_small_chunks_is_saved_once_it_is_whole(
    start: Starter, asynchronous: bool
) -> None:
    engine = start(asynchronous=asynchronous, batched_tokens=24)
    engine.ask("a", PROMPT, head=HEAD)
    assert stored(engine)
    assert (
        start(asynchronous=asynchronous, batched_tokens=24).ask("b", PROMPT, head=HEAD)["source"]
        == "store"
    )


@both_schedulers
@pytest.mark.parametrize("damage", ["corrupted", "deleted", "truncated"])
def test_an_artifact_that_cannot_be_loaded_is_computed(
    start: Starter, damage: str, asynchronous: bool
) -> None:
    engine = start(asynchronous=asynchronous)
    engine.ask("a", PROMPT, head=HEAD)
    restarted = start(asynchronous=asynchronous)
    (shard,) = (restarted.folder / "artifacts" / "data").rglob("*.safetensors")
    shard.chmod(0o600)
    if damage == "deleted":
        shard.unlink()
    elif damage == "truncated":
        shard.write_bytes(shard.read_bytes()[:-200])
    else:
        data = bytearray(shard.read_bytes())
        data[-30_000] ^= 1
        shard.write_bytes(bytes(data))
    restarted.add("b", PROMPT, head=HEAD)
    while not restarted.counted("loads:unusable"):
        restarted.step()
    # A real prefill gives the quarantine time: the good file will have the bad one's name.
    restarted.half._housekeeper.submit(int).result()
    restarted.run()
    reply = restarted.replies["b"]
    assert (reply["source"], reply["cached_tokens"]) == ("computed", 0)
    assert restarted.counted("loads:unusable") == 1
    restarted.assert_at_rest()
    # The broken one is gone, and the good KV has taken its place.
    assert start(asynchronous=asynchronous).ask("c", PROMPT, head=HEAD)["source"] == "store"


@both_schedulers
def test_a_request_aborted_while_it_loads_leaves_nothing_behind(
    start: Starter, asynchronous: bool
) -> None:
    start(asynchronous=asynchronous).ask("a", PROMPT, head=HEAD)
    engine = start(asynchronous=asynchronous)
    engine.hold_loads = True
    request = engine.add("b", PROMPT, head=HEAD)
    engine.step()
    assert request.status is RequestStatus.WAITING_FOR_REMOTE_KVS
    engine.abort("b")
    engine.step()
    assert [block.ref_cnt for block in engine.pool.blocks].count(1) >= WHOLE // BLOCK
    engine.hold_loads = False
    engine.run()
    engine.assert_at_rest()
    assert engine.ask("c", PROMPT, head=HEAD)["source"] == "store"


def test_concurrent_requests_share_one_load_and_say_so(start: Starter) -> None:
    start().ask("a", PROMPT, head=HEAD)
    engine = start()
    engine.hold_loads = True
    for index in range(5):
        engine.add(f"r{index}", [*PROMPT[:HEAD], *tokens(9, seed=10 + index)], head=HEAD)
    for _ in range(3):
        engine.step()
    engine.hold_loads = False
    engine.run()
    sources = [engine.replies[f"r{index}"]["source"] for index in range(5)]
    assert sources == ["store", *["resident"] * 4]
    assert engine.counted("loads:ok") == 1
    engine.assert_at_rest()


def test_when_the_load_that_others_wait_for_is_aborted_one_of_them_loads(start: Starter) -> None:
    start().ask("a", PROMPT, head=HEAD)
    engine = start()
    engine.hold_loads = True
    for name in ("b", "c"):
        engine.add(name, PROMPT, head=HEAD)
    engine.step()
    engine.abort("b")
    engine.step()
    engine.hold_loads = False
    engine.run()
    assert engine.replies["c"]["source"] == "store"
    engine.assert_at_rest()


def test_when_the_load_that_others_wait_for_fails_none_is_stuck(start: Starter) -> None:
    start().ask("a", PROMPT, head=HEAD)
    engine = start()
    (shard,) = (engine.folder / "artifacts" / "data").rglob("*.safetensors")
    shard.unlink()
    engine.hold_loads = True
    for name in ("b", "c", "d"):
        engine.add(name, PROMPT, head=HEAD)
    engine.step()
    engine.hold_loads = False
    engine.run()
    assert engine.replies["b"]["source"] == "computed"
    assert {engine.replies[name]["source"] for name in "cd"} <= {"computed", "resident"}
    engine.assert_at_rest()


def test_what_another_process_has_just_imported_is_loaded_and_not_computed(start: Starter) -> None:
    engine = start()
    engine.ask("a", PROMPT, head=HEAD)
    ours = open_store(engine)
    found = ours.lookup(engine.identity(SCOPE), PROMPT[:WHOLE])
    assert found is not None
    theirs = ArtifactStore(engine.folder / "artifacts", mac_key=ours._mac_key)
    (entry,) = found.manifest.shards
    with open_shard(theirs, entry) as file:
        shards = [(entry.size_bytes, file)]
        adopt(theirs, read_description(describe(found.manifest)), scope="1mported", shards=shards)
    reply = engine.ask("b", PROMPT, head=HEAD, salt="another", scope="1mported")
    assert (reply["source"], reply["cached_tokens"]) == ("store", WHOLE)
    engine.assert_at_rest()


def test_other_salts_never_share_blocks_and_other_scopes_never_share_artifacts(
    start: Starter,
) -> None:
    engine = start()
    engine.ask("a", PROMPT, head=HEAD)
    same_scope = engine.ask("b", PROMPT, head=HEAD, salt="salt of cubes a, b")
    assert same_scope["source"] == "store"
    other = engine.ask("c", PROMPT, head=HEAD, salt="salt of cube c", scope="0ther")
    assert (other["source"], other["cached_tokens"]) == ("computed", 0)
    plain = engine.add("d", PROMPT)
    cached = engine.scheduler.kv_cache_manager.get_computed_blocks(plain)[1]
    engine.run()
    assert cached == 0
    assert "d" not in engine.replies
    engine.assert_at_rest()


@both_schedulers
def test_prefix_caching_off_still_saves_and_loads(start: Starter, asynchronous: bool) -> None:
    engine = start(prefix_caching=False, asynchronous=asynchronous)
    assert engine.ask("a", PROMPT, head=HEAD)["source"] == "computed"
    assert engine.ask("b", PROMPT, head=HEAD)["source"] == "store"
    for name in ("c", "d", "e"):
        engine.add(name, PROMPT, head=HEAD)
    engine.run()
    assert {engine.replies[name]["source"] for name in "cde"} == {"store"}
    engine.assert_at_rest()


def test_an_adapter_neither_loads_nor_saves_what_was_computed_without_one(start: Starter) -> None:
    engine = start()
    engine.ask("a", PROMPT, head=HEAD)
    before = open_store(engine).num_artifacts
    lora = LoRARequest(lora_name="taught", lora_int_id=1, lora_path="nowhere")
    reply = engine.ask("b", PROMPT, head=HEAD, lora=lora)
    assert (reply["source"], reply["cached_tokens"]) == ("computed", 0)
    assert engine.ask("c", PROMPT, head=HEAD, lora=lora)["source"] == "resident"
    assert open_store(engine).num_artifacts == before
    engine.assert_at_rest()


def test_what_an_adapter_computed_is_never_saved_as_the_models_own(start: Starter) -> None:
    engine = start()
    lora = LoRARequest(lora_name="taught", lora_int_id=1, lora_path="nowhere")
    engine.ask("a", PROMPT, head=HEAD, lora=lora)
    assert open_store(engine).num_artifacts == 0
    engine.assert_at_rest()


def test_an_artifact_that_is_being_loaded_is_not_evicted(start: Starter) -> None:
    start().ask("a", PROMPT, head=HEAD)
    engine = start()
    store = open_store(engine)
    engine.hold_loads = True
    engine.add("b", PROMPT, head=HEAD)
    engine.step()
    store._ledger.budget_bytes = 1
    assert store.evict_to_budget() == ()
    engine.hold_loads = False
    engine.run()
    assert engine.replies["b"]["source"] == "store"
    assert len(store.evict_to_budget()) == 1


def test_cubes_are_counted_by_their_scopes(start: Starter) -> None:
    engine = start(residency_fraction=0.5)
    engine.ask("a", PROMPT, head=HEAD)
    engine.ask("b", PROMPT, head=HEAD, salt="salt of cube b", scope="0ther")
    engine.ask("c", [*PROMPT[:40], *tokens(90, seed=3)], head=80)
    assert engine.half._residency.resident_by_scope() == {SCOPE: 6 + 3, "0ther": 6}


def test_a_step_that_loads_many_cubes_does_not_push_another_out(start: Starter) -> None:
    """Loads take blocks beyond the step's token budget, which the horizon follows."""
    head = 3 * BLOCK + 2
    first = start()
    for cube in range(7):
        first.ask(f"c{cube}", PROMPT[:70], head=head, salt=f"salt {cube}", scope=f"{cube}")
    engine = start(num_blocks=56, batched_tokens=32, max_seqs=2)
    engine.ask("a", PROMPT[:70], head=head, salt="salt 0", scope="0")
    (prefix,) = engine.half._residency._prefixes.values()
    for index in range(100):
        others = free_ids(engine).index(prefix.pins[-1].block_id)
        if 5 <= others <= 12:
            break
        engine.ask(f"p{index}", tokens(50, seed=80 + index), max_tokens=1)
    engine.hold_loads = True
    for cube in range(1, 7):
        engine.add(f"l{cube}", PROMPT[:70], head=head, salt=f"salt {cube}", scope=f"{cube}")
    engine.step()
    assert len(engine._held_loads) == 6
    assert engine.half._residency.resident_blocks("0") == 3
    engine.hold_loads = False
    engine.run()
    engine.assert_at_rest()


@both_schedulers
def test_preemption_while_saving_keeps_the_saved_bytes_right(
    start: Starter, asynchronous: bool
) -> None:
    # Two requests that do not fit together: the later one is preempted as they grow.
    engine = start(num_blocks=22, asynchronous=asynchronous)
    engine.hold_saves = True
    engine.add("a", PROMPT, head=HEAD, max_tokens=60)
    engine.add("b", tokens(140, seed=5), max_tokens=60)
    for _ in range(80):
        engine.step()
    assert engine.half.has_pending_work, "the save is under way"
    engine.hold_saves = False
    engine.run()
    engine.assert_at_rest()
    assert stored(engine)
    assert start(asynchronous=asynchronous).ask("c", PROMPT, head=HEAD)["source"] == "store"


@both_schedulers
def test_a_preempted_memory_request_goes_on_with_the_right_kv(
    start: Starter, asynchronous: bool
) -> None:
    engine = start(num_blocks=24, asynchronous=asynchronous)
    engine.add("p", tokens(150, seed=6), max_tokens=90)
    request = engine.add("m", PROMPT, head=HEAD, max_tokens=90)
    engine.run()
    assert request.num_preemptions
    assert engine.replies["m"]["source"] == "computed"
    engine.assert_at_rest()


def test_a_save_holds_its_blocks_only_until_it_ends(start: Starter) -> None:
    engine = start()
    engine.hold_saves = True
    engine.add("a", PROMPT, head=HEAD)
    for _ in range(12):
        engine.step()
    assert "a" in engine.replies
    held = [block for block in engine.pool.blocks if block.ref_cnt and not block.is_null]
    assert len(held) == WHOLE // BLOCK
    assert engine.scheduler.has_requests(), "the engine must step until the save has ended"
    assert engine.scheduler.reset_prefix_cache() is False
    engine.hold_saves = False
    engine.run()
    assert engine.scheduler.reset_prefix_cache(reset_connector=True) is True
    assert engine.half._residency.resident_blocks() == 0
    engine.assert_at_rest()
    assert engine.ask("b", PROMPT, head=HEAD)["source"] == "store"


def test_a_cache_reset_that_the_connector_is_not_told_of_does_no_harm(start: Starter) -> None:
    engine = start()
    engine.ask("a", PROMPT, head=HEAD)
    assert engine.scheduler.reset_prefix_cache() is True
    for index in range(6):
        engine.ask(f"p{index}", tokens(300, seed=20 + index))
    assert engine.half._residency.resident_blocks() == 0
    assert engine.ask("b", PROMPT, head=HEAD)["source"] == "store"
    engine.assert_at_rest()


def test_what_another_process_erased_leaves_the_pool(start: Starter) -> None:
    engine = start()
    engine.ask("a", PROMPT, head=HEAD)
    engine.ask("b", PROMPT, head=HEAD, salt="salt of cube b", scope="0ther")
    engine.store.discard_scope(SCOPE)
    for _ in range(2):
        # The first look finds it, the second one acts on it.
        engine.half._next_gauges_at = 0.0
        engine.half.take_stats()
        engine.half._housekeeper.submit(int).result()
    assert engine.half._residency.resident_by_scope() == {"0ther": 6}
    assert engine.ask("c", PROMPT, head=HEAD)["source"] == "computed"
    other = engine.ask("d", PROMPT, head=HEAD, salt="salt of cube b", scope="0ther")
    assert other["source"] == "resident"
    engine.assert_at_rest()


@both_schedulers
def test_memory_survives_floods_of_plain_requests(start: Starter, asynchronous: bool) -> None:
    engine = start(num_blocks=96, batched_tokens=128, max_seqs=4, asynchronous=asynchronous)
    engine.ask("a", PROMPT, head=HEAD)
    for index in range(12):
        engine.ask(f"p{index}", tokens(400, seed=30 + index))
    assert engine.ask("b", PROMPT, head=HEAD)["source"] == "resident"
    assert engine.counted("residency_moves") > 0
    engine.assert_at_rest()


def test_plain_requests_are_preempted_no_more_often_than_without_memory(start: Starter) -> None:
    preemptions = []
    for memory in (False, True):
        engine = start(num_blocks=48)
        if memory:
            engine.ask("a", PROMPT, head=HEAD)
            assert engine.half._residency.resident_blocks() == WHOLE // BLOCK
        requests = [
            engine.add(f"p{index}", tokens(200, seed=40 + index), max_tokens=60)
            for index in range(4)
        ]
        engine.run()
        preemptions.append(sum(request.num_preemptions for request in requests))
        engine.assert_at_rest()
    assert preemptions[0] > 0
    assert preemptions[0] == preemptions[1]


def test_a_conversation_stays_resident_for_its_next_turn(start: Starter) -> None:
    engine = start(num_blocks=128, batched_tokens=64, max_seqs=4, residency_fraction=0.5)
    turn = [*PROMPT, *tokens(90, seed=50)]
    engine.ask("a", turn, head=HEAD, session="call-17")
    for index in range(10):
        engine.ask(f"p{index}", tokens(400, seed=60 + index))
    longer = engine.add("b", [*turn, *tokens(40, seed=51)], head=HEAD, session="call-17")
    engine.step()
    local = engine.half._requests["b"].local_tokens
    engine.run()
    assert local >= len(turn) // BLOCK * BLOCK
    assert longer.is_finished()
    engine.assert_at_rest()


def test_a_head_that_reaches_the_end_of_the_prompt_leaves_a_token_to_compute(
    start: Starter,
) -> None:
    prompt = tokens(6 * BLOCK)
    start().ask("a", prompt, head=len(prompt))
    engine = start()
    reply = engine.ask("b", prompt, head=len(prompt))
    assert (reply["source"], reply["cached_tokens"]) == ("store", 5 * BLOCK)
    engine.assert_at_rest()


@pytest.mark.parametrize("head", [0, 3, BLOCK - 1])
def test_a_head_of_less_than_a_block_is_left_alone(start: Starter, head: int) -> None:
    engine = start()
    reply = engine.ask("a", PROMPT, head=head)
    assert (reply["source"], reply["kept_tokens"]) == ("computed", 0)
    assert open_store(engine).num_artifacts == 0
    engine.assert_at_rest()


def test_a_head_longer_than_the_prompt_is_cut(start: Starter) -> None:
    engine = start()
    reply = engine.ask("a", PROMPT, head=10_000)
    assert reply["kept_tokens"] == (len(PROMPT) - 1) // BLOCK * BLOCK
    engine.assert_at_rest()


def test_a_longer_head_loads_what_is_stored_and_saves_the_rest(start: Starter) -> None:
    start().ask("a", PROMPT, head=3 * BLOCK)
    engine = start()
    reply = engine.ask("b", PROMPT, head=HEAD)
    assert (reply["source"], reply["cached_tokens"]) == ("store", 3 * BLOCK)
    assert stored(engine)
    engine.assert_at_rest()


def test_an_artifact_that_left_between_lookup_and_allocation_is_computed(
    start: Starter, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another artifact shares a shorter prefix: its later tokens must not be taken."""
    engine = start()
    engine.ask("a", PROMPT, head=HEAD)
    engine.ask("b", [*PROMPT[: 2 * BLOCK], *tokens(90, seed=70)], head=HEAD)
    restarted = start()
    key = open_store(restarted).lookup(restarted.identity(), PROMPT[:WHOLE]).manifest.key
    on_allocated = restarted.half.on_allocated

    def evict_then_allocate(request: Any, count: int) -> None:
        open_store(restarted).forget(key)
        on_allocated(request, count)

    monkeypatch.setattr(restarted.half, "on_allocated", evict_then_allocate)
    reply = restarted.ask("c", PROMPT, head=HEAD)
    assert (reply["source"], reply["cached_tokens"]) == ("computed", 0)
    restarted.assert_at_rest()


def test_kv_that_only_some_ranks_have_loaded_is_never_saved(start: Starter) -> None:
    """One rank reports a bad artifact while another still loads; then the client goes away."""
    start().ask("a", PROMPT, head=HEAD)
    engine = start()
    engine.hold_loads = True
    engine.add("b", PROMPT, head=HEAD)
    engine.step()
    (job,) = engine._held_loads
    report = LoadReport("b", job.artifact, 0, 0.1, error="the checksum is wrong", unusable=True)
    engine.scheduler._update_from_kv_xfer_finished(
        KVConnectorOutput(kv_connector_worker_meta=StepReport(loads=[report]))
    )
    engine.abort("b")
    assert not engine.half.has_pending_work
    engine.hold_loads = False
    engine.run()
    engine.assert_at_rest()


def test_unwanted_heads_are_not_saved_but_stay_resident(start: Starter) -> None:
    engine = start()
    engine.ask("a", PROMPT, head=HEAD, save=False)
    assert open_store(engine).num_artifacts == 0
    assert engine.ask("b", PROMPT, head=HEAD, save=False)["source"] == "resident"
    engine.assert_at_rest()


def test_a_ticket_never_reaches_the_workers(start: Starter) -> None:
    engine = start()
    request = engine.add("a", PROMPT, head=HEAD)
    output = engine.step()
    assert request.kv_transfer_params is None
    sampling = output.scheduled_new_reqs[0].sampling_params
    assert TICKET_KEY not in repr(sampling.extra_args)
    assert SALT not in repr(output.kv_connector_metadata)
    engine.run()
    engine.assert_at_rest()
