"""What can go wrong in the store, beyond ArtifactCorrupted and ArtifactMissing.

ArtifactError
├── ArtifactStoreFull       no room: the disk, the quota or the byte budget
├── ArtifactSaveFailed      the disk refused a write; what was saved before is intact
├── ArtifactIncomplete      the shards do not tile layers x heads
├── ArtifactUnreadable      the system refused for now (descriptors, memory); keep it
└── ArtifactScopeErased     the memory was erased while it was being saved
"""

from __future__ import annotations

import errno

from memos_vllm.errors import ArtifactError


class ArtifactStoreFull(ArtifactError):
    """No room on the disk, in the quota or in the byte budget; nothing was changed."""


class ArtifactSaveFailed(ArtifactError):
    """The operating system refused a write; the temporary file is gone."""


class ArtifactIncomplete(ArtifactError):
    """The shards handed to commit overlap, leave a hole, or are of other tokens."""


class ArtifactUnreadable(ArtifactError):
    """The operating system refused a read for a reason that may pass; the artifact is kept."""


class ArtifactScopeErased(ArtifactError):
    """The scope was discarded while this artifact was being saved; it is not kept."""


# EFBIG: a file-size limit (RLIMIT_FSIZE) is one more way of having no room.
_NO_ROOM = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})


def save_error(artifact: str, error: OSError) -> ArtifactError:
    """The typed error for an OSError met while saving."""
    kind = ArtifactStoreFull if error.errno in _NO_ROOM else ArtifactSaveFailed
    return kind(artifact, f"could not be saved: {error.strerror or error}")
