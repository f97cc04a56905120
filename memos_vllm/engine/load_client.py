"""vLLM's own bench client over our plan: `python -m memos_vllm.engine.load_client PLAN RESULT`.

A process of its own: vLLM's client prints its tables, seeds numpy's global source and takes the
interpreter for itself. `memos_vllm.bench.load` writes the plan and reads the result, both JSON.
"""

from __future__ import annotations

import asyncio
import json
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import vllm
from vllm.benchmarks.datasets import SampleRequest
from vllm.benchmarks.serve import TaskType, benchmark
from vllm.tokenizers import get_tokenizer
from vllm.utils.gc_utils import freeze_gc_heap

from memos_vllm.parent_death import end_with_parent


def run(plan: dict[str, Any]) -> dict[str, Any]:
    """Send every chat of a plan; return the raw samples of each, in the plan's order.

    Returns when all are answered; one that failed has its error.
    """
    # From here vLLM draws the Poisson arrivals.
    np.random.seed(plan["seed"])
    requests = [_request(chat) for chat in plan["chats"]]
    tokenizer = get_tokenizer(plan["tokenizer"])
    freeze_gc_heap()
    return _result(
        asyncio.run(
            benchmark(
                task_type=TaskType.GENERATION,
                endpoint_type="openai-chat",
                api_url=f"{plan['url']}/v1/chat/completions",
                base_url=plan["url"],
                model_id=plan["model"],
                model_name=plan["model"],
                tokenizer=tokenizer,
                input_requests=requests,
                logprobs=None,
                request_rate=plan["request_rate"],
                burstiness=1.0,
                disable_tqdm=True,
                num_warmups=0,
                profile=False,
                selected_percentile_metrics=["ttft", "itl"],
                selected_percentiles=[99.0],
                ignore_eos=True,
                goodput_config_dict={"ttft": plan["limit_seconds"] * 1000},
                max_concurrency=plan["concurrency"],
                lora_modules=None,
                extra_headers=None,
                # The backend asks for the usage by itself.
                extra_body={"temperature": 0},
                # The check would ask the first question, which then is no new one.
                ready_check_timeout_sec=0,
            )
        )
    )


def _request(chat: dict[str, Any]) -> SampleRequest:
    return SampleRequest(
        prompt="",
        # The usage has the server's own count, which replaces this one.
        prompt_len=0,
        expected_output_len=chat["output_tokens"],
        chat_messages=chat["messages"],
        request_overrides=chat["body"] or None,
    )


def _result(raw: dict[str, Any]) -> dict[str, Any]:
    """vLLM's columns as one object per request; times in seconds, from the first arrival."""
    columns = zip(
        *(raw[name] for name in ("start_times", "queue_times", "ttfts", "latencies", "itls")),
        *(raw[name] for name in ("input_lens", "output_lens", "errors")),
        strict=True,
    )
    began = min(s - q for s, q in zip(raw["start_times"], raw["queue_times"], strict=True))
    return {
        "vllm": vllm.__version__,
        "duration_seconds": raw["duration"],
        "goodput_per_second": raw["request_goodput"],
        "output_tokens_per_second": raw["output_throughput"],
        "requests": [
            {
                "arrived_seconds": started - waited - began,
                "waited_seconds": waited,
                "ttft_seconds": ttft,
                "total_seconds": total,
                "gap_seconds": gaps,
                "prompt_tokens": prompt_tokens,
                "output_tokens": output_tokens,
                "error": error,
            }
            for started, waited, ttft, total, gaps, prompt_tokens, output_tokens, error in columns
        ],
    }


def main(argv: Sequence[str]) -> int:
    """Run the plan in the first file and write what was measured into the second."""
    end_with_parent(signal.SIGKILL)
    plan_path, result_path = map(Path, argv)
    result_path.write_text(json.dumps(run(json.loads(plan_path.read_text()))))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
