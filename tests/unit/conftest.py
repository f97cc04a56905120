"""The Triton kernels of this process are interpreted on the CPU; those of its children are not."""

from __future__ import annotations

import pytest

with pytest.MonkeyPatch.context() as patch:
    # Triton chooses when a kernel, or a function of its own library, is defined: at first import.
    patch.setenv("TRITON_INTERPRET", "1")
    # And again later, when it imports more of itself.
    import triton

    import memos_vllm_kernels.triton_pages  # noqa: F401

    triton.knobs.runtime.interpret = True
