"""Episodes in real sandboxes: the same whatever the timing, full whatever dies, never hanging."""

import dataclasses
import os
import random
import signal
import threading
import time

import gymnasium
import jax
import numpy as np
import pytest

from rome import models
from rome.agent import Agent
from rome.envs import SandboxError, TaskError, generate
from rome.rollout import (
  AgentConfig,
  Engine,
  EpisodeRunner,
  Grouping,
  Patience,
  SandboxConfig,
  TooManyInvalid,
  World,
)
from rome.text import ByteTokenizer
from rome.trajectory import Invalid, Valid

CONFIG = models.PRESETS["micro"]
T = ByteTokenizer()
SLOTS, MAX_REPLY, CONTEXT = 3, 6, 192
KEY = jax.random.key(4)
TASKS = [generate("count", seed) for seed in range(7)]
ONE = Grouping()
PATIENCE = Patience(reset=60.0, step=60.0, close=20.0, first_delay=0.01)


class Translated(Agent):
  """Makes a command of whatever the untrained model says, so that sandboxes have real work.

  Two thirds of the episodes play the reference solution, and so succeed; the rest print a number
  that depends on the sampled tokens and on the sandbox's state, then submit.
  """

  def act(self, reply):
    turn = len(self.turns)
    if turn == 0:
      self.solves = sum(reply) % 3 > 0
    solution = self.env.unwrapped._task.solution
    if turn < len(solution):
      work = f"echo {sum(reply)} >> said; md5sum said"
      call = f"sh {solution[turn] if self.solves else work}"
    else:
      call = "submit"
    return super().act([T.call, *T.encode(call), T.end])


class Sleepy(gymnasium.Wrapper):
  """Delays that no seed fixes."""

  def reset(self, **kwargs):
    time.sleep(random.SystemRandom().random() * 0.05)
    return self.env.reset(**kwargs)

  def step(self, action):
    time.sleep(random.SystemRandom().random() * 0.05)
    return self.env.step(action)


class Killer(gymnasium.Wrapper):
  """Kills the sandbox with SIGKILL in front of a step, as often as `times` says."""

  def __init__(self, env, times):
    super().__init__(env)
    self._times = times

  def step(self, action):
    if self._times:
      self._times.pop()
      # The sandbox's first process, as the host knows it: all others end with it.
      os.kill(self.env.unwrapped.sandbox._launched.pid, signal.SIGKILL)
    return self.env.step(action)


class Hanging(gymnasium.Wrapper):
  """Runs a command without end in front of a step, as often as `times` says."""

  def __init__(self, env, times):
    super().__init__(env)
    self._times = times

  def step(self, action):
    if self._times:
      self._times.pop()
      self.env.unwrapped.sandbox.run("sleep 1000", timeout=900)
    return self.env.step(action)


class Refusing(gymnasium.Wrapper):
  """Fails to reset as often as `times` says."""

  def __init__(self, env, times):
    super().__init__(env)
    self._times = times

  def reset(self, **kwargs):
    if self._times:
      self._times.pop()
      raise SandboxError("no image today")
    return self.env.reset(**kwargs)


@pytest.fixture(scope="module")
def params():
  return jax.jit(models.init_params, static_argnums=0)(CONFIG, jax.random.key(0))


@pytest.fixture(scope="module")
def world():
  config = SandboxConfig(backend="bubblewrap")
  with World(config, AgentConfig(context=CONTEXT), size=SLOTS) as made:
    yield made


@pytest.fixture
def make_runner(world):
  runners = []

  def make(wrap=None, *, context=CONTEXT, patience=PATIENCE, cap=0.5, agent=Translated):
    def make_agent(task):
      base = world.agent(task)
      env = wrap(base.env, task) if wrap else base.env
      return agent(env, T, base.system, base.max_turns)

    engine = Engine(CONFIG, slots=SLOTS, max_length=context, stop_tokens=(T.end,), steps=4)
    runners.append(
      EpisodeRunner(
        engine,
        make_agent,
        models.Sampling(),
        max_reply=MAX_REPLY,
        invalid_cap=cap,
        patience=patience,
      )
    )
    return runners[-1]

  yield make
  for runner in runners:
    runner.close()


def play(runner, params, *, tasks=TASKS, key=KEY, version=3, count=None, grouping=ONE):
  count = len(tasks) if count is None else count
  return runner.run(params, key, version, tasks.__getitem__, 0, count, grouping)


def same(a, b, ids=True):
  """Whether two lists of trajectories agree in every bit that training or a reader sees."""
  assert len(a) == len(b) and (not ids or [t.id for t in a] == [t.id for t in b])
  for x, y in zip(a, b, strict=True):
    assert (x.reward, x.end_reason, x.turns) == (y.reward, y.end_reason, y.turns)
    assert x.row_starts == y.row_starts
    for name in ("tokens", "call_ids", "logps", "versions"):
      assert getattr(x, name).tobytes() == getattr(y, name).tobytes(), (x.id, name)


@pytest.fixture(scope="module")
def undisturbed():
  return []


@pytest.fixture
def calm(make_runner, params, undisturbed):
  """The batch as it comes out when nothing is in its way."""
  if not undisturbed:
    undisturbed.extend(play(make_runner(), params)[0])
  return undisturbed


@pytest.mark.slow
def test_a_batch_is_full_sorted_and_recorded(make_runner, params):
  done, stats = play(make_runner(), params)
  assert [t.id for t in done] == [f"count/{i}#{i}" for i in range(7)] and stats.invalid == ()
  assert {t.reward for t in done} == {Valid(0.0), Valid(1.0)}, "the policy should do both"
  for t in done:
    sampled = t.call_ids >= 0
    assert t.num_chunks == len(t.turns) == 3 and t.end_reason == "submitted"
    assert (t.logps[sampled] < 0).all() and not t.logps[~sampled].any()
    assert all(1 <= (t.call_ids == k).sum() <= MAX_REPLY for k in range(3))
    assert t.versions.tolist() == [3] * 3
    # Prompt and observations are in the record as the policy saw them.
    text = T.decode(t.tokens)
    assert text.startswith(f"<|bos|><|user|>{t.instruction}<|end|><|assistant|>")
    for turn in t.turns[:-1]:
      assert f"<|tool|>{turn.observation}<|end|><|assistant|>" in text
  assert stats.env_steps == sum(t.num_chunks for t in done)
  assert stats.sampled_tokens == sum((t.call_ids >= 0).sum() for t in done)
  assert stats.generate_seconds > 0 and stats.env_wait_seconds > 0
  # Every context but its last token is either computed or known, and later turns know the earlier.
  starts = [np.flatnonzero(t.call_ids == k)[0] for t in done for k in range(t.num_chunks)]
  assert stats.prefilled_tokens + stats.cached_tokens == sum(start - 1 for start in starts)
  assert stats.prefilled_tokens <= sum(len(t.tokens) for t in done)


def test_results_do_not_depend_on_timing(make_runner, params, calm):
  runner = make_runner(lambda env, task: Sleepy(env))
  same(play(runner, params)[0], calm)
  # The same runner again, and with a base key of its own.
  same(play(runner, params)[0], calm)
  other, _ = play(runner, params, key=jax.random.key(5))
  assert any(a.tokens.tobytes() != b.tokens.tobytes() for a, b in zip(other, calm, strict=True))


@pytest.mark.slow
def test_a_killed_sandbox_is_invalid_and_its_episode_is_played_again(make_runner, params, calm):
  victim = TASKS[4]
  times = [True]
  runner = make_runner(lambda env, task: Killer(env, times) if task is victim else env)
  done, stats = play(runner, params)
  (lost,) = stats.invalid
  assert lost.id == f"{victim.id}#4" and lost.end_reason == "sandbox_lost" and not lost.success
  assert isinstance(lost.reward, Invalid) and "is lost" in lost.reward.reason
  assert lost.num_chunks == 1 and lost.turns == ()
  same(done, calm)
  assert stats.env_steps == sum(t.num_chunks for t in (*done, lost))


def test_too_many_invalid_stop_the_run(make_runner, params):
  runner = make_runner(lambda env, task: Killer(env, [True] * 99), cap=0.3)
  with pytest.raises(TooManyInvalid, match=r"3 episodes .*invalid_cap=0.3 allows.* is lost"):
    play(runner, params)


def test_a_slow_environment_delays_its_own_trajectory_alone(make_runner, params, calm):
  """It answers only when all others have ended; if they waited for it, it would be silent."""
  running, ended = {task.id for task in TASKS[1:]}, threading.Event()

  class Last(gymnasium.Wrapper):
    def step(self, action):
      assert ended.wait(50)
      return self.env.step(action)

  class Told(gymnasium.Wrapper):
    def step(self, action):
      result = self.env.step(action)
      if result[2]:
        running.remove(self.env.unwrapped._tasks[0].id)
        if not running:
          ended.set()
      return result

  runner = make_runner(lambda env, task: Last(env) if task is TASKS[0] else Told(env))
  done, stats = play(runner, params)
  assert stats.silent == 0 and stats.invalid == () and not running
  same(done, calm)


@pytest.mark.slow
def test_a_hanging_environment_is_killed_and_its_episode_played_again(make_runner, params, calm):
  victim, times = TASKS[1], [True]
  runner = make_runner(
    lambda env, task: Hanging(env, times) if task is victim else env,
    patience=dataclasses.replace(PATIENCE, step=4.0),
  )
  done, stats = play(runner, params)
  assert stats.silent == len(stats.invalid) >= 1 and not times
  lost = next(t for t in stats.invalid if t.id == f"{victim.id}#1")
  assert lost.reward == Invalid(
    "the environment's step did not answer within 4 s (sandbox.deadline)"
  )
  assert lost.end_reason == "environment_silent" and lost.num_chunks == 1
  same(done, calm)


@pytest.mark.slow
def test_too_many_silent_environments_stop_the_run(make_runner, params):
  runner = make_runner(
    lambda env, task: Hanging(env, [True] * 99),
    patience=dataclasses.replace(PATIENCE, step=0.5),
    cap=0.3,
  )
  with pytest.raises(TooManyInvalid, match=r"3 episodes .*cap=0.3 .*did not answer within 0.5 s"):
    play(runner, params)


@pytest.mark.slow
def test_a_failed_reset_is_tried_again(make_runner, params, calm):
  times = [True] * 4
  runner = make_runner(lambda env, task: Refusing(env, times) if task is TASKS[2] else env)
  done, stats = play(runner, params)
  assert (stats.retries, stats.invalid, times) == (4, (), [])
  same(done, calm)


def test_resets_that_keep_failing_are_invalid_and_stop_the_run(make_runner, params):
  runner = make_runner(
    lambda env, task: Refusing(env, [True] * 99),
    patience=dataclasses.replace(PATIENCE, tries=2),
    cap=0.0,
  )
  with pytest.raises(TooManyInvalid, match="1 episodes .* the last: no image today"):
    play(runner, params)


@pytest.mark.slow
def test_groups_are_the_same_whatever_the_timing(make_runner, params, calm):
  two = Grouping(size=2)
  plain, stats = play(make_runner(), params, grouping=two)
  wild, _ = play(make_runner(lambda env, task: Sleepy(env)), params, grouping=two)
  same(plain, wild)
  assert [t.id for t in plain] == [f"count/{i}#{i}.{s}" for i in range(7) for s in range(2)]
  # The first sample is what a group of one plays; the second draws anew.
  same(plain[::2], calm, ids=False)
  assert len({t.tokens.tobytes() for t in plain}) == len(plain)
  assert (stats.finished, stats.instances, stats.filtered, stats.redundant) == (14, 7, 0, 0)
  assert stats.succeeded == sum(t.success for t in plain)


@pytest.mark.slow
def test_groups_without_signal_are_replaced_the_same_whatever_the_timing(make_runner, params):
  everything, _ = play(make_runner(), params, grouping=Grouping(size=2))
  pairs = [everything[i : i + 2] for i in range(0, 14, 2)]
  mixed = [a.reward != b.reward for a, b in pairs]
  wanted, refills = 2, 5
  assert not all(mixed[:2]) and sum(mixed) >= 2, f"these episodes show nothing: {mixed}"
  taken = next(n for n in range(wanted, 8) if sum(mixed[:n]) == wanted)
  chosen = [pair for pair, good in zip(pairs[:taken], mixed, strict=False) if good]
  runner = make_runner(lambda env, task: Sleepy(env))
  done, stats = play(runner, params, count=wanted, grouping=Grouping(2, 0, refills))
  same(done, [t for pair in chosen for t in pair])
  assert (stats.instances, stats.filtered) == (taken, taken - wanted)
  assert stats.finished == 2 * taken


@pytest.mark.slow
def test_a_redundant_member_takes_the_place_of_one_that_hangs(make_runner, params):
  """Without it the batch would need the hang monitor."""
  times = [True]
  runner = make_runner(lambda env, task: Hanging(env, times) if task is TASKS[3] else env)
  done, stats = play(runner, params, grouping=Grouping(size=1, redundancy=1))
  assert [t.task_id for t in done] == [f"count/{i}" for i in range(7)] and not times
  assert stats.redundant >= 1 and stats.silent == 0 and stats.invalid == ()
  # What was cancelled leaves the engine and the sandboxes free for the next batch.
  again, _ = play(runner, params)
  same(again, play(make_runner(), params)[0])


@pytest.mark.slow
def test_an_answer_that_waited_for_a_busy_engine_is_not_late(make_runner, params, monkeypatch):
  runner = make_runner(patience=dataclasses.replace(PATIENCE, step=2.0))
  step, naps = runner.engine.step, [2.5, 0]

  def slow():
    if runner.engine.stats.sampled_tokens and naps:  # environments are at work on the first replies
      time.sleep(naps.pop())
    return step()

  monkeypatch.setattr(runner.engine, "step", slow)
  done, stats = play(runner, params)
  assert len(done) == len(TASKS) and not naps and stats.silent == 0


@pytest.mark.slow
def test_a_full_context_ends_an_episode_without_reward(make_runner, params):
  done, _ = play(make_runner(context=70), params)
  full = [t for t in done if t.end_reason == "context_full"]
  assert full and all(t.reward == Valid(0.0) for t in full)
  assert all(len(t.tokens) <= 70 for t in done)
  # One of them had already written the right answer: an episode earns by its submit alone.
  last_commands = {f"<|call|>sh {task.solution[-1]}" for task in TASKS}
  assert any(t.turns[-1].action in last_commands for t in full)


def test_a_prompt_that_cannot_fit_is_named(make_runner, params):
  with pytest.raises(TaskError, match="prompt of task count/0 has [0-9]+ tokens.*agent.context"):
    play(make_runner(context=2 * MAX_REPLY), params, tasks=TASKS[:1])


def test_an_untrained_policy_alone_never_raises(make_runner, params):
  done, _ = play(make_runner(agent=Agent), params, version=0)
  assert {t.end_reason for t in done} <= {"max_turns", "context_full", "submitted"}
  assert all(turn.observation.startswith("error: ") for t in done for turn in t.turns[:-1])


def test_no_episodes_is_no_work(make_runner, params):
  done, stats = play(make_runner(), params, tasks=[])
  assert done == [] and stats.env_steps == stats.sampled_tokens == 0


def test_every_sandbox_came_back(world):
  """Last in this file: after kills, errors and a hang the pool is whole again."""
  boxes = [world.pool.acquire(20) for _ in range(SLOTS)]
  assert all(box.run("true").exit_code == 0 for box in boxes)
  for box in boxes:
    world.pool.release(box)


def test_versions_are_int32(calm):
  assert all(t.versions.dtype == t.tokens.dtype == np.int32 for t in calm)
