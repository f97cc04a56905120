"""What an erased memory said is in no file of the data folder once its job is done."""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import store_samples as samples
from catalog_kit import ADMIN, KEY, Desk, open_desk
from disk_search import files_holding, left_in, text_forms, token_forms, vector_forms
from indexer_kit import CountingEmbedder, running

from memos_vllm.activation.store import ArtifactStore
from memos_vllm.control.jobs import MAX_ATTEMPTS
from memos_vllm.domain.access import Role
from memos_vllm.domain.erasure import Proof, Removed
from memos_vllm.domain.job import Job, JobKind, JobState
from memos_vllm.domain.memory import Memory, MemoryPatch, Source
from memos_vllm.domain.search import SearchQuery
from memos_vllm.engine import job_runner
from memos_vllm.engine.eraser import Eraser
from memos_vllm.engine.job_runner import JobRunner
from memos_vllm.engine.log_search import LogSearch
from memos_vllm.errors import Conflict, NotFound, Unavailable
from memos_vllm.plaintext.document import indexed_text
from memos_vllm.plaintext.index.qdrant_edge import EdgeStore
from memos_vllm.plaintext.store import PlaintextStore

# Much longer than it takes on a busy machine.
PATIENCE_SECONDS = 180.0
MARKERS = ("quicksilver", "vitriol", "cinnabar")
SECRET = "the customer's passphrase is quicksilver over cinnabar"


@dataclass
class Pool:
    """Stands in for the engine's block pool, and notes what it was asked to drop."""

    dropped: Sequence[str] = ()
    failure: Exception | None = None

    async def drop(self, scopes: Sequence[str]) -> str:
        if self.failure is not None:
            raise self.failure
        self.dropped = scopes
        return "the pool of the test was asked"


@dataclass
class Site:
    """A data folder with all that lies in one, and what a server does with it."""

    folder: Path
    desk: Desk
    plaintext: PlaintextStore
    artifacts: ArtifactStore
    embedder: CountingEmbedder
    pool: Pool

    def erase(self, memory: Memory) -> str:
        return self.desk.mos.erase_memory(ADMIN, "c", memory.id, tombstone_key=KEY).job

    def save_artifact(self, ids: Sequence[int], *, epoch: int = 1) -> None:
        identity = replace(samples.IDENTITY, scope=scope_of("c", epoch))
        samples.save(self.artifacts, ids, identity=identity)

    def do_jobs(self, job_id: str, *, attempts: int = 1000) -> Job:
        """Run the worker until the job has ended, or was begun so often."""

        async def work() -> Job:
            eraser = Eraser(
                mos=self.desk.mos,
                plaintext=self.plaintext,
                store=self.artifacts,
                residency=self.pool,
                logs=LogSearch(lambda: [self.folder / "run"]),
                scope=scope_of,
                key=KEY,
            )
            runner = JobRunner(self.desk.mos, {JobKind.ERASE: eraser.erase}, kinds=[JobKind.ERASE])
            task = asyncio.create_task(runner.run())
            deadline = time.monotonic() + PATIENCE_SECONDS
            while True:
                job = self.desk.mos.get_job(ADMIN, job_id)
                if job.state.finished or job.attempts >= attempts:
                    break
                assert time.monotonic() < deadline, job
                # What was put off, or renewed a last time, is begun again.
                self.desk.clock.advance(60)
                await asyncio.sleep(0.02)
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task
            return job

        return asyncio.run(work())


def scope_of(cube_id: str, epoch: int) -> str:
    return f"{cube_id:5}{epoch:05d}".encode().hex()


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(job_runner, "_POLL_SECONDS", 0.05)
    monkeypatch.setattr(job_runner, "_NEXT_ATTEMPT_SECONDS", (0.0,))


@contextmanager
def opened(folder: Path) -> Iterator[Site]:
    embedder = CountingEmbedder(dimension=64)
    artifacts = samples.open_store(folder)
    (folder / "run").mkdir()
    with (
        open_desk(folder) as desk,
        running(desk, lambda: EdgeStore(folder / "qdrant"), embedder=embedder) as plaintext,
    ):
        yield Site(folder, desk, plaintext, artifacts, embedder, Pool())
    artifacts.close()


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    with opened(tmp_path) as found:
        yield found


def proofs_of(job: Job) -> Mapping[Removed, Proof]:
    return {proof.what: proof for proof in job.proofs}


def test_no_text_token_id_or_vector_of_an_erased_memory_is_left_in_any_file(
    tmp_path: Path,
) -> None:
    text, title, former = MARKERS
    ids = samples.token_ids(160, seed=1)
    others = samples.token_ids(160, seed=2)
    with opened(tmp_path) as site:
        desk = site.desk
        memory, kept = desk.add(f"first {former}", "kept text")
        patch = MemoryPatch(text=f"it says {text}", source=Source(title=title))
        changed = desk.mos.update_memory(ADMIN, "c", memory.id, patch)
        body = f'{{"id": "{memory.id}", "text": "{text}"}}'.encode()
        desk.mos.store_reply(ADMIN, "key", "digest", 201, body)
        site.save_artifact(ids)
        site.artifacts.quarantine(site.artifacts._index.manifests()[0].key, "for the test")
        site.save_artifact(ids)
        samples.save(site.artifacts, others)
        (tmp_path / "run" / "worker.log").write_text(f"fine\nfailed on 'it says {text}'\nfine\n")
        assert site.plaintext.wait_until_indexed("c", seconds=PATIENCE_SECONDS)
        found = site.plaintext.search(ADMIN, ["c"], SearchQuery(text))
        assert memory.id in [hit.memory.id for hit in found.hits]
        wanted = {
            "text": text_forms(*MARKERS),
            "tokens": token_forms(ids),
            "vectors": [
                form
                for one in (memory, changed)
                for form in vector_forms(site.embedder.vector(indexed_text(one).dense))
            ],
        }
        assert left_in(tmp_path, wanted).keys() == wanted.keys()
        job = site.do_jobs(site.erase(memory))
        assert (job.state, job.error) == (JobState.SUCCEEDED, None)
        assert left_in(tmp_path, wanted) == {}
        # Written again, as a crash would have it; and what is kept is kept.
        assert files_holding(tmp_path, *token_forms(others))
        assert [
            hit.memory.id for hit in site.plaintext.search(ADMIN, ["c"], SearchQuery("kept")).hits
        ] == [kept.id]
    # Stores that are closed write what they held in memory.
    assert left_in(tmp_path, wanted) == {}
    assert files_holding(tmp_path, b"kept text")
    assert (tmp_path / "run" / "worker.log").read_text().splitlines()[::2] == ["fine", "fine"]


def test_a_job_proves_each_removal_and_quotes_nothing(site: Site) -> None:
    memory, _kept = site.desk.add(SECRET, "kept")
    site.save_artifact(samples.token_ids(64))
    job_id = site.erase(memory)
    queued = site.desk.mos.get_job(ADMIN, job_id)
    assert (queued.kind, queued.state, queued.proofs) == (JobKind.ERASE, JobState.QUEUED, ())
    job = site.do_jobs(job_id)
    proofs = proofs_of(job)
    assert set(proofs) == set(Removed)
    assert (proofs[Removed.TEXT].count, proofs[Removed.POINTS].count) == (1, 1)
    assert all(proof.checked for proof in job.proofs)
    assert site.pool.dropped == [scope_of("c", 1)]
    # Nothing by which the text could be guessed is kept beyond the search of the logs.
    assert job.payload["needles"] == []
    assert not any(word in repr(job) for word in MARKERS)
    assert not any(word in repr(site.desk.mos.audit_entries(ADMIN, "c")) for word in MARKERS)


def test_an_artifact_that_no_catalog_knows_is_removed_and_none_comes_after(site: Site) -> None:
    (memory,) = site.desk.add("one")
    ids = samples.token_ids(64)
    site.save_artifact(ids)
    assert site.desk.mos.list_artifacts("c") == []
    assert site.do_jobs(site.erase(memory)).state is JobState.SUCCEEDED
    assert files_holding(site.folder / "store", *token_forms(ids)) == []
    with pytest.raises(Exception, match="erased"):
        site.save_artifact(ids)
    # The next epoch's are not held up.
    site.save_artifact(ids, epoch=2)


def test_an_erasure_goes_on_after_whatever_was_down_and_is_never_given_up(site: Site) -> None:
    (memory,) = site.desk.add(SECRET)
    job_id = site.erase(memory)
    site.pool.failure = Unavailable("the engine is away")
    job = site.do_jobs(job_id, attempts=MAX_ATTEMPTS + 2)
    assert (job.state, job.error) == (JobState.RUNNING, None)
    # What was done before is proved already.
    assert set(proofs_of(job)) == {Removed.ARTIFACTS}
    site.pool.failure = None
    assert site.do_jobs(job_id).state is JobState.SUCCEEDED


def test_an_erasure_cannot_be_cancelled(site: Site) -> None:
    (memory,) = site.desk.add("one")
    job_id = site.erase(memory)
    with pytest.raises(Conflict, match="cannot be cancelled"):
        site.desk.mos.cancel_job(ADMIN, job_id)


def test_erasures_that_wait_are_one_job_and_are_all_proved(site: Site) -> None:
    texts = [f"note {number} says quicksilver{number}" for number in range(5)]
    memories = site.desk.add(*texts)
    jobs = {site.erase(memory) for memory in memories}
    (job_id,) = jobs
    job = site.do_jobs(job_id)
    assert proofs_of(job)[Removed.TEXT].count == 5
    assert site.pool.dropped == [scope_of("c", epoch) for epoch in range(1, 6)]
    assert left_in(site.folder, {"text": text_forms("quicksilver")}) == {}


def test_a_row_that_comes_back_fails_the_job_and_names_its_table(site: Site) -> None:
    (memory, other) = site.desk.add("one", "two")
    (seq,) = site.desk.sql(f"SELECT seq FROM memories WHERE id = '{memory.id}'")[0]
    job_id = site.erase(memory)
    site.desk.sql(
        "PRAGMA foreign_keys = OFF",
        f"INSERT INTO memory_labels VALUES ({seq}, 'left over')",
    )
    job = site.do_jobs(job_id)
    assert (job.state, job.error) == (
        JobState.FAILED,
        "the catalog still has rows of what was erased: 1 in memory_labels",
    )
    assert Removed.TEXT not in proofs_of(job)
    assert site.desk.mos.get_memory(ADMIN, "c", other.id).text == "two"


def test_a_job_that_erases_what_is_under_a_label_is_for_owners_and_who_asked(site: Site) -> None:
    desk = site.desk
    (memory,) = desk.add(SECRET, labels=("hr",))
    editor = desk.grant("editor", Role.EDITOR, labels=["hr"])
    reader = desk.grant("reader", Role.READER)
    job_id = desk.mos.erase_memory(editor, "c", memory.id, tombstone_key=KEY).job
    for actor in (ADMIN, editor):
        assert desk.mos.get_job(actor, job_id).id == job_id
        assert [job.id for job in desk.mos.list_jobs(actor, cube_id="c").items] == [job_id]
    with pytest.raises(NotFound):
        desk.mos.get_job(reader, job_id)
    assert desk.mos.list_jobs(reader, cube_id="c").items == []


def test_what_was_derived_elsewhere_goes_too_and_the_job_does_not_tell_of_it(site: Site) -> None:
    desk = site.desk
    desk.mos.create_cube(ADMIN, cube_id="d")
    (memory,) = desk.add(SECRET)
    (copy,) = desk.mos.keep_memories(ADMIN, "d", from_cube="c", memory_ids=[memory.id])
    ids = samples.token_ids(64)
    identity = replace(samples.IDENTITY, scope=scope_of("d", 1))
    samples.save(site.artifacts, ids, identity=identity)
    editor = desk.grant("editor", Role.EDITOR)
    erased = desk.mos.erase_memory(editor, "c", memory.id, tombstone_key=KEY)
    job = site.do_jobs(erased.job)
    assert job.state is JobState.SUCCEEDED
    with pytest.raises(NotFound):
        desk.mos.get_memory(ADMIN, "d", copy.id)
    assert site.pool.dropped == [scope_of("c", 1), scope_of("d", 1)]
    assert left_in(site.folder, {"text": text_forms(*MARKERS), "ids": token_forms(ids)}) == {}
    # What the editor may not see is proved without being counted.
    assert erased.derived == ()
    assert (proofs_of(job)[Removed.TEXT].count, proofs_of(job)[Removed.POINTS].count) == (1, 1)
    assert copy.id not in repr(job.proofs)


def test_what_pages_keep_of_rows_that_moved_goes_with_the_rewrite(tmp_path: Path) -> None:
    # SQLite overwrites what it deletes; where a page was split, a copy stays in the other half.
    drawn = random.Random(1)
    with open_desk(tmp_path) as desk:
        gone: list[str] = []
        # Where pages are split depends on ids, which are random: until there is something to show.
        for attempt in range(20):
            gone += add_and_erase(desk, f"zq{attempt:02d}", drawn)
            if any(word.encode() in desk.stored_bytes() for word in gone):
                break
        else:
            pytest.fail("no page kept anything of a row that was erased")
        assert desk.mos.rewrite_files(10**6)
        after = desk.stored_bytes()
        assert not any(word.encode() in after for word in gone)


def add_and_erase(desk: Desk, mark: str, drawn: random.Random) -> list[str]:
    """Add many memories, change some, erase most; words that only the erased ones held."""
    words: dict[str, str] = {}
    for batch in range(40):
        texts = [
            f"{mark}{batch:03d}{number:03d}qz " + "w" * drawn.randint(5, 700)
            for number in range(10)
        ]
        words |= {one.id: one.text.split()[0] for one in desk.add(*texts)}
    for memory_id in drawn.sample(sorted(words), 100):
        patch = MemoryPatch(text=f"{words[memory_id]} again " + "y" * drawn.randint(1, 900))
        desk.mos.update_memory(ADMIN, "c", memory_id, patch)
    erased = drawn.sample(sorted(words), 300)
    for memory_id in erased:
        desk.mos.erase_memory(ADMIN, "c", memory_id, tombstone_key=KEY)
    return [words[memory_id] for memory_id in erased]


def test_a_reader_that_holds_on_to_the_log_is_waited_for(tmp_path: Path) -> None:
    from memos_vllm.control.catalog import Catalog

    with open_desk(tmp_path) as desk:
        (memory,) = desk.add(SECRET)
        desk.mos.close()
        impatient = Catalog.open(desk.url, busy_timeout_seconds=0.05)
        desk.mos._catalog = impatient
        with impatient.engine.connect() as reader:
            reader.exec_driver_sql("SELECT * FROM memories").all()
            desk.mos.erase_memory(ADMIN, "c", memory.id, tombstone_key=KEY)
            assert not desk.mos.rewrite_files(1)
        assert desk.mos.rewrite_files(1)
        assert MARKERS[0].encode() not in desk.stored_bytes()
