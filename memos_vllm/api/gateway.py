"""What the routes need from the engine; `memos_vllm.engine` implements it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

from memos_vllm.cartridge.artifacts import CarriedArtifact
from memos_vllm.domain.artifact import ArtifactRecord
from memos_vllm.domain.cartridge import LoadedCube


class CartridgeSupport(Protocol):
    """What whole cubes on their way need beside the catalog: disk, and their artifacts."""

    @property
    def spool_dir(self) -> Path:
        """A folder for temporary files, on the disk of the data folder."""
        ...

    @property
    def max_import_bytes(self) -> int:
        """The largest archive that is taken in."""
        ...

    def open_artifacts(self, cube_id: str) -> list[CarriedArtifact]:
        """The cube's current artifacts, with their files open; blocks."""
        ...

    async def adopt_artifacts(
        self, loaded: LoadedCube, artifacts: Iterable[CarriedArtifact]
    ) -> list[str]:
        """Take over the artifacts that fit this model and this cube, and have the rest computed.

        Args:
            artifacts: gone through in a worker thread, in order, once.
        Returns:
            What was kept out and why, in words.
        """
        ...


class EngineGateway(Protocol):
    """The engine's side of the HTTP surface."""

    @property
    def cartridges(self) -> CartridgeSupport: ...

    async def status(self) -> Mapping[str, object]:
        """Versions, model fingerprint, residency budget and use, stores: JSON values only."""
        ...

    async def health(self) -> Mapping[str, str]:
        """Each part, with "ready" or the reason why it is not."""
        ...

    async def discard_artifacts(self, records: Sequence[ArtifactRecord]) -> None:
        """Remove the files of these artifacts.

        Raises:
            Unavailable: the store cannot be reached; some files may be left.
        """
        ...

    async def check_composition(self, cube_id: str, *, adding: Sequence[str] | None) -> None:
        """Refuse a prefix that could never be baked, before anything is changed.

        Args:
            adding: memory ids about to join the activation tier; None for every active,
                unlabelled memory of the cube.
        Raises:
            ContextTooLong: the prefix would exceed the model's context.
            TemplateError: the model's template cannot render it.
        """
        ...

    def resident_tokens(self, cube_id: str) -> int:
        """Tokens of the cube's prefix that are in the engine's KV pool now, as last reported."""
        ...

    def wake_jobs(self) -> None:
        """A job was queued; never blocks, never raises."""
        ...
