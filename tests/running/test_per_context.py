"""A list of each asyncio task, which copies do not share."""

from __future__ import annotations

import asyncio
import contextvars
import copy
import pickle
from concurrent.futures import ThreadPoolExecutor

from coordconv_patch.running.per_context import PerContext


def test_tasks_inherit_and_keep_to_themselves() -> None:
    value = PerContext()
    assert (value.held[0], value.is_set) == (None, False)

    async def task(number: int) -> list[int | None]:
        before = value.held[0]
        value.set([number])
        await asyncio.sleep(0)
        return [before, value.held[0], await asyncio.to_thread(lambda: value.held[0])]

    async def tasks() -> list[list[int | None]]:
        value.set([7])
        return await asyncio.gather(task(1), task(2))

    assert asyncio.run(tasks()) == [[7, 1, 1], [7, 2, 2]]
    assert not value.is_set


def test_other_threads_inherit_nothing() -> None:
    value = PerContext()
    value.set([7])
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(lambda: value.held[0]).result() is None
    value.set(None)
    assert not value.is_set


def test_a_token_tells_its_context() -> None:
    value = PerContext()
    token = value.set([7])
    assert not contextvars.copy_context().run(value.is_of_this_context, token)
    assert value.held == [7]
    assert value.is_of_this_context(token)
    assert not value.is_set


def test_copies_begin_without_a_list() -> None:
    value = PerContext()
    value.set([7])
    for copied in (copy.copy(value), copy.deepcopy(value), pickle.loads(pickle.dumps(value))):
        assert isinstance(copied, PerContext)
        assert not copied.is_set
        copied.set([8])
        assert value.held == [7]
