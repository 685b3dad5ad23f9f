"""What users bring by import path: every mistake is one line, and rewards reach trajectories."""

import textwrap

import numpy as np
import pytest

from rome.agent import Agent
from rome.envs import SandboxError
from rome.envs.terminal import TerminalEnv
from rome.rollout import (
  AgentConfig,
  CustomError,
  SandboxConfig,
  TasksConfig,
  TaskSource,
  World,
  custom,
)
from rome.text import ByteTokenizer
from rome.trajectory import Trajectory

WORDS = textwrap.dedent(
  '''
  import gymnasium
  from rome.agent import Agent
  from rome.trajectory import Invalid

  number = 3

  class Echo(gymnasium.Env):
    """Says back what it hears; over, and worth its length, when it hears `end`."""
    def __init__(self, task, **settings):
      self.task, self.settings = task, settings
    def reset(self, *, seed=None, options=None):
      return "Talk.", {}
    def step(self, action):
      return action, 0.5, action == "end", False, {}

  class NoEnv:
    def __init__(self, task, **settings):
      pass

  class Plain(Agent):
    def read(self, reply):
      return self.tokenizer.decode(reply).removesuffix("<|end|>")

  def bare(env, tokenizer, system, max_turns):
    return object()

  def no_arguments():
    return 0.0

  def length(trajectory):
    return trajectory.reward.value + len(trajectory.tokens)

  def invalid(trajectory):
    return Invalid("the judge was not at home")

  def text(trajectory):
    return "good"

  def nan(trajectory):
    return float("nan")
  '''
)
TASKS = TasksConfig(families=(), env="words:Echo")


@pytest.fixture
def words(tmp_path, monkeypatch):
  (tmp_path / "words.py").write_text(WORDS)
  (tmp_path / "broken.py").write_text("1 / 0\n")
  monkeypatch.syspath_prepend(tmp_path)


@pytest.fixture
def play(words):
  """Plays one episode of two replies under a reward: the agent, after its last reply."""

  def play(reward):
    config, task = AgentConfig(factory="words:Plain"), TaskSource(TASKS).get("train", 7)
    with World(SandboxConfig(backend="none"), config, size=2, env=TASKS.env) as world:
      agent = custom.Rewarded(world.agent(task), task, custom.load_reward(f"words:{reward}"))
      agent.begin()
      for text in ("hello", "end"):
        agent.act([*world.tokenizer.encode(text), world.tokenizer.end])
      return agent

  return play


@pytest.mark.parametrize(
  ("path", "message"),
  [
    ("words", "config.reward='words' must be an import path \"package.module:name\""),
    (":length", "config.reward=':length' must be an import path"),
    ("words:", "config.reward='words:' must be an import path"),
    ("nowhere.at_all:f", "cannot be imported .ModuleNotFoundError.*mend the path.*PYTHONPATH"),
    ("words:lenght", "config.reward='words:lenght' cannot be imported .AttributeError"),
    ("broken:f", "config.reward='broken:f' cannot be imported .ZeroDivisionError: division by"),
    ("words:number", "config.reward='words:number' is int, which cannot be called"),
    ("words:no_arguments", r"does not take what it is given, \(trajectory\): too many positional"),
    ("words:bare", r"does not take what it is given, \(trajectory\): missing a required"),
  ],
)
def test_a_path_that_cannot_be_used(words, path, message):
  with pytest.raises(CustomError, match=message) as error:
    custom.load_reward(path)
  assert "\n" not in str(error.value)


def test_the_defaults_are_import_paths_too():
  assert custom.load_env(TasksConfig().env) is TerminalEnv
  assert custom.load_agent(AgentConfig().factory) is Agent


@pytest.mark.parametrize(
  ("env", "factory", "message"),
  [
    ("words:NoEnv", "words:Plain", "config.tasks.env made a NoEnv, which is no gymnasium.Env"),
    ("words:Echo", "words:bare", "config.agent.factory made a object without env, begin, act"),
  ],
)
def test_factories_that_make_something_else(words, env, factory, message):
  task = TaskSource(TASKS).get("train", 0)
  with World(SandboxConfig(backend="none"), AgentConfig(factory=factory), 1, env) as world:
    with pytest.raises(CustomError, match=message):
      world.agent(task)


def test_an_environment_gets_its_task_and_settings(words):
  config = AgentConfig(max_turns=5, max_observation=40)
  with World(SandboxConfig(backend="none"), config, 1, "words:Echo") as world:
    env = world.agent(TaskSource(TASKS).get("held_out", 3)).env
  assert env.task.id == "numbered/1000003" and env.task.family == "numbered"
  assert env.settings == {
    "pool": None, "judges": None, "max_turns": 5, "command_timeout": 10.0, "max_observation": 40,
  }  # fmt: skip
  assert world.backend == "none"


def test_a_reward_reads_the_whole_episode(play):
  tokenizer = ByteTokenizer()
  agent = play("length")
  prompt = [tokenizer.bos, tokenizer.user, *b"Talk.", tokenizer.end, tokenizer.assistant]
  said = [*b"hello", tokenizer.end, tokenizer.tool, *b"hello", tokenizer.end, tokenizer.assistant]
  # The reward of the environment, and all that was said: both prompts, both replies.
  assert agent.reward == 0.5 + len(prompt) + len(said) + len(b"end") + 1
  assert (agent.end_reason, agent.instruction) == ("submitted", "Talk.")
  assert [turn.action for turn in agent.turns] == ["hello", "end"]


def test_what_a_reward_is_given(words):
  seen: list[Trajectory] = []
  task = TaskSource(TASKS).get("train", 7)
  with World(SandboxConfig(backend="none"), AgentConfig(), 1, "words:Echo") as world:
    agent = custom.Rewarded(world.agent(task), task, lambda t: seen.append(t) or 0)
    agent.begin()
    agent.act([world.tokenizer.call, *b"sh end", world.tokenizer.end])
  (trajectory,) = seen
  assert (trajectory.id, trajectory.family, trajectory.num_chunks) == ("numbered/7", "numbered", 1)
  assert trajectory.reward.value == 0.5 and agent.reward == 0.0
  assert np.isnan(trajectory.logps[trajectory.call_ids == 0]).all()
  assert bytes(trajectory.tokens[trajectory.call_ids == 0][1:-1].tolist()) == b"sh end"


def test_no_reward_is_an_infrastructure_failure(play):
  with pytest.raises(SandboxError, match="the judge was not at home"):
    play("invalid")


@pytest.mark.parametrize(("reward", "value"), [("text", "'good'"), ("nan", "nan")])
def test_what_is_no_reward(play, reward, value):
  with pytest.raises(CustomError, match=f"config.reward gave {value} for numbered/7; it must be"):
    play(reward)
