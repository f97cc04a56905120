"""One shard file opened for reading: checked, guarded, mapped, verified piece by piece."""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
from pathlib import Path

import numpy as np
from blake3 import blake3

from memos_vllm.activation.store.errors import ArtifactUnreadable
from memos_vllm.activation.store.shard_format import (
    MAX_HEADER_BYTES,
    ShardFormat,
    content_digest,
    parse_header,
    tail_of,
)
from memos_vllm.activation.store.types import ArtifactManifest, RawArray, ShardEntry
from memos_vllm.errors import ArtifactCorrupted, ArtifactMissing

# Linux 5.14; the mmap module does not name it.
_MADV_POPULATE_READ = 22
_MAP_NORESERVE = getattr(mmap, "MAP_NORESERVE", 0)
_MAY_PASS = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EAGAIN, errno.EINTR})


class ShardFile:
    """The KV of one shard. Views keep the mapping alive after `close`.

    Touching a mapping of a file that was truncated, or that the disk cannot read, is a SIGBUS
    and the end of the engine. So the file is mapped under a read lease, with which the kernel
    holds off anyone who would truncate or write it (45 s by default, we need milliseconds),
    and pages are touched only after MADV_POPULATE_READ said that they are there. Where the
    filesystem has no leases the bytes are copied out with pread. 70 MB verified in page cache:
    15 ms mapped (lease and populate 1 ms of it), 50 ms copied, hence not simply pread.
    """

    def __init__(self, path: Path, *, manifest: ArtifactManifest, entry: ShardEntry) -> None:
        """Open and check header, ids and checksum table; reads no KV.

        Raises:
            ArtifactMissing, ArtifactCorrupted, ArtifactUnreadable.
        """
        self.entry = entry
        self._key = manifest.key
        try:
            self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        except OSError as error:
            raise self._read_error(error) from error
        try:
            self._lease = _take_read_lease(self._fd)
            self.format, self._checksums = self._read_frame(manifest)
            self._verified_chunks = [0] * entry.layout.num_layers
            self._present_chunks = [0] * entry.layout.num_layers
            self._map()
        except (OSError, EOFError) as error:
            os.close(self._fd)
            raise self._read_error(error) from error
        except BaseException:
            os.close(self._fd)
            raise

    def layer(self, layer: int, *, num_tokens: int) -> RawArray:
        """[2, num_tokens, kv_heads, head_dim] of one model layer, verified.

        Raises:
            ArtifactCorrupted, ArtifactUnreadable.
        """
        self.verify_layer(layer, num_tokens=num_tokens)
        layout, form = self.entry.layout, self.format
        raw = np.frombuffer(
            self._kv,
            dtype=layout.kv_dtype.raw,
            count=2 * form.half_layer_bytes // layout.kv_dtype.item_bytes,
            offset=self._layer_offset(layer),
        )
        shape = (2, form.num_tokens, layout.num_kv_heads, layout.head_dim)
        return raw.reshape(shape)[:, :num_tokens]

    def verify_layer(self, layer: int, *, num_tokens: int) -> None:
        """Compare the checksums of the first `num_tokens` tokens, those not compared yet."""
        form, index = self.format, layer - self.entry.layout.layer_start
        num_chunks = -(-num_tokens // form.chunk_tokens)
        if num_chunks <= self._verified_chunks[index]:
            return
        self._make_present(index, num_chunks)
        base = self._layer_offset(layer)
        with memoryview(self._kv)[base : base + 2 * form.half_layer_bytes] as view:
            for half, name in enumerate("KV"):
                found = form.checksums_of(view, half, first_chunks=num_chunks)
                if found != self._checksums[index, half, :num_chunks].tobytes():
                    raise self._corrupted(
                        f"{name} of layer {layer} differs from its checksums in the first "
                        f"{num_tokens} tokens"
                    )
        self._check_guard()
        self._verified_chunks[index] = num_chunks

    def close(self) -> None:
        """Close the descriptor; the memory goes when the last view does."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)
            del self._kv

    def _read_frame(self, manifest: ArtifactManifest) -> tuple[ShardFormat, np.ndarray]:
        """Header and tail, proven by the content digest that the manifest's MAC covers."""
        entry = self.entry
        if os.fstat(self._fd).st_size != entry.size_bytes:
            raise self._corrupted("a shard file is truncated or has grown")
        header = read_raw_header(self._fd)
        kv_bytes = entry.layout.kv_bytes(manifest.num_tokens)
        tail_offset = len(header) + kv_bytes
        tail = _read_exactly(self._fd, max(entry.size_bytes - tail_offset, 0), offset=tail_offset)
        if content_digest(header, tail) != entry.content_digest:
            raise self._corrupted("a shard's header or checksum table was altered")
        try:
            form = parse_header(header)
        except ValueError as error:
            raise self._corrupted(f"a shard is of another version: {error}") from error
        checksums = tail[4 * form.num_tokens :]
        is_ours = (form.identity, form.layout) == (manifest.identity, entry.layout)
        if not is_ours or tail != tail_of(manifest.token_ids, checksums):
            raise self._corrupted("a shard belongs to another artifact")
        if len(tail) != form.tail_bytes or blake3(checksums).hexdigest() != entry.checksum_digest:
            raise self._corrupted("a shard's checksum table was altered")
        table = np.frombuffer(checksums, dtype=np.uint8).reshape(form.checksums_shape)
        return form, table

    def _map(self) -> None:
        form = self.format
        self._kv_offset = form.kv_offset
        if self._lease:
            # Private and writable: torch warns about arrays that are not, and a stray write
            # stays in this process.
            self._kv = mmap.mmap(
                self._fd,
                form.tail_offset,
                flags=mmap.MAP_PRIVATE | _MAP_NORESERVE,
                prot=mmap.PROT_READ | mmap.PROT_WRITE,
            )
            self._lease = _can_populate(self._kv)
        if not self._lease:
            self._kv = mmap.mmap(-1, form.kv_bytes)
            self._kv_offset = 0

    def _make_present(self, index: int, num_chunks: int) -> None:
        """See to it that touching these bytes is safe, by populating or copying them."""
        form = self.format
        layer_start = self._layer_offset(index + self.entry.layout.layer_start)
        # Only what is new: copying again would put unverified bytes under verified views.
        first = self._present_chunks[index]
        if num_chunks <= first:
            return
        self._check_guard()
        try:
            for chunks in form.segments:
                start = layer_start + chunks[first][0]
                end = layer_start + chunks[num_chunks - 1][1]
                if self._lease:
                    start -= start % mmap.PAGESIZE
                    self._kv.madvise(_MADV_POPULATE_READ, start, end - start)
                else:
                    with memoryview(self._kv)[start:end] as target:
                        _read_into(self._fd, target, offset=form.kv_offset + start)
        except (OSError, EOFError) as error:
            raise self._read_error(error) from error
        self._present_chunks[index] = num_chunks

    def _check_guard(self) -> None:
        """The kernel tells the holder of a lease when somebody waits to write or truncate."""
        if self._lease and fcntl.fcntl(self._fd, fcntl.F_GETLEASE) != fcntl.F_RDLCK:
            raise self._corrupted("another process is writing to a shard file")

    def _layer_offset(self, layer: int) -> int:
        index = layer - self.entry.layout.layer_start
        return self._kv_offset + index * 2 * self.format.half_layer_bytes

    def _corrupted(self, message: str) -> ArtifactCorrupted:
        return ArtifactCorrupted(self._key, f"{message} ({self.entry.file_name})")

    def _read_error(
        self, error: OSError | EOFError
    ) -> ArtifactMissing | ArtifactCorrupted | ArtifactUnreadable:
        return read_error(self._key, self.entry.file_name, error)


def read_error(
    key: str, name: str, error: OSError | EOFError
) -> ArtifactMissing | ArtifactCorrupted | ArtifactUnreadable:
    """The typed error for what was met while reading the file `name` of artifact `key`."""
    if isinstance(error, EOFError):
        return ArtifactCorrupted(key, f"{name} is truncated: {error}")
    if error.errno in {errno.ENOENT, errno.ENOTDIR, errno.ESTALE}:
        return ArtifactMissing(key, f"{name} is gone")
    kind = ArtifactUnreadable if error.errno in _MAY_PASS else ArtifactCorrupted
    return kind(key, f"{name} cannot be read: {error.strerror or error}")


def read_raw_header(fd: int) -> bytes:
    """Length field and JSON of a safetensors file.

    Raises:
        EOFError, OSError: turn them into a typed error with `read_error`.
    """
    length = int.from_bytes(_read_exactly(fd, 8, offset=0), "little")
    if length > MAX_HEADER_BYTES:
        raise EOFError("the header length is absurd")
    return _read_exactly(fd, 8 + length, offset=0)


def _take_read_lease(fd: int) -> bool:
    """Whether the kernel now keeps writers and truncation away from the file."""
    try:
        fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_RDLCK)
        # The lease made us the owner, who gets a SIGIO, which kills. We ask instead.
        fcntl.fcntl(fd, fcntl.F_SETOWN, 0)
    except OSError:
        return False
    return True


def _can_populate(mapping: mmap.mmap) -> bool:
    try:
        mapping.madvise(_MADV_POPULATE_READ, 0, mmap.PAGESIZE)
    except OSError as error:
        return error.errno != errno.EINVAL  # older kernels; other errors are met again
    return True


def _read_exactly(fd: int, size_bytes: int, *, offset: int) -> bytes:
    data = bytearray(size_bytes)
    _read_into(fd, memoryview(data), offset=offset)
    return bytes(data)


def _read_into(fd: int, target: memoryview, *, offset: int) -> None:
    while target:
        received = os.preadv(fd, [target], offset)
        if received == 0:
            raise EOFError("the file is shorter than it should be")
        target, offset = target[received:], offset + received
