"""Settings of sandboxes and agents are checked when they are made; a world lends sandboxes."""

import pytest

from rome.envs import ImageError, generate
from rome.envs.pool import PoolClosed
from rome.rollout import AgentConfig, SandboxConfig, World
from rome.text import ByteTokenizer

T = ByteTokenizer()


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"backend": "docker"}, "sandbox.backend must be one of auto, podman, .* got 'docker'"),
    ({"backend": "process"}, "sandbox.backend=process isolates nothing"),
    ({"reuse": 0}, "sandbox.reuse must be at least 1, got 0"),
    ({"reset_tries": 0}, "sandbox.reset_tries must be at least 1, got 0"),
    ({"max_abandoned": -1}, "sandbox.max_abandoned must be at least 0, got -1"),
    ({"reset_deadline": 0.0}, "sandbox.reset_deadline must be above 0 and finite, got 0"),
    (
      {"close_deadline": float("inf")},
      "sandbox.close_deadline must be above 0 .*, got inf",
    ),
    ({"invalid_cap": 1.0}, r"sandbox.invalid_cap must be in \[0, 1\), got 1.0"),
    ({"command_timeout": 0.0}, "sandbox.command_timeout must be above 0"),
    ({"command_timeout": 9.0, "deadline": 9.0}, "and below sandbox.deadline=9, got 9"),
    ({"memory_mb": 1}, "memory_mb must be an integer of at least 16"),
    ({"cpus": 0.0}, "cpus must be a number of at least 0.01"),
    ({"pids": 0}, "pids must be an integer of at least 4"),
    ({"disk_mb": 0}, "disk_mb must be an integer of at least 1"),
  ],
)
def test_sandbox_settings(change, message):
  with pytest.raises(ValueError, match=message):
    SandboxConfig(**change)


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"max_turns": 0}, "agent.max_turns must be at least 1, got 0"),
    ({"max_reply": 0}, "agent.max_reply must be at least 1, got 0"),
    ({"max_reply": 48, "context": 95}, "agent.context must be at least twice agent.max_reply=48"),
    ({"max_observation": 31}, "agent.max_observation must be at least 32, got 31"),
  ],
)
def test_agent_settings(change, message):
  with pytest.raises(ValueError, match=message):
    AgentConfig(**change)


@pytest.mark.slow
def test_agents_act_under_the_settings_and_give_their_sandbox_back():
  config = SandboxConfig(backend="bubblewrap", command_timeout=1.0, pids=20, disk_mb=2)
  with World(config, AgentConfig(max_turns=3, max_observation=40), size=1) as world:
    assert (world.backend, world.context) == ("bubblewrap", AgentConfig().context)
    for _ in range(2):  # the second finds an empty sandbox, or there would be none to find
      agent = world.agent(generate("count", 1))
      agent.begin()
      seen = agent.env.step("ls | wc -l; seq 100; head -c 9000000 /dev/zero > big || echo full")[0]
      assert seen.startswith("3\n") and seen.endswith("full") and "characters cut" in seen
      assert agent.env.step("sleep 30")[4]["timed_out"]
      *_, truncated, info = agent.env.step("true")  # the third of three turns
      assert truncated and info["passed"] is False
      agent.env.close()
    assert world.pool.counters["started"] == 1 and world.pool.counters["acquired"] == 2
  with pytest.raises(PoolClosed, match="closed"):
    world.agent(generate("count", 1)).begin()


def test_an_unknown_image_is_told_before_any_episode():
  with pytest.raises(ImageError, match="image 'nope'"):
    World(SandboxConfig(backend="bubblewrap", image="nope"), AgentConfig(), size=2)
