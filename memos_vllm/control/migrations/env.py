"""What alembic runs: every step on the connection, and in the transaction, of the caller."""

from __future__ import annotations

from alembic import context

from memos_vllm.control.tables import Base

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=Base.metadata,
    render_as_batch=False,
    compare_type=True,
)
context.run_migrations()
