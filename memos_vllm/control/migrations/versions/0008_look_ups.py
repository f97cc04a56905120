"""Looking up whose cubes come next by id, and what somebody did, or had done, last."""

from __future__ import annotations

from alembic import op

revision = "0008"
down_revision = "0007"
branch_labels = None
depends_on = None

# (table, columns before, columns now)
_WIDER = (
    ("cubes", ["owner"], ["owner", "id"]),
    ("grants", ["principal_id"], ["principal_id", "cube_id"]),
)
_NEW = (("audit", ["actor", "seq"]), ("audit", ["action", "seq"]))


def upgrade() -> None:
    """Apply."""
    for table, before, now in _WIDER:
        op.drop_index(_name(table, before), table_name=table)
        op.create_index(_name(table, now), table, now)
    for table, columns in _NEW:
        op.create_index(_name(table, columns), table, columns)


def downgrade() -> None:
    """As it was."""
    for table, columns in _NEW:
        op.drop_index(_name(table, columns), table_name=table)
    for table, before, now in _WIDER:
        op.drop_index(_name(table, now), table_name=table)
        op.create_index(_name(table, before), table, before)


def _name(table: str, columns: list[str]) -> str:
    return op.f(f"ix_{table}_{'_'.join(columns)}")
