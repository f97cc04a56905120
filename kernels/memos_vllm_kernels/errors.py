"""Errors of the kernels package.

KernelInputError (ValueError)      an argument has the wrong shape, dtype, stride, device or range
└── UnsupportedLayout              these pages cannot be moved without changing bytes
"""


class KernelInputError(ValueError):
    """An argument cannot be used; nothing was written."""


class UnsupportedLayout(KernelInputError):
    """These pages are stored in a way that this package cannot move bit for bit.

    Attributes:
        reason: one clause that says what is in the way, without a trailing full stop.
    """

    def __init__(self, reason: str) -> None:
        super().__init__(f"these KV pages cannot be moved exactly: {reason}")
        self.reason = reason
