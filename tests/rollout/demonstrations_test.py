"""Reference solutions played for real: right, repeatable, without log-probs."""

import dataclasses

import numpy as np
import pytest

from rome.envs import FAMILIES, TaskError, generate
from rome.rollout import AgentConfig, SandboxConfig, World, demonstrate
from rome.text import ByteTokenizer
from rome.trajectory import Turn, Valid

T = ByteTokenizer()
TASKS = [generate(family, 5) for family in FAMILIES]
SETTINGS = SandboxConfig(backend="bubblewrap")


@pytest.fixture(scope="module")
def world():
  with World(SETTINGS, AgentConfig(), size=2) as made:
    yield made


def test_every_family_is_solved_and_recorded(world):
  demos = demonstrate(TASKS, world, threads=2)
  assert [d.task_id for d in demos] == [task.id for task in TASKS]
  for task, demo in zip(TASKS, demos, strict=True):
    assert demo.reward == Valid(1.0) and demo.end_reason == "submitted"
    assert demo.id == f"{task.id}#demo" and demo.instruction == task.instruction
    calls = [f"<|call|>sh {c}" for c in task.solution] + ["<|call|>submit"]
    assert [turn.action for turn in demo.turns] == calls and demo.num_chunks == len(calls)
    sampled = demo.call_ids >= 0
    assert np.isnan(demo.logps[sampled]).all() and not demo.logps[~sampled].any()
    for k, call in enumerate(calls):
      assert T.decode(demo.tokens[demo.call_ids == k]) == f"{call}<|end|>"
    # What a command really printed is in the context, and no policy gets to imitate it.
    shown = T.decode(demo.tokens[~sampled])
    for turn in demo.turns[:-1]:
      assert f"<|tool|>{turn.observation}<|end|>" in shown


def test_observations_are_what_commands_print(world):
  (demo,) = demonstrate(TASKS[:1], world, threads=1)
  count = TASKS[0].solution[1].split()[1]
  assert demo.turns[0] == Turn(f"<|call|>sh {TASKS[0].solution[0]}", count, 0)


def test_demonstrations_repeat(world):
  first, again = (demonstrate(TASKS, world, threads=n) for n in (2, 1))
  for a, b in zip(first, again, strict=True):
    np.testing.assert_array_equal(a.tokens, b.tokens)
    assert a.turns == b.turns


def test_a_solution_that_is_wrong(world):
  broken = dataclasses.replace(TASKS[0], id="mine", solution=("echo 0 > ans",))
  with pytest.raises(TaskError, match="reference solution of task mine does not pass its tests"):
    demonstrate([TASKS[1], broken], world, threads=2)


@pytest.mark.parametrize(
  ("settings", "message"),
  [
    (AgentConfig(max_turns=2), "does not pass its tests within 2 turns"),
    (AgentConfig(max_reply=16, context=64), "takes [0-9]+ tokens, more than agent.context=64"),
  ],
)
def test_a_solution_that_the_agent_has_no_room_for(settings, message):
  task = dataclasses.replace(TASKS[0], solution=("true", "true", *TASKS[0].solution))
  with World(SETTINGS, settings, size=1) as world:
    with pytest.raises(TaskError, match=f"reference solution of task {task.id} {message}"):
      demonstrate([task], world, threads=1)


def test_every_sandbox_comes_back(world):
  demonstrate(TASKS, world, threads=2)
  boxes = [world.pool.acquire(10) for _ in range(2)]
  for box in boxes:
    world.pool.release(box)
