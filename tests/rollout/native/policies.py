"""A policy that has learnt what to say in one conversation; a second look at what was sampled."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax

from rome import models
from rome.models import exact
from rome.text import ByteTokenizer
from rome.text.render import Renderer

T = ByteTokenizer()


def said(text):
  """Ids of a reply of the policy, with its call written as <|call|>."""
  before, call, after = text.partition("<|call|>")
  return [*T.encode(before), *([T.call] if call else []), *T.encode(after), T.end]


def spoken(messages, replies, results, tools):
  """Ids of a conversation in which the policy says `replies`, and which of them it said.

  Args:
    messages: up to the first reply.
    replies: texts of the policy, calls written as <|call|>.
    results: messages behind each reply but the last.
    tools: schemas of the tools.
  """
  renderer = Renderer(T)
  ids = renderer.prompt(messages, tools)
  own = [False] * len(ids)
  for i, text in enumerate(replies):
    reply = said(text)
    ids, own = ids + reply, own + [True] * len(reply)
    if i < len(results):
      new = renderer.extend(results[i], tools, T.end)
      ids, own = ids + new, own + [False] * len(new)
  return ids, own


def taught(config, conversations, *, steps=120, rate=1e-2):
  """Weights of a model that says what it said in `conversations`, pairs of `spoken`."""
  length = max(len(ids) for ids, _ in conversations)
  tokens, mask = (np.zeros((len(conversations), length), np.int32) for _ in range(2))
  for row, (ids, own) in enumerate(conversations):
    tokens[row, : len(ids)], mask[row, : len(ids)] = ids, own
  places = jnp.broadcast_to(jnp.arange(length)[None], tokens.shape)
  segments = jnp.asarray([[i < len(ids) for i in range(length)] for ids, _ in conversations])
  optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(rate))

  def loss(params):
    hidden, _ = models.hidden_states(config, params, tokens, segments.astype(jnp.int32), places)
    head, tied = models.head_kernel(config, params), config.tie_word_embeddings
    logp, _ = models.head_logps(hidden, head, tokens, models.Sampling(), tied)
    return -(logp * mask).sum() / mask.sum()

  @jax.jit
  def step(params, state):
    value, grads = jax.value_and_grad(loss)(params)
    updates, state = optimizer.update(grads, state)
    return optax.apply_updates(params, updates), state, value

  params = models.init_params(config, jax.random.key(0))
  state = optimizer.init(params)
  for _ in range(steps):
    params, state, value = step(params, state)
  return params, float(value)


@functools.partial(jax.jit, static_argnums=(0, 1), compiler_options=exact.COMPILER_OPTIONS)
def _exactly(config, sampling, params, tokens, lengths):
  return exact.exact_logps(config, sampling, params, tokens, lengths)[0]


def differing(engine, params, sampling, trajectories):
  """Of the sampled tokens of exact numerics, how many there are, and how many score otherwise."""
  shape = (engine.slots, engine.max_length)
  rows = [
    (t.tokens[a:b], t.call_ids[a:b] >= 0, t.logps[a:b])
    for t in trajectories
    for a, b in zip(t.row_starts, (*t.row_starts[1:], len(t.tokens)), strict=True)
  ]
  found = [0, 0]
  for first in range(0, len(rows), engine.slots):
    tokens, lengths = np.zeros(shape, np.int32), np.zeros(engine.slots, np.int32)
    part = rows[first : first + engine.slots]
    for i, (ids, _, _) in enumerate(part):
      tokens[i, : len(ids)], lengths[i] = ids, len(ids)
    logp = np.asarray(_exactly(engine.config, sampling, params, tokens, lengths))
    for i, (ids, sampled, logps) in enumerate(part):
      found[0] += int(sampled.sum())
      found[1] += int((logp[i, : len(ids)] != logps)[sampled].sum())
  return tuple(found)
