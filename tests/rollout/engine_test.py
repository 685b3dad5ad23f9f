"""The engine says what one request at a time would say, whatever else runs beside it."""

import functools
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rome import models
from rome.rollout import Engine

CONFIG = models.PRESETS["micro"]
SLOTS, LENGTH, TILE, STEPS = 4, 64, 5, 3
SAMPLING = models.Sampling(temperature=0.8, top_k=40, top_p=0.95)
NEVER = -7  # no token
KEY = jax.random.key(11)
CONTEXTS = ([*range(12)], [9] * 5, [100, 101])  # two tiles and a bit, one tile, less

init = jax.jit(models.init_params, static_argnums=0)
extend = jax.jit(models.extend, static_argnums=0)


@pytest.fixture(scope="module")
def params():
  # Larger weights, so that what was said before matters to what comes next.
  return jax.tree.map(lambda x: 3 * x, init(CONFIG, jax.random.key(0)))


def make_engine(params, stop=NEVER, sampling=SAMPLING, slots=SLOTS):
  engine = Engine(
    CONFIG, sampling, slots=slots, cache_length=LENGTH, stop=stop, tile=TILE, steps=STEPS
  )
  engine.load(params, KEY)
  return engine


def finish(engine):
  """Steps until nothing is asked any more: {slot: reply}."""
  replies = {}
  while engine.busy:
    for reply in engine.step():
      assert reply.slot not in replies
      replies[reply.slot] = reply
  return replies


def talk(engine, slot, episode, contexts=CONTEXTS, max_tokens=6):
  """One episode alone: the replies to each of its contexts."""
  engine.start(slot, episode)
  replies = []
  for context in contexts:
    engine.ask(slot, context, max_tokens)
    replies.append(finish(engine)[slot])
  return replies


@functools.partial(jax.jit, static_argnums=0)
def draw(sampling, logits_V, episode, chunk, index):
  logp_V = models.distribution(logits_V, sampling)
  key = functools.reduce(jax.random.fold_in, (episode, chunk, index), KEY)
  token = jax.random.categorical(key, logp_V)
  return token, logp_V[token]


def naive(params, slot, episode, contexts=CONTEXTS, max_tokens=6, stop=NEVER, sampling=SAMPLING):
  """Token by token through `extend` at the engine's shapes, every other row empty."""
  cache = models.init_cache(CONFIG, SLOTS, LENGTH)

  def push(tokens, width):
    nonlocal cache
    block, counts = np.zeros((SLOTS, width), np.int32), np.zeros(SLOTS, np.int32)
    block[slot, : len(tokens)], counts[slot] = tokens, len(tokens)
    logits, cache, _ = extend(CONFIG, params, cache, block, counts)
    return logits[slot]

  replies = []
  for chunk, context in enumerate(contexts):
    while len(context) > TILE:
      push(context[:TILE], TILE)
      context = context[TILE:]
    for token in context:
      logits = push([token], 1)
    tokens, logps = [], []
    while len(tokens) < max_tokens and stop not in tokens:
      token, logp = draw(sampling, logits, episode, chunk, len(tokens))
      tokens.append(int(token))
      logps.append(float(logp))
      logits = push(tokens[-1:], 1)
    replies.append((tokens, logps))
  return replies


@pytest.mark.slow
@pytest.mark.parametrize(("slot", "episode"), [(0, 5), (3, 2)])
def test_the_engine_is_naive_sampling(params, slot, episode):
  got = talk(make_engine(params), slot, episode)
  want = naive(params, slot, episode)
  for reply, (tokens, logps) in zip(got, want, strict=True):
    assert reply.slot == slot and reply.tokens == tokens and len(tokens) == 6
    np.testing.assert_allclose(reply.logps, logps, atol=1e-5)


@pytest.mark.slow
def test_logps_are_those_that_the_loss_computes(params):
  """The whole context scored at once by `forward` and `token_logps`: the trainer's side."""
  replies = talk(make_engine(params), 1, 4)
  tokens, sampled, logps = [], [], []
  for context, reply in zip(CONTEXTS, replies, strict=True):
    tokens += [*context, *reply.tokens]
    sampled += [False] * len(context) + [True] * len(reply.tokens)
    logps += [0.0] * len(context) + reply.logps
  row = jnp.asarray([tokens], jnp.int32)
  place = jnp.arange(len(tokens))[None]
  logits = jax.jit(models.forward, static_argnums=0)(CONFIG, params, row, jnp.ones_like(row), place)
  scored = np.asarray(models.token_logps(logits, row, SAMPLING)[0][0])
  np.testing.assert_allclose(scored[sampled], np.array(logps)[sampled], atol=1e-4)


@pytest.mark.slow
def test_the_stop_token_ends_a_reply_and_belongs_to_it(params):
  free = talk(make_engine(params), 0, 5, max_tokens=9)[0].tokens
  stop = free[3]
  reply = talk(make_engine(params, stop), 0, 5, contexts=CONTEXTS[:1], max_tokens=9)[0]
  assert reply.tokens == free[: free.index(stop) + 1] and len(reply.logps) == len(reply.tokens)
  # And the next turn goes on behind the stop token.
  got = talk(make_engine(params, stop), 0, 5, max_tokens=9)
  assert [r.tokens for r in got] == [t for t, _ in naive(params, 0, 5, max_tokens=9, stop=stop)]


@pytest.mark.parametrize("max_tokens", [1, 3, 4, 7])
def test_max_tokens_is_exact_across_bursts(params, max_tokens):
  whole = talk(make_engine(params), 2, 1, contexts=CONTEXTS[:1], max_tokens=7)[0]
  cut = talk(make_engine(params), 2, 1, contexts=CONTEXTS[:1], max_tokens=max_tokens)[0]
  assert len(cut.tokens) == len(cut.logps) == max_tokens
  assert cut.tokens == whole.tokens[:max_tokens] and cut.logps == whole.logps[:max_tokens]


def crowd(engine, seed):
  """Slot 1 plays episode 5 while the others play what chance says, asked in random order."""
  rng = np.random.default_rng(seed)
  engine.start(1, 5)
  turn, mine = 0, []
  idle, waiting = set(range(SLOTS)), False
  while turn < len(CONTEXTS) or waiting:
    for slot in rng.permutation(sorted(idle)):
      if slot == 1 and turn < len(CONTEXTS) and rng.random() < 0.5:
        engine.ask(1, CONTEXTS[turn], 6)
        turn, waiting = turn + 1, True
        idle.discard(1)
      elif slot != 1 and rng.random() < 0.6:
        engine.start(int(slot), int(rng.integers(100)))
        engine.ask(int(slot), rng.integers(0, 256, rng.integers(1, 20)).tolist(), 9)
        idle.discard(slot)
    for reply in engine.step():
      idle.add(reply.slot)
      if reply.slot == 1:
        mine.append(reply)
        waiting = False
  return mine


def test_a_row_is_bitwise_the_same_in_every_company(params):
  alone = talk(make_engine(params), 1, 5)
  for seed in range(4):
    for a, b in zip(alone, crowd(make_engine(params), seed), strict=True):
      assert a.tokens == b.tokens
      assert np.array(a.logps).tobytes() == np.array(b.logps).tobytes()


def test_an_engine_that_was_used_before_says_the_same(params):
  engine = make_engine(params)
  first = talk(engine, 1, 5)
  talk(engine, 1, 6)
  assert talk(engine, 1, 5) == first
  engine.ask(2, [1, 2], 5)  # left unfinished
  engine.load(params, KEY)
  assert talk(engine, 1, 5) == first


def test_randomness_follows_episode_and_chunk(params):
  engine = make_engine(params)
  same = [1, 2, 3]
  five, six = (talk(engine, 0, e, contexts=[same] * 2, max_tokens=12) for e in (5, 6))
  assert five[0].tokens != six[0].tokens
  # The same context again is another chunk: other draws, and a longer history.
  assert five[0].tokens != five[1].tokens
  other = make_engine(params)
  other.load(params, jax.random.key(12))
  assert talk(other, 0, 5, contexts=[same], max_tokens=12)[0].tokens != five[0].tokens


def test_new_weights_are_used(params):
  engine = make_engine(params)
  before = talk(engine, 0, 5)
  engine.load(jax.tree.map(lambda x: -x, params), KEY)
  assert talk(engine, 0, 5) != before


@pytest.mark.slow
def test_nothing_recompiles_after_the_first_replies(params, caplog):
  def compiled(work):
    caplog.clear()
    with jax.log_compiles(), caplog.at_level(logging.WARNING):
      work()
    calls = ("_prefill", "_decode")
    return {n for n in calls for m in caplog.messages if m.startswith("Compiling") and n in m}

  def more():
    for seed in range(2):
      crowd(engine, seed)
      engine.load(params, jax.random.key(seed))

  # A number of slots that no other test has, so that both calls are new to this process.
  engine = make_engine(params, slots=SLOTS + 1)
  assert compiled(lambda: talk(engine, 0, 1)) == {"_prefill", "_decode"}
  assert compiled(more) == set()


def test_requests_that_cannot_be_served(params):
  engine = make_engine(params)
  engine.start(0, 1)
  assert engine.room(0) == LENGTH
  with pytest.raises(ValueError, match=rf"slot 0 has room for {LENGTH} tokens, asked for 60 \+ 5"):
    engine.ask(0, [1] * 60, 5)
  for context, max_tokens in (([], 5), ([1], 0)):
    with pytest.raises(ValueError, match="slot 0 has room"):
      engine.ask(0, context, max_tokens)
  engine.ask(0, [1] * 60, 4)
  with pytest.raises(ValueError, match="slot 0 is still generating"):
    engine.ask(0, [1], 1)
  reply = finish(engine)[0]
  assert len(reply.tokens) == 4 and engine.room(0) == 0
  engine.start(0, 2)
  assert engine.room(0) == LENGTH


def test_counters(params):
  engine = make_engine(params)
  replies = talk(engine, 0, 5)
  assert engine.sampled_tokens == sum(len(r.tokens) for r in replies)
  assert engine.context_tokens == sum(map(len, CONTEXTS))
  assert not engine.busy and engine.step() == []
