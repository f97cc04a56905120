"""Bake, scribble, load in an in-process engine, and tell what was in the pages.

Run as a program by test_pages.py: a list of cases as JSON on stdin, one JSON line per case on
stdout. In-process because only there can pages be read between two requests.
"""

from __future__ import annotations

import contextlib
import gc
import hashlib
import json
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from vllm import LLM, SamplingParams
from vllm import _custom_ops as ops
from vllm.config import KVTransferConfig
from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

from memos_vllm.activation.store import ArtifactStore
from memos_vllm.engine.secrets import artifact_scope, cache_salt, load_keys
from memos_vllm.engine.ticket import TICKET_KEY, TicketSigner
from memos_vllm.engine.transfer import LoadJob, SaveJob
from memos_vllm_kernels import tensor_over

_HEAD_BLOCKS = 3
_POOL_BLOCKS = 12
_SAVE_SECONDS = 60.0

# [layer][block] -> digest of the page's bytes
PageDigests = list[list[str]]


@dataclass(frozen=True, slots=True)
class Case:
    model: str
    dtype: str
    block_size: int
    data_dir: str


@dataclass(slots=True)
class Findings:
    """What one case showed.

    Attributes:
        isa: of the attention kernels.
        baked, loaded: the head's pages after the bake, and after the load into other blocks.
        scribbled: what was in the baked pages' place just before the load.
        split: the head's pages when its first block was loaded by one request, and the others
            by another.
        artifact: the artifact's KV, packed into pages by vLLM's own op.
    """

    isa: str = ""
    baked: PageDigests = field(default_factory=list)
    scribbled: PageDigests = field(default_factory=list)
    loaded: PageDigests = field(default_factory=list)
    split: PageDigests = field(default_factory=list)
    artifact: PageDigests = field(default_factory=list)
    baked_blocks: list[int] = field(default_factory=list)
    loaded_blocks: list[int] = field(default_factory=list)
    split_blocks: list[list[int]] = field(default_factory=list)
    sources: list[str] = field(default_factory=list)
    same_tokens: bool = False


class Engine:
    """An in-process vLLM with the connector, whose jobs and pages can be watched."""

    def __init__(self, case: Case) -> None:
        self.case = case
        transfer = KVTransferConfig(
            kv_connector="MemCubeConnector",
            kv_role="kv_both",
            kv_load_failure_policy="recompute",
            kv_connector_extra_config={"data_dir": case.data_dir},
        )
        self.llm = LLM(
            case.model,
            dtype=case.dtype,
            block_size=case.block_size,
            enforce_eager=True,
            max_model_len=case.block_size * (_POOL_BLOCKS - 2),
            num_gpu_blocks_override=_POOL_BLOCKS,
            kv_transfer_config=transfer,
        )
        self._core = self.llm.llm_engine.engine_core.engine_core
        self.saves: list[SaveJob] = []
        self.loads: list[LoadJob] = []
        self._watch_jobs()
        self._keys = load_keys(Path(case.data_dir) / "secrets")
        self._signer = TicketSigner(self._keys.ticket, ttl_seconds=600)
        self.store = ArtifactStore(Path(case.data_dir) / "artifacts", mac_key=self._keys.artifact)
        self._next_request = 0

    def ask(self, prompt: Sequence[int], *, head_tokens: int) -> tuple[str, list[int]]:
        """Generate behind a memory head; where it came from, and the tokens."""
        cubes = [("cube", 1)]
        salt = cache_salt(self._keys.salt, cubes)
        ticket = self._signer.sign(
            request_id=str(self._next_request),
            samples=1,
            scope=artifact_scope(self._keys.salt, cubes),
            cache_salt=salt,
            head_tokens=head_tokens,
            save=True,
        )
        output = self._generate(
            prompt, salt=salt, extra={"kv_transfer_params": {TICKET_KEY: ticket}}, max_tokens=8
        )
        report = output.kv_transfer_params[TICKET_KEY]
        return report["source"], list(output.outputs[0].token_ids)

    def plain(self, prompt: Sequence[int]) -> None:
        self._generate(prompt, salt=f"plain-{self._next_request}", extra=None, max_tokens=1)

    def wait_until_stored(self) -> None:
        """Step until the save has ended; each step needs a request."""
        deadline = time.monotonic() + _SAVE_SECONDS
        while not self.store.stats().num_artifacts:
            if time.monotonic() > deadline:
                raise TimeoutError("the head was not saved")
            self.plain([5, 6, 7])
            self.store.refresh()

    def pages(self, blocks: Sequence[int]) -> PageDigests:
        return self._layers_with_pages(digest_pages, list(blocks))

    def artifact_pages(self, num_tokens: int) -> PageDigests:
        return self._layers_with_pages(
            pack_artifact, self.case.data_dir, num_tokens, self.case.block_size
        )

    @property
    def isa(self) -> str:
        return str(self.llm.collective_rpc(attention_isa)[0])

    def reset(self) -> None:
        assert self.llm.llm_engine.reset_prefix_cache()

    def close(self) -> None:
        self.store.close()
        self.llm.llm_engine.engine_core.shutdown()

    def _layers_with_pages(self, read: Any, *args: Any) -> PageDigests:
        (digests,) = self.llm.collective_rpc(read, args=args)
        return list(digests)

    def _generate(
        self, prompt: Sequence[int], *, salt: str, extra: dict[str, Any] | None, max_tokens: int
    ) -> Any:
        sampling = SamplingParams(
            max_tokens=max_tokens, temperature=0, ignore_eos=True, extra_args=extra
        )
        request = {"prompt_token_ids": list(prompt), "cache_salt": salt}
        self._next_request += 1
        return self.llm.generate([request], sampling, use_tqdm=False)[0]

    def _watch_jobs(self) -> None:
        half = self._core.scheduler.connector._scheduler
        plan_step = half.plan_step

        def watched(output: Any) -> Any:
            metadata = plan_step(output)
            self.saves += metadata.saves
            self.loads += metadata.loads
            return metadata

        half.plan_step = watched


# --- run in the worker ----------------------------------------------------------------------


def attention_isa(worker: Any) -> str:
    context = worker.model_runner.vllm_config.compilation_config.static_forward_context
    return str(next(iter(context.values())).isa)


def digest_pages(worker: Any, blocks: list[int]) -> PageDigests:
    """Digest each block of each layer, byte for byte as it lies in the page tensor."""
    return [[_digest(layer[block]) for block in blocks] for layer in worker.model_runner.kv_caches]


def pack_artifact(worker: Any, data_dir: str, num_tokens: int, block_size: int) -> PageDigests:
    """Pack the only artifact's KV into empty pages with vLLM's own op, and digest them."""
    root = Path(data_dir)
    store = ArtifactStore(root / "artifacts", mac_key=load_keys(root / "secrets").artifact)
    (path,) = (root / "artifacts" / "manifests").glob("*.json")
    isa = attention_isa(worker)
    packed = []
    with store.open_shards(store.read_manifest(path.stem)) as reader:
        for index, layer in enumerate(worker.model_runner.kv_caches):
            raw = reader.layer(index, num_tokens=num_tokens)
            key, value = (tensor_over(half.data, layer.dtype, half.shape) for half in raw)
            scratch = torch.zeros_like(layer[: num_tokens // block_size])
            blocks, heads, size, width = scratch.shape
            key_cache, value_cache = scratch.view(blocks, heads, 2 * size, width // 2).chunk(2, 2)
            ops.cpu_attn_reshape_and_cache(
                key, value, key_cache, value_cache, torch.arange(num_tokens), isa
            )
            packed.append([_digest(block) for block in scratch])
    store.close()
    return packed


def _digest(page: torch.Tensor) -> str:
    return hashlib.sha256(page.contiguous().view(torch.uint8).numpy()).hexdigest()


# --- one case -------------------------------------------------------------------------------


def examine(engine: Engine) -> Findings:
    """Bake a head, fill the pool with other prompts, load the head into other blocks; twice."""
    size = engine.case.block_size
    head = [(index * 7919) % 40_000 + 100 for index in range(_HEAD_BLOCKS * size + 5)]
    prompt = [*head, 17, 18, 19]
    found = Findings()

    def ask(prompt: list[int], head_tokens: int) -> list[int]:
        source, tokens = engine.ask(prompt, head_tokens=head_tokens)
        found.sources.append(source)
        return tokens

    computed = ask(prompt, len(head))
    engine.wait_until_stored()
    (save,) = engine.saves
    found.isa = engine.isa
    found.baked_blocks = list(save.block_ids)
    found.baked = engine.pages(save.block_ids)
    engine.reset()
    scribble(engine)
    found.scribbled = engine.pages(save.block_ids)
    found.same_tokens = ask(prompt, len(head)) == computed
    found.loaded_blocks = list(engine.loads[0].block_ids)
    found.loaded = engine.pages(found.loaded_blocks)
    engine.reset()
    scribble(engine)
    ask(prompt[: size + 2], size + 1)
    found.same_tokens &= ask(prompt, len(head)) == computed
    found.split_blocks = [list(load.block_ids) for load in engine.loads[1:]]
    found.split = engine.pages([block for load in found.split_blocks for block in load])
    found.artifact = engine.artifact_pages(len(save.token_ids))
    return found


def scribble(engine: Engine) -> None:
    """Fill the whole pool with the KV of other prompts."""
    size = engine.case.block_size
    for start in range(4):
        engine.plain([(index * 31 + start) % 40_000 + 100 for index in range(size * 5 + 9)])


@contextlib.contextmanager
def running(case: Case) -> Iterator[Engine]:
    engine = Engine(case)
    try:
        yield engine
    finally:
        engine.close()
        del engine
        gc.collect()
        cleanup_dist_env_and_memory()


def main() -> None:
    for fields in json.load(sys.stdin):
        with running(Case(**fields)) as engine:
            found = examine(engine)
        print("FINDINGS", json.dumps(asdict(found)), flush=True)


if __name__ == "__main__":
    main()
