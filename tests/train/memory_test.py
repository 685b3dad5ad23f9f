"""The memory plan: counts by hand, and that it costs a run no compilation."""

import dataclasses
import logging

import jax
import numpy as np
import pytest

from rome.rollout import AgentConfig
from rome.train import memory
from rome.train.config import EngineConfig, ExpertsConfig, RLConfig, RunConfig, StageConfig
from rome.train.learner import Learner
from rome.trajectory import Trajectory, Valid

pytestmark = pytest.mark.slow

CONFIG = RunConfig(
  model="micro",
  row_length=64,
  agent=AgentConfig(context=64, max_reply=16),
  engine=EngineConfig(slots=4),
  sft=StageConfig(steps=1, batch=4, learning_rate=1e-3, micro_rows=2),
  rl=RLConfig(steps=1, batch=4, learning_rate=1e-3, micro_rows=4),
  experts=ExpertsConfig(batch=4, capacity=8),
)


def episode(n: int) -> Trajectory:
  call_ids = np.array([-1, -1, 0, 0], np.int32)
  return Trajectory(
    id=f"t#{n}", task_id=f"t/{n}", family="t", instruction="",
    tokens=np.array([1, 2, 3, 4], np.int32), call_ids=call_ids,
    logps=np.where(call_ids >= 0, -5.0, 0.0).astype(np.float32),
    versions=np.zeros(1, np.int32), chunk_rewards=np.zeros(1, np.float32), reward=Valid(1.0),
    end_reason="submitted", turns=(),
  )  # fmt: skip


@pytest.fixture(scope="module")
def plan():
  return memory.memory_plan(CONFIG)


def test_what_lies_there(plan):
  state = Learner(CONFIG).fresh()
  assert plan.params == sum(x.nbytes for x in jax.tree.leaves(state.params))
  assert plan.optimizer == sum(x.nbytes for x in jax.tree.leaves(state.opt_state))
  # Two layers, one key head of 8 (16 for values), 4 slots of 4 pages twice and one more; choices.
  assert plan.engine_cache >= (2 * 4 * 4 + 1) * 16 * 2 * (8 + 8) * 4
  assert plan.engine_weights >= plan.params


def test_moments_in_host_memory(plan):
  """They are counted there, but on a processor, whose memory it is, here as well."""
  config = dataclasses.replace(CONFIG, offload_optimizer=True)
  away = memory.memory_plan(config)
  state = Learner(CONFIG).fresh()
  layers = [sum(x.nbytes for x in jax.tree.leaves(part)) for part in state.params.values()]
  assert away.piece == 2 * max(layers) and plan.piece == 0
  assert away.resident == away.optimizer == plan.optimizer
  assert "of weights" in away.lines()[0] and "in host memory, engine" in away.lines()[0]
  on_accelerator = dataclasses.replace(away, resident=0)
  assert on_accelerator.peak == plan.peak - plan.optimizer


def test_programs_are_the_runs(plan):
  supervised, policy = plan.programs
  # A gradient is as large as the weights; so are the weights that come in.
  for program in (supervised, policy):
    assert program.arguments > plan.params and program.outputs >= plan.params
  # Twice the rows: more beside them.
  assert policy.temporaries > supervised.temporaries
  assert plan.peak > plan.params + plan.optimizer + policy.temporaries
  assert len(plan.lines()) == 2 and "DOES NOT FIT" not in plan.lines()[0]
  assert "DOES NOT FIT" in dataclasses.replace(plan, limit=plan.params).lines()[0]


@pytest.mark.parametrize("offload", [False, True])
def test_the_run_does_not_compile_them_again(plan, offload, caplog):
  """Nor anything after the first update of a stage."""
  config = dataclasses.replace(CONFIG, offload_optimizer=offload)
  if offload:
    memory.memory_plan(config)
  learner = Learner(config)
  state, episodes = learner.begin(), [episode(n) for n in range(4)]
  with jax.log_compiles(True), caplog.at_level(logging.WARNING, logger="jax"):
    state, _, _ = learner.imitate(state, episodes, 0)
    state, _, _ = learner.reinforce(learner.reinforcing(state), episodes, episodes, 0)
    first = len(caplog.records)
    learner.reinforce(state, episodes, episodes, 0)
  told = [r.getMessage() for r in caplog.records]
  assert not [line for line in told[first:] if "Finished XLA comp" in line]
  compiled = [line for line in told if "Finished XLA comp" in line]
  assert any("apply_piece" in line for line in compiled)  # so that the log is what it is taken for
  assert not [line for line in compiled if "_grad" in line]


def test_a_stage_without_updates_has_no_program():
  other = dataclasses.replace(CONFIG, sft=dataclasses.replace(CONFIG.sft, steps=0))
  assert [p.name for p in memory.memory_plan(other).programs] == ["policy gradient"]


def test_asynchronous_training_keeps_weights_and_old_log_probs(plan):
  rl = dataclasses.replace(CONFIG.rl, max_staleness=2)
  other = dataclasses.replace(CONFIG, rl=rl, sft=dataclasses.replace(CONFIG.sft, steps=0))
  late = memory.memory_plan(other)
  assert (plan.kept, late.kept) == (0, 2 * late.params)
  (program,) = late.programs
  rows, length = rl.micro_rows, CONFIG.row_length
  assert program.arguments == plan.programs[1].arguments + rows * length * 4
  assert "older weights" in late.lines()[0] and "older" not in plan.lines()[0]
