"""One case a process, with a progress bar."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context, parent_process
from typing import TypeVar

from ...console.progress import Progress
from .cases import Case

Result = TypeVar("Result")


def in_parallel(
    work: Callable[[Case], Result], cases: Sequence[Case], processes: int, progress: Progress, text: str
) -> list[Result]:
    """What `work` made of each case, in their order; in this process if `processes` is 1."""
    results = []
    with progress.bar(text, len(cases)) as step, contextlib.ExitStack() as stack:
        pool = None
        if processes > 1 and len(cases) > 1:
            pool = ProcessPoolExecutor(min(processes, len(cases)), get_context("spawn"), _begin_as_worker)
            stack.enter_context(pool)
        try:
            with _starting_workers() if pool else contextlib.nullcontext():
                made = (pool.map if pool else map)(work, cases)
            for case, result in zip(cases, made, strict=True):
                results.append(result)
                step(case.name)
        except BaseException:
            if pool:
                pool.shutdown(cancel_futures=True)
            raise
    return results


@contextlib.contextmanager
def _starting_workers() -> Iterator[None]:
    """Start them deaf to interruptions, which are for this process: they finish their case."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _begin_as_worker() -> None:
    """End when the first process is killed."""

    def end_with_parent() -> None:
        parent_process().join()
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()
