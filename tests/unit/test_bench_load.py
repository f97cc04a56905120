"""Load: the plan that is drawn, vLLM's client over it end to end, and what its answer tells."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import stream_server as fake
from tokenizers import Tokenizer, models, pre_tokenizers

from memos_vllm.bench import load
from memos_vllm.bench.load import (
    LoadFailed,
    LoadPlan,
    LoadRequest,
    LoadRun,
    run_load,
    ttft_ratios,
)
from memos_vllm.bench.metrics import Metrics
from memos_vllm.bench.traffic import (
    Filler,
    PlannedChat,
    Question,
    asking_by_prompt,
    asking_cubes,
    draw_questions,
    zipf_weights,
)
from memos_vllm.errors import ConfigurationError, InvalidRequest, MemosError

CUBES = ["handbook", "people", "prices", "archive"]
OUTPUT_TOKENS = 6
RATE = 8.0
SEED = 11
NAMED = ("handbook", "people") * 4
LIMIT_SECONDS = 1.0
CONCURRENCY = 2


# --- plans ------------------------------------------------------------------------------


def test_cubes_are_asked_as_zipf_says() -> None:
    questions = draw_questions(CUBES, number=4000, seed=3)
    counts = Counter(question.cube for question in questions)

    assert zipf_weights(3) == pytest.approx([6 / 11, 3 / 11, 2 / 11])
    for cube, weight in zip(CUBES, zipf_weights(len(CUBES)), strict=True):
        # Four standard deviations.
        spread = 4 * (4000 * weight * (1 - weight)) ** 0.5
        assert abs(counts[cube] - 4000 * weight) < spread


def test_without_an_exponent_all_cubes_are_asked_alike() -> None:
    assert zipf_weights(4, 0.0) == [0.25] * 4


def test_a_seed_gives_the_same_questions_and_another_seed_others() -> None:
    drawn = [draw_questions(CUBES, number=20, seed=seed) for seed in (1, 1, 2)]

    assert drawn[0] == drawn[1]
    assert not {q.text for q in drawn[0]} & {q.text for q in drawn[2]}


def test_no_filler_comes_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    # Of two letters: with 26 there would be no repeat to leave out.
    monkeypatch.setattr("memos_vllm.bench.traffic.string.ascii_lowercase", "ab")
    words = Filler(0, "questions").words(2**6).split()

    assert len(set(words)) == 2**6


def test_questions_differ_from_their_first_word_on() -> None:
    firsts = [q.text.split()[1] for q in draw_questions(CUBES, number=500, seed=0)]

    assert len(set(firsts)) == 500


def test_a_share_of_the_questions_is_asked_without_memory() -> None:
    questions = draw_questions(CUBES, number=2000, seed=5, plain_share=0.25)
    plain = sum(question.cube is None for question in questions)

    assert 400 < plain < 600
    assert draw_questions([], number=3, seed=5, plain_share=1.0)[0].cube is None


@pytest.mark.parametrize(("cubes", "number"), [([], 5), (CUBES, 0)])
def test_a_plan_of_nothing_is_refused(cubes: list[str], number: int) -> None:
    with pytest.raises(InvalidRequest):
        draw_questions(cubes, number=number, seed=0)


def test_a_chat_names_its_cube_in_the_body_and_a_plain_one_names_none() -> None:
    asked = asking_cubes([Question("people", "Who?"), Question(None, "What?")], output_tokens=9)

    assert [dict(chat.body) for chat in asked] == [{"memcube_id": "people"}, {}]
    assert [chat.cube for chat in asked] == ["people", None]
    assert asked[0].messages == ({"role": "user", "content": "Who?"},)
    assert asked[0].output_tokens == 9


def test_without_the_plugin_the_same_questions_carry_their_memory_in_the_prompt() -> None:
    asked = asking_by_prompt(
        [Question("people", "Who?"), Question(None, "What?")],
        lambda question: [{"role": "system", "content": f"{question.cube}'s text"}],
        output_tokens=9,
    )

    assert asked[0].messages == ({"role": "system", "content": "people's text"},)
    assert asked[1].messages == ({"role": "user", "content": "What?"},)
    assert [dict(chat.body) for chat in asked] == [{}, {}]
    assert [chat.cube for chat in asked] == ["people", None]


# --- vLLM's client, end to end ----------------------------------------------------------


@dataclass(frozen=True)
class Measured:
    server: fake.StreamServer
    plan: LoadPlan
    run: LoadRun


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    words = Tokenizer(models.WordLevel({"a": 0, "?": 1}, unk_token="?"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.save(str(folder / "tokenizer.json"))
    about = {"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "?"}
    (folder / "tokenizer_config.json").write_text(json.dumps(about))
    return folder


@pytest.fixture(scope="module")
def measured(tokenizer: Path) -> Iterator[Measured]:
    """One run, since vLLM's client takes ten seconds to start."""
    # The two slow ones take both places, and whoever comes then waits.
    named = [*NAMED, None, None, fake.SLOW, fake.SLOW, fake.UNKNOWN, fake.BREAKING, "people"]
    questions = [Question(cube, f"Question {number}?") for number, cube in enumerate(named)]
    plan = LoadPlan(
        chats=asking_cubes(questions, output_tokens=OUTPUT_TOKENS),
        concurrency=CONCURRENCY,
        request_rate=RATE,
        limit_seconds=LIMIT_SECONDS,
        seed=SEED,
    )
    with fake.stream_server() as server, pytest.MonkeyPatch.context() as patch:
        patch.setenv("http_proxy", "http://127.0.0.1:9")
        patch.setenv("OPENAI_API_KEY", "sk-somebody")
        server.sources["resident"] = 7
        yield Measured(
            server, plan, run_load(plan, url=server.url, model="bench", tokenizer=tokenizer)
        )


def test_the_client_sends_each_chat_once_as_planned(measured: Measured) -> None:
    sent = {body["messages"][0]["content"]: body for body in measured.server.bodies}

    assert len(measured.server.bodies) == len(measured.plan.chats)
    for chat in measured.plan.chats:
        body = sent[str(chat.messages[0]["content"])]
        assert body.get("memcube_id") == chat.cube
        assert body["model"] == "bench"
        assert body["max_completion_tokens"] == OUTPUT_TOKENS
        assert body["temperature"] == 0
        assert body["ignore_eos"] is True
        assert body["stream_options"] == {"include_usage": True}


def test_nobodys_key_goes_along(measured: Measured) -> None:
    assert not any("authorization" in headers for headers in measured.server.headers)


def test_no_more_chats_are_under_way_than_the_limit(measured: Measured) -> None:
    assert measured.server.most_at_once == CONCURRENCY


def test_chats_arrive_as_a_poisson_process_of_the_seed(measured: Measured) -> None:
    number = len(measured.plan.chats)
    np.random.seed(SEED)
    due = np.cumsum(np.random.exponential(1 / RATE, size=number))
    due *= (number / RATE) / due[-1]
    arrived = [one.arrived_seconds for one in measured.run.requests]

    # A busy machine delays one or another, and none for good.
    assert np.median(np.abs(arrived - (due - due[0]))) < 0.05


def test_a_chat_that_had_to_wait_in_the_client_says_so(measured: Measured) -> None:
    *_, last = measured.run.requests

    assert last.waited_seconds > LIMIT_SECONDS > last.ttft_seconds
    assert measured.run.requests[0].waited_seconds < LIMIT_SECONDS
    assert measured.run.felt_goodput_per_second < measured.run.goodput_per_second


def test_each_request_has_its_raw_samples(measured: Measured) -> None:
    whole = measured.run.answered

    assert len(whole) == len(measured.plan.chats) - 2
    for one in whole:
        assert one.prompt_tokens == fake.PROMPT_TOKENS
        assert one.output_tokens == OUTPUT_TOKENS
        assert 0 < one.ttft_seconds < one.total_seconds
        # The role's chunk, then one for each token.
        assert len(one.gap_seconds) == OUTPUT_TOKENS
    assert len(measured.run.gap_seconds) == len(whole) * (OUTPUT_TOKENS - 1)
    assert min(measured.run.gap_seconds) > 0


def test_what_failed_is_an_error_and_no_sample(measured: Measured) -> None:
    errors = {one.cube: one.error for one in measured.run.requests if one.error}

    assert errors == {
        fake.UNKNOWN: "Not Found",
        fake.BREAKING: f"the answer broke off after 2 of {OUTPUT_TOKENS} tokens",
    }
    assert sorted(measured.run.errors) == sorted(errors.values())
    assert len(measured.run.ttft_seconds) == len(measured.run.answered)


def test_goodput_leaves_out_the_slow_and_the_broken(measured: Measured) -> None:
    run = measured.run
    good = len(measured.plan.chats) - 4

    assert run.goodput_per_second == pytest.approx(good / run.duration_seconds)
    # vLLM's own figure counts the stream that broke off.
    assert run.reported_goodput_per_second == pytest.approx((good + 1) / run.duration_seconds)


def test_only_the_runs_own_memory_chats_are_counted_by_source(measured: Measured) -> None:
    assert dict(measured.run.sources) == {"resident": 11, "plain": 2}


def test_plain_and_memory_streams_have_their_own_speeds(measured: Measured) -> None:
    assert len(measured.run.tokens_per_second(with_memory=False)) == 2
    assert len(measured.run.tokens_per_second(with_memory=True)) == 11
    assert min(measured.run.tokens_per_second(with_memory=True)) > 0


def test_a_run_can_be_written_as_json(measured: Measured) -> None:
    written = json.loads(json.dumps(asdict(measured.run)))

    assert len(written["requests"]) == len(measured.plan.chats)
    assert written["requests"][0]["ttft_seconds"] == measured.run.requests[0].ttft_seconds


# --- what cannot be used ----------------------------------------------------------------


def _plan(**changes: Any) -> LoadPlan:
    chat = PlannedChat(({"role": "user", "content": "Hello"},), output_tokens=2)
    plan = LoadPlan((chat,), concurrency=1, request_rate=1.0, limit_seconds=1.0, seed=0)
    return replace(plan, **changes)


@pytest.mark.parametrize(
    "changes",
    [{"chats": ()}, {"concurrency": 0}, {"request_rate": 0.0}, {"limit_seconds": -1.0}],
)
def test_an_unusable_plan_is_refused_before_anything_starts(
    changes: dict[str, Any], tokenizer: Path
) -> None:
    with pytest.raises(ConfigurationError):
        run_load(_plan(**changes), url="http://127.0.0.1:9", model="m", tokenizer=tokenizer)


def test_a_folder_without_a_tokenizer_is_refused_and_nothing_is_fetched(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="holds no tokenizer"):
        run_load(_plan(), url="http://127.0.0.1:9", model="m", tokenizer=tmp_path)


def test_a_server_that_is_not_there_is_named(tokenizer: Path) -> None:
    with pytest.raises(MemosError, match=r"127\.0\.0\.1:9 does not tell"):
        run_load(_plan(), url="http://127.0.0.1:9", model="m", tokenizer=tokenizer)


def test_a_client_that_dies_tells_why(tokenizer: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load, "_CLIENT", "memos_vllm.no_such_module")
    with (
        fake.stream_server() as server,
        pytest.raises(LoadFailed, match=r"exit code 1:\n.*no_such_module"),
    ):
        run_load(_plan(), url=server.url, model="m", tokenizer=tokenizer)


def test_a_client_that_takes_too_long_is_ended(tokenizer: Path) -> None:
    with (
        fake.stream_server() as server,
        pytest.raises(LoadFailed, match=r"not done after 0\.2 s"),
    ):
        run_load(_plan(), url=server.url, model="m", tokenizer=tokenizer, timeout_seconds=0.2)


# --- figures ----------------------------------------------------------------------------


def _request(ttft_seconds: float, error: str | None = None) -> LoadRequest:
    return LoadRequest(
        cube=None,
        arrived_seconds=0.0,
        waited_seconds=0.3,
        ttft_seconds=ttft_seconds,
        total_seconds=ttft_seconds + 1.0,
        gap_seconds=(0.0, 0.5, 0.5),
        prompt_tokens=10,
        output_tokens=3,
        error=error,
    )


def _run(*requests: LoadRequest) -> LoadRun:
    return LoadRun(
        concurrency=1,
        request_rate=1.0,
        limit_seconds=0.5,
        duration_seconds=2.0,
        reported_goodput_per_second=0.0,
        output_tokens_per_second=0.0,
        vllm="0",
        requests=requests,
    )


def test_the_wait_in_the_client_counts_in_the_felt_goodput_only() -> None:
    run = _run(_request(0.1), _request(0.4), _request(0.6), _request(0.1, error="gone"))

    assert run.goodput_per_second == 1.0
    assert run.felt_goodput_per_second == 0.5
    assert run.chats_per_second == 1.5


def test_a_streams_speed_is_that_of_the_tokens_after_its_first() -> None:
    assert _request(0.1).tokens_per_second == pytest.approx(2.0)


def test_runs_are_compared_chat_by_chat_and_without_what_failed() -> None:
    with_plugin = _run(_request(0.2), _request(0.3), _request(0.4, error="gone"))
    without = _run(_request(0.1), _request(0.3, error="gone"), _request(0.4))

    assert ttft_ratios(with_plugin, without) == pytest.approx((2.0,))


def test_metrics_are_summed_over_labels_and_told_by_one() -> None:
    page = Metrics(
        "# HELP memos_requests_total of requests\n"
        'memos_requests_total{engine="0",kind="resident"} 3.0\n'
        'memos_requests_total{engine="1",kind="resident"} 2.0\n'
        'memos_requests_total{engine="0",kind="store"} 1.0\n'
        'memos_requests_total_more{kind="store"} 9.0\n'
        "up 1.0\n"
    )

    assert page.by_label("memos_requests_total", "kind") == Counter(resident=5, store=1)
    assert page.total("memos_requests_total") == 6
    assert page.total("up") == 1
    assert page.total("absent") == 0


def _waits(at_once: int, soon: int, late: int) -> Metrics:
    counts = (at_once, at_once + soon, at_once + soon + late)
    return Metrics(
        "\n".join(
            f'wait_seconds_bucket{{le="{bound}",part="rights"}} {count}.0'
            for bound, count in zip(("0.002", "0.004", "+Inf"), counts, strict=True)
        )
    )


def test_a_quantile_is_of_what_was_observed_since_the_earlier_reading() -> None:
    before, after = _waits(100, 0, 0), _waits(110, 10, 0)
    assert after.quantile("wait_seconds", 0.5, since=before) == pytest.approx(0.002)
    assert after.quantile("wait_seconds", 0.75, since=before) == pytest.approx(0.003)


def test_a_quantile_above_all_bounds_is_the_last_bound() -> None:
    assert _waits(0, 0, 5).quantile("wait_seconds", 0.5, since=_waits(0, 0, 0)) == 0.004


def test_there_is_no_quantile_of_nothing() -> None:
    page = _waits(3, 2, 1)
    assert math.isnan(page.quantile("wait_seconds", 0.5, since=page))
    assert math.isnan(page.quantile("absent", 0.5, since=page))
