"""The cases of `workers_test.py`: two hosts of Ray on this machine; one is killed."""

import dataclasses
import os
import signal
import threading
import time

import jax
import pytest

from rome import models
from rome.envs.families import generate
from rome.envs.sandbox import SandboxError
from rome.rollout import (
  AgentConfig,
  Engine,
  EpisodeRunner,
  Grouping,
  SandboxConfig,
  Workers,
  WorkersConfig,
  World,
  demonstrate,
)
from rome.text import ByteTokenizer
from tests.envs.fleet_cases import NODE, cluster, eventually
from tests.rollout.episodes_test import PATIENCE, same
from tests.train.loop_test import rows_of, run, summary

__all__ = ["cluster"]
CONFIG = models.PRESETS["micro"]
T = ByteTokenizer()
CONTEXT, SLOTS = 192, 6
TASKS = [generate("count", seed) for seed in range(8)]
SANDBOX = SandboxConfig(backend="bubblewrap")
AGENT = AgentConfig(context=CONTEXT, max_turns=4, max_reply=24)
ENV = "rome.envs.terminal:TerminalEnv"


@pytest.fixture(scope="module")
def params():
  return jax.jit(models.init_params, static_argnums=0)(CONFIG, jax.random.key(0))


@pytest.fixture
def workers(cluster):
  config = WorkersConfig(address=cluster.address, slots=SLOTS // 2)
  with Workers(config, SANDBOX, AGENT, ENV) as made:
    assert eventually(lambda: len(made.hosts()) == 2)
    yield made


@pytest.fixture(scope="module")
def wanted(params):
  """What the same batch gives in this process."""
  with World(SANDBOX, AGENT, SLOTS) as world:
    return play(world, params)[0], demonstrate(TASKS[:3], world, 2)


def play(world, params, wrap=lambda agent: agent, tasks=TASKS):
  engine = Engine(CONFIG, slots=SLOTS, max_length=CONTEXT, stop_tokens=(T.end,), steps=4)
  runner = EpisodeRunner(
    engine,
    lambda task: wrap(world.agent(task)),
    models.Sampling(),
    max_reply=AGENT.max_reply,
    invalid_cap=0.9,
    patience=PATIENCE,
  )
  try:
    return runner.run(params, jax.random.key(1), 0, tasks.__getitem__, 0, len(tasks), Grouping(2))
  finally:
    runner.close()


def test_episodes_of_two_hosts_are_those_of_one_process(workers, params, wanted):
  done, stats = play(workers, params)
  same(done, wanted[0])
  assert stats.invalid == () and len(done) == 16 and all(t.num_chunks > 1 for t in done)
  demos = demonstrate(TASKS[:3], workers, 4)
  same(demos, wanted[1])
  assert [t.reward.value for t in demos] == [1.0] * 3
  # Both played, neither loaded jax, and every place is free again.
  hosts = list(workers._hosts.values())
  facts = [workers.ask(host, "hello") for host in hosts]
  assert all(backend == "bubblewrap" and not has_jax for backend, _, has_jax in facts)
  assert len({pid for _, pid, _ in facts} | {os.getpid()}) == 3
  assert eventually(lambda: all(host.free == SLOTS // 2 for host in hosts))


def test_a_context_that_is_rewritten_crosses_over(cluster, params):
  config = WorkersConfig(address=cluster.address, slots=SLOTS // 2)
  agent = dataclasses.replace(AGENT, factory="tests.rollout.rows_test:Short")
  with World(SANDBOX, agent, SLOTS) as world:
    here = play(world, params, tasks=TASKS[:3])[0]
  with Workers(config, SANDBOX, agent, ENV) as made:
    same(play(made, params, tasks=TASKS[:3])[0], here)
  assert any(len(t.rows) > 1 for t in here)


def test_a_lost_host_costs_its_episodes_a_new_beginning_and_comes_back(workers, params, wanted):
  before = set(workers.hosts())
  victim = workers._hosts[min(before)]
  _, pid, _ = workers.ask(victim, "hello")
  acted = []

  def wrap(agent):
    act = agent.act

    def counted(reply):
      acted.append(agent)
      if len(acted) == 6:
        os.kill(pid, signal.SIGKILL)
      return act(reply)

    agent.act = counted
    return agent

  done, stats = play(workers, params, wrap)
  same(done, wanted[0])
  assert workers.lost == 1 and stats.invalid
  assert all("is lost" in t.reward.reason for t in stats.invalid)
  # Its node gets another worker.
  assert eventually(lambda: set(workers.hosts()) == before)
  same(play(workers, params)[0], wanted[0])


def test_a_host_that_joins_plays_and_one_that_leaves_is_lost(workers, cluster, params, wanted):
  node = cluster.add_node(**NODE)
  assert eventually(lambda: len(workers.hosts()) == 3)
  same(play(workers, params)[0], wanted[0])
  cluster.remove_node(node, allow_graceful=False)
  assert eventually(lambda: len(workers.hosts()) == 2)
  same(play(workers, params)[0], wanted[0])


def test_more_episodes_than_places_wait(workers):
  agents = [workers.agent(TASKS[0]) for _ in range(SLOTS + 1)]
  threads = [threading.Thread(target=agent.begin) for agent in agents]
  for thread in threads:
    thread.start()
  assert eventually(lambda: sum(thread.is_alive() for thread in threads) == 1)
  time.sleep(0.3)
  assert sum(thread.is_alive() for thread in threads) == 1
  begun = [agent for agent, thread in zip(agents, threads, strict=True) if not thread.is_alive()]
  begun[0].env.close()
  assert eventually(lambda: not any(thread.is_alive() for thread in threads))
  for agent in agents:
    agent.env.close()


def test_a_hanging_call_is_ended_from_here(workers):
  agent = workers.agent(TASKS[0])
  agent.begin()
  errors = []

  def act():
    try:
      agent.act([T.call, *T.encode("sh sleep 9"), T.end])
    except SandboxError as error:
      errors.append(str(error))

  thread = threading.Thread(target=act)
  thread.start()
  time.sleep(1.0)
  agent.env.unwrapped.sandbox.close()
  thread.join(5)
  assert not thread.is_alive() and len(errors) == 1
  agent.env.close()


def test_no_host_is_one_error(cluster):
  config = WorkersConfig(address=cluster.address, slots=1)
  image = SandboxConfig(backend="bubblewrap", image="/nowhere/at/all")
  with pytest.raises(SandboxError, match="no host of the Ray cluster at .*: .*nowhere"):
    Workers(config, image, AGENT, ENV)


def test_a_whole_run(cluster, tmp_path):
  """It trains and is replayed as one in a process would be."""
  flags = [f"--config.workers.address={cluster.address}", "--config.workers.slots=2"]
  done = run(os.environ, tmp_path, *flags)
  assert done.returncode == 0, done.stderr
  assert [row["step"] for row in rows_of(tmp_path, "rl")] == [1, 2, 3, 4, 5]
  assert summary(tmp_path)["sandbox_backend"] == "bubblewrap"
