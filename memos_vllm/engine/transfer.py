"""What the two halves of the connector tell each other, once per engine step."""

from __future__ import annotations

from dataclasses import dataclass, field

from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorMetadata,
    KVConnectorWorkerMetadata,
)

from memos_vllm.activation.store import PrefixIdentity, ShardEntry


@dataclass(frozen=True, slots=True)
class LoadJob:
    """Copy tokens [first_token, first_token + num_tokens) of an artifact into pages.

    Attributes:
        artifact: key of the manifest in the store.
        block_ids: the request's blocks that hold those tokens, in token order;
            `first_token` is a multiple of the block size.
    """

    request_id: str
    artifact: str
    identity: PrefixIdentity
    first_token: int
    num_tokens: int
    block_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class SaveJob:
    """Copy the first len(token_ids) tokens of these blocks into a new artifact."""

    save_id: int
    identity: PrefixIdentity
    token_ids: tuple[int, ...]
    block_ids: tuple[int, ...]


@dataclass
class StepMetadata(KVConnectorMetadata):
    """Scheduler half to worker half: the work that starts in this step.

    Attributes:
        computes_nothing: no request has tokens in this step; it is there for loads and saves.
    """

    loads: list[LoadJob] = field(default_factory=list)
    saves: list[SaveJob] = field(default_factory=list)
    computes_nothing: bool = False


@dataclass(frozen=True, slots=True)
class LoadReport:
    """How a load went on one rank.

    Attributes:
        error: why it failed; None when the KV is in place.
        unusable: the artifact itself is at fault and must not be tried again.
    """

    request_id: str
    artifact: str
    num_bytes: int
    seconds: float
    error: str | None = None
    unusable: bool = False


@dataclass(frozen=True, slots=True)
class SaveReport:
    """One rank's shard of a save, or why there is none."""

    save_id: int
    shard: ShardEntry | None
    seconds: float
    error: str | None = None


@dataclass
class StepReport(KVConnectorWorkerMetadata):
    """Worker half to scheduler half: what ended since the last step, over all ranks."""

    loads: list[LoadReport] = field(default_factory=list)
    saves: list[SaveReport] = field(default_factory=list)

    def aggregate(self, other: KVConnectorWorkerMetadata) -> StepReport:
        assert isinstance(other, StepReport)
        return StepReport(self.loads + other.loads, self.saves + other.saves)
