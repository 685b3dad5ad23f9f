"""Real agents, unmodified, in Podman: a policy that knows the answer solves the task by them."""

import os
import shutil

import jax
import pytest

from rome import models
from rome.envs import generate, hub
from rome.rollout import AgentConfig, Engine, NativeWorld, Patience, SandboxConfig
from tests.rollout.native.foreign import LLM, MINI
from tests.rollout.native.policies import T, differing, spoken, taught

pytestmark = [
  pytest.mark.slow,
  pytest.mark.skipif(
    os.geteuid() != 0 or not shutil.which("podman"), reason="builds images, as root, with Podman"
  ),
]
CONFIG, SAMPLING = models.PRESETS["micro"], models.Sampling(temperature=0.25)
SLOTS, CONTEXT = 2, 224


@pytest.mark.timeout(900)  # the first time builds the image
@pytest.mark.parametrize("agent", [MINI, LLM], ids=lambda agent: agent.recipe)
def test_a_policy_acts_through_a_real_agent(agent):
  task = generate("count", 0)
  name, answer = agent.tool["function"]["name"], task.solution[-1]
  result = [{"role": "tool", "content": ""}]
  conversation = spoken(
    agent.opening(task.instruction),
    [f"<|call|>{name} {answer}", agent.leave],
    [result],
    [agent.tool],
  )
  params, loss = taught(CONFIG, [conversation], steps=250, rate=2e-2)
  assert loss < 0.05
  sandbox = SandboxConfig(
    backend="podman", image=hub.EnvHub().ensure(agent.recipe), memory_mb=768, disk_mb=32
  )
  settings = AgentConfig(context=CONTEXT, max_reply=80, max_turns=6, mode="native")
  with NativeWorld(sandbox, settings, agent.native, SAMPLING, SLOTS) as world:
    engine = Engine(CONFIG, slots=SLOTS, max_length=CONTEXT, stop_tokens=(T.end,), numerics="exact")
    runner = world.runner(
      engine, world.agent, SAMPLING, max_reply=80, invalid_cap=0.5,
      patience=Patience(reset=300.0, step=120.0),
    )  # fmt: skip
    try:
      played, _ = runner.run(params, jax.random.key(1), 0, lambda i: task, 0, 2)
    finally:
      world.close()
      runner.close()
  sampled, other = differing(engine, params, SAMPLING, played)
  assert sampled == 2 * sum(conversation[1]) and other == 0
  for t in played:
    assert t.end_reason == "submitted" and t.success
    assert t.num_chunks == 2 and t.row_starts == (0,)  # the second call went on from the first
    assert t.tokens.tolist() == conversation[0]
