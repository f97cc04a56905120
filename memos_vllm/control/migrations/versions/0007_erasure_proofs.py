"""What an erase job knows to be gone."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0007"
down_revision = "0006"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Apply."""
    op.add_column("jobs", sa.Column("proofs", sa.JSON(), nullable=True))


def downgrade() -> None:
    """Jobs go on; what they proved is in the log as far as that they ended."""
    op.drop_column("jobs", "proofs")
