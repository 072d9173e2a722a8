"""Jobs that take turns in one thread."""

import asyncio
import threading

import pytest

from mistral_sae.live import engine as engine_module
from mistral_sae.live.engine import Busy, Engine


@pytest.fixture
def engine():
    engine = Engine()
    yield engine
    engine.close()


async def items(engine, job):
    return [item async for item in engine.stream(job)]


def test_jobs_take_turns_and_keep_their_order(engine):
    taken, both = [], threading.Barrier(2)

    def job(name):
        for i in range(4):
            taken.append(name)
            yield (name, i)

    def held():  # until both of the others wait
        both.wait(5)
        yield None

    async def run():
        first = asyncio.create_task(items(engine, held()))
        others = [asyncio.create_task(items(engine, job(name))) for name in "ab"]
        await asyncio.sleep(0.05)
        both.wait(5)
        return (await asyncio.gather(first, *others))[1:]

    assert asyncio.run(run()) == [[(name, i) for i in range(4)] for name in "ab"]
    assert sorted(taken[:2]) == sorted(taken[2:4]) == ["a", "b"]


def test_what_a_job_raises_ends_that_job_alone(engine):
    def failing():
        yield 1
        raise ValueError("of this job")

    async def run():
        return await asyncio.gather(items(engine, failing()), items(engine, iter([1, 2, 3])), return_exceptions=True)

    failed, others = asyncio.run(run())
    assert str(failed) == "of this job"
    assert others == [1, 2, 3]
    assert engine.jobs == 0


def test_a_stream_that_is_closed_frees_its_place_and_takes_no_more_steps(engine):
    steps = []

    def endless():
        while True:
            steps.append(1)
            yield len(steps)

    async def run():
        stream = engine.stream(endless())
        await anext(stream)
        await stream.aclose()
        await items(engine, iter(range(3)))
        taken = len(steps)
        await items(engine, iter(range(3)))
        return taken

    assert asyncio.run(run()) == len(steps)
    assert engine.jobs == 0


def test_a_stream_that_is_closed_holds_nothing_while_the_engine_waits(engine):
    freed = threading.Event()

    def endless():
        try:
            while True:
                yield 1
        finally:
            freed.set()

    async def run():
        stream = engine.stream(endless())
        await anext(stream)
        await stream.aclose()

    asyncio.run(run())
    assert freed.wait(5)


def test_too_many_jobs_are_told_so(engine, monkeypatch):
    monkeypatch.setattr(engine_module, "WAITING", 1)
    release = threading.Event()

    def held():
        release.wait(5)
        yield 1

    async def run():
        first = asyncio.create_task(items(engine, held()))
        await asyncio.sleep(0)
        with pytest.raises(Busy, match="try again"):
            await items(engine, iter([1]))
        release.set()
        return await first

    assert asyncio.run(run()) == [1]
