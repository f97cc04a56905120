"""Any sequence of operations, against a model that fits on a page."""

from __future__ import annotations

import shutil
import tempfile
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest
from catalog_kit import ADMIN, KEY, open_desk
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    initialize,
    invariant,
    multiple,
    rule,
)

from memos_vllm.domain.job import JobState
from memos_vllm.domain.memory import MemoryPatch, NewMemory, Tier
from memos_vllm.errors import Conflict, InvalidRequest, NotFound

Prefix = list[tuple[str, int]]
TEXTS = st.text(st.characters(categories=["L", "N"]), min_size=1, max_size=8)


@dataclass
class Model:
    """What one memory should be."""

    text: str
    active: bool = True
    versions: int = 1
    position: int = 0
    merged: bool = False
    parents: frozenset[str] = frozenset()


class CatalogMachine(RuleBasedStateMachine):
    """One cube under random changes, bakes and restarts."""

    memories = Bundle("memories")

    @initialize()
    def start(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="memos-machine-"))
        self.opened = ExitStack()
        self.desk = self.opened.enter_context(open_desk(self.folder))
        self.model: dict[str, Model] = {}
        self.ready: list[Prefix] = []
        self.erased: set[str] = set()
        self.version = 1

    def stale(self, *memory_ids: str) -> None:
        """What is baked from one of these memories is out of date."""
        self.ready = [
            prefix for prefix in self.ready if not {one for one, _ in prefix} & set(memory_ids)
        ]

    def family(self, memory_id: str) -> set[str]:
        """A memory and all that was derived from it."""
        found = {memory_id}
        while more := {k for k, one in self.model.items() if one.parents & found} - found:
            found |= more
        return found

    def prefix(self) -> Prefix:
        chosen = [
            (one.position, memory_id, one.versions)
            for memory_id, one in self.model.items()
            if one.active and one.position
        ]
        return [(memory_id, versions) for _, memory_id, versions in sorted(chosen)]

    @rule(target=memories, texts=st.lists(TEXTS, min_size=1, max_size=3))
    def add(self, texts: list[str]) -> object:
        added = self.desk.mos.add_memories(ADMIN, "c", [NewMemory(text) for text in texts])
        self.model.update({one.id: Model(one.text) for one in added})
        return multiple(*(one.id for one in added))

    @rule(memory_id=memories, text=TEXTS)
    def edit(self, memory_id: str, text: str) -> None:
        if (model := self.model.get(memory_id)) is None:
            return
        patch = MemoryPatch(text=text)
        if not model.active:
            with pytest.raises(Conflict):
                self.desk.mos.update_memory(ADMIN, "c", memory_id, patch)
            return
        self.desk.mos.update_memory(ADMIN, "c", memory_id, patch, if_match=model.versions)
        if text != model.text:
            model.text = text
            model.versions += 1
            self.stale(memory_id)

    @rule(memory_id=memories)
    def archive_or_restore(self, memory_id: str) -> None:
        if (model := self.model.get(memory_id)) is None:
            return
        calls = (self.desk.mos.archive_memory, self.desk.mos.restore_memory)
        legal, illegal = calls if model.active else calls[::-1]
        if not model.merged:
            with pytest.raises(Conflict):
                illegal(ADMIN, "c", memory_id)
        legal(ADMIN, "c", memory_id)
        model.active, model.merged = not model.active, False
        model.versions += 1
        self.stale(memory_id)

    @rule(target=memories, one=memories, two=memories)
    def merge(self, one: str, two: str) -> object:
        parents = [self.model.get(memory_id) for memory_id in (one, two)]
        if one == two or not all(parent is not None and parent.active for parent in parents):
            with pytest.raises((Conflict, InvalidRequest, NotFound)):
                self.desk.mos.merge_memories(ADMIN, "c", [one, two])
            return multiple()
        new = self.desk.mos.merge_memories(ADMIN, "c", [one, two])
        for parent in parents:
            assert parent is not None
            parent.active, parent.merged, parent.versions = False, True, parent.versions + 1
        self.stale(one, two)
        self.model[new.id] = Model(new.text, parents=frozenset((one, two)))
        return new.id

    @rule(memory_id=consumes(memories))
    def erase(self, memory_id: str) -> None:
        if memory_id not in self.model:
            return
        family = self.family(memory_id)
        erased = self.desk.mos.erase_memory(ADMIN, "c", memory_id, tombstone_key=KEY)
        assert set(erased.derived) == family - {memory_id}
        assert erased.versions == self.model[memory_id].versions
        for gone in family:
            del self.model[gone]
        self.erased.add(memory_id)
        self.ready = []

    @rule(memory_id=memories)
    def promote_one(self, memory_id: str) -> None:
        if memory_id in self.model:
            self._promote([memory_id], named=[memory_id])

    @rule()
    def promote_all(self) -> None:
        self._promote(None, named=[key for key, one in self.model.items() if one.active])

    def _promote(self, memory_ids: list[str] | None, *, named: list[str]) -> None:
        if not named or not all(self.model[key].active for key in named):
            with pytest.raises(Conflict):
                self.desk.mos.promote(ADMIN, "c", to=Tier.ACTIVATION, memory_ids=memory_ids)
            return
        self.desk.mos.promote(ADMIN, "c", to=Tier.ACTIVATION, memory_ids=memory_ids)
        for key in named:
            if not self.model[key].position:
                last = max(one.position for one in self.model.values())
                self.model[key].position = last + 1

    @rule()
    def demote_all(self) -> None:
        self.desk.mos.demote(ADMIN, "c", from_tier=Tier.ACTIVATION)
        self.stale(*(key for key, one in self.model.items() if one.position))
        for one in self.model.values():
            one.position = 0

    @rule()
    def bake(self) -> None:
        if self.prefix():
            self.desk.mos.record_artifact(self.desk.artifact())
            self.ready.append(self.prefix())

    def waiting(self) -> bool:
        return bool(self.desk.mos.list_jobs(ADMIN, state=JobState.QUEUED).items)

    @rule()
    def work(self) -> None:
        waiting = self.waiting()
        self.desk.run_jobs()
        if waiting:
            self.ready.append(self.prefix())

    @rule()
    def restart(self) -> None:
        self.desk.reopen()

    @invariant()
    def the_catalog_is_what_the_model_says(self) -> None:
        page = self.desk.mos.list_memories(ADMIN, "c", limit=1000)
        found = {
            one.id: Model(
                one.text,
                one.state == "active",
                one.version,
                one.position,
                one.state == "merged",
                frozenset(one.lineage.derived_from),
            )
            for one in page.items
        }
        assert found == self.model
        assert list(found) == list(self.model)

    @invariant()
    def the_prefix_is_what_the_model_says(self) -> None:
        shot = self.desk.shot()
        assert [(one.id, one.version) for one in shot.memories] == self.prefix()
        assert shot.epoch == 1 + len(self.erased)
        assert shot.version >= self.version
        self.version = shot.version

    @invariant()
    def the_activation_state_follows_from_the_prefix(self) -> None:
        if not self.prefix():
            expected = "none"
        elif self.prefix() in self.ready:
            expected = "ready"
        else:
            expected = "baking" if self.waiting() else "stale"
        assert self.desk.state() == expected

    def teardown(self) -> None:
        if hasattr(self, "desk"):
            assert self.desk.mos.verify_audit().ok
            for memory_id, one in self.model.items():
                history = self.desk.mos.memory_history(ADMIN, "c", memory_id)
                assert [line.version for line in history] == list(range(1, one.versions + 1))
            self.opened.close()
            shutil.rmtree(self.folder)


TestCatalogMachine = CatalogMachine.TestCase
TestCatalogMachine.settings = settings(
    max_examples=8,
    stateful_step_count=20,
    deadline=None,
    database=None,
    suppress_health_check=list(HealthCheck),
)
