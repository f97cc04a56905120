"""Time to first token with a cube, beside plain vLLM: `python -m benchmarks.ttft`.

Two real servers, one plain vLLM and one with memory, take turns, so that a noisy machine slows both
alike; what counts is the median of the ratios of samples from the same round. While one is asked,
the other is stopped: an idle vLLM worker spins for a second, on the very core that the other's
worker is pinned to. The JSON file holds every raw sample, the machine and the versions.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import random
import statistics
import string
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import httpx

from benchmarks.streams import Timed, metric, timed_chat
from memos_vllm import MOS
from memos_vllm.activation.prefix import compose_messages, render_memory_block
from memos_vllm.demo.handbook import handbook_sections
from memos_vllm.engine.gateway import vllm_version
from memos_vllm.models.prepare import prepare
from memos_vllm.process import ServerProcess, memos_command, plain_vllm_command

MODEL = "smollm2-135m-instruct"
SERVED = "bench"
CUBE = "handbook"
BLOCK_TOKENS = 128
# Four seconds or so of somebody else's answer, within which a save begins and ends.
_OTHER_TOKENS = 96
# What the model's template adds when a chat has no system text; memory keeps it.
DEFAULT_SYSTEM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"


@dataclass
class Row:
    """One line of the report.

    Attributes:
        seconds: this situation's samples.
        base_seconds: its partner's samples from the same rounds.
        limit: the ratio that the project promises, or None.
        faults: why the row does not count; a row with faults is printed without a time.
    """

    name: str
    base: str
    limit: float | None = None
    seconds: list[float] = field(default_factory=list)
    base_seconds: list[float] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)

    def add(self, sample: float, base: float) -> None:
        self.seconds.append(sample)
        self.base_seconds.append(base)

    @property
    def ratios(self) -> list[float]:
        return [a / b for a, b in zip(self.seconds, self.base_seconds, strict=True)]


class Bench:
    """Both servers, and what is asked of them."""

    def __init__(self, folder: Path, *, blocks: int, seed: int) -> None:
        self.blocks = blocks
        self.random = random.Random(seed)
        model = str(prepare(MODEL, progress=print))
        options = (
            *("--enforce-eager", "--served-model-name", SERVED, "--enable-prompt-tokens-details"),
            *("--num-gpu-blocks-override", str(blocks), "--max-num-seqs", "32"),
        )
        environment = {
            "VLLM_CPU_KVCACHE_SPACE": "1",
            # With a connector vLLM chooses other cores than without: both get all of them.
            "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, sorted(os.sched_getaffinity(0)))),
        }
        data = folder / "data"
        self.memos = ServerProcess(
            memos_command(model, "--data-dir", str(data), *options),
            log_path=folder / "memos.log",
            environment=environment,
        )
        self.plain = ServerProcess(
            plain_vllm_command(model, *options),
            log_path=folder / "plain.log",
            environment=environment,
        )
        self.clients: dict[str, httpx.Client] = {}
        self._stopping = threading.Lock()
        self._stopped = contextlib.ExitStack()
        self._alone = 0
        sections = handbook_sections()
        self.sections = sections
        self.block = render_memory_block(None, sections)

    def start(self) -> None:
        for name, server in (("plain", self.plain), ("memos", self.memos)):
            server.start()
            # Without keep-alive: a server that was stopped closes old connections when it goes on.
            self.clients[name] = httpx.Client(
                base_url=server.url,
                timeout=300.0,
                trust_env=False,
                limits=httpx.Limits(max_keepalive_connections=0),
            )
            self.warm_up(name)

    def stop(self) -> None:
        for client in self.clients.values():
            client.close()
        self.memos.stop()
        self.plain.stop()

    def warm_up(self, name: str) -> None:
        self.ask_plain(name, [{"role": "user", "content": f"Say hello to {self.filler(4)}."}])

    def fill_cube(self) -> None:
        with MOS(self.memos.url) as mos:
            cube = mos.create_cube(CUBE)
            for section in self.sections:
                cube.add(section.text, source={"kind": "document", "title": section.title})
            cube.promote("all", to="activation", wait=True)

    # --- single chats -------------------------------------------------------------------

    def filler(self, words: int) -> str:
        """Words that no cache has seen."""
        letters = string.ascii_lowercase
        return " ".join("".join(self.random.choices(letters, k=6)) for _ in range(words))

    def question(self) -> list[dict[str, Any]]:
        return [{"role": "user", "content": f"Regarding {self.filler(6)}: what is the motto?"}]

    def with_memory_by_hand(self, messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """The very messages that memory composes, for the server without memory."""
        return compose_messages(messages, block=self.block, default_system=DEFAULT_SYSTEM)

    def ask_plain(self, name: str, messages: list[dict[str, Any]], **body: Any) -> Timed:
        with self.alone(name):
            return timed_chat(self.clients[name], messages, model=SERVED, **body)

    @contextlib.contextmanager
    def alone(self, name: str) -> Iterator[None]:
        """Nobody else uses the machine's cores; nested and concurrent uses share one stop."""
        with self._stopping:
            self._alone += 1
            if self._alone == 1:
                other = self.memos if name == "plain" else self.plain
                self._stopped = contextlib.ExitStack()
                self._stopped.enter_context(other.paused())
        try:
            yield
        finally:
            with self._stopping:
                self._alone -= 1
                if self._alone == 0:
                    self._stopped.close()

    def ask_warm(self) -> Timed:
        """Plain vLLM, memory in the prompt, its prefix cache warm."""
        return self.ask_plain("plain", self.with_memory_by_hand(self.question()))

    def ask_cold(self) -> Timed:
        """Plain vLLM, memory in the prompt, nothing cached."""
        return self.ask_plain(
            "plain",
            self.with_memory_by_hand(self.question()),
            cache_salt=self.filler(3).replace(" ", ""),
        )

    def ask_cube(self, **body: Any) -> Timed:
        return self.ask_plain("memos", self.question(), memcube_id=CUBE, **body)

    def flood(self, name: str, *, pools: float) -> None:
        """Unrelated prompts that cycle the block pool `pools` times."""
        prompt_tokens = 1024
        requests = int(pools * self.blocks * BLOCK_TOKENS / prompt_tokens) + 1
        # A six-letter random word is about four tokens.
        prompts = [self.filler(prompt_tokens // 4) for _ in range(requests)]
        with ThreadPoolExecutor(4) as pool:
            list(
                pool.map(
                    lambda text: self.ask_plain(
                        name, [{"role": "user", "content": text}], max_tokens=1
                    ),
                    prompts,
                )
            )


# --- situations -------------------------------------------------------------------------


def measure_resident(bench: Bench, rounds: int) -> list[Row]:
    """Cube in the pool, beside plain vLLM's warm prefix cache and its cold prefill."""
    resident = Row("cube, resident", "plain vLLM, warm prefix cache", 1.05)
    speedup = Row("cube, resident", "plain vLLM, full prefill", 1 / 8)
    bench.ask_warm()
    bench.ask_cube()
    for number in range(rounds):
        warm, cube = _in_turn(number, bench.ask_warm, bench.ask_cube)
        cold = bench.ask_cold()
        _expect(resident, cube, "resident")
        _expect_cached(resident, warm)
        if cold.cached_tokens > BLOCK_TOKENS:
            speedup.faults.append(f"the cold prompt had {cold.cached_tokens} cached tokens")
        resident.add(cube.ttft_seconds, warm.ttft_seconds)
        speedup.add(cube.ttft_seconds, cold.ttft_seconds)
    return [resident, speedup]


def measure_flooded(bench: Bench, rounds: int) -> list[Row]:
    """The first memory chat after unrelated traffic has cycled the pool three times.

    Plain vLLM's prefix is computed before that traffic and its own pool is not flooded, so both
    find their blocks as cold in the processor's caches, and each sample follows one unrelated
    request: the same prefix just before would be worth a tenth.
    """
    flooded = Row("cube, after a flood of 3 pools", "plain vLLM, warm prefix cache", 1.05)
    fallen = Row("plain vLLM, after the same flood", "plain vLLM, warm prefix cache")

    def after_another(name: str, ask: Callable[[], Timed]) -> Callable[[], Timed]:
        def sample() -> Timed:
            bench.warm_up(name)
            return ask()

        return sample

    for number in range(rounds):
        bench.ask_warm()
        bench.flood("memos", pools=3)
        warm, cube = _in_turn(
            number, after_another("plain", bench.ask_warm), after_another("memos", bench.ask_cube)
        )
        bench.flood("plain", pools=3)
        lost = bench.ask_warm()
        _expect(flooded, cube, "resident")
        _expect_cached(flooded, warm)
        flooded.add(cube.ttft_seconds, warm.ttft_seconds)
        fallen.add(lost.ttft_seconds, warm.ttft_seconds)
    return [flooded, fallen]


def measure_restart(bench: Bench, rounds: int) -> list[Row]:
    """The first memory chat of a new server process, after kill -9."""
    row = Row("cube, first chat after kill -9", "plain vLLM, warm prefix cache", 1.35)
    for _ in range(rounds):
        bench.memos.kill()
        bench.memos.start()
        bench.warm_up("memos")
        bench.ask_warm()
        bench.warm_up("plain")
        warm = bench.ask_warm()
        bench.warm_up("memos")
        cube = bench.ask_cube()
        _expect(row, cube, "store")
        row.add(cube.ttft_seconds, warm.ttft_seconds)
    return [row]


def measure_plain_traffic(bench: Bench, rounds: int) -> list[Row]:
    """Requests without memory, on the server with the plugin and without."""
    ttft = Row("plain chat with the plugin: TTFT", "plain vLLM: TTFT", 1.02)
    decode = Row("plain chat with the plugin: seconds per token", "plain vLLM", 1.02)
    for number in range(rounds):
        messages = [{"role": "user", "content": f"Tell a story about {bench.filler(100)}."}]

        def ask(name: str, messages: list[dict[str, Any]] = messages) -> Callable[[], Timed]:
            return lambda: bench.ask_plain(name, messages, max_tokens=48, ignore_eos=True)

        plain, plugin = _in_turn(number, ask("plain"), ask("memos"))
        ttft.add(plugin.ttft_seconds, plain.ttft_seconds)
        decode.add(_per_token(plugin), _per_token(plain))
    return [ttft, decode]


def measure_saving(bench: Bench, rounds: int) -> list[Row]:
    """A chat that computes its memory and saves it, beside one that only computes it.

    Meanwhile another, plain chat streams: what saving costs it shows in the time of its tokens.
    """
    row = Row("chat that bakes", "the same chat without memory's keeping", 1.02)
    others = Row(
        f"{_OTHER_TOKENS} tokens of another chat meanwhile",
        "beside one that only computes",
    )

    def beside_another(**body: Any) -> Callable[[], Timed]:
        def sample() -> Timed:
            story = [{"role": "user", "content": f"Tell a story about {bench.filler(20)}."}]
            with ThreadPoolExecutor(1) as pool:
                other = pool.submit(
                    bench.ask_plain, "memos", story, max_tokens=_OTHER_TOKENS, ignore_eos=True
                )
                time.sleep(0.5)
                reply = bench.ask_cube(**body)
                times["bakes" if not body else "computes"] = other.result().total_seconds
            return reply

        return sample

    times: dict[str, float] = {}
    with MOS(bench.memos.url) as mos:
        cube = mos.cube(CUBE)
        first = next(iter(cube.memories()))
        for number in range(rounds):
            cube.update_memory(first.id, text=f"{first.text}\n\nEdition {bench.filler(2)}.")
            baked, computed = _in_turn(
                number,
                bench.ask_cube,
                lambda: bench.ask_cube(memos={"activation": False}),
            )
            _expect(row, baked, "computed")
            row.add(baked.ttft_seconds, computed.ttft_seconds)
            # The save is over before the next round starts.
            time.sleep(1.0)
            cube.update_memory(first.id, text=f"{first.text}\n\nEdition {bench.filler(2)}.")
            _in_turn(number, beside_another(), beside_another(memos={"activation": False}))
            others.add(times["bakes"], times["computes"])
            time.sleep(1.0)
        cube.update_memory(first.id, text=first.text)
        cube.promote("all", to="activation", wait=True)
    return [row, others]


def count_preemptions(bench: Bench) -> dict[str, float]:
    """Preemptions under plain traffic that saturates the pool, on both servers."""
    counts = {}
    for name in ("plain", "memos"):
        before = metric(bench.clients[name], "vllm:num_preemptions_total")
        rng = random.Random(7)
        prompts = [
            " ".join("".join(rng.choices(string.ascii_lowercase, k=6)) for _ in range(200))
            for _ in range(24)
        ]
        with ThreadPoolExecutor(24) as pool:
            list(
                pool.map(
                    lambda text, name=name: bench.ask_plain(
                        name,
                        [{"role": "user", "content": text}],
                        max_tokens=256,
                        ignore_eos=True,
                    ),
                    prompts,
                )
            )
        counts[name] = metric(bench.clients[name], "vllm:num_preemptions_total") - before
    return counts


def _in_turn(
    number: int, first: Callable[[], Timed], second: Callable[[], Timed]
) -> tuple[Timed, Timed]:
    """Both, in an order that alternates from round to round."""
    if number % 2 == 0:
        return first(), second()
    late = second()
    return first(), late


def _expect(row: Row, reply: Timed, source: str) -> None:
    if reply.activation.get("source") != source:
        row.faults.append(f"expected source {source}, the server says {dict(reply.activation)}")


def _expect_cached(row: Row, reply: Timed) -> None:
    if reply.cached_tokens < 3072:
        row.faults.append(f"plain vLLM had only {reply.cached_tokens} cached tokens")


def _per_token(reply: Timed) -> float:
    return (reply.total_seconds - reply.ttft_seconds) / max(1, reply.completion_tokens - 1)


# --- reporting --------------------------------------------------------------------------


def interval(values: Sequence[float], *, seed: int = 0) -> tuple[float, float]:
    """A bootstrap 95 % interval of the median."""
    rng = random.Random(seed)
    medians = sorted(statistics.median(rng.choices(values, k=len(values))) for _ in range(2000))
    return medians[50], medians[1949]


def table(rows: Sequence[Row]) -> str:
    lines = [
        "| situation | median s | beside | median s | ratio (95 %) | promised | n |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        if row.faults or not row.seconds:
            lines.append(
                f"| {row.name} | failed: {'; '.join(row.faults[:1])} | {row.base} | | | | |"
            )
            continue
        low, high = interval(row.ratios)
        promised = "" if row.limit is None else f"≤ {row.limit:.3g}"
        lines.append(
            f"| {row.name} | {statistics.median(row.seconds):.4f} | {row.base} "
            f"| {statistics.median(row.base_seconds):.4f} "
            f"| {statistics.median(row.ratios):.3f} ({low:.3f}–{high:.3f}) | {promised} "
            f"| {len(row.seconds)} |"
        )
    return "\n".join(lines)


def facts(bench: Bench) -> dict[str, Any]:
    client = bench.clients["memos"]
    seconds = metric(client, "memos_load_seconds_total")
    num_bytes = metric(client, "memos_load_bytes_total")
    cube = client.get(f"/v1/memcubes/{CUBE}").json()["activation"]
    return {
        "import_gb_per_second": num_bytes / seconds / 1e9 if seconds else None,
        "artifact_bytes": cube["bytes"],
        "memory_tokens": cube["tokens"],
    }


def machine() -> dict[str, Any]:
    cpu = next(
        (
            line.partition(":")[2].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        ),
        platform.processor(),
    )
    return {
        "cpu": cpu,
        "cores": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        "vllm": vllm_version(),
        "model": MODEL,
    }


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=11, help="samples of each pair (11)")
    parser.add_argument("--slow-rounds", type=int, default=9, help="of floods and restarts (9)")
    parser.add_argument("--blocks", type=int, default=120, help="KV blocks of each server (120)")
    parser.add_argument("--seed", type=int, default=int(time.time()))
    parser.add_argument("--only", nargs="*", help="situations to measure (all)")
    parser.add_argument("--json", type=Path, help="write every raw sample here")
    options = parser.parse_args(argv)
    situations: dict[str, Callable[[Bench], list[Row]]] = {
        "resident": lambda b: measure_resident(b, options.rounds),
        "plain": lambda b: measure_plain_traffic(b, 2 * options.rounds),
        "flooded": lambda b: measure_flooded(b, options.slow_rounds),
        "saving": lambda b: measure_saving(b, options.rounds),
        "restart": lambda b: measure_restart(b, options.slow_rounds),
    }
    chosen = options.only or list(situations)
    rows: list[Row] = []
    with tempfile.TemporaryDirectory(prefix="memos-bench-") as folder:
        bench = Bench(Path(folder), blocks=options.blocks, seed=options.seed)
        try:
            bench.start()
            bench.fill_cube()
            for name in chosen:
                print(f"measuring: {name}", file=sys.stderr, flush=True)
                rows += situations[name](bench)
                print(table(rows), file=sys.stderr, flush=True)
            report = {
                "machine": machine(),
                "seed": options.seed,
                "facts": facts(bench),
                "preemptions": count_preemptions(bench) if not options.only else None,
                "rows": [asdict(row) for row in rows],
            }
        finally:
            bench.stop()
    print(table(rows))
    print(json.dumps({k: report[k] for k in ("machine", "facts", "preemptions")}, indent=2))
    if options.json:
        options.json.write_text(json.dumps(report, indent=2))
    return 1 if any(row.faults for row in rows) else 0


if __name__ == "__main__":
    raise SystemExit(main())
