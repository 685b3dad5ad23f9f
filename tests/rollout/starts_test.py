"""Starts inside expert trajectories, in real sandboxes: what stood there stands there again."""

import dataclasses
import threading

import jax
import numpy as np
import pytest

from rome import models
from rome.envs import SandboxError, generate
from rome.rollout import (
  AgentConfig,
  Engine,
  EpisodeRunner,
  Grouping,
  SandboxConfig,
  World,
  demonstrate,
)
from rome.rollout.starts import Boundaries, Divergent, Start
from rome.text import ByteTokenizer
from tests.rollout.episodes_test import PATIENCE

T = ByteTokenizer()
CONFIG = models.PRESETS["micro"]
CONTEXT, MAX_REPLY = 224, 6
TASKS = [generate("edit", seed) for seed in range(3)]
LOOK = "pwd; ls -la; cat * 2>/dev/null; echo $x; declare -f f"


@pytest.fixture(scope="module")
def world():
  config = SandboxConfig(backend="bubblewrap")
  with World(config, AgentConfig(context=CONTEXT), size=4) as made:
    yield made


@pytest.fixture(scope="module")
def experts(world):
  """Solutions with chunks that leave traces in files and in the shell."""
  traces = ("mkdir d; cd d; x=7; f() { echo f; }; echo one > a; cd ..", "echo two >> d/a")
  tasks = [dataclasses.replace(t, solution=(*traces, *t.solution)) for t in TASKS]
  return demonstrate(tasks, world, 2)


def state(agent):
  """What an agent and its sandbox are now, as text."""
  sandbox = agent.env.unwrapped.sandbox
  return sandbox.run(LOOK).output, sandbox.snapshot().digest, list(agent.turns)


@pytest.mark.slow
def test_every_boundary_is_restored_by_replaying_and_by_a_snapshot(world, experts):
  expert = experts[0]
  for chunks in range(1, expert.num_chunks):
    boundaries, start = Boundaries(), Start(expert, chunks)
    found = []
    for _ in range(3):
      agent = world.agent(TASKS[0])
      context = boundaries.begin(agent, start)
      assert context == expert.tokens[: len(context)].tolist()
      assert expert.call_ids[len(context)] == chunks and len(agent.turns) == chunks
      found.append(state(agent))
      # It plays on as the expert did, and succeeds.
      for k in range(chunks, expert.num_chunks):
        context = agent.act(expert.tokens[expert.call_ids == k].tolist())
      assert context is None and agent.reward == 1.0
      agent.env.close()
    assert found[0] == found[1] == found[2] and "f ()" in found[0][0]


@pytest.mark.slow
def test_the_first_replays_and_the_others_restore(world, experts):
  boundaries, start = Boundaries(), Start(experts[1], 3)
  agents = [world.agent(TASKS[1]) for _ in range(4)]
  acted = []
  for n, agent in enumerate(agents):
    act = agent.act
    agent.act = lambda reply, n=n, act=act: acted.append(n) or act(reply)
  threads = [threading.Thread(target=boundaries.begin, args=(agent, start)) for agent in agents]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join(60)
  assert len(acted) == 3 and len(set(acted)) == 1
  assert len({agent.env.unwrapped.sandbox.snapshot().digest for agent in agents}) == 1
  for agent in agents:
    agent.env.close()


@pytest.mark.slow
def test_after_a_replay_that_failed_the_next_one_is_tried(world, experts):
  boundaries, start, acted = Boundaries(), Start(experts[0], 2), []
  for n in range(3):
    agent = world.agent(TASKS[0])

    def act(reply, n=n, act=agent.act):
      acted.append(n)
      if n == 0:
        raise SandboxError("gone")
      return act(reply)

    agent.act = act
    if n:
      boundaries.begin(agent, start)
    else:
      with pytest.raises(SandboxError, match="gone"):
        boundaries.begin(agent, start)
    agent.env.close()
  assert acted == [0, 1, 1]  # the third restores what the second left


@pytest.mark.slow
def test_what_a_snapshot_cannot_hold_is_replayed(world):
  """A process that runs in the background."""
  solution = ("sleep 50 & echo $! > pid", "kill -0 $(cat pid)", *TASKS[0].solution)
  (expert,) = demonstrate([dataclasses.replace(TASKS[0], solution=solution)], world, 1)
  boundaries = Boundaries()
  for _ in range(2):
    agent = world.agent(TASKS[0])
    boundaries.begin(agent, Start(expert, 2))
    assert agent.env.unwrapped.sandbox.run("kill -0 $(cat pid)").exit_code == 0
    agent.env.close()


@pytest.mark.slow
def test_a_prefix_that_diverges_is_refused(world, experts):
  tokens = experts[0].tokens.copy()
  end = np.flatnonzero(experts[0].call_ids == 0)[-1]
  tokens[end + 2] ^= 1  # a byte of the first observation
  wrong = dataclasses.replace(experts[0], tokens=tokens)
  agent = world.agent(TASKS[0])
  with pytest.raises(Divergent, match="first 2 chunks of expert .* no longer lead"):
    Boundaries().begin(agent, Start(wrong, 2))
  agent.env.close()
  # Nor does the expert of one task fit another.
  agent = world.agent(TASKS[2])
  with pytest.raises(Divergent):
    Boundaries().begin(agent, Start(experts[0], 1))
  agent.env.close()


@pytest.mark.slow
def test_a_batch_that_starts_here_and_there(world, experts):
  """Prefixes are no chunks of the policy; a divergent one falls back to the initial state."""
  params = jax.jit(models.init_params, static_argnums=0)(CONFIG, jax.random.key(0))
  engine = Engine(CONFIG, slots=4, max_length=CONTEXT, stop_tokens=(T.end,), steps=4)

  runner = EpisodeRunner(
    engine, world.agent, models.Sampling(), max_reply=MAX_REPLY, invalid_cap=0.0, patience=PATIENCE
  )
  bad = dataclasses.replace(experts[2], id="bad", tokens=np.where(
    np.arange(len(experts[2].tokens)) == 1, 5, experts[2].tokens))  # fmt: skip

  def starts(member):
    chosen = {0: Start(experts[0], member.sample), 1: None, 2: Start(bad, 2)}[member.instance]
    return chosen if chosen and chosen.chunks else None

  try:
    done, stats = runner.run(
      params, jax.random.key(1), 0, TASKS.__getitem__, 0, 3, Grouping(3), starts
    )
  finally:
    runner.close()
  assert [t.start for t in done] == [0, 1, 2, 0, 0, 0, 0, 0, 0]
  assert stats.divergent == 3 and stats.invalid == ()
  for t in done:
    expert = experts[int(t.task_id.rpartition("/")[2])]
    first = int(np.argmax(t.call_ids == 0))
    assert t.tokens[:first].tolist() == (
      Start(expert, t.start).context if t.start else t.tokens[:first].tolist()
    )
    assert len(t.turns) == t.num_chunks and not t.logps[:first].any()
  # The prefixes were computed once: by whoever came first.
  assert stats.cached_tokens > 0
