"""Work on several things at a time, with what comes of it in the order of the things."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def in_order(
    work: Callable[[Item], Result], items: Iterable[Item], *, threads: int, waiting: int, name: str
) -> Iterator[tuple[Item, Result]]:
    """Each item with `work(item)`, done by `threads` threads called `name`; at most `waiting` items are taken and not given
    back yet. What `work` raises is raised when its item is due, and ends the rest."""
    pending: deque[tuple[Item, Future[Result]]] = deque()
    pool = ThreadPoolExecutor(threads, thread_name_prefix=name)
    try:
        for item in items:
            pending.append((item, pool.submit(work, item)))
            if len(pending) >= waiting:
                first, future = pending.popleft()
                yield first, future.result()
        while pending:
            first, future = pending.popleft()
            yield first, future.result()
    finally:
        pool.shutdown(cancel_futures=True)
