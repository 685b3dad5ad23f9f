"""The environment over HTTP is the environment in process."""

import time

import gymnasium
import pytest
from gymnasium.utils.env_checker import check_env

from rome.envs import TaskError, TerminalEnv, generate, owner, sandbox_cli
from rome.envs.remote import OutOfCapacity
from rome.envs.remote_env import RemoteEnv
from tests.envs.service.conftest import BOB, service, tokens_file  # noqa: F401

ACTIONS = ["ls", "cat *.txt | head -3", "false", "kill -9 $$", "echo '\ud800'", "x" * 70000, "pwd"]


@pytest.fixture
def client(service):  # noqa: F811
  with service.client() as found:
    yield found


def _play(env, episodes):
  """All that one can see of some episodes."""
  seen = []
  for seed, options, actions in episodes:
    seen.append(env.reset(seed=seed, options=options))
    for action in actions:
      seen.append(env.step(action))
      if seen[-1][2] or seen[-1][3]:
        break
  return seen


def test_same_seeds_and_actions_give_the_same_sequences(client):
  tasks = ["count/17", "edit/3", "count/5"]
  solution = list(generate("count", 17).solution)
  episodes = [
    (0, None, ACTIONS),
    (7, None, ["submit"]),
    (None, {"task": "count/17"}, [*solution, "submit"]),
    (None, None, ["echo a", "echo b", "echo c", "echo d", "echo e", "echo f", "echo g"]),
    (3, {"task": generate("edit", 12)}, [*generate("edit", 12).solution, "submit"]),
  ]
  arguments = {"tasks": tasks, "max_turns": 8, "max_observation": 200}
  here = TerminalEnv(backend="bubblewrap", **arguments)
  there = RemoteEnv(client, **arguments)
  try:
    expected, found = _play(here, episodes), _play(there, episodes)
    assert found == expected
    assert [step[1] for step in expected if len(step) == 5].count(1.0) == 2
    types = [[type(part) for part in step] for step in expected]
    assert [[type(part) for part in step] for step in found] == types
  finally:
    here.close()
    there.close()


def test_the_seed_given_when_made_is_that_of_the_first_reset(client):
  body = {"tasks": [f"count/{i}" for i in range(50)], "seed": 11}
  made = client.call("POST", "/v1/envs", json=body).json()["id"]
  first = client.call("POST", f"/v1/envs/{made}/reset", json={}).json()
  client.call("DELETE", f"/v1/envs/{made}")
  env = TerminalEnv(tasks=body["tasks"], backend="bubblewrap")
  assert env.reset(seed=11)[0] == first["observation"]
  env.close()


@pytest.mark.slow
def test_gymnasium_finds_nothing_wrong(client):
  env = RemoteEnv(client, task="count/17")
  check_env(env, skip_render_check=True)
  env.close()


def test_errors_are_those_of_the_process(client):
  for arguments in ({"task": "nonsense/1"}, {"max_turns": 0}, {"task": "count/1", "tasks": ["a"]}):
    with pytest.raises((ValueError, TaskError)):
      RemoteEnv(client, **arguments)
  env = RemoteEnv(client)
  with pytest.raises(gymnasium.error.ResetNeeded):
    env.step("ls")
  with pytest.raises(TaskError, match="no task to play"):
    env.reset()
  with pytest.raises(ValueError, match="option"):
    env.reset(options={"nonsense": 1})
  with pytest.raises(TypeError):
    env.step(3)
  env.reset(options={"task": "count/1"})
  env.close()
  env.close()
  with pytest.raises(gymnasium.error.ClosedEnvironmentError):
    env.step("ls")


def test_an_environment_belongs_to_its_tenant_and_holds_one_sandbox_an_episode(service, client):  # noqa: F811
  env = RemoteEnv(client, task="count/1")
  env.reset()
  entry = next(e for e in client.call("GET", "/v1/envs").json()["envs"] if e["id"] == env._id)
  assert client.view(entry["sandbox"])["state"] == "running"
  with service.http("bob-0123456789abcdef") as http:
    assert http.get("/v1/envs").json() == {"envs": []}
    response = http.post(f"/v1/envs/{env._id}/step", json={"action": "ls"})
    assert response.status_code == 404
  env.reset()
  assert client.view(entry["sandbox"])["state"] == "deleted"
  env.close()


def test_the_sandbox_of_the_tests_counts_and_is_given_back(service):  # noqa: F811
  """Bob may have two sandboxes."""

  def held():
    label = owner.label(service.process.pid)
    return [name for name, of in sandbox_cli.owned_directories().items() if of == label]

  with service.client(BOB) as bob:
    before = len(held())
    made = bob.call("POST", "/v1/envs", json={"task": "count/1"}).json()["id"]
    bob.call("POST", f"/v1/envs/{made}/reset", json={})
    step = {"method": "POST", "url": f"/v1/envs/{made}/step", "json": {"action": "submit"}}
    with bob.create(), pytest.raises(OutOfCapacity):
      bob.call(**step)
    assert bob.call(**step).json()["terminated"]
    for _ in range(100):
      if len(held()) <= before:
        break
      time.sleep(0.1)
    assert len(held()) <= before
    bob.call("DELETE", f"/v1/envs/{made}")
