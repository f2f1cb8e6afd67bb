"""Reading ahead and writing behind: nothing lost, nothing out of order, and nothing that goes on after the end."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from itertools import count
from threading import Event

import pytest

from seedvr2_core.video import threads
from seedvr2_core.video.threads import read_ahead, write_behind

# A fraction of a second, on a machine that has other things to do.
SOON = 0.5


@pytest.fixture(autouse=True)
def no_thread_stays() -> Iterator[None]:
    before = set(threading.enumerate())
    yield
    assert set(threading.enumerate()) <= before


@pytest.fixture
def ctrl_c() -> Iterator[Callable[[float], None]]:
    """Interrupts this thread, as Ctrl-C would, so many seconds later."""
    if os.name == "nt":
        pytest.skip("Windows has no such signals")
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    here, timers = threading.get_ident(), []

    def later(seconds: float) -> None:
        timers.append(threading.Timer(seconds, signal.pthread_kill, (here, signal.SIGINT)))
        timers[-1].start()

    yield later
    for timer in timers:
        timer.join()
    signal.signal(signal.SIGINT, before)


class Source:
    """Numbers from 0, and what became of them."""

    def __init__(self, error: Exception | None = None, at: int = -1, seconds: float = 0) -> None:
        self.read, self.busy, self.closed = 0, False, False
        self.error, self.at, self.seconds = error, at, seconds

    def __iter__(self) -> Iterator[int]:
        try:
            for number in count():
                self.busy = True
                time.sleep(self.seconds)
                self.busy = False
                if number == self.at:
                    raise self.error
                self.read += 1
                yield number
        finally:
            self.closed = True


def soon(condition: Callable[[], bool]) -> bool:
    end = time.monotonic() + 5
    while not condition() and time.monotonic() < end:
        time.sleep(0.002)
    return condition()


# --- reading ahead ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("depth", [1, 3, 100])
@pytest.mark.parametrize("items", [0, 1, 4, 50])
def test_every_item_arrives_in_order(items, depth):
    assert list(read_ahead(range(items), depth)) == list(range(items))


def test_reading_goes_on_while_an_item_is_in_use_and_no_further_than_asked(depth=3):
    source = Source()
    ahead = read_ahead(source, depth)
    for taken in range(1, 6):
        assert next(ahead) == taken - 1
        assert soon(lambda taken=taken: source.read == taken + depth)
        time.sleep(0.01)
        assert source.read == taken + depth
    ahead.close()


def test_nothing_is_read_before_the_first_item_is_asked_for():
    source = Source()
    read_ahead(source, 2).close()
    assert source.read == 0


def test_an_error_of_the_source_comes_after_the_items_before_it():
    source, taken = Source(error := OSError("broken"), at=4), []
    with pytest.raises(OSError) as raised:
        taken.extend(read_ahead(source, 8))
    assert raised.value is error
    assert source.closed and source.read == 4


def test_an_iteration_left_early_stops_soon_and_closes_its_source_when_nobody_reads():
    source = Source(seconds=0.1)
    items = iter(source)  # so that nobody else lets go of it
    ahead = read_ahead(items, 50)
    next(ahead)
    assert soon(lambda: source.busy)
    start = time.monotonic()
    ahead.close()
    assert time.monotonic() - start < SOON
    assert source.closed and not source.busy and source.read <= 4
    assert list(ahead) == []


def test_an_iterator_that_is_dropped_stops_too():
    source = Source()
    for item in read_ahead(source, 4):
        if item == 2:
            break
    assert soon(lambda: source.closed)


def test_an_interrupt_while_waiting_stops_the_reading(ctrl_c):
    source = Source(seconds=0.15)
    ctrl_c(0.05)
    start = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        next(read_ahead(source, 50))
    assert time.monotonic() - start < SOON
    assert source.closed and not source.busy


def test_a_second_interrupt_closes_nothing_that_is_still_being_read(ctrl_c):
    source = Source(seconds=0.3)
    for seconds in (0.05, 0.1, 0.15):
        ctrl_c(seconds)
    with pytest.raises(KeyboardInterrupt):
        next(read_ahead(source, 50))
    assert source.closed and not source.busy


def test_an_iterator_left_open_does_not_keep_the_process_alive():
    read_ahead = f"runpy.run_path({threads.__file__!r})['read_ahead']"
    script = f"import runpy, itertools; ahead = {read_ahead}(itertools.count(), 4); print(next(ahead)); 1 / 0"
    run = subprocess.run([sys.executable, "-c", script], timeout=20, capture_output=True, text=True)
    assert run.stdout == "0\n" and run.stderr.endswith("ZeroDivisionError: division by zero\n")


# --- writing behind --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("depth", [1, 3, 100])
@pytest.mark.parametrize("items", [0, 1, 4, 50])
def test_every_item_is_written_in_order_before_the_block_ends(items, depth):
    written = []

    def write(item: int) -> None:
        time.sleep(0.001)
        written.append((item, threading.get_ident()))

    with write_behind(write, depth) as put:
        for item in range(items):
            put(item)
    assert [item for item, _ in written] == list(range(items))
    assert threading.get_ident() not in {thread for _, thread in written}


def test_as_many_items_wait_as_were_asked_for_and_no_more():
    go, started, written = Event(), Event(), []

    def write(item: int) -> None:
        started.set()
        go.wait()
        written.append(item)

    with write_behind(write, 3) as put:
        put(0)
        started.wait()
        for item in (1, 2, 3):
            put(item)
        assert written == []
        threading.Timer(0.05, go.set).start()
        put(4)  # has to wait
        assert 0 in written
    assert written == [0, 1, 2, 3, 4]


def test_an_error_of_the_writer_comes_out_of_the_next_call_and_nothing_follows_it():
    error, tried = OSError("full"), []

    def write(item: int) -> None:
        tried.append(item)
        if item == 2:
            raise error

    with pytest.raises(OSError) as raised, write_behind(write, 4) as put:
        for item in (0, 1, 2):
            put(item)
        assert soon(lambda: len(tried) == 3)
        time.sleep(0.02)
        put(3)
        pytest.fail("the error did not come out")
    assert raised.value is error
    assert tried == [0, 1, 2]


def test_an_error_of_the_writer_comes_out_at_the_end_and_what_waited_is_not_written():
    error, go, tried = OSError("full"), Event(), []

    def write(item: int) -> None:
        go.wait()
        tried.append(item)
        raise error

    with pytest.raises(OSError) as raised, write_behind(write, 4) as put:
        for item in range(4):
            put(item)
        go.set()
    assert raised.value is error
    assert tried == [0]


def test_an_error_in_the_block_drops_what_waits():
    started, written = Event(), []

    def write(item: int) -> None:
        started.set()
        time.sleep(0.1)
        written.append(item)

    start = time.monotonic()
    with pytest.raises(ZeroDivisionError), write_behind(write, 50) as put:
        for item in range(50):
            put(item)
        started.wait()
        raise ZeroDivisionError
    assert time.monotonic() - start < SOON
    assert written == [0]


def test_interrupts_while_a_full_queue_is_waited_for_end_the_writing_once(ctrl_c):
    written = []

    def write(item: int) -> None:
        time.sleep(0.3)
        written.append(item)

    for seconds in (0.05, 0.1, 0.15):
        ctrl_c(seconds)
    with pytest.raises(KeyboardInterrupt), write_behind(write, 1) as put:
        for item in range(9):
            put(item)
    assert written == [0]
