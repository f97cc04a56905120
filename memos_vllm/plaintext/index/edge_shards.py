"""Opening shards of Qdrant Edge, copying points between them, and the words for what goes wrong."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import qdrant_edge as edge

from memos_vllm.errors import ConfigurationError, MemosError, Unavailable
from memos_vllm.plaintext.index.edge_folder import LAYOUT, CollectionFolder
from memos_vllm.plaintext.index.edge_objects import edge_config, edge_indexes

logger = logging.getLogger(__name__)


@contextmanager
def speaking(folder: Path, done: str) -> Iterator[None]:
    """Raise errors of Edge and of the file system in words that say where to look.

    Args:
        done: what was to be done with the index in `folder`: "flushed", "read", …
    Raises:
        Unavailable: in place of whatever is not an error of ours.
    """
    try:
        yield
    except MemosError:
        raise
    except BaseException as error:
        # Edge raises plain Exception, and a panic in it is only a BaseException.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise Unavailable(
            f"the index in {folder} could not be {done}: {error}; if its disk is well and not "
            "full, remove that folder while the server is stopped: it is built again from the "
            "catalog"
        ) from error


@dataclass(frozen=True, slots=True)
class OpenedShard:
    """A collection's current shard; `made_anew` when what was there before is lost, if it was."""

    shard: edge.EdgeShard
    path: Path
    made_anew: bool


def open_shard(folder: CollectionFolder, *, dim: int) -> OpenedShard:
    """The current shard of a collection, or a new one in place of none, a broken or an older one.

    Raises:
        ConfigurationError: it holds vectors of another dimension.
        Unavailable: a new one cannot be made.
    """
    current = folder.current()
    if current is not None and current.layout == LAYOUT:
        if current.dim != dim:
            raise ConfigurationError(
                f"collection '{folder.path.name}' holds vectors of {current.dim} dimensions and "
                f"the embedder makes {dim}; name another collection for this embedder"
            )
        path = folder.generation(current.generation)
        try:
            with speaking(folder.path, "opened"):
                shard = edge.EdgeShard.load(str(path))
        except Unavailable as error:
            logger.warning(
                "memos: the index in %s cannot be opened (%s); it is built anew",
                path,
                error.__cause__,
            )
        else:
            folder.remove_others(path)
            return OpenedShard(shard, path, made_anew=False)
    return _create(folder, dim)


def create_shard(path: Path, *, dim: int) -> edge.EdgeShard:
    """An empty shard in a folder that is not there yet; raises whatever Edge does."""
    path.mkdir(mode=0o700)
    shard = edge.EdgeShard.create(str(path), edge_config(dim))
    for operation in edge_indexes():
        shard.update(operation)
    return shard


def _create(folder: CollectionFolder, dim: int) -> OpenedShard:
    with speaking(folder.path, "created"):
        path = folder.new_generation()
        shard = create_shard(path, dim=dim)
        # Not flushed: that takes 0.3 s, and what a power cut leaves is empty or made again.
        folder.make_current(path, dim=dim)
    folder.remove_others(path)
    return OpenedShard(shard, path, made_anew=True)


def unindexed(shard: edge.EdgeShard) -> int:
    """How many points no optimiser has seen; an indexed point counts once for each vector."""
    info = shard.info()
    return max(0, 2 * info.points_count - info.indexed_vectors_count)


def retrieve_whole(shard: edge.EdgeShard, *, seqs: list[int]) -> list[edge.Record]:
    """Those of `seqs` that are there, with vectors and payload."""
    return shard.retrieve(list(seqs), with_payload=True, with_vector=True)


def copy_points(shard: edge.EdgeShard, fresh: edge.EdgeShard, *, batch: int) -> None:
    """Put every point of `shard` into `fresh`, which is empty."""
    offset: int | None = None
    while True:
        request = edge.ScrollRequest(
            offset=offset, limit=batch, with_payload=True, with_vector=True
        )
        records, following = shard.scroll(request)
        put_records(fresh, [], records)
        if following is None:
            return
        offset = int(following)


def put_records(shard: edge.EdgeShard, seqs: list[int], records: list[edge.Record]) -> None:
    """Make `shard` hold, of `seqs`, exactly these records."""
    gone = set(seqs).difference(int(record.id) for record in records)
    shard.update(edge.UpdateOperation.delete_points(list(gone)))
    points = [edge.Point(record.id, record.vector or {}, record.payload) for record in records]
    shard.update(edge.UpdateOperation.upsert_points(points))
