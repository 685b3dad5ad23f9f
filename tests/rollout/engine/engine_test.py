"""The engine says what one request at a time would say, whatever else runs beside it."""

import dataclasses
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rome import models
from rome.rollout.engine import Engine, QueueFull, Request
from rome.text import ByteTokenizer

CONFIG = models.PRESETS["micro"]
T = ByteTokenizer()
SLOTS, LENGTH = 4, 96
SAMPLING = models.Sampling(temperature=0.8, top_k=40, top_p=0.95)
KEY = jax.random.key(11)
CONTEXT = tuple(range(37))

init = jax.jit(models.init_params, static_argnums=0)


@pytest.fixture(scope="module")
def params():
  # Larger weights, so that what was said before matters to what comes next.
  return jax.tree.map(lambda x: 2 * x, init(CONFIG, jax.random.key(0)))


@pytest.fixture(scope="module")
def make_engine(params):
  def make(backend="native", publish=True, **settings):
    settings = {"slots": SLOTS, "max_length": LENGTH, "steps": 3, "prefill_tokens": 20} | settings
    engine = Engine(CONFIG, backend=backend, tokenizer=T, **settings)
    if publish:
      engine.publish(params, 0, KEY)
    return engine

  return make


def finish(engine):
  """Steps until nothing is asked any more: {id: reply}."""
  replies = {}
  while engine.busy:
    for update in engine.step():
      if update.reply:
        assert update.id not in replies
        replies[update.id] = update.reply
  return replies


def ask(engine, *requests):
  """The replies to requests that are submitted together."""
  ids = [engine.submit(request) for request in requests]
  replies = finish(engine)
  return [replies[id] for id in ids]


def request(context=CONTEXT, max_tokens=8, **rest):
  return Request(context, max_tokens, **({"sampling": SAMPLING, "key": (5, 0)} | rest))


def same(a, b):
  assert a.tokens == b.tokens and a.finish == b.finish
  assert np.array(a.logps).tobytes() == np.array(b.logps).tobytes()


@pytest.mark.parametrize("backend", ["native", "xla"])
@pytest.mark.parametrize(("scale", "max_tokens"), [(1, 40), (1.5, 6)])
def test_logps_are_those_that_the_loss_computes(make_engine, params, backend, scale, max_tokens):
  """Three turns, scored at once by `forward` and `token_logps`: the trainer's side.

  Larger weights amplify rounding, and longer replies see more of it.
  """
  larger = jax.tree.map(lambda x: scale * x, params)
  engine = make_engine(backend, publish=False, max_length=160)
  engine.publish(larger, 0, KEY)
  tokens, sampled, logps = [], [], []
  for turn, context in enumerate(([*range(12)], [9] * 5, [100, 101])):
    tokens += context
    (reply,) = ask(engine, request(tuple(tokens), max_tokens, key=(4, turn)))
    assert reply.finish == "length" and reply.version == 0
    sampled += [False] * len(context) + [True] * max_tokens
    logps += [0.0] * len(context) + reply.logps
    tokens += reply.tokens
  row, place = jnp.asarray([tokens], jnp.int32), jnp.arange(len(tokens))[None]
  logits = jax.jit(models.forward, static_argnums=0)(CONFIG, larger, row, jnp.ones_like(row), place)
  scored = np.asarray(models.token_logps(logits, row, SAMPLING)[0][0])
  np.testing.assert_allclose(scored[sampled], np.array(logps)[sampled], atol=1e-4)


def test_bfloat16_weights_are_cast_once(make_engine, params):
  compute = models.Compute(dtype="bfloat16", experts="dense")
  engine = make_engine("xla", compute=compute)
  (reply,) = ask(engine, request())
  held = engine._weights[0][0]["layers_0"]
  assert held["attn"]["q_proj"]["kernel"].dtype == jnp.bfloat16
  assert held["mlp"]["router"].dtype == held["input_norm"]["scale"].dtype == jnp.float32
  uncast = make_engine("xla", compute=compute)
  uncast._weights[0] = params, KEY
  (other,) = ask(uncast, request())
  assert other.tokens[0] == reply.tokens[0]
  assert other.logps[0] == pytest.approx(reply.logps[0], abs=0.05)


@pytest.mark.parametrize("backend", ["native", "xla"])
def test_a_prefix_is_computed_once(make_engine, backend):
  engine = make_engine(backend, slots=16)
  group = [request(key=(sample, 0)) for sample in range(16)]
  replies = ask(engine, *group)
  assert engine.stats.prefilled_tokens == len(CONTEXT) - 1
  assert sum(r.cached for r in replies) == 15 * (len(CONTEXT) - 1)
  assert len({tuple(r.tokens) for r in replies}) > 8
  # A turn later: the context and the reply are known, but for its last token.
  first = replies[0]
  grown = (*CONTEXT, *first.tokens, 1, 2, 3)
  (turn,) = ask(engine, request(grown, key=(0, 1)))
  assert turn.cached == len(CONTEXT) + len(first.tokens) - 1
  # A branch from the middle of that reply.
  (branch,) = ask(engine, request(grown[: len(CONTEXT) + 4], key=(0, 9)))
  assert branch.cached == len(CONTEXT) + 3


def test_a_late_member_of_a_group_takes_over_what_is_there(make_engine):
  engine = make_engine(prefill_tokens=16)
  engine.submit(request(key=(0, 0)))
  engine.step()
  engine.submit(request(key=(1, 0)))
  finish(engine)
  assert engine.stats.prefilled_tokens == len(CONTEXT) - 1


def test_evicted_prefixes_are_computed_again(make_engine):
  engine = make_engine(cache_tokens=LENGTH)
  first = ask(engine, request())[0]
  for start in range(50, 60):
    ask(engine, request(tuple(range(start, start + 40))))
  before = engine.stats.prefilled_tokens
  same(ask(engine, request())[0], first)
  assert engine.stats.prefilled_tokens == before + len(CONTEXT) - 1


def test_a_request_is_bitwise_the_same_in_every_company(make_engine):
  alone = [ask(make_engine(), r)[0] for r in (request(), request(CONTEXT[:20], key=(6, 1)))]
  for seed in range(4):
    engine, rng = make_engine(cache_tokens=3 * LENGTH), np.random.default_rng(seed)
    mine, done = [], []
    for _ in range(12):
      for _ in range(rng.integers(3)):
        context = tuple(rng.integers(0, 256, rng.integers(1, 60)).tolist())
        shared = CONTEXT[: rng.integers(len(CONTEXT))]
        engine.submit(request((*shared, *context)[:60], int(rng.integers(1, 30))))
      if rng.random() < 0.5:
        mine.append(engine.submit(request()))
        mine.append(engine.submit(request(CONTEXT[:20], key=(6, 1))))
      done += [update.reply for update in engine.step() if update.reply]
    replies = {reply.id: reply for reply in done} | finish(engine)
    for i, id in enumerate(mine):
      same(replies[id], alone[i % 2])


def test_the_stop_token_ends_a_reply_and_belongs_to_it(make_engine):
  free = ask(make_engine(), request(max_tokens=12))[0].tokens
  stop = next(t for t in free[2:] if t not in free[:2])
  cut = free[: free.index(stop) + 1]
  (own,) = ask(make_engine(), request(max_tokens=12, stop_tokens=(263, stop)))
  assert own.tokens == cut and own.finish == "stop" and len(own.logps) == len(cut)
  (default,) = ask(make_engine(stop_tokens=(stop,)), request(max_tokens=12))
  assert default.tokens == cut
  (none,) = ask(make_engine(stop_tokens=(stop,)), request(max_tokens=12, stop_tokens=()))
  assert none.tokens == free and none.finish == "length"
  # A stop token that comes last is a stop all the same.
  (last,) = ask(make_engine(), request(max_tokens=len(cut), stop_tokens=(stop,)))
  assert last.tokens == cut and last.finish == "stop"


def test_a_stop_string_ends_a_reply_at_the_token_that_completes_it(make_engine):
  letters = tuple((t, 100.0) for t in T.encode("ab"))  # the policy may say nothing else
  whole = ask(make_engine(), request(max_tokens=30, logit_bias=letters, text=True))[0]
  assert set(whole.text) == {"a", "b"} and T.encode(whole.text) == whole.tokens
  stop = whole.text[7:10]
  at = whole.text.index(stop)
  engine = make_engine()
  asked = request(max_tokens=30, logit_bias=letters, text=True, stop_strings=("zz", stop))
  id, pieces, tokens = engine.submit(asked), [], []
  while engine.busy:
    for update in engine.step():
      pieces.append(update.text)
      tokens += update.tokens
      reply = update.reply
  assert reply.id == id and reply.finish == "stop" and reply.text == whole.text[:at]
  assert "".join(pieces) == reply.text and tokens == reply.tokens
  assert reply.tokens == whole.tokens[: at + len(stop)]
  # The next turn goes on behind the stop.
  grown = (*CONTEXT, *reply.tokens, 7)
  same(ask(engine, request(grown))[0], ask(make_engine(), request(grown))[0])


@pytest.mark.parametrize("max_tokens", [1, 3, 4, 7])
def test_max_tokens_is_exact_across_bursts(make_engine, max_tokens):
  whole = ask(make_engine(), request(max_tokens=7))[0]
  cut = ask(make_engine(), request(max_tokens=max_tokens))[0]
  assert cut.tokens == whole.tokens[:max_tokens] and cut.logps == whole.logps[:max_tokens]


def test_randomness_follows_the_key(make_engine, params):
  replies = ask(make_engine(), *(request(key=key) for key in ((5, 0), (5, 1), (6, 0), (5, 0))))
  assert len({tuple(r.tokens) for r in replies}) == 3 and replies[0].tokens == replies[3].tokens
  other = make_engine(publish=False)
  other.publish(params, 0, jax.random.key(12))
  assert ask(other, request())[0].tokens != replies[0].tokens


def test_greedy_takes_the_most_probable(make_engine):
  free = models.Sampling()
  (reply,) = ask(make_engine(), request(greedy=True, sampling=free, top_logps=3, max_tokens=12))
  for token, logp, best in zip(reply.tokens, reply.logps, reply.top, strict=True):
    assert best[0] == (token, logp) and len(best) == 3
    assert best[0][1] >= best[1][1] >= best[2][1]


def test_filters_that_leave_one_token(make_engine):
  narrow = (models.Sampling(top_k=1), models.Sampling(top_p=1e-60), models.Sampling(min_p=1.0))
  (best,) = ask(make_engine(), request(greedy=True))
  for sampling in narrow:
    (reply,) = ask(make_engine(), request(sampling=sampling))
    assert reply.tokens == best.tokens and not any(reply.logps)
  everything = models.Sampling(top_k=10**30)
  same(*ask(make_engine(), request(sampling=everything), request(sampling=models.Sampling())))


def test_draws_follow_the_distribution(make_engine):
  """2,000 first tokens against the log-probs that the engine itself names."""
  engine = make_engine(slots=16, max_waiting=4096)
  sampling = models.Sampling(temperature=4.0, min_p=0.35)
  asked = [request(max_tokens=1, key=(9, i), sampling=sampling, top_logps=20) for i in range(2000)]
  replies = ask(engine, *asked)
  p = {t: np.exp(logp) for t, logp in replies[0].top[0] if np.isfinite(logp)}
  assert 3 < len(p) < 20 and sum(p.values()) == pytest.approx(1, abs=1e-5)
  counts = np.array([sum(r.tokens[0] == t for r in replies) for t in p])
  assert counts.sum() == 2000  # nothing that min-p excludes
  expected = 2000 * np.array(list(p.values()))
  chi2 = ((counts - expected) ** 2 / expected).sum()
  assert chi2 < len(p) + 5 * np.sqrt(2 * len(p))


def test_logit_bias_forbids_and_forces(make_engine):
  free = ask(make_engine(), request(max_tokens=12))[0].tokens
  (without,) = ask(make_engine(), request(max_tokens=12, logit_bias=((free[0], -100.0),)))
  assert free[0] not in without.tokens
  (forced,) = ask(make_engine(), request(max_tokens=5, logit_bias=((77, 100.0),)))
  assert forced.tokens == [77] * 5 and forced.logps == pytest.approx([0] * 5, abs=1e-5)


def test_neighbours_settings_do_not_leak(make_engine):
  alone = ask(make_engine(), request())[0]
  company = [
    request(key=(5, 0)),
    request(sampling=models.Sampling(temperature=2.0)),
    request(logit_bias=((77, 100.0),), top_logps=5),
    request(greedy=True, stop_tokens=(1, 2)),
  ]
  same(ask(make_engine(), *company)[0], alone)
  engine = make_engine(slots=1)  # one slot serves them all in turn
  same(ask(engine, *reversed(company))[-1], alone)


@pytest.mark.parametrize("backend", ["native", "xla"])
def test_router_choices_are_those_of_the_forward_pass(make_engine, params, backend):
  (reply,) = ask(make_engine(backend), request(max_tokens=10, router_choices=True))
  row = jnp.asarray([[*CONTEXT, *reply.tokens]], jnp.int32)
  hidden = jax.jit(models.hidden_states, static_argnums=0)
  _, stats = hidden(CONFIG, params, row, jnp.ones_like(row), jnp.arange(row.shape[1])[None])
  want = np.moveaxis(np.asarray(stats["choices"])[:, 0, :-1], 0, 1)
  np.testing.assert_array_equal(np.sort(reply.choices), np.sort(want))


@pytest.mark.parametrize("backend", ["native", "xla"])
def test_a_dense_model_has_no_choices(backend):
  dense = dataclasses.replace(
    CONFIG, num_experts=0, num_experts_per_tok=0, moe_intermediate_size=0, intermediate_size=16
  )
  engine = Engine(dense, slots=2, max_length=LENGTH, backend=backend)
  engine.publish(init(dense, jax.random.key(0)), 0)
  (reply,) = ask(engine, request(router_choices=True))
  assert reply.choices.shape == (len(CONTEXT) + 7, 0, 0) and len(reply.tokens) == 8


def test_cancelled_requests_free_their_slots(make_engine):
  engine = make_engine(slots=1)
  running, waiting = engine.submit(request(max_tokens=50)), engine.submit(request())
  engine.step(), engine.step(), engine.step()
  engine.cancel(running), engine.cancel(waiting), engine.cancel(12345)
  last = engine.submit(request(CONTEXT[:30]))
  replies = finish(engine)
  assert replies[running].finish == replies[waiting].finish == "cancelled"
  assert replies[waiting].tokens == [] and replies[last].finish == "length"
  same(replies[last], ask(make_engine(), request(CONTEXT[:30]))[0])
  stats = engine.stats
  assert stats.running == stats.waiting == 0 and not engine.busy and engine.step() == []


def test_new_weights_are_for_new_requests(make_engine, params):
  other = jax.tree.map(lambda x: -x, params)
  old, new = (ask(make_engine(), request(max_tokens=20))[0] for _ in range(2))
  engine = make_engine()
  first = engine.submit(request(max_tokens=20))
  for _ in range(4):
    engine.step()
  engine.publish(other, 7)
  second = engine.submit(request(max_tokens=20))
  replies = finish(engine)
  same(replies[first], old)
  assert (replies[first].version, replies[second].version) == (0, 7)
  # Nothing that the old weights computed is used.
  assert replies[second].cached == 0
  fresh = make_engine(publish=False)
  fresh.publish(other, 7, KEY)
  new = ask(fresh, request(max_tokens=20))[0]
  same(replies[second], new)
  assert new.tokens != old.tokens
  with pytest.raises(ValueError, match="version 7 is not above the last one, 7"):
    engine.publish(other, 7)


def test_interrupted_requests_begin_anew(make_engine, params):
  other = jax.tree.map(lambda x: -x, params)
  engine = make_engine()
  ids = [engine.submit(request(max_tokens=20, key=(k, 0))) for k in range(6)]
  for _ in range(4):
    engine.step()
  engine.publish(other, 1, interrupt=True)
  replies = finish(engine)
  fresh = make_engine(publish=False)
  fresh.publish(other, 1, KEY)
  for k, id in enumerate(ids):
    assert replies[id].version == 1
    same(replies[id], ask(fresh, request(max_tokens=20, key=(k, 0)))[0])


def test_old_weights_and_their_pages_are_forgotten(make_engine, params):
  engine = make_engine()
  ask(engine, request())
  assert engine.stats.pages_used > 0
  engine.publish(params, 1)
  assert engine.stats.pages_used == 0 and list(engine._weights) == [1]


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["native", "xla"])
def test_nothing_recompiles_after_the_first_requests(make_engine, params, caplog, backend):
  def compiled(work):
    caplog.clear()
    with jax.log_compiles(), caplog.at_level(logging.WARNING):
      work()
    return [m for m in caplog.messages if m.startswith("Compiling")]

  def warm_up():
    ask(engine, request(max_tokens=10, top_logps=2), request(tuple(range(60, 100))))
    ask(engine, request(max_tokens=10, router_choices=True))
    ask(engine, request(max_tokens=10))

  def more():
    rng = np.random.default_rng(0)
    for _ in range(30):
      context = tuple(rng.integers(0, 256, rng.integers(1, 70)).tolist())
      common = {"logit_bias": ((3, 1.0),), "stop_strings": ("x",), "router_choices": True}
      engine.submit(request(context, int(rng.integers(1, 20)), **common))
      engine.step()
    finish(engine)
    engine.publish(params, 1)
    ask(engine, request(greedy=True))

  # A number of slots that no other test has, so that all calls are new to this process.
  engine = make_engine(backend, slots=SLOTS + 1, publish=False)
  engine.publish(params, 0, KEY)
  assert any("decode" in m for m in compiled(warm_up))
  assert compiled(more) == []


def test_a_long_prompt_does_not_stop_the_others(make_engine):
  engine = make_engine(max_length=400, prefill_tokens=16)
  short = engine.submit(request(CONTEXT[:4], 12))
  engine.step()
  engine.submit(request(tuple(np.arange(350) % 256), 1))
  updates = []
  while not any(u.reply for u in updates):
    updates += engine.step()
  assert updates[-1].id == short


def test_clients_take_turns(make_engine):
  engine = make_engine(slots=1)
  flood = [engine.submit(request(max_tokens=2, client="a")) for _ in range(5)]
  late = engine.submit(request(max_tokens=2, client="b"))
  assert list(finish(engine)) == [flood[0], late, *flood[1:]]


def test_requests_wait_for_pages(make_engine):
  engine = make_engine(cache_tokens=LENGTH, slots=3)
  big = request(tuple(range(60)), 30)
  ids = [engine.submit(big), engine.submit(request(tuple(range(100, 160)), 30))]
  engine.step()
  assert (engine.stats.running, engine.stats.waiting) == (1, 1)
  assert list(finish(engine)) == ids


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"context": ()}, "the context is empty"),
    ({"context": (0, 264)}, "token ids outside the vocabulary of 264"),
    ({"context": (-1,)}, "token ids outside the vocabulary of 264"),
    ({"max_tokens": 0}, "max_tokens must be at least 1, got 0"),
    ({"max_tokens": 60}, "37 tokens and max_tokens=60 exceed the 96 tokens"),
    ({"stop_tokens": tuple(range(9))}, "at most 8 stop tokens, got 9"),
    ({"stop_tokens": (1 << 31,)}, "stop_tokens has ids outside the vocabulary"),
    ({"stop_strings": ("",)}, "a stop string is empty"),
    ({"stop_strings": ("x" * 1001,)}, "longer than 1000 characters"),
    ({"sampling": models.Sampling(temperature=1e-9)}, "temperature must be at least 0.001"),
    ({"top_logps": 21}, "top_logps must be in 0..20, got 21"),
    ({"logit_bias": ((264, 1.0),)}, "logit_bias has ids outside the vocabulary"),
    ({"logit_bias": ((1, float("nan")),)}, "addends beyond 100"),
    ({"logit_bias": ((1, 1e39),)}, "addends beyond 100"),
    ({"logit_bias": tuple((i % 200, 1.0) for i in range(301))}, "at most 300 entries"),
    ({"key": (1 << 32, 0)}, "key must be in"),
  ],
)
def test_requests_that_can_never_be_served(make_engine, change, message):
  engine = make_engine()
  with pytest.raises(ValueError, match=message):
    engine.submit(request(**change))
  assert not engine.busy


def test_an_engine_without_weights_or_room(make_engine):
  with pytest.raises(ValueError, match="no weights yet"):
    make_engine(publish=False).submit(request())
  engine = make_engine(max_waiting=2)
  for _ in range(2):
    engine.submit(request())
  with pytest.raises(QueueFull, match="2 requests are waiting"):
    engine.submit(request())


@pytest.mark.parametrize(
  ("settings", "message"),
  [
    ({"slots": 0}, "slots must be at least 1, got 0"),
    ({"steps": 0}, "steps must be at least 1"),
    ({"prefill_tokens": 15}, "prefill_tokens must be at least 16, got 15"),
    ({"max_length": 1}, "max_length must be at least 2"),
    ({"cache_tokens": 95}, "cache_tokens=95 cannot hold one request of max_length=96"),
    ({"stop_tokens": range(9)}, "stop_tokens must be at most 8 ids"),
    ({"stop_tokens": (264,)}, "stop_tokens must be at most 8 ids of a vocabulary of 264"),
    ({"numerics": "slow"}, 'numerics must be "fast" or "exact"'),
    ({"backend": "cuda"}, 'backend must be "auto", "native" or "xla"'),
    ({"backend": "native", "compute": models.Compute(dtype="bfloat16")}, 'backend="native" cannot'),
  ],
)
def test_settings_that_cannot_be_served(make_engine, settings, message):
  with pytest.raises(ValueError, match=message):
    make_engine(**settings)


def test_weights_of_another_model_are_refused(make_engine, params):
  engine = make_engine()
  small = jax.tree.map(lambda x: x, params)
  small["embed_tokens"] = {"embedding": params["embed_tokens"]["embedding"][:128]}
  name = r"\['embed_tokens'\]\['embedding'\] is \(128, 16\), config wants \(264, 16\)"
  with pytest.raises(ValueError, match=name):
    engine.publish(small, 1)
  small = {name: node for name, node in params.items() if name != "layers_1"}
  with pytest.raises(ValueError, match="missing"):
    engine.publish(small, 1)
  with pytest.raises(ValueError, match="stacked parameters cannot follow on unstacked ones"):
    engine.publish(models.stack_layers(CONFIG, params), 1)
  assert engine.version == 0
  same(ask(engine, request())[0], ask(make_engine(), request())[0])


def test_nothing_of_a_request_stays_in_its_slot(make_engine):
  engine = make_engine()
  busy = request(
    sampling=models.Sampling(0.5, 3, 0.5, 0.1),
    logit_bias=((1, 2.0),),
    stop_tokens=(1,),
    top_logps=3,
    greedy=True,
  )
  ask(engine, busy, busy)
  fresh = jax.tree.leaves(make_engine()._settings)
  for now, neutral in zip(jax.tree.leaves(engine._settings), fresh, strict=True):
    np.testing.assert_array_equal(now, neutral)


def test_the_same_reply_again_takes_no_more_pages(make_engine):
  engine = make_engine()
  ask(engine, request(greedy=True))
  used = engine.stats.pages_used
  for _ in range(20):
    ask(engine, request(greedy=True))
  assert engine.stats.pages_used == used
  # A longer one takes the place of what it goes on from.
  ask(engine, request(greedy=True, max_tokens=9))
  assert engine.stats.pages_used == used


def test_a_request_that_waits_in_vain_evicts_nothing(make_engine):
  engine = make_engine(cache_tokens=LENGTH, slots=2)
  ask(engine, request(max_tokens=1))
  known = engine.stats.pages_used
  engine.submit(request(tuple(range(100, 116)), 14, key=(1, 0)))
  engine.step()
  waiting = engine.submit(request(tuple(range(60, 120)), 36))
  engine.step()
  engine.cancel(waiting)
  finish(engine)
  assert engine.stats.pages_used >= known
  assert ask(engine, request(max_tokens=1))[0].cached == len(CONTEXT) - 1


def test_a_short_prompt_does_not_wait_for_all_of_a_long_one(make_engine):
  engine = make_engine(max_length=800, prefill_tokens=16)
  engine.submit(request(tuple(np.arange(700) % 256), 1))
  engine.step()
  short = engine.submit(request(CONTEXT[:10], 1))
  steps = 0
  while not any(u.id == short for u in engine.step()):
    steps += 1
  assert steps <= 2


def test_weights_that_are_not_finite_are_told(make_engine, params):
  engine = make_engine(publish=False)
  engine.publish(jax.tree.map(lambda x: x * jnp.nan, params), 3)
  engine.submit(request())
  with pytest.raises(FloatingPointError, match="weights of version 3"):
    finish(engine)
