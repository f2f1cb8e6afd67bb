"""Reading ahead and writing behind: files are worked on while the device computes.

Every item is a task for a thread that never waits inside one. To stop is therefore to drop the tasks that have not
begun and to wait for the one that has, which takes as long as one item does.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from typing import Any, TypeVar

T = TypeVar("T")

_END = object()


def read_ahead(source: Iterable[T], depth: int) -> Generator[T, None, None]:
    """The items of an iterable, taken from it by a thread while earlier ones are in use.

    The thread begins with the first item asked for. It is over, and the source closed, when the iteration ends, by
    whatever way; close an iterator that is left early.

    Args:
        source: what it raises is raised here, after the items before it.
        depth: items, 1 or more, that may wait to be asked for.
    """
    items = iter(source)
    try:
        with _Worker("read ahead") as worker:
            for _ in range(depth):
                worker.add(next, items, _END)
            while (item := worker.result()) is not _END:
                worker.add(next, items, _END)
                yield item
    finally:
        if isinstance(items, Generator):
            items.close()


@contextmanager
def write_behind(write: Callable[[T], object], depth: int) -> Iterator[Callable[[T], None]]:
    """A function that has `write(item)` done by a thread, in order, and waits only while `depth` items do.

    All are written when the block ends. What `write` raises is raised by a later call or at the end, and nothing is
    written after it. If the block raises, what has not begun is dropped.

    Args:
        depth: items, 1 or more, that may wait to be written.
    """
    with _Worker("write behind") as worker:

        def put(item: T) -> None:
            while len(worker.tasks) > depth or (worker.tasks and worker.tasks[0].done()):
                worker.result()
            worker.add(_after, worker.tasks[-1] if worker.tasks else None, write, item)

        yield put
        while worker.tasks:
            worker.result()


def _after(before: Future[None] | None, write: Callable[[T], object], item: T) -> None:
    if before is not None:
        before.result()  # raises what it raised
    write(item)


class _Worker:
    """A thread that does tasks in the order they came in."""

    def __init__(self, name: str) -> None:
        self._pool = ThreadPoolExecutor(1, name)
        self.tasks: deque[Future] = deque()  # those whose result is still to be asked for

    def add(self, task: Callable[..., object], *arguments: object) -> None:
        self.tasks.append(self._pool.submit(task, *arguments))

    def result(self) -> Any:
        """What the oldest task returns or raises."""
        result = self.tasks[0].result()
        self.tasks.popleft()
        return result

    def __enter__(self) -> _Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)
        begun = [task for task in self.tasks if not task.cancelled()]
        interrupt = None
        # A second Ctrl-C must not have files closed that the thread is still busy with.
        while any(not task.done() for task in begun):
            try:
                wait(begun)
            except KeyboardInterrupt as again:
                interrupt = again
        self._pool.shutdown()
        if interrupt:
            raise interrupt
