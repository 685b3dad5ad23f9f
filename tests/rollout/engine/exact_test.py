"""Replies of the exact engine have the bits that training computes, however they came about."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rome import models
from rome.models import exact
from rome.rollout.engine import Engine, Request

MOE = models.PRESETS["micro"]
DENSE = dataclasses.replace(
  MOE, num_experts=0, num_experts_per_tok=0, moe_intermediate_size=0, intermediate_size=48,
  tie_word_embeddings=False,
)  # fmt: skip
SAMPLING = models.Sampling(temperature=0.8, top_p=0.9)
STOP = 3


@functools.cache
@functools.partial(jax.jit, static_argnums=(0, 1))
def params_of(config, stacked):
  params = models.init_params(config, jax.random.key(0))
  keys = iter(jax.random.split(jax.random.key(1), len(jax.tree.leaves(params))))
  params = jax.tree.map(lambda x: x + 0.1 * jax.random.normal(next(keys), x.shape), params)
  return models.stack_layers(config, params) if stacked else params


def engine_of(config, compute, params, **settings):
  engine = Engine(
    config, compute=compute, stop_tokens=(STOP,), steps=5, numerics="exact", **settings
  )
  engine.publish(params, 0, jax.random.key(5))
  return engine


@dataclasses.dataclass
class Episode:
  """Tokens of a context, the log-prob of each that was sampled, and how many turns are to come."""

  key: int
  tokens: list[int]
  logps: list[float | None]
  turns: int


def play(engine, episodes, max_reply):
  """Plays episodes of several turns with text of a tool in between, each in its own time.

  Returns the episodes with their last replies, and how many tokens came out of the cache.
  """
  running, finished, cached = {}, [], 0

  def ask(episode):
    request = Request(
      tuple(episode.tokens), max_reply, SAMPLING, key=(episode.key, episode.turns),
      router_choices=engine.config.num_experts > 0,
    )  # fmt: skip
    running[engine.submit(request)] = episode

  for episode in episodes:
    ask(episode)
  while engine.busy:
    for update in engine.step():
      if update.reply is None:
        continue
      episode, reply = running.pop(update.id), update.reply
      cached += reply.cached
      episode.tokens += reply.tokens
      episode.logps += reply.logps
      episode.turns -= 1
      rng = np.random.default_rng((episode.key, episode.turns))
      text = rng.integers(4, 256, rng.integers(1, 24)).tolist()
      if episode.turns and len(episode.tokens) + len(text) + max_reply <= engine.max_length:
        episode.tokens += text
        episode.logps += [None] * len(text)
        ask(episode)
      else:
        finished.append((episode, reply))
  return finished, cached


def episodes_of(groups, branches, turns, prompt=37):
  """`branches` episodes from each of `groups` prompts, which share half of their tokens."""
  rng = np.random.default_rng(1)
  system = rng.integers(4, 256, prompt // 2).tolist()
  found = []
  for group in range(groups):
    task = system + rng.integers(4, 256, rng.integers(1, prompt - prompt // 2)).tolist()
    for branch in range(branches):
      found.append(Episode(group * branches + branch, list(task), [None] * len(task), turns))
  return found


@functools.partial(jax.jit, static_argnums=(0, 1), compiler_options=exact.COMPILER_OPTIONS)
def train(config, compute, params, tokens, lengths, weights):
  """Log-probs and chosen experts as they are computed with a gradient."""

  def loss(params):
    logp, entropy, stats = exact.exact_logps(config, SAMPLING, params, tokens, lengths, compute)
    return jnp.where(weights, logp + 0.1 * entropy, 0).sum(), (logp, stats)

  return jax.value_and_grad(loss, has_aux=True)(params)


@functools.partial(jax.jit, static_argnums=(0, 1))
def score_ordinarily(config, compute, params, tokens, lengths, weights):
  places = jnp.broadcast_to(jnp.arange(tokens.shape[1])[None], tokens.shape)
  segments = (places < lengths[:, None]).astype(jnp.int32)
  hidden, stats = models.hidden_states(config, params, tokens, segments, places, compute)
  head, tied = models.head_kernel(config, params), config.tie_word_embeddings
  logp, _ = models.head_logps(hidden, head, tokens, SAMPLING, tied)
  return (0, (logp, stats)), ()


def compare(score, engine, compute, params, finished):
  """How many sampled tokens there are, and how many of their log-probs differ."""
  config, shape = engine.config, (engine.slots, engine.max_length)
  compared = differing = 0
  for first in range(0, len(finished), engine.slots):
    part = finished[first : first + engine.slots]
    tokens, lengths = np.zeros(shape, np.int32), np.zeros(engine.slots, np.int32)
    sampled = np.full(shape, np.nan, np.float32)
    for row, (episode, _) in enumerate(part):
      lengths[row] = len(episode.tokens)
      tokens[row, : lengths[row]] = episode.tokens
      sampled[row, : lengths[row]] = [np.nan if x is None else x for x in episode.logps]
    real = ~np.isnan(sampled)
    (_, (logp, stats)), grads = score(config, compute, params, tokens, lengths, real)
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(grads))
    compared += int(real.sum())
    differing += int((np.asarray(logp) != sampled)[real].sum())
    for row, (_, reply) in enumerate(part):
      if reply.choices is not None and score is train:
        chosen = np.moveaxis(np.asarray(stats["choices"])[:, row], 0, 1)[: lengths[row] - 1]
        np.testing.assert_array_equal(reply.choices, chosen)
  return compared, differing


def check(engine, compute, params, episodes, max_reply, least):
  """No log-prob of at least `least` sampled tokens differs; returns the episodes."""
  finished, cached = play(engine, episodes, max_reply)
  compared, differing = compare(train, engine, compute, params, finished)
  assert differing == 0 and compared >= least
  assert cached > compared  # prefixes were shared, in the middle of pages too
  return finished


def test_replies_have_the_bits_of_training():
  params, compute = params_of(MOE, True), models.Compute("bfloat16", "dense")
  engine = engine_of(MOE, compute, params, slots=4, max_length=96)
  check(engine, compute, params, episodes_of(groups=2, branches=3, turns=3), 12, least=150)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("config, stacked", [(MOE, True), (DENSE, False)])
def test_ten_thousand_tokens(config, stacked, dtype):
  """A quarter of them each: turns with text between them, branches, more episodes than slots."""
  params, compute = params_of(config, stacked), models.Compute(dtype, "dense")
  engine = engine_of(config, compute, params, slots=8, max_length=256)
  episodes = episodes_of(groups=6, branches=4, turns=6)
  finished = check(engine, compute, params, episodes, 30, least=2500)
  # The test can fail: the ordinary scoring of the same tokens does not have these bits.
  compared, differing = compare(score_ordinarily, engine, compute, params, finished)
  assert differing > compared / 4


def test_refuses_what_would_change_bits():
  for settings, message in (
    ({"compute": models.Compute(experts="padded")}, 'needs compute.experts="dense"'),
    ({"backend": "xla"}, "backend='xla' is for numerics=\"fast\""),
  ):
    engine = Engine(MOE, slots=2, max_length=32, numerics="exact", **settings)
    with pytest.raises(ValueError, match=message):
      engine.publish(params_of(MOE, True), 0)
