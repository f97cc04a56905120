"""Where versions came from, conversations counted by label, a look-up of what expires, a secret."""

from __future__ import annotations

import secrets

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None

SERIAL = sa.BigInteger().with_variant(sa.Integer(), "sqlite")

_OLD = ("cube_id", "session_id", "turns", "last_memory_seq")


def upgrade() -> None:
    """Apply."""
    op.add_column("memory_versions", sa.Column("lineage", sa.JSON(), nullable=True))
    op.create_index(
        op.f("ix_memories_state_expires_at"),
        "memories",
        ["state", "expires_at"],
        sqlite_where=sa.text("expires_at IS NOT NULL"),
        postgresql_where=sa.text("expires_at IS NOT NULL"),
    )
    # Filled in at once: SQLite adds no column that may not be NULL to rows that are there.
    op.add_column("catalog_identity", sa.Column("secret", sa.String(length=64), nullable=True))
    identity = sa.table("catalog_identity", sa.column("secret", sa.String))
    op.execute(identity.update().values(secret=secrets.token_hex(32)))
    _count_conversations_by_label()


def downgrade() -> None:
    """Refuse: what is under a label would be counted for everybody again."""
    raise NotImplementedError("restore the catalog from a backup instead")


def _count_conversations_by_label() -> None:
    """The same table with labels in its key; what was counted until now counts as unlabelled."""
    bind = op.get_bind()
    old = sa.table("chat_sessions", *(sa.column(name) for name in _OLD))
    rows = [dict(row) for row in bind.execute(sa.select(old)).mappings()]
    op.drop_table("chat_sessions")
    new = op.create_table(
        "chat_sessions",
        sa.Column("cube_id", sa.String(length=64), nullable=False),
        sa.Column("session_id", sa.String(length=256), nullable=False),
        sa.Column("label_set", sa.String(length=64), nullable=False),
        sa.Column("labels", sa.JSON(), nullable=False),
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
        sa.PrimaryKeyConstraint(
            "cube_id", "session_id", "label_set", name=op.f("pk_chat_sessions")
        ),
    )
    op.create_index(op.f("ix_chat_sessions_last_memory_seq"), "chat_sessions", ["last_memory_seq"])
    if rows:
        op.bulk_insert(new, [{**row, "label_set": "", "labels": []} for row in rows])
