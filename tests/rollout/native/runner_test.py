"""Episodes of foreign agents in real sandboxes: every way in which one ends."""

import dataclasses
import itertools
import os
import pathlib
import signal

import jax
import numpy as np
import pytest

from rome import models
from rome.envs import generate
from rome.rollout import (
  AgentConfig,
  Engine,
  NativeConfig,
  NativeWorld,
  Patience,
  SandboxConfig,
  TooManyInvalid,
)
from rome.rollout.again import ask_again
from rome.rollout.native import NativeAgent
from rome.text import ByteTokenizer, render_prompt
from rome.trajectory import Valid

pytestmark = pytest.mark.slow

CONFIG = models.PRESETS["micro"]
T = ByteTokenizer()
SLOTS, MAX_REPLY, CONTEXT, MAX_CALLS = 2, 8, 256, 3
KEY = jax.random.key(4)
SAMPLING = models.Sampling(temperature=0.9)
TASKS = [generate("count", seed) for seed in range(3)]
ASK = (pathlib.Path(__file__).parent / "curl.sh").read_text()
PATIENCE = Patience(reset=60.0, step=60.0, close=20.0, first_delay=0.01, tries=2)


@pytest.fixture(scope="module")
def params():
  return models.init_params(CONFIG, jax.random.key(0))


@pytest.fixture(scope="module")
def engine():
  return Engine(CONFIG, slots=SLOTS, max_length=CONTEXT, stop_tokens=(T.end,))


@pytest.fixture
def play(engine, params):
  """Plays agents: bash texts by the number of their instance."""

  shared = engine

  def run(
    agents, *, deadline=60.0, silence=60.0, invalid_cap=0.9, kind=NativeAgent, engine=shared
  ):
    cases = "\n".join(f"{i}) {text};;" for i, text in enumerate(agents))
    number = '"${ROME_INSTRUCTION%%:*}"'
    native = NativeConfig(
      command=f"{ASK}\ncase {number} in\n{cases}\nesac", deadline=deadline, silence=silence
    )
    tasks = [
      dataclasses.replace(task, instruction=f"{i}: {task.instruction}")
      for i, task in zip(range(len(agents)), itertools.cycle(TASKS), strict=False)
    ]
    agent = AgentConfig(context=CONTEXT, max_reply=MAX_REPLY, max_turns=MAX_CALLS, mode="native")
    sandbox = SandboxConfig(backend="bubblewrap", disk_mb=4)
    with NativeWorld(sandbox, agent, native, SAMPLING, SLOTS) as world:
      runner = world.runner(
        engine,
        lambda task: kind(world.environment(task), native),
        SAMPLING,
        max_reply=MAX_REPLY,
        invalid_cap=invalid_cap,
        patience=PATIENCE,
      )
      try:
        played, stats = runner.run(params, KEY, 7, tasks.__getitem__, 0, len(agents))
      finally:
        world.close()
        runner.close()
    return sorted(played, key=lambda t: int(t.id.rpartition("#")[2])), stats, tasks

  return run


def test_every_end_has_its_reason(play, engine, params):
  solve = "; ".join(TASKS[0].solution)
  agents = [
    f"say hello; {solve}",  # solves the task
    "say hello; exit 3",
    "say hello; say a; say b; say c; sleep 60",  # one call too many
    f'say "{"x" * CONTEXT}"; say hello; say "{"x" * CONTEXT}"; exit 1',
    "say a; say a",  # the same twice is one call
  ]
  played, stats, tasks = play(agents)
  assert [t.end_reason for t in played] == [
    "submitted", "agent_exit_3", "max_turns", "context_full", "submitted",
  ]  # fmt: skip
  assert [t.num_chunks for t in played] == [1, 1, 3, 1, 1]
  assert [t.reward for t in played] == [Valid(1.0), *[Valid(0.0)] * 4]
  assert stats.env_steps == 7 and not stats.invalid
  hello = render_prompt(T, "", "hello")
  for t, task in zip(played, tasks, strict=True):
    assert t.instruction == task.instruction
    assert (t.versions == 7).all()
    if t.end_reason != "submitted" or t.success:
      assert t.tokens[: len(hello)].tolist() == hello
  # Every chunk again, from the record alone.
  again = ask_again(engine, params, KEY, played, SAMPLING, MAX_REPLY)
  for t, replies in zip(played, again, strict=True):
    for k, reply in enumerate(replies):
      assert t.tokens[t.call_ids == k].tolist() == reply.tokens
      np.testing.assert_array_equal(t.logps[t.call_ids == k], np.float32(reply.logps))


def test_a_hang_ends(play):
  """An agent that makes no further call, and one that goes on for too long."""
  (hung,), _, _ = play(["say hello; sleep 600"], silence=8.0)
  assert (hung.end_reason, hung.num_chunks, hung.reward) == ("agent_silent", 1, Valid(0.0))
  (slow,), _, _ = play(["say hello; while true; do sleep 1; say hello; done"], deadline=8.0)
  assert (slow.end_reason, slow.num_chunks, slow.reward) == ("agent_deadline", 1, Valid(0.0))


def test_what_the_policy_could_not_help_is_invalid(play):
  """An agent that never called is broken: no reward, tried again, and the run stops."""
  with pytest.raises(TooManyInvalid, match=r"ended \(status 127\) before its first LLM call.*nope"):
    play(["nope"], invalid_cap=0.0)


class Doomed(NativeAgent):
  """Its sandbox is killed once, after its first call."""

  kills = 1

  def watch(self):
    if Doomed.kills and self._calls.record.calls:
      Doomed.kills -= 1
      os.kill(self.sandbox._launched.pid, signal.SIGKILL)
    return super().watch()


def test_a_lost_sandbox_is_played_again(play):
  """With the same randomness, so that the trajectory is the same as of one that was not lost."""
  agent = "say hello; sleep 3; say bye; exit 1"
  (wanted,), stats, _ = play([agent])
  assert stats.invalid == ()
  (found,), stats, _ = play([agent], kind=Doomed, invalid_cap=1.0)
  (lost,) = stats.invalid
  assert lost.end_reason == "sandbox_lost" and lost.num_chunks == 1
  np.testing.assert_array_equal(found.tokens, wanted.tokens)
  np.testing.assert_array_equal(found.logps, wanted.logps)
  assert found.num_chunks == 2 and found.end_reason == "agent_exit_1"


def test_calls_wait_where_the_engine_has_no_room(play):
  """An agent with several at once: none is refused, as the record would end there."""
  engine = Engine(CONFIG, slots=1, max_length=CONTEXT, stop_tokens=(T.end,), max_waiting=1)
  (played,), _, _ = play(["say a & say b & say c & wait; exit 2"], engine=engine)
  assert (played.end_reason, played.num_chunks) == ("agent_exit_2", MAX_CALLS)


class Broken(Engine):
  """Breaks off in a step, as at Ctrl-C, and cannot go on after that."""

  steps = 0

  def step(self):
    self.steps += self.busy
    if self.steps > 1:
      raise RuntimeError("an array was deleted")
    if self.steps:
      raise KeyboardInterrupt
    return super().step()


def test_an_engine_that_breaks_off_is_told_as_what_it_was(play):
  """Nobody asks it again on the way out, and the agents that wait hear that it is over."""
  engine = Broken(CONFIG, slots=1, max_length=CONTEXT, stop_tokens=(T.end,))
  with pytest.raises(KeyboardInterrupt):
    play(["say hello; exit 1"], engine=engine)
