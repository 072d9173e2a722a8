"""One model for many people: a thread that runs their jobs in turn, a step of each at a time.

A job is an iterator whose every `next` is one step, such as a token; its items are sent unless they are None. Hooks are
on the model itself, so an edit is entered and left within a step: two jobs with different edits never meet. What a job
raises ends that job alone.
"""

import asyncio
import queue
import threading
from collections import deque
from collections.abc import AsyncGenerator, Callable, Generator, Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, TypeVar

from mistral_sae.cli import UserError

AT_ONCE = 8  # jobs that take turns, most with a KV cache of their own
WAITING = 64  # jobs at most, those that take turns included

T = TypeVar("T")


class Busy(UserError):
    """More jobs than WAITING."""


@dataclass
class _Job:
    steps: Iterator[Any]
    send: Callable[[str, Any], object]  # how ("item", "error" or "end") and what; called by the engine's thread
    is_closed: bool = False


class Engine:
    """Runs jobs in a thread of its own, until `close`."""

    def __init__(self) -> None:
        self._new: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self.jobs, self._is_closed = 0, False  # jobs that run or wait
        self._thread = threading.Thread(target=self._run, name="the model", daemon=True)
        self._thread.start()

    async def stream(self, steps: Iterator[T]) -> AsyncGenerator[T, None]:
        """The items of a job as they come. A job whose stream is closed, as by a closed tab, frees its place.

        Raises Busy, and what the job raises.
        """
        if self.jobs >= WAITING:
            raise Busy(f"found {self.jobs} requests at work, expected at most {WAITING}: try again in a moment")
        loop, items = asyncio.get_running_loop(), asyncio.Queue[tuple[str, Any]]()
        job = _Job(steps, lambda *item: loop.call_soon_threadsafe(items.put_nowait, item))
        self.jobs += 1
        self._new.put(job)
        try:
            while True:
                how, what = await items.get()
                if how == "error":
                    raise what
                if how == "end":
                    return
                yield what
        finally:
            job.is_closed = True
            self.jobs -= 1

    def prepare(self, steps: Iterator[Any]) -> None:
        """Run a job whose items nobody waits for: what a first request would else wait for."""
        self._new.put(_Job(steps, lambda *_: None))

    def close(self) -> None:
        """End the thread after the step that it is in."""
        self._is_closed = True
        self._new.put(None)
        self._thread.join()

    def _run(self) -> None:
        active: deque[_Job] = deque()
        while not self._is_closed:
            while not active or (len(active) < AT_ONCE and not self._new.empty()):
                new = self._new.get()
                if new is None:
                    return
                active.appendleft(new)  # its first step is waited for, a further one less
            job = active.popleft()
            if job.is_closed:
                if isinstance(job.steps, Generator):
                    job.steps.close()  # now, and not when the next request comes: it may hold a KV cache
            elif _step(job):
                active.append(job)
            del job


def _step(job: _Job) -> bool:
    """Take one step of a job; False after its last one."""
    try:
        if (item := next(job.steps)) is not None:
            job.send("item", item)
        return True
    except StopIteration:
        how, what = "end", None
    except Exception as error:  # of this job alone: whoever waits for it gets to know
        how, what = "error", error
    with suppress(RuntimeError):  # the loop that waited is closed
        job.send(how, what)
    return False
