"""The artifact store: canonical KV of prefixes, content-addressed, verified on the way in.

Files: `data/<2 hex>/<content digest>.safetensors` hold KV and never change; one
`manifests/<key>.json` per artifact names its shards under a MAC and is the commit point;
`tmp/` holds unfinished files, `quarantine/` what was found bad, `erased/` a mark per
discarded scope. A manifest's mtime is what its artifact's uses are worth (`worth.py`), which may be
days ahead. No torch and no vllm in here.
"""

from memos_vllm.activation.store.artifact_store import ArtifactStore
from memos_vllm.activation.store.errors import (
    ArtifactIncomplete,
    ArtifactSaveFailed,
    ArtifactScopeErased,
    ArtifactStoreFull,
    ArtifactUnreadable,
)
from memos_vllm.activation.store.eviction import ArtifactUsage, EvictionPolicy, LeastValuableFirst
from memos_vllm.activation.store.reader import ArtifactReader
from memos_vllm.activation.store.types import (
    ArtifactManifest,
    KvDtype,
    Match,
    PrefixIdentity,
    ScanReport,
    ShardEntry,
    ShardLayout,
    StoreStats,
)
from memos_vllm.activation.store.writer import ShardWriter

__all__ = [
    "ArtifactIncomplete",
    "ArtifactManifest",
    "ArtifactReader",
    "ArtifactSaveFailed",
    "ArtifactScopeErased",
    "ArtifactStore",
    "ArtifactStoreFull",
    "ArtifactUnreadable",
    "ArtifactUsage",
    "EvictionPolicy",
    "KvDtype",
    "LeastValuableFirst",
    "Match",
    "PrefixIdentity",
    "ScanReport",
    "ShardEntry",
    "ShardLayout",
    "ShardWriter",
    "StoreStats",
]
