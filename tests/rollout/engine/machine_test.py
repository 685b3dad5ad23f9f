"""Random mixes of requests, cancellations, evictions and new weights: each reply is the naive one.

The naive sampler serves one request at a time: token by token through a pool of its own, with one
row, no batching, no sharing and no engine.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from rome import models
from rome.models import native
from rome.rollout.engine import Engine, Request

CONFIG = models.PRESETS["micro"]
SLOTS, LENGTH, STEPS = 3, 80, 3
KEY = jax.random.key(3)
TREE = np.random.default_rng(0).integers(0, 256, (4, 60)).tolist()  # contexts begin like these
SAMPLINGS = (
  models.Sampling(),
  models.Sampling(temperature=0.6, top_k=30),
  models.Sampling(temperature=1.3, top_p=0.9),
  models.Sampling(min_p=0.1),
)


@functools.cache
def weights():
  """Two policies."""
  init = jax.jit(models.init_params, static_argnums=0)
  first, second = (init(CONFIG, jax.random.key(k)) for k in range(2))
  return [jax.tree.map(lambda x: 2 * x, params) for params in (first, second)]


@functools.cache
def packed(policy):
  return jax.jit(native.pack, static_argnums=(0, 2))(CONFIG, weights()[policy], LENGTH)


@functools.partial(jax.jit, donate_argnums=1)
def feed(policy, pages, token, place):
  table = jnp.arange(LENGTH // native.PAGE, dtype=jnp.int32)[None]
  hidden, pages = native.extend(
    CONFIG, policy, pages, token[None], jnp.zeros(1, jnp.int32), place[None], table
  )
  return native.logits(CONFIG, policy, hidden, jnp.ones(1, bool))[0], pages


@functools.partial(jax.jit, static_argnums=0)
def draw(sampling, logits, key):
  logp = models.distribution(logits, sampling)
  token = models.draw(logp[None], jax.random.uniform(key)[None])[0]
  return token, logp[token]


@functools.cache
def naive(policy, context, sampling, key, max_tokens, stop):
  pages = native.init_pages(CONFIG, LENGTH // native.PAGE)
  base = functools.reduce(jax.random.fold_in, key, KEY)
  tokens, logps, place = list(context), [], 0
  while True:
    for token in tokens[place:]:
      logits, pages = feed(packed(policy), pages, np.int32(token), np.int32(place))
      place += 1
    token, logp = draw(sampling, logits, jax.random.fold_in(base, len(logps)))
    tokens.append(int(token))
    logps.append(float(logp))
    if int(token) == stop or len(logps) == max_tokens:
      return tokens[len(context) :], logps


class Mixes(RuleBasedStateMachine):
  """An engine with little room, and what it owes."""

  def __init__(self):
    super().__init__()
    self.engine = Engine(
      CONFIG, slots=SLOTS, max_length=LENGTH, steps=STEPS, prefill_tokens=24,
      cache_tokens=2 * LENGTH, backend="native",
    )  # fmt: skip
    self.policy_of = {0: 0}
    self.engine.publish(weights()[0], 0, KEY)
    self.asked, self.cancelled = {}, set()

  @rule(
    stem=st.sampled_from(range(len(TREE))),
    shared=st.integers(1, 60),
    own=st.lists(st.integers(0, 255), max_size=6),
    max_tokens=st.integers(1, 12),
    sampling=st.sampled_from(SAMPLINGS),
    key=st.integers(0, 3),
    client=st.sampled_from("ab"),
  )
  def submit(self, stem, shared, own, max_tokens, sampling, key, client):
    request = Request(
      context=(*TREE[stem][:shared], *own),
      max_tokens=max_tokens,
      sampling=sampling,
      key=(key, 1),
      stop_tokens=(17,),
      client=client,
    )
    self.asked[self.engine.submit(request)] = request

  @rule(count=st.integers(1, 3))
  def step(self, count):
    for _ in range(count):
      self.take(self.engine.step())

  @precondition(lambda self: self.asked)
  @rule(data=st.data())
  def cancel(self, data):
    id = data.draw(st.sampled_from(sorted(self.asked)))
    self.cancelled.add(id)
    self.engine.cancel(id)

  @rule(policy=st.integers(0, 1), interrupt=st.booleans())
  def publish(self, policy, interrupt):
    version = self.engine.version + 1
    self.policy_of[version] = policy
    self.engine.publish(weights()[policy], version, interrupt=interrupt)

  def take(self, updates):
    for reply in (update.reply for update in updates if update.reply):
      request = self.asked.pop(reply.id)
      if reply.version < 0:
        assert reply.id in self.cancelled and not reply.tokens
        continue
      tokens, logps = naive(
        self.policy_of[reply.version],
        request.context,
        request.sampling,
        request.key,
        request.max_tokens,
        17,
      )
      count = len(reply.tokens)
      if reply.finish == "cancelled":
        assert reply.id in self.cancelled
      else:
        assert count == len(tokens)
        assert reply.finish == ("stop" if tokens[-1] == 17 else "length")
      assert reply.tokens == tokens[:count]
      np.testing.assert_allclose(reply.logps, logps[:count], atol=1e-6, rtol=0)

  @invariant()
  def pages_add_up(self):
    """Every page is free, one row's own, or one node of a tree."""
    prefixes, filed = self.engine._prefixes, []
    stack = list(prefixes._roots.values())
    while stack:
      node = stack.pop()
      filed += [node.page] if node.page >= 0 else []
      stack += [child for group in node.children.values() for child in group]
    own = []
    for row in filter(None, self.engine._rows):
      assert set(row.pages[: row.shared]) <= set(filed)
      own += row.pages[row.shared + (row.tail is not None) :]
    assert sorted(filed + own + prefixes._free) == list(range(1, prefixes.total))

  def teardown(self):
    rounds = 0
    while self.engine.busy:
      self.take(self.engine.step())
      rounds += 1
      assert rounds < 2000, "stuck"
    assert not self.asked
    assert not any(node.holders for node in self.engine._prefixes._idle)


def mixes(count):
  return settings(
    max_examples=count,
    stateful_step_count=25,
    deadline=None,
    derandomize=True,
    phases=[Phase.generate],  # shrinking takes minutes, and the same mixes come every time
    suppress_health_check=list(HealthCheck),
  )


class TestMixes(Mixes.TestCase):
  settings = mixes(15)


@pytest.mark.slow
@pytest.mark.timeout(600)
class TestManyMixes(Mixes.TestCase):
  settings = mixes(500)
