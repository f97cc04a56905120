"""Memory chats through floods: their order, and whether a series of times rises."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import numpy as np
import pytest
from live_server import LiveServer, live_server

from memos_vllm.bench import steady
from memos_vllm.bench.flatness import flatness
from memos_vllm.bench.flood import Pool
from memos_vllm.bench.metrics import Metrics
from memos_vllm.bench.steady import SteadyChat, SteadyRun, chat_through_floods, run_steady
from memos_vllm.bench.streams import Timed
from memos_vllm.errors import InvalidRequest

# --- a line through times ---------------------------------------------------------------


def test_the_slope_of_a_straight_line_is_exact() -> None:
    line = flatness([0.1 + 0.002 * number for number in range(50)])

    assert line.slope == pytest.approx(0.002)
    assert line.slope_low == pytest.approx(0.002)
    assert line.slope_high == pytest.approx(0.002)
    assert line.growth == pytest.approx(0.002 * 49 / line.median)
    assert line.rises


def test_a_few_slow_samples_tilt_nothing() -> None:
    seconds = [0.1] * 90 + [5.0] * 10

    assert flatness(seconds).slope == 0.0
    assert not flatness(seconds).rises


def test_noise_around_a_constant_is_seldom_called_rising() -> None:
    noisy = [_noise(seed) for seed in range(40)]

    # Two or three of a hundred should be; the bootstrap's interval is a bit narrow.
    assert sum(flatness(list(values), draws=200).rises for values in noisy) <= 4


def test_a_drift_of_a_tenth_is_found_in_noise_of_a_tenth() -> None:
    drift = 0.01 * np.linspace(0, 1, 200)
    found = [flatness(list(_noise(seed) + drift), draws=200) for seed in range(10)]

    assert sum(line.rises for line in found) >= 9
    assert np.median([line.growth for line in found]) == pytest.approx(0.1, abs=0.03)


def _noise(seed: int) -> np.ndarray:
    """200 times around 0.1 s, a tenth of it apart."""
    return 0.1 + 0.01 * np.random.default_rng(seed).standard_normal(200)


def test_the_last_quarter_is_set_beside_the_first() -> None:
    assert flatness([1.0] * 4 + [2.0] * 8 + [3.0] * 4).last_to_first == 3.0


def test_too_few_samples_have_no_slope() -> None:
    with pytest.raises(InvalidRequest, match="8 samples, there are 7"):
        flatness([0.1] * 7)


# --- chats through floods ---------------------------------------------------------------


def test_floods_come_before_every_so_many_questions_and_no_text_comes_twice() -> None:
    asked: list[tuple[str, str]] = []

    def answer(kind: str, seconds: float, source: str) -> Callable[[str], Timed]:
        def ask(text: str) -> Timed:
            asked.append((kind, text))
            return Timed(seconds, seconds, 600, 4, 512, {"source": source}, "")

        return ask

    ticks = iter(range(100))
    chats = chat_through_floods(
        answer("cube", 0.2, "resident"),
        answer("flood", 0.7, "-"),
        chats=4,
        flood_prompts=2,
        flood_every=2,
        seed=1,
        clock=lambda: float(next(ticks)),
    )

    once = ["flood", "flood", "cube", "cube"]
    assert [kind for kind, _ in asked] == once * 2
    words = [
        word for _, text in asked for word in text.split() if len(word) == 6 and word.isalpha()
    ]
    assert max(Counter(words).values()) == 1
    assert chats[0] == SteadyChat(1.0, 0.2, 512, "resident", (0.7, 0.7))
    assert [chat.flood_seconds for chat in chats] == [(0.7, 0.7), (), (0.7, 0.7), ()]
    assert [chat.at_seconds for chat in chats] == [1.0, 2.0, 3.0, 4.0]


def test_a_run_tells_all_chats_from_those_behind_a_flood_and_from_the_machine() -> None:
    chats = [
        SteadyChat(
            at_seconds=number,
            ttft_seconds=0.2 if number % 2 else 0.1 * (1 + number),
            cached_tokens=512,
            source="resident" if number else "store",
            flood_seconds=() if number % 2 else (0.5, 0.6, 9.0),
        )
        for number in range(16)
    ]
    run = SteadyRun(tuple(chats), pools_flooded=9.0)

    assert run.all_chats.samples == 16
    assert run.after_floods.samples == 8
    assert run.after_floods.slope == pytest.approx(0.2)
    assert run.machine.median == 0.6
    assert not run.machine.rises
    assert run.sources == Counter(resident=15, store=1)


@pytest.fixture
def live(tmp_path: Path) -> Iterator[LiveServer]:
    with live_server(tmp_path) as server:
        yield server


def test_a_cube_of_a_server_is_asked_and_the_floods_name_none(
    live: LiveServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    readings = iter([1000.0, 9000.0])
    monkeypatch.setattr(steady, "read_pool", lambda url: Pool(num_blocks=16, block_size=128))
    monkeypatch.setattr(
        steady,
        "read_metrics",
        lambda url: Metrics(f"vllm:prompt_tokens_total {next(readings)}"),
    )

    with httpx.Client(base_url=live.url, trust_env=False) as client:
        run = run_steady(client, model="any", body={"memcube_id": "acme"}, chats=3, flood_pools=1.0)

    # 2,048 tokens of pool are two prompts of 1,024, and one more to be sure.
    assert [chat.get("memcube_id") for chat in live.chats] == [None, None, None, "acme"] * 3
    assert [len(chat.flood_seconds) for chat in run.chats] == [3, 3, 3]
    assert run.pools_flooded == pytest.approx(8000 / 2048)
    assert set(run.sources) == {"resident"}
