"""Any sequence of operations, against a model that fits on a page."""

from __future__ import annotations

import shutil
import tempfile
from contextlib import ExitStack
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from pathlib import Path
from typing import cast

import pytest
from catalog_kit import ADMIN, KEY, open_desk
from databases import Database
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
    run_state_machine_as_test,
)

from memos_vllm.control.calls import Call, Delivery, Outcome, Remote, perform
from memos_vllm.control.mos import Mos
from memos_vllm.domain.access import Principal, Role
from memos_vllm.domain.document import NewChunk, NewDocument
from memos_vllm.domain.ids import PrincipalId
from memos_vllm.domain.job import JobState
from memos_vllm.domain.memory import MemoryPatch, NewMemory, Tier
from memos_vllm.domain.turn import NewTurn
from memos_vllm.errors import Conflict, InvalidRequest, MemosError, NotFound

# PostgreSQL answers each small statement later.
EXAMPLES = {"sqlite": 16, "postgresql": 8}
INDEX = "model"
LABELS = st.lists(st.sampled_from(["red", "blue"]), max_size=2, unique=True)
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
    expires: datetime | None = None
    labels: tuple[str, ...] = ()

    def live(self, now: datetime) -> bool:
        """Whether it is active and its time is not over."""
        return self.active and (self.expires is None or self.expires > now)


class Delivered:
    """Every other change arrives twice, as after a crash of who carries it."""

    def __init__(self) -> None:
        self._calls = 0

    def to(self, mos: Mos) -> Mos:
        """`Mos`, called so."""

        def send(call: Call, delivery: Delivery) -> Outcome:
            self._calls += delivery is Delivery.EXACTLY_ONCE
            if delivery is not Delivery.EXACTLY_ONCE or self._calls % 2:
                return perform(mos, call)
            try:
                first = perform(mos, call)
            except MemosError as error:
                # What was refused changed nothing, and is refused again.
                with pytest.raises(type(error)):
                    perform(mos, call)
                raise
            again = perform(mos, call)
            assert again.repeated
            assert again.value == first.value
            return again

        return cast(Mos, Remote(Mos, send=send, stream=lambda call: iter(())))


class CatalogMachine(RuleBasedStateMachine):
    """One cube, and one that keeps some of it, under random changes, bakes and restarts.

    The index is a dictionary, which follows the outbox as the real one does.
    """

    memories = Bundle("memories")

    def __init__(self, database: Database) -> None:
        super().__init__()
        self.database = database

    @initialize()
    def start(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="memos-machine-"))
        self.opened = ExitStack()
        self.desk = self.opened.enter_context(open_desk(self.folder, self.database))
        self.delivered = Delivered()
        self.model: dict[str, Model] = {}
        self.ready: list[Prefix] = []
        self.erased: set[str] = set()
        self.version = 1
        self.grants: dict[str, tuple[str, tuple[str, ...]]] = {"local": ("owner", ())}
        self.mos.create_cube(ADMIN, cube_id="d")
        self.kept: dict[str, Model] = {}
        self.pieces: set[str] = set()
        self.epoch = 1
        self.mos.start_index(INDEX, embedder="none", dimension=1, anew=True)
        self.mos.end_walk(INDEX)
        self.index: dict[int, int] = {}
        self.reached = self.mos.newest_change()
        self.documents = 0
        self.noted = self.mos.newest_change()
        self.rows = self.stored()
        self.logged = self.mos.verify_audit().entries
        self.logged_version = 1

    def stale(self, *memory_ids: str) -> None:
        """What is baked from one of these memories is out of date."""
        self.ready = [
            prefix for prefix in self.ready if not {one for one, _ in prefix} & set(memory_ids)
        ]

    @property
    def mos(self) -> Mos:
        return self.delivered.to(self.desk.mos)

    def family(self, memory_id: str) -> set[str]:
        """A memory and all that was derived from it, in the other cube, too."""
        found, everything = {memory_id}, {**self.model, **self.kept}
        while more := {k for k, one in everything.items() if one.parents & found} - found:
            found |= more
        return found

    @property
    def now(self) -> datetime:
        return self.desk.clock.now

    def stored(self) -> dict[int, tuple[object, ...]]:
        """What the index has to follow, as it is written down."""
        rows = self.desk.sql("SELECT seq, version, state, tier FROM memories")
        return {int(str(seq)): rest for seq, *rest in rows}

    def prefix(self) -> Prefix:
        chosen = [
            (one.position, memory_id, one.versions)
            for memory_id, one in self.model.items()
            if one.live(self.now) and one.position and not one.labels
        ]
        return [(memory_id, versions) for _, memory_id, versions in sorted(chosen)]

    @rule(target=memories, texts=st.lists(TEXTS, min_size=1, max_size=3))
    def add(self, texts: list[str]) -> object:
        added = self.mos.add_memories(ADMIN, "c", [NewMemory(text) for text in texts])
        self.model.update({one.id: Model(one.text) for one in added})
        return multiple(*(one.id for one in added))

    @rule(target=memories, text=TEXTS, seconds=st.integers(1, 4))
    def add_for_a_while(self, text: str, seconds: int) -> object:
        soon = self.now + timedelta(seconds=seconds)
        (one,) = self.mos.add_memories(ADMIN, "c", [NewMemory(text, expires_at=soon)])
        self.model[one.id] = Model(text, expires=soon)
        return one.id

    @rule(seconds=st.integers(1, 3))
    def wait(self, seconds: int) -> None:
        self.desk.clock.advance(seconds)

    @rule(limit=st.integers(1, 3))
    def sweep(self, limit: int) -> None:
        due = {
            (cube, key): one
            for cube, models in (("c", self.model), ("d", self.kept))
            for key, one in models.items()
            if one.active and not one.live(self.now)
        }
        assert self.mos.archive_expired(limit) == min(limit, len(due))
        for (cube, key), one in due.items():
            if self.mos.get_memory(ADMIN, cube, key).version != one.versions:
                one.active = False
                one.versions += 1
                self.stale(key)

    @rule(target=memories, texts=st.lists(TEXTS, min_size=1, max_size=2))
    def say(self, texts: list[str]) -> object:
        turns = [NewTurn("user", text) for text in texts]
        said = self.mos.add_turns(ADMIN, "c", turns, session_id="s")
        self.model.update({one.id: Model(one.text) for one in said})
        return multiple(*(one.id for one in said))

    @rule(target=memories, texts=st.lists(TEXTS, min_size=1, max_size=2, unique=True))
    def take_in(self, texts: list[str]) -> object:
        self.documents += 1
        digest = str(self.documents)
        chunks = tuple(NewChunk(text, "", (), None, f"{digest} {text}") for text in texts)
        document = NewDocument(f"title {digest}", "text/plain", digest, 1, chunks)
        stored = self.mos.put_document(ADMIN, "c", document, uri=f"{digest}.txt")
        made = [stored.document, *stored.memories]
        self.model.update({one.id: Model(one.text) for one in made})
        self.pieces.update(one.id for one in made)
        return multiple(*(one.id for one in made))

    @rule(memory_id=memories, labels=LABELS)
    def relabel(self, memory_id: str, labels: list[str]) -> None:
        # Of a document's pieces, the document's own text would have to be modelled.
        if (model := self.model.get(memory_id)) is None or memory_id in self.pieces:
            return
        patch = MemoryPatch(labels=tuple(labels))
        if not model.live(self.now):
            with pytest.raises(Conflict):
                self.mos.update_memory(ADMIN, "c", memory_id, patch)
            return
        self.mos.update_memory(ADMIN, "c", memory_id, patch, if_match=model.versions)
        if model.labels != tuple(labels):
            model.labels = tuple(labels)
            model.versions += 1
            self.epoch += 1
            self.ready = []
            if labels:
                model.position = 0

    @rule(memory_id=memories)
    def keep(self, memory_id: str) -> None:
        if (model := self.model.get(memory_id)) is None or not model.live(self.now):
            with pytest.raises((Conflict, NotFound)):
                self.mos.keep_memories(ADMIN, "d", from_cube="c", memory_ids=[memory_id])
            return
        same = [
            one
            for one in self.kept.values()
            if one.live(self.now) and (one.text, {*one.labels}) == (model.text, {*model.labels})
        ]
        (found,) = self.mos.keep_memories(ADMIN, "d", from_cube="c", memory_ids=[memory_id])
        if same:
            self.kept[found.id].parents |= {memory_id}
        else:
            self.kept[found.id] = Model(
                model.text,
                parents=frozenset({memory_id}),
                expires=model.expires,
                labels=model.labels,
            )

    @rule(limit=st.integers(1, 4), crash=st.booleans())
    def follow(self, limit: int, crash: bool) -> None:
        """Take in the next changes; after a crash before that was noted down, once more."""
        entries = self.mos.outbox(INDEX, limit=limit, after=self.reached)
        for _ in range(1 + crash):
            self.take_in_changes([one.memory_seq for one in entries if one.memory_seq is not None])
        if entries:
            self.reached = entries[-1].seq
            self.mos.advance_index(INDEX, applied=self.reached)

    def take_in_changes(self, seqs: list[int]) -> None:
        alive = {one.seq: one for one in self.mos.memories_to_index(seqs, embedder="none")}
        for seq in seqs:
            self.index.pop(seq, None)
            if seq in alive:
                self.index[seq] = alive[seq].memory.version

    @rule(who=st.sampled_from(["ann", "bob"]), role=st.sampled_from(list(Role)), labels=LABELS)
    def share(self, who: str, role: Role, labels: list[str]) -> None:
        owner = self.owner() == who
        if owner and role != "owner" and not self.heirs(who):
            with pytest.raises(Conflict):
                self.mos.put_grant(ADMIN, "c", who, role=role, labels=labels)
            return
        before = self.mos.verify_audit().entries
        self.mos.put_grant(ADMIN, "c", who, role=role, labels=labels)
        if owner and role == "owner":
            return
        told = owner or self.grants.get(who) != (role, tuple(labels))
        assert self.mos.verify_audit().entries == before + told
        self.grants[who] = (role, tuple(labels))

    @rule(who=st.sampled_from(["local", "ann", "bob"]))
    def unshare(self, who: str) -> None:
        before = self.mos.verify_audit().entries
        if who not in self.grants:
            with pytest.raises(NotFound):
                self.mos.delete_grant(ADMIN, "c", who)
        elif self.owner() == who and not self.heirs(who):
            with pytest.raises(Conflict, match="last owner"):
                self.mos.delete_grant(ADMIN, "c", who)
        else:
            self.mos.delete_grant(ADMIN, "c", who)
            del self.grants[who]
            before += 1
        assert self.mos.verify_audit().entries == before

    def owner(self) -> str:
        return self.mos.get_cube(ADMIN, "c").owner

    def heirs(self, who: str) -> list[str]:
        return [name for name, (role, _) in self.grants.items() if role == "owner" and name != who]

    @rule(memory_id=memories, text=TEXTS)
    def edit(self, memory_id: str, text: str) -> None:
        if (model := self.model.get(memory_id)) is None:
            return
        patch = MemoryPatch(text=text)
        if not model.live(self.now):
            with pytest.raises(Conflict):
                self.mos.update_memory(ADMIN, "c", memory_id, patch)
            return
        self.mos.update_memory(ADMIN, "c", memory_id, patch, if_match=model.versions)
        if text != model.text:
            model.text = text
            model.versions += 1
            self.stale(memory_id)

    @rule(memory_id=memories)
    def archive_or_restore(self, memory_id: str) -> None:
        if (model := self.model.get(memory_id)) is None:
            return
        calls = (self.mos.archive_memory, self.mos.restore_memory)
        alive = model.live(self.now)
        legal, illegal = calls if alive else calls[::-1]
        if not model.merged:
            with pytest.raises(Conflict):
                illegal(ADMIN, "c", memory_id)
        legal(ADMIN, "c", memory_id)
        model.active, model.merged = not alive, False
        if model.active and not model.live(self.now):
            model.expires = None
        model.versions += 1
        self.stale(memory_id)

    @rule(target=memories, one=memories, two=memories)
    def merge(self, one: str, two: str) -> object:
        parents = [self.model.get(memory_id) for memory_id in (one, two)]
        if one == two or not all(one is not None and one.live(self.now) for one in parents):
            with pytest.raises((Conflict, InvalidRequest, NotFound)):
                self.mos.merge_memories(ADMIN, "c", [one, two])
            return multiple()
        new = self.mos.merge_memories(ADMIN, "c", [one, two])
        for parent in parents:
            assert parent is not None
            parent.active, parent.merged, parent.versions = False, True, parent.versions + 1
        self.stale(one, two)
        ends = [one.expires for one in parents if one is not None and one.expires is not None]
        self.model[new.id] = Model(
            new.text,
            parents=frozenset((one, two)),
            expires=min(ends, default=None),
            labels=tuple(
                dict.fromkeys(name for p in parents if p is not None for name in p.labels)
            ),
        )
        return new.id

    @rule(memory_id=consumes(memories))
    def erase(self, memory_id: str) -> None:
        if memory_id not in self.model:
            return
        family = self.family(memory_id)
        erased = self.mos.erase_memory(ADMIN, "c", memory_id, tombstone_key=KEY)
        # What the other cube kept goes, too, and is named to nobody who asked about this one.
        assert set(erased.derived) == (family & set(self.model)) - {memory_id}
        assert erased.versions == self.model[memory_id].versions
        for gone in family:
            self.model.pop(gone, None)
            self.kept.pop(gone, None)
        self.erased.add(memory_id)
        self.epoch += 1
        self.ready = []

    @rule(memory_id=memories)
    def promote_one(self, memory_id: str) -> None:
        if memory_id in self.model:
            self._promote([memory_id], named=[memory_id])

    @rule()
    def promote_all(self) -> None:
        self._promote(
            None,
            named=[key for key, one in self.model.items() if one.live(self.now) and not one.labels],
        )

    def _promote(self, memory_ids: list[str] | None, *, named: list[str]) -> None:
        chosen = [self.model[key] for key in named]
        if not named or not all(one.live(self.now) and not one.labels for one in chosen):
            with pytest.raises((Conflict, InvalidRequest)):
                self.mos.promote(ADMIN, "c", to=Tier.ACTIVATION, memory_ids=memory_ids)
            return
        self.mos.promote(ADMIN, "c", to=Tier.ACTIVATION, memory_ids=memory_ids)
        for key in named:
            if not self.model[key].position:
                last = max(one.position for one in self.model.values())
                self.model[key].position = last + 1

    @rule()
    def demote_all(self) -> None:
        self.mos.demote(ADMIN, "c", from_tier=Tier.ACTIVATION)
        self.stale(*(key for key, one in self.model.items() if one.position))
        for one in self.model.values():
            one.position = 0

    @rule()
    def bake(self) -> None:
        if self.prefix():
            self.mos.record_artifact(self.desk.artifact())
            self.ready.append(self.prefix())

    def waiting(self) -> bool:
        return bool(self.mos.list_jobs(ADMIN, state=JobState.QUEUED).items)

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
        page = self.mos.list_memories(ADMIN, "c", limit=1000)
        found = {
            one.id: Model(
                one.text,
                one.state == "active",
                one.version,
                one.position,
                one.state == "merged",
                frozenset(one.lineage.derived_from),
                one.expires_at,
                one.labels,
            )
            for one in page.items
        }
        assert found == {
            key: replace(one, active=one.live(self.now)) for key, one in self.model.items()
        }
        assert list(found) == list(self.model)
        counts = self.mos.get_cube(ADMIN, "c").memories
        assert counts.active == sum(one.live(self.now) for one in self.model.values())
        assert counts.merged == sum(one.merged for one in self.model.values())
        assert counts.active + counts.merged + counts.archived == len(self.model)

    @invariant()
    def the_grants_are_what_the_model_says(self) -> None:
        grants = self.mos.list_grants(ADMIN, "c").items
        owner = self.owner()
        assert {one.principal: (one.role, one.labels) for one in grants} == {
            who: ("owner", ()) if who == owner else grant for who, grant in self.grants.items()
        }
        assert self.grants[owner][0] == "owner"

    @invariant()
    def principals_see_what_their_grants_leave_open(self) -> None:
        for who in ("ann", "bob"):
            role, labels = self.grants.get(who, ("none", ()))
            actor = Principal(PrincipalId(who))
            if role in {"none", "auditor"}:
                with pytest.raises(NotFound):
                    self.mos.list_memories(actor, "c")
                continue
            seen = [one.id for one in self.mos.list_memories(actor, "c", limit=1000).items]
            assert seen == [
                key
                for key, one in self.model.items()
                if role == "owner" or set(one.labels) <= set(labels)
            ]

    @invariant()
    def what_was_kept_is_what_the_model_says(self) -> None:
        page = self.mos.list_memories(ADMIN, "d", limit=1000)
        found = {
            one.id: (one.text, one.state == "active", frozenset(one.lineage.derived_from))
            for one in page.items
        }
        assert found == {
            key: (one.text, one.live(self.now), one.parents) for key, one in self.kept.items()
        }

    @invariant()
    def an_index_that_has_followed_everything_holds_what_is_active(self) -> None:
        if self.reached == self.mos.newest_change() or not self.mos.outbox(
            INDEX, limit=1, after=self.reached
        ):
            active = {seq: row[0] for seq, row in self.stored().items() if row[1] == "active"}
            assert self.index == active

    @invariant()
    def the_index_is_told_of_every_memory_that_is_not_what_it_was(self) -> None:
        before, self.rows = self.rows, self.stored()
        outbox = self.desk.sql(f"SELECT memory_seq FROM index_outbox WHERE seq > {self.noted}")
        self.noted = self.mos.newest_change()
        changed = {seq for seq in {*before, *self.rows} if before.get(seq) != self.rows.get(seq)}
        assert changed <= {seq for (seq,) in outbox}

    @invariant()
    def the_log_is_whole_and_its_end_speaks_of_the_newest_version(self) -> None:
        verdict = self.mos.verify_audit()
        assert verdict.ok
        version = self.mos.get_cube(ADMIN, "c").version
        entries = self.mos.audit_entries(ADMIN, "c", limit=1000).items
        told = [e.details["version"] for e in entries if "version" in e.details]
        assert max((int(str(one)) for one in told), default=1) == version
        if version != self.logged_version:
            assert verdict.entries > self.logged
        self.logged, self.logged_version = verdict.entries, version

    @invariant()
    def the_prefix_is_what_the_model_says(self) -> None:
        shot = self.desk.shot()
        assert [(one.id, one.version) for one in shot.memories] == self.prefix()
        assert shot.epoch == self.epoch
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
            for memory_id, one in self.model.items():
                history = self.mos.memory_history(ADMIN, "c", memory_id)
                assert [line.version for line in history] == list(range(1, one.versions + 1))
            self.opened.close()
            shutil.rmtree(self.folder)


def test_the_catalog_does_what_the_model_does(database: Database) -> None:
    run_state_machine_as_test(
        lambda: CatalogMachine(database),
        settings=settings(
            max_examples=EXAMPLES[database.name],
            stateful_step_count=20,
            deadline=None,
            database=None,
            suppress_health_check=list(HealthCheck),
        ),
    )
