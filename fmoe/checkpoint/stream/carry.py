"""Work carried out on a few threads, and accounted for in order: what is done is done up to a point."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from os import cpu_count, environ
from typing import TypeVar

from fmoe.types import AdapterError, brief

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


def default_threads() -> int:
    return min(8, cpu_count() or 1)


def threads_of_rank() -> int:
    """The threads of one of the ranks of this machine, as torchrun says how many they are."""
    return max(1, default_threads() // int(environ.get("LOCAL_WORLD_SIZE", 1)))


def threads_of(asked: int | None, *others: int | None) -> int | None:
    """How many are asked for; where that is None, the first of the others that is not. Raises AdapterError."""
    if asked is not None and not 1 <= asked < 2**31:
        raise AdapterError(
            f"threads is {brief(asked)}, expected a positive int, or None for as many as there are cores"
        )
    return next((n for n in (asked, *others) if n is not None), None)


@contextmanager
def pool(threads: int | None) -> Iterator[ThreadPoolExecutor]:
    """Threads. What an error or an interruption leaves over is not begun. Raises AdapterError for less than one."""
    executor = ThreadPoolExecutor(threads_of(threads, default_threads()))
    try:
        yield executor
    finally:
        executor.shutdown(cancel_futures=True)


def in_order(
    executor: ThreadPoolExecutor, run: Callable[[_Item], _Result], items: Iterable[_Item], ahead: int = 16
) -> Iterator[tuple[_Item, _Result]]:
    """(item, run(item)) in the order of the items, with at most `ahead` of them begun or waiting."""
    waiting: deque[tuple[_Item, Future[_Result]]] = deque()
    for item in items:
        waiting.append((item, executor.submit(run, item)))
        if len(waiting) >= ahead:
            first, future = waiting.popleft()
            yield first, future.result()
    while waiting:
        first, future = waiting.popleft()
        yield first, future.result()
