"""Devices come and go; what is said, and to whom, stays the same."""

import jax
import numpy as np
import pytest

from rome import models
from rome.envs import generate
from rome.rollout import AgentConfig, EpisodeRunner, SandboxConfig, World
from rome.rollout.engine import Engine, EnginePool, QueueFull, Request
from rome.text import ByteTokenizer

CONFIG = models.PRESETS["micro"]
SLOTS, LENGTH = 3, 96
SETTINGS = {"slots": SLOTS, "max_length": LENGTH, "steps": 3, "prefill_tokens": 32}
KEY = jax.random.key(11)
SAMPLING = models.Sampling(temperature=0.8, top_k=40)
TREE = np.random.default_rng(0).integers(0, 256, (4, 60)).tolist()  # contexts begin like these

init = jax.jit(models.init_params, static_argnums=0)


@pytest.fixture(scope="module")
def policies():
  # Larger weights, so that what was said before matters to what comes next.
  return [jax.tree.map(lambda x: 2 * x, init(CONFIG, jax.random.key(k))) for k in range(2)]


def make_pool(devices, policy=None, backend="native", **settings):
  pool = EnginePool(CONFIG, devices, backend=backend, **(SETTINGS | settings))
  if policy is not None:
    pool.publish(policy, 0, KEY)
  return pool


def requests(rng, count):
  made = []
  for i in range(count):
    context = TREE[rng.integers(4)][: rng.integers(1, 60)] + rng.integers(0, 256, 3).tolist()
    tokens = int(rng.integers(1, 24))
    made.append(Request(tuple(context), tokens, SAMPLING, key=(i, 1), stop_tokens=(17,)))
  return made


def replies_of_one_engine(policy, asked, backend="native"):
  engine = Engine(CONFIG, backend=backend, **SETTINGS)
  engine.publish(policy, 0, KEY)
  ids = {engine.submit(request): i for i, request in enumerate(asked)}
  return {ids[id]: reply for id, reply in finish(engine).items()}


def finish(engine):
  """Steps until nothing is asked any more: {id: reply}."""
  replies = {}
  while engine.busy:
    take(engine.step(), replies)
  return replies


def take(updates, replies):
  for update in updates:
    if update.reply:
      assert update.id == update.reply.id and update.id not in replies
      replies[update.id] = update.reply


def same(reply, want):
  assert reply.tokens == want.tokens and reply.finish == want.finish
  assert np.array(reply.logps).tobytes() == np.array(want.logps).tobytes()


@pytest.mark.slow
@pytest.mark.devices8
@pytest.mark.parametrize("seed", range(4))
def test_nothing_is_lost_doubled_or_changed_when_devices_come_and_go(policies, seed):
  """Requests, cancellations, weights and devices, all at random moments."""
  rng = np.random.default_rng(seed)
  asked = requests(rng, 90)
  wanted = [replies_of_one_engine(policy, asked) for policy in policies]
  pool = make_pool(jax.devices(), policies[0])
  policy_of, ids, replies, cancelled, moved = {0: 0}, {}, {}, set(), 0
  while len(ids) < len(asked) or pool.busy:
    away = [d for d in pool.devices if d not in pool.serving]
    action = rng.choice(["submit", "step", "cancel", "publish", "shrink", "expand"],
                        p=[0.3, 0.4, 0.05, 0.03, 0.12, 0.1])  # fmt: skip
    if action == "submit":
      for i in range(len(ids), min(len(ids) + int(rng.integers(1, 5)), len(asked))):
        ids[pool.submit(asked[i])] = i
    elif action == "step":
      take(pool.step(), replies)
    elif action == "cancel" and (open_ids := sorted(ids.keys() - replies.keys() - cancelled)):
      cancelled.add(id := int(rng.choice(open_ids)))
      pool.cancel(id)
    elif action == "publish":
      version = pool.version + 1
      policy_of[version] = int(rng.integers(2))
      pool.publish(policies[policy_of[version]], version, interrupt=bool(rng.integers(2)))
    elif action == "shrink" and (most := len(pool.serving) - 1):
      count = rng.integers(1, most + 1)
      waiting = pool.stats.waiting
      pool.shrink([pool.serving[i] for i in rng.permutation(most + 1)[:count]])
      moved += pool.stats.waiting - waiting
    elif action == "expand" and away:
      pool.expand(away[: rng.integers(1, len(away) + 1)])
  assert moved > 20 and replies.keys() == ids.keys()
  for id, reply in replies.items():
    if reply.finish == "cancelled":
      assert id in cancelled
    else:
      same(reply, wanted[policy_of[reply.version]][ids[id]])
  assert pool.stats.running == pool.stats.waiting == 0


@pytest.mark.slow
@pytest.mark.devices8
def test_every_device_takes_part_in_any_order(policies):
  asked = requests(np.random.default_rng(9), 24)
  wanted = replies_of_one_engine(policies[0], asked)
  pool = make_pool(jax.devices(), policies[0])
  for order in (range(24), reversed(range(24))):
    ids = {pool.submit(asked[i]): i for i in order}
    take(pool.step(), replies := {})
    assert all(engine.stats.running or not engine.busy for engine in pool._engines.values())
    replies |= finish(pool)
    assert replies.keys() == ids.keys()
    for id, reply in replies.items():
      same(reply, wanted[ids[id]])
  for device, engine in pool._engines.items():
    assert engine.stats.sampled_tokens > 0
    assert all(x.devices() == {device} for x in jax.tree.leaves((engine._pages, engine._weights)))
  # A device that is given away holds nothing more.
  last = pool.devices[-1]
  assert any(last in x.devices() for x in jax.live_arrays())
  del device, engine
  pool.shrink([last])
  assert not any(last in x.devices() for x in jax.live_arrays())


@pytest.mark.slow
@pytest.mark.devices8
def test_the_xla_backend_says_the_same_on_two_devices(policies):
  """Its last bits depend on what is found in the cache, so log-probs are compared as numbers."""
  asked = requests(np.random.default_rng(5), 10)
  wanted = replies_of_one_engine(policies[0], asked, "xla")
  pool = make_pool(jax.devices()[:2], policies[0], "xla")
  ids = {pool.submit(request): i for i, request in enumerate(asked)}
  take(pool.step(), replies := {})
  pool.shrink(pool.devices[:1])
  take(pool.step(), replies)
  pool.expand(pool.devices[:1])
  replies |= finish(pool)
  assert replies.keys() == ids.keys()
  for id, reply in replies.items():
    assert reply.tokens == wanted[ids[id]].tokens
    np.testing.assert_allclose(reply.logps, wanted[ids[id]].logps, atol=1e-4)


@pytest.mark.slow
@pytest.mark.devices8
def test_a_turn_goes_where_its_episode_is_known(policies):
  pool = make_pool(jax.devices()[:2], policies[0])
  contexts = [tuple(TREE[k][:40]) for k in range(4)]
  ids = {pool.submit(Request(c, 8, SAMPLING, key=(k, 0))): k for k, c in enumerate(contexts)}
  first = {ids[id]: reply for id, reply in finish(pool).items()}
  assert pool.stats.cached_tokens == 0
  assert [engine.stats.prefilled_tokens for engine in pool._engines.values()] == [78, 78]
  grown = {k: (*contexts[k], *reply.tokens, 1, 2, 3) for k, reply in sorted(first.items())}
  for k in (2, 0, 3, 1):
    pool.submit(Request(grown[k], 8, SAMPLING, key=(k, 1)))
  finish(pool)
  # But for a reply's last token, which was never fed.
  assert pool.stats.cached_tokens == sum(len(c) - 4 for c in grown.values())


class Flighty(EnginePool):
  """Devices come and go in front of every other step."""

  rng, moves = np.random.default_rng(7), 0

  def step(self):
    if self.rng.integers(2):
      away = [device for device in self.devices if device not in self.serving]
      if away:
        self.expand(away)
      else:
        self.moves += self.stats.running
        self.shrink([self.devices[i] for i in self.rng.permutation(len(self.devices))[1:]])
        self.moves -= self.stats.running
    return super().step()


@pytest.mark.slow
@pytest.mark.devices8
def test_a_batch_of_episodes_is_the_same_while_devices_come_and_go(policies):
  tasks = [generate("count", seed) for seed in range(9)]
  settings = {"max_length": 224, "stop_tokens": (ByteTokenizer().end,), "steps": 3}
  engines = [
    Engine(CONFIG, slots=4, **settings),
    Flighty(CONFIG, jax.devices()[:2], slots=2, **settings),
  ]
  played = []
  with World(SandboxConfig(backend="bubblewrap"), AgentConfig(context=224), size=4) as world:
    for engine in engines:
      runner = EpisodeRunner(engine, world.agent, SAMPLING, max_reply=6, invalid_cap=0.0)
      try:
        done, stats = runner.run(policies[0], KEY, 3, tasks.__getitem__, 0, len(tasks))
      finally:
        runner.close()
      assert stats.finished == len(done) == len(tasks)
      played.append(done)
  assert engines[1].moves > 5
  for got, want in zip(*played, strict=True):
    assert (got.id, got.reward, got.end_reason) == (want.id, want.reward, want.end_reason)
    for name in ("tokens", "call_ids", "logps", "versions"):
      assert getattr(got, name).tobytes() == getattr(want, name).tobytes()


def test_one_device_is_an_engine(policies):
  asked = requests(np.random.default_rng(2), 8)
  wanted = replies_of_one_engine(policies[0], asked)
  pool = make_pool(jax.devices()[:1], policies[0])
  ids = {pool.submit(request): i for i, request in enumerate(asked)}
  replies = finish(pool)
  assert replies.keys() == ids.keys()
  for id, reply in replies.items():
    same(reply, wanted[ids[id]])


def test_bad_input_is_refused(policies):
  device = jax.devices()[0]
  for devices in ([], [device, device]):
    with pytest.raises(ValueError, match="devices must be one or more different"):
      EnginePool(CONFIG, devices, **SETTINGS)
  with pytest.raises(ValueError, match="max_waiting"):
    make_pool([device], max_waiting=0)
  pool = make_pool([device], max_waiting=1)
  request = Request((1, 2), 3)
  with pytest.raises(ValueError, match="publish some"):
    pool.submit(request)
  pool.publish(policies[0], 4, KEY)
  with pytest.raises(ValueError, match="not above the last one, 4"):
    pool.publish(policies[1], 4)
  with pytest.raises(ValueError, match="exceed the 96 tokens"):
    pool.submit(Request((1,) * 90, 9))
  with pytest.raises(ValueError, match="shrink would leave no device"):
    pool.shrink([device])
  with pytest.raises(ValueError, match="serves already"):
    pool.expand([device])
  for change in (pool.shrink, pool.expand):
    with pytest.raises(ValueError, match="none of the pool's devices"):
      change(["cpu:99"])
  pool.submit(request)
  with pytest.raises(QueueFull, match="1 requests are waiting"):
    pool.submit(request)
  assert len(finish(pool)) == 1 and not pool.busy


@pytest.mark.devices8
def test_changes_of_devices(policies):
  params = jax.tree.map(lambda x: x + 0, policies[0])
  a, b = jax.devices()[2:4]
  pool = make_pool([a, b], params)
  with pytest.raises(ValueError, match="named twice"):
    pool.shrink([a, a])
  pool.shrink([a])
  with pytest.raises(ValueError, match="does not serve"):
    pool.shrink([a])
  assert pool.serving == (b,)
  # Trainers update in place: what was published may be gone.
  for leaf in jax.tree.leaves(params):
    leaf.delete()
  pool.expand([a])
  assert pool.serving == (a, b)
