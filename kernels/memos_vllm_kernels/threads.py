"""Running copies in a thread beside vLLM's compute."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

_setting_threads = threading.Lock()


@contextmanager
def unpinned_thread(*, num_threads: int = 1) -> Iterator[None]:
    """Let the calling thread run on every core of this process, with its own intra-op limit.

    vLLM's CPU worker pins its main thread to one core, and a thread started later inherits that
    core: copies would take turns with the model on it. Meant to wrap the whole body of a background
    thread; both settings are undone at the end.

    Args:
        num_threads: cores that one copy may use; more than 1 starts an OpenMP team of this thread's
            own.
    """
    pinned = _affinity(0)
    before = unpin_thread(num_threads=num_threads)
    try:
        yield
    finally:
        with _setting_threads:
            torch._C.set_num_threads(before)
        _set_affinity(pinned)


def unpin_thread(*, num_threads: int = 1) -> int:
    """What `unpinned_thread` does, for good: for a thread that does nothing but such copies.

    Returns:
        The limit that the thread had.
    """
    _set_affinity(_cores_of_process())
    return _limit_this_thread(num_threads)


def _limit_this_thread(num_threads: int) -> int:
    """set_num_threads is per thread, but also becomes the default of threads not yet seen.

    So the default is put back at once, from a thread that ends here. It is read under the same
    lock: a thread that begins meanwhile would take this one's limit for everyone's. vLLM's CPU
    worker replaces `torch.set_num_threads` by a warning, to protect its own threads; these are not
    touched.
    """
    with _setting_threads:
        before = torch.get_num_threads()
        torch._C.set_num_threads(num_threads)
        if num_threads != before:
            restorer = threading.Thread(target=torch._C.set_num_threads, args=(before,))
            restorer.start()
            restorer.join()
    return before


def _cores_of_process() -> set[int]:
    """The union over all threads: vLLM pins each of them, but only to cores it may use."""
    cores = _affinity(0)
    tasks = Path("/proc/self/task")
    for task in tasks.iterdir() if tasks.is_dir() else ():
        try:
            cores |= _affinity(int(task.name))
        except ProcessLookupError:
            continue
    return cores


def _affinity(thread_id: int) -> set[int]:
    return os.sched_getaffinity(thread_id) if hasattr(os, "sched_getaffinity") else set()


def _set_affinity(cores: set[int]) -> None:
    if cores and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, cores)
