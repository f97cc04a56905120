"""Plaintext memory: the index's outbox, vectors, entities, documents, chat sessions."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None

SERIAL = sa.BigInteger().with_variant(sa.Integer(), "sqlite")


def upgrade() -> None:
    """Apply."""
    _create_index_state()
    _create_derived()
    _create_documents()
    # Every memory that is there already is new to the index.
    op.execute(
        "INSERT INTO index_outbox (cube_id, memory_seq) SELECT cube_id, seq FROM memories "
        "ORDER BY seq"
    )


def downgrade() -> None:
    """Drop what was added; memories stay."""
    for table in (
        "chat_sessions",
        "document_chunks",
        "documents",
        "memory_entities",
        "memory_vectors",
        "indexes",
        "index_outbox",
    ):
        op.drop_table(table)


def _create_index_state() -> None:
    op.create_table(
        "index_outbox",
        sa.Column("seq", SERIAL, nullable=False),
        sa.Column("cube_id", sa.String(length=64), nullable=False),
        sa.Column("memory_seq", sa.BigInteger(), nullable=True),
        sa.PrimaryKeyConstraint("seq", name=op.f("pk_index_outbox")),
        sqlite_autoincrement=True,
    )
    op.create_index(op.f("ix_index_outbox_cube_id"), "index_outbox", ["cube_id"], unique=False)
    op.create_table(
        "indexes",
        sa.Column("name", sa.String(length=128), nullable=False),
        sa.Column("embedder", sa.String(length=256), nullable=False),
        sa.Column("dimension", sa.Integer(), nullable=False),
        sa.Column("applied", sa.BigInteger(), nullable=False),
        sa.Column("walked", sa.BigInteger(), nullable=True),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint("name", name=op.f("pk_indexes")),
    )


def _create_derived() -> None:
    op.create_table(
        "memory_vectors",
        sa.Column("memory_seq", SERIAL, nullable=False),
        sa.Column("embedder", sa.String(length=256), nullable=False),
        sa.Column("digest", sa.LargeBinary(length=32), nullable=False),
        sa.Column("vector", sa.LargeBinary(), nullable=False),
        sa.ForeignKeyConstraint(
            ["memory_seq"],
            ["memories.seq"],
            name=op.f("fk_memory_vectors_memory_seq"),
            ondelete="CASCADE",
        ),
        sa.PrimaryKeyConstraint("memory_seq", "embedder", name=op.f("pk_memory_vectors")),
    )
    op.create_table(
        "memory_entities",
        sa.Column("cube_id", sa.String(length=64), nullable=False),
        sa.Column("entity", sa.String(length=64), nullable=False),
        sa.Column("memory_seq", SERIAL, nullable=False),
        sa.ForeignKeyConstraint(
            ["memory_seq"],
            ["memories.seq"],
            name=op.f("fk_memory_entities_memory_seq"),
            ondelete="CASCADE",
        ),
        sa.PrimaryKeyConstraint("cube_id", "entity", "memory_seq", name=op.f("pk_memory_entities")),
    )
    op.create_index(
        op.f("ix_memory_entities_memory_seq"), "memory_entities", ["memory_seq"], unique=False
    )


def _create_documents() -> None:
    op.create_table(
        "documents",
        sa.Column("memory_seq", SERIAL, nullable=False),
        sa.Column("cube_id", sa.String(length=64), nullable=False),
        sa.Column("uri", sa.String(length=2048), nullable=False),
        sa.Column("digest", sa.String(length=64), nullable=False),
        sa.Column("media_type", sa.String(length=128), nullable=False),
        sa.Column("size_bytes", sa.BigInteger(), nullable=False),
        sa.ForeignKeyConstraint(
            ["memory_seq"],
            ["memories.seq"],
            name=op.f("fk_documents_memory_seq"),
            ondelete="CASCADE",
        ),
        sa.PrimaryKeyConstraint("memory_seq", name=op.f("pk_documents")),
    )
    for column in ("digest", "uri"):
        op.create_index(
            op.f(f"ix_documents_cube_id_{column}"), "documents", ["cube_id", column], unique=False
        )
    op.create_table(
        "document_chunks",
        sa.Column("memory_seq", SERIAL, nullable=False),
        sa.Column("document_seq", SERIAL, nullable=False),
        sa.Column("ordinal", sa.Integer(), nullable=False),
        sa.Column("digest", sa.String(length=64), nullable=False),
        sa.ForeignKeyConstraint(
            ["memory_seq"],
            ["memories.seq"],
            name=op.f("fk_document_chunks_memory_seq"),
            ondelete="CASCADE",
        ),
        sa.ForeignKeyConstraint(
            ["document_seq"],
            ["documents.memory_seq"],
            name=op.f("fk_document_chunks_document_seq"),
            ondelete="CASCADE",
        ),
        sa.PrimaryKeyConstraint("memory_seq", name=op.f("pk_document_chunks")),
    )
    op.create_index(
        op.f("ix_document_chunks_document_seq"),
        "document_chunks",
        ["document_seq"],
        unique=False,
    )
    op.create_table(
        "chat_sessions",
        sa.Column("cube_id", sa.String(length=64), nullable=False),
        sa.Column("session_id", sa.String(length=256), nullable=False),
        sa.Column("turns", sa.Integer(), nullable=False),
        sa.Column("last_memory_seq", SERIAL, nullable=True),
        sa.ForeignKeyConstraint(
            ["cube_id"], ["cubes.id"], name=op.f("fk_chat_sessions_cube_id"), ondelete="CASCADE"
        ),
        sa.ForeignKeyConstraint(
            ["last_memory_seq"],
            ["memories.seq"],
            name=op.f("fk_chat_sessions_last_memory_seq"),
            ondelete="SET NULL",
        ),
        sa.PrimaryKeyConstraint("cube_id", "session_id", name=op.f("pk_chat_sessions")),
    )
    op.create_index(
        op.f("ix_chat_sessions_last_memory_seq"),
        "chat_sessions",
        ["last_memory_seq"],
        unique=False,
    )
