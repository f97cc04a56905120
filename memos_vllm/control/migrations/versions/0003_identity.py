"""A name for the catalog, by which what it keeps elsewhere is known to be its own."""

from __future__ import annotations

import secrets

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Apply."""
    table = op.create_table(
        "catalog_identity",
        sa.Column("id", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("uid", sa.String(length=32), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_catalog_identity")),
    )
    op.bulk_insert(table, [{"id": 1, "uid": secrets.token_hex(8)}])


def downgrade() -> None:
    """The catalog has no name any more."""
    op.drop_table("catalog_identity")
