"""The engine's thread: submissions, cancels, new weights, failure, idleness."""

import asyncio
import functools
import time

import jax
import pytest

from rome import models
from rome.rollout.engine import Engine, QueueFull, Request
from rome.rollout.serve.loop import EngineFailed, EngineLoop

pytestmark = pytest.mark.slow  # the engine has to be compiled first

MICRO = models.PRESETS["micro"]


@functools.cache
def weights(seed):
  return jax.jit(models.init_params, static_argnums=0)(MICRO, jax.random.key(seed))


def make(**arguments):
  engine = Engine(MICRO, slots=2, max_length=4096, max_waiting=4, **arguments)
  engine.publish(weights(0), 0)
  return engine


def request(count=20, **fields):
  return Request(context=(1, 2, 3), max_tokens=count, stop_tokens=(), **fields)


def in_a_loop(test):
  """Runs a coroutine function with a started loop."""

  def run():
    async def whole():
      loop = EngineLoop(make)
      await loop.start()
      try:
        await asyncio.wait_for(test(loop), 120)
      finally:
        assert await loop.close()

    asyncio.run(whole())

  run.__doc__ = test.__doc__
  return run


async def replies(ticket, news=()):
  """The replies, after a look at their pieces; `news` was read before."""
  found, pieces = {}, {}
  while news := news or await ticket.news():
    for index, update in news:
      pieces.setdefault(index, []).extend(update.tokens)
      if update.reply:
        found[index] = update.reply
    news = ()
  assert {i: r.tokens for i, r in found.items()} == pieces
  return [found[i] for i in sorted(found)]


@in_a_loop
async def test_replies_come_in_pieces_and_whole(loop):
  one = await loop.submit([request(key=(1, 0)), request(key=(2, 0)), request(5)])
  two = await loop.submit([request(key=(1, 0))])
  assert loop.open == 2
  first, second = await replies(one), await replies(two)
  assert [len(r.tokens) for r in first] == [20, 20, 5]
  assert first[0].tokens == second[0].tokens != first[1].tokens
  assert one.done and two.done and loop.open == 0 and await one.news() == []


@in_a_loop
async def test_all_or_nothing(loop):
  with pytest.raises(ValueError, match="exceed"):
    await loop.submit([request(), request(5000)])
  with pytest.raises(QueueFull):
    await loop.submit([request(4000)] * 20)
  assert loop.open == 0
  assert len(await replies(await loop.submit([request()]))) == 1
  assert loop.stats.waiting == loop.stats.running == 0


@in_a_loop
async def test_a_cancelled_request_frees_its_slots(loop):
  ticket = await loop.submit([request(4000)] * 4)
  await ticket.news()
  loop.cancel(ticket)
  with pytest.raises(EngineFailed, match="cancelled"):
    while True:
      await ticket.news()
  assert loop.open == 0
  await replies(await loop.submit([request(1)]))
  stats = await loop.call(lambda engine: engine.stats)
  assert stats.running == stats.waiting == 0


@in_a_loop
async def test_a_caller_that_gives_up_while_submitting_leaves_nothing(loop):
  task = asyncio.ensure_future(loop.submit([request(4000)]))
  await asyncio.sleep(0)
  task.cancel()
  await asyncio.gather(task, return_exceptions=True)
  assert loop.open == 0
  await loop.call(lambda engine: None)
  assert (await loop.call(lambda engine: engine.stats)).running == 0


@in_a_loop
async def test_new_weights_are_for_new_requests(loop):
  old = await loop.submit([request(500)])
  first = await old.news()
  await loop.publish(weights(1), 7)
  new = await loop.submit([request(500)])
  (before,), (after,) = await replies(old, first), await replies(new)
  assert (before.version, after.version) == (0, 7) and before.logps != after.logps
  assert loop.stats.version == 7
  with pytest.raises(ValueError, match="not above"):
    await loop.publish(weights(1), 7)


@in_a_loop
async def test_it_sleeps_where_there_is_nothing_to_do(loop):
  await replies(await loop.submit([request(1)]))
  start = time.process_time()
  await asyncio.sleep(1)
  assert time.process_time() - start < 0.2


@in_a_loop
async def test_when_the_engine_raises_everybody_is_told(loop):
  running, other = [await loop.submit([request(4000)]) for _ in range(2)]

  def broken():
    raise FloatingPointError("not a number")

  await loop.call(lambda engine: setattr(engine, "step", broken))
  for ticket in (running, other):
    with pytest.raises(EngineFailed, match="not a number"):
      await replies(ticket)
  assert loop.state == "failed" and isinstance(loop.failure, FloatingPointError)
  for work in (lambda: loop.submit([request()]), lambda: loop.call(print)):
    with pytest.raises(EngineFailed):
      await work()


def test_an_engine_that_cannot_be_made():
  async def whole():
    def fail():
      raise OSError("no such file")

    loop = EngineLoop(fail)
    with pytest.raises(OSError, match="no such file"):
      await loop.start()
    assert loop.state == "failed" and await loop.close()

  asyncio.run(whole())
