"""The first schema: cubes, memories, artifacts, grants, jobs, audit."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None

SERIAL = sa.BigInteger().with_variant(sa.Integer(), "sqlite")

_REFUSAL = "the audit log is append-only"


def upgrade() -> None:
    """Apply."""
    _create_audit()
    _create_cubes()
    _create_memories()
    _create_memory_relations()
    _create_artifacts()
    _create_jobs_and_usage()
    _seal_audit()


def downgrade() -> None:
    """Refuse: there is nothing before the first schema but an empty file."""
    raise NotImplementedError("delete the catalog instead")


def _create_audit() -> None:
    op.create_table(
        "audit",
        sa.Column("seq", SERIAL, autoincrement=False, nullable=False),
        sa.Column("at", sa.String(length=40), nullable=False),
        sa.Column("actor", sa.String(length=64), nullable=False),
        sa.Column("action", sa.String(length=64), nullable=False),
        sa.Column("cube_id", sa.String(length=64), nullable=True),
        sa.Column("subject", sa.String(length=128), nullable=True),
        sa.Column("details", sa.Text(), nullable=False),
        sa.Column("previous_hash", sa.String(length=64), nullable=False),
        sa.Column("hash", sa.String(length=64), nullable=False),
        sa.PrimaryKeyConstraint("seq", name=op.f("pk_audit")),
    )
    op.create_index(op.f("ix_audit_cube_id_seq"), "audit", ["cube_id", "seq"], unique=False)
    op.create_table(
        "audit_head",
        sa.Column("id", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("seq", sa.BigInteger(), nullable=False),
        sa.Column("hash", sa.String(length=64), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_audit_head")),
    )


def _create_cubes() -> None:
    op.create_table(
        "principals",
        sa.Column("id", sa.String(length=64), nullable=False),
        sa.Column("kind", sa.String(length=16), nullable=False),
        sa.Column("name", sa.String(length=200), nullable=False),
        sa.Column("admin", sa.Boolean(), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("disabled_at", sa.DateTime(timezone=True), nullable=True),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_principals")),
    )
    op.create_table(
        "retired_cubes",
        sa.Column("id", sa.String(length=64), nullable=False),
        sa.Column("version", sa.BigInteger(), nullable=False),
        sa.Column("epoch", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_retired_cubes")),
    )
    op.create_table(
        "cubes",
        sa.Column("id", sa.String(length=64), nullable=False),
        sa.Column("name", sa.String(length=200), nullable=False),
        sa.Column("description", sa.Text(), nullable=False),
        sa.Column("preamble", sa.Text(), nullable=False),
        sa.Column("labels", sa.JSON(), nullable=False),
        sa.Column("owner", sa.String(length=64), nullable=False),
        sa.Column("version", sa.BigInteger(), nullable=False),
        sa.Column("epoch", sa.BigInteger(), nullable=False),
        sa.Column("scope_version", sa.BigInteger(), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("updated_at", sa.DateTime(timezone=True), nullable=False),
        sa.ForeignKeyConstraint(["owner"], ["principals.id"], name=op.f("fk_cubes_owner")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_cubes")),
    )
    op.create_index(op.f("ix_cubes_owner"), "cubes", ["owner"], unique=False)
    op.create_table(
        "grants",
        sa.Column("cube_id", sa.String(length=64), nullable=False),
        sa.Column("principal_id", sa.String(length=64), nullable=False),
        sa.Column("role", sa.String(length=16), nullable=False),
        sa.Column("labels", sa.JSON(), nullable=False),
        sa.Column("granted_by", sa.String(length=64), nullable=False),
        sa.Column("granted_at", sa.DateTime(timezone=True), nullable=False),
        sa.ForeignKeyConstraint(
            ["cube_id"], ["cubes.id"], name=op.f("fk_grants_cube_id"), ondelete="CASCADE"
        ),
        sa.ForeignKeyConstraint(
            ["principal_id"],
            ["principals.id"],
            name=op.f("fk_grants_principal_id"),
            ondelete="CASCADE",
        ),
        sa.PrimaryKeyConstraint("cube_id", "principal_id", name=op.f("pk_grants")),
    )
    op.create_index(op.f("ix_grants_principal_id"), "grants", ["principal_id"], unique=False)


def _create_memories() -> None:
    op.create_table(
        "memories",
        sa.Column("seq", SERIAL, nullable=False),
        sa.Column("id", sa.String(length=64), nullable=False),
        sa.Column("cube_id", sa.String(length=64), nullable=False),
        sa.Column("text", sa.Text(), nullable=False),
        sa.Column("text_bytes", sa.Integer(), nullable=False),
        sa.Column("tags", sa.JSON(), nullable=False),
        sa.Column("labels", sa.JSON(), nullable=False),
        sa.Column("metadata", sa.JSON(), nullable=False),
        sa.Column("source", sa.JSON(), nullable=False),
        sa.Column("state", sa.String(length=16), nullable=False),
        sa.Column("tier", sa.String(length=16), nullable=False),
        sa.Column("position", sa.Integer(), nullable=False),
        sa.Column("version", sa.Integer(), nullable=False),
        sa.Column("created_by", sa.String(length=64), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("updated_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("expires_at", sa.DateTime(timezone=True), nullable=True),
        sa.ForeignKeyConstraint(
            ["cube_id"], ["cubes.id"], name=op.f("fk_memories_cube_id"), ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("seq", name=op.f("pk_memories")),
        sa.UniqueConstraint("id", name=op.f("uq_memories_id")),
    )
    op.create_index(op.f("ix_memories_cube_id_seq"), "memories", ["cube_id", "seq"], unique=False)
    op.create_index(
        op.f("ix_memories_cube_id_state_tier"),
        "memories",
        ["cube_id", "state", "tier"],
        unique=False,
    )
    op.create_table(
        "memory_versions",
        sa.Column("memory_seq", SERIAL, nullable=False),
        sa.Column("version", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("text", sa.Text(), nullable=False),
        sa.Column("tags", sa.JSON(), nullable=False),
        sa.Column("labels", sa.JSON(), nullable=False),
        sa.Column("metadata", sa.JSON(), nullable=False),
        sa.Column("source", sa.JSON(), nullable=False),
        sa.Column("state", sa.String(length=16), nullable=False),
        sa.Column("expires_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("change", sa.String(length=16), nullable=False),
        sa.Column("reason", sa.Text(), nullable=True),
        sa.Column("changed_by", sa.String(length=64), nullable=False),
        sa.Column("changed_at", sa.DateTime(timezone=True), nullable=False),
        sa.ForeignKeyConstraint(
            ["memory_seq"],
            ["memories.seq"],
            name=op.f("fk_memory_versions_memory_seq"),
            ondelete="CASCADE",
        ),
        sa.PrimaryKeyConstraint("memory_seq", "version", name=op.f("pk_memory_versions")),
    )


def _create_memory_relations() -> None:
    op.create_table(
        "memory_tags",
        sa.Column("cube_id", sa.String(length=64), nullable=False),
        sa.Column("tag", sa.String(length=128), nullable=False),
        sa.Column("memory_seq", SERIAL, nullable=False),
        sa.ForeignKeyConstraint(
            ["memory_seq"],
            ["memories.seq"],
            name=op.f("fk_memory_tags_memory_seq"),
            ondelete="CASCADE",
        ),
        sa.PrimaryKeyConstraint("cube_id", "tag", "memory_seq", name=op.f("pk_memory_tags")),
    )
    op.create_index(op.f("ix_memory_tags_memory_seq"), "memory_tags", ["memory_seq"], unique=False)
    op.create_table(
        "memory_labels",
        sa.Column("memory_seq", SERIAL, nullable=False),
        sa.Column("label", sa.String(length=128), nullable=False),
        sa.ForeignKeyConstraint(
            ["memory_seq"],
            ["memories.seq"],
            name=op.f("fk_memory_labels_memory_seq"),
            ondelete="CASCADE",
        ),
        sa.PrimaryKeyConstraint("memory_seq", "label", name=op.f("pk_memory_labels")),
    )
    op.create_table(
        "memory_usage",
        sa.Column("memory_seq", SERIAL, nullable=False),
        sa.Column("hits", sa.BigInteger(), nullable=False),
        sa.Column("last_used_at", sa.DateTime(timezone=True), nullable=False),
        sa.ForeignKeyConstraint(
            ["memory_seq"],
            ["memories.seq"],
            name=op.f("fk_memory_usage_memory_seq"),
            ondelete="CASCADE",
        ),
        sa.PrimaryKeyConstraint("memory_seq", name=op.f("pk_memory_usage")),
    )
    op.create_table(
        "edges",
        sa.Column("memory_seq", SERIAL, nullable=False),
        sa.Column("kind", sa.String(length=64), nullable=False),
        sa.Column("target_seq", SERIAL, nullable=False),
        sa.Column("weight", sa.Float(), nullable=False),
        sa.Column("rank", sa.Integer(), nullable=False),
        sa.ForeignKeyConstraint(
            ["memory_seq"], ["memories.seq"], name=op.f("fk_edges_memory_seq"), ondelete="CASCADE"
        ),
        sa.ForeignKeyConstraint(
            ["target_seq"], ["memories.seq"], name=op.f("fk_edges_target_seq"), ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("memory_seq", "kind", "target_seq", name=op.f("pk_edges")),
    )
    op.create_index(op.f("ix_edges_target_seq"), "edges", ["target_seq"], unique=False)
    op.create_table(
        "memory_lineage",
        sa.Column("memory_seq", SERIAL, nullable=False),
        sa.Column("relation", sa.String(length=16), nullable=False),
        sa.Column("target_seq", SERIAL, nullable=False),
        sa.ForeignKeyConstraint(
            ["memory_seq"],
            ["memories.seq"],
            name=op.f("fk_memory_lineage_memory_seq"),
            ondelete="CASCADE",
        ),
        sa.ForeignKeyConstraint(
            ["target_seq"],
            ["memories.seq"],
            name=op.f("fk_memory_lineage_target_seq"),
            ondelete="CASCADE",
        ),
        sa.PrimaryKeyConstraint(
            "memory_seq", "relation", "target_seq", name=op.f("pk_memory_lineage")
        ),
    )
    op.create_index(
        op.f("ix_memory_lineage_target_seq"), "memory_lineage", ["target_seq"], unique=False
    )


def _create_artifacts() -> None:
    op.create_table(
        "artifacts",
        sa.Column("id", sa.String(length=128), nullable=False),
        sa.Column("cube_id", sa.String(length=64), nullable=False),
        sa.Column("kind", sa.String(length=32), nullable=False),
        sa.Column("head_key", sa.String(length=128), nullable=False),
        sa.Column("scope", sa.String(length=128), nullable=False),
        sa.Column("tokens", sa.Integer(), nullable=False),
        sa.Column("size_bytes", sa.BigInteger(), nullable=False),
        sa.Column("state", sa.String(length=16), nullable=False),
        sa.Column("cube_version", sa.BigInteger(), nullable=True),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.ForeignKeyConstraint(
            ["cube_id"], ["cubes.id"], name=op.f("fk_artifacts_cube_id"), ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_artifacts")),
    )
    op.create_index(op.f("ix_artifacts_cube_id"), "artifacts", ["cube_id"], unique=False)
    op.create_table(
        "artifact_memories",
        sa.Column("artifact_id", sa.String(length=128), nullable=False),
        sa.Column("rank", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("memory_seq", SERIAL, nullable=False),
        sa.Column("memory_version", sa.Integer(), nullable=False),
        sa.ForeignKeyConstraint(
            ["artifact_id"],
            ["artifacts.id"],
            name=op.f("fk_artifact_memories_artifact_id"),
            ondelete="CASCADE",
        ),
        sa.ForeignKeyConstraint(
            ["memory_seq"],
            ["memories.seq"],
            name=op.f("fk_artifact_memories_memory_seq"),
            ondelete="CASCADE",
        ),
        sa.PrimaryKeyConstraint("artifact_id", "rank", name=op.f("pk_artifact_memories")),
    )
    op.create_index(
        op.f("ix_artifact_memories_memory_seq"), "artifact_memories", ["memory_seq"], unique=False
    )


def _create_jobs_and_usage() -> None:
    op.create_table(
        "jobs",
        sa.Column("seq", SERIAL, nullable=False),
        sa.Column("id", sa.String(length=64), nullable=False),
        sa.Column("cube_id", sa.String(length=64), nullable=False),
        sa.Column("kind", sa.String(length=16), nullable=False),
        sa.Column("state", sa.String(length=16), nullable=False),
        sa.Column("progress", sa.Float(), nullable=False),
        sa.Column("message", sa.Text(), nullable=False),
        sa.Column("error", sa.Text(), nullable=True),
        sa.Column("payload", sa.JSON(), nullable=False),
        sa.Column("created_by", sa.String(length=64), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("updated_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("lease_owner", sa.String(length=128), nullable=True),
        sa.Column("lease_until", sa.DateTime(timezone=True), nullable=True),
        sa.Column("attempts", sa.Integer(), nullable=False),
        sa.ForeignKeyConstraint(
            ["cube_id"], ["cubes.id"], name=op.f("fk_jobs_cube_id"), ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("seq", name=op.f("pk_jobs")),
        sa.UniqueConstraint("id", name=op.f("uq_jobs_id")),
    )
    op.create_index(op.f("ix_jobs_cube_id"), "jobs", ["cube_id"], unique=False)
    op.create_index(op.f("ix_jobs_state_seq"), "jobs", ["state", "seq"], unique=False)
    op.create_table(
        "cube_usage",
        sa.Column("cube_id", sa.String(length=64), nullable=False),
        sa.Column("source", sa.String(length=32), nullable=False),
        sa.Column("hits", sa.BigInteger(), nullable=False),
        sa.Column("tokens", sa.BigInteger(), nullable=False),
        sa.Column("cached_tokens", sa.BigInteger(), nullable=False),
        sa.Column("saved_seconds", sa.Float(), nullable=False),
        sa.Column("last_used_at", sa.DateTime(timezone=True), nullable=False),
        sa.ForeignKeyConstraint(
            ["cube_id"], ["cubes.id"], name=op.f("fk_cube_usage_cube_id"), ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("cube_id", "source", name=op.f("pk_cube_usage")),
    )
    op.create_table(
        "idempotency",
        sa.Column("principal_id", sa.String(length=64), nullable=False),
        sa.Column("key", sa.String(length=256), nullable=False),
        sa.Column("fingerprint", sa.String(length=128), nullable=True),
        sa.Column("status", sa.Integer(), nullable=True),
        sa.Column("body", sa.LargeBinary(), nullable=True),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("expires_at", sa.DateTime(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint("principal_id", "key", name=op.f("pk_idempotency")),
    )
    op.create_index(op.f("ix_idempotency_expires_at"), "idempotency", ["expires_at"], unique=False)


def _seal_audit() -> None:
    op.execute(f"INSERT INTO audit_head (id, seq, hash) VALUES (1, 0, '{'0' * 64}')")
    if op.get_bind().dialect.name == "postgresql":
        _seal_audit_in_postgresql()
        return
    for verb in ("UPDATE", "DELETE"):
        op.execute(
            f"CREATE TRIGGER audit_refuses_{verb.lower()} BEFORE {verb} ON audit "
            f"BEGIN SELECT RAISE(ABORT, '{_REFUSAL}'); END"
        )
    # INSERT OR REPLACE removes a row without asking the DELETE trigger.
    op.execute(
        "CREATE TRIGGER audit_refuses_replace BEFORE INSERT ON audit "
        "WHEN EXISTS (SELECT 1 FROM audit WHERE seq = NEW.seq) "
        f"BEGIN SELECT RAISE(ABORT, '{_REFUSAL}'); END"
    )


def _seal_audit_in_postgresql() -> None:
    op.execute(
        "CREATE FUNCTION audit_refuses() RETURNS trigger LANGUAGE plpgsql AS "
        f"$$ BEGIN RAISE EXCEPTION '{_REFUSAL}'; END $$"
    )
    op.execute(
        "CREATE TRIGGER audit_refuses_change BEFORE UPDATE OR DELETE OR TRUNCATE ON audit "
        "FOR EACH STATEMENT EXECUTE FUNCTION audit_refuses()"
    )
