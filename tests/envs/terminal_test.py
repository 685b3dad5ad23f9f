"""The gymnasium environment, on real sandboxes."""

import subprocess
import warnings

import gymnasium
import pytest
from gymnasium.utils import env_checker

from rome.envs import families, pool, sandbox, scoring, task, terminal

# Never the process backend: what test_sabotage runs would then happen to this machine.
BACKENDS = ["bubblewrap", pytest.param("podman", marks=pytest.mark.slow)]
COUNT = families.generate("count", 3)


@pytest.fixture(scope="module")
def cell():
  with sandbox.make_sandbox(backend="bubblewrap") as made:
    yield made


@pytest.fixture
def env(cell):
  made = terminal.TerminalEnv(task=COUNT, sandbox=cell, max_turns=4, command_timeout=2.0)
  made.reset(seed=0)
  yield made
  made.close()


def _solve(env):
  """Plays the reference solution of the running episode and returns the last step."""
  for command in env.unwrapped._task.solution:
    step = env.step(command)
    assert step[1:4] == (0.0, False, False)
  return env.step("submit")


def test_gymnasium_finds_nothing_to_complain_about():
  env = gymnasium.make("rome/Terminal-v0", task="count/3", backend="bubblewrap")
  with warnings.catch_warnings():
    warnings.simplefilter("error")
    env_checker.check_env(env.unwrapped)
  env.close()
  env.close()


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_episode_from_make_to_close(backend):
  env = gymnasium.make("rome/Terminal-v0", task="count/3", backend=backend)
  observation, info = env.reset(seed=1)
  assert observation == COUNT.instruction
  assert info == {"task_id": "count/3", "family": "count"}
  number = COUNT.solution[1].split()[1]
  observation, *_, info = env.step(COUNT.solution[0])
  assert observation == number and info == {"exit_code": 0, "timed_out": False}
  assert env.step(COUNT.solution[1])[0] == ""
  observation, reward, terminated, truncated, info = env.step(" submit\n")
  assert (observation, reward, terminated, truncated) == ("tests passed", 1.0, True, False)
  assert info == {"exit_code": None, "timed_out": False, "passed": True, "tests_output": ""}
  used = env.unwrapped.sandbox
  env.close()
  assert not used.alive()


def test_doing_nothing_earns_nothing(env):
  observation, reward, terminated, truncated, info = env.step("submit")
  assert (observation, reward, terminated, truncated) == ("tests failed", 0.0, True, False)
  assert not info["passed"] and info["tests_output"] == "ans is missing"


def test_the_last_turn_runs_the_tests_as_well(env):
  for command in COUNT.solution:
    env.step(command)
  assert env.step("true")[1:4] == (0.0, False, False)
  observation, reward, terminated, truncated, info = env.step("echo last")
  assert (observation, reward, terminated, truncated) == ("last", 1.0, False, True)
  assert info["passed"] and info["exit_code"] == 0


def test_submitting_in_the_last_turn_is_an_ordinary_end(env):
  for _ in range(3):
    env.step("true")
  assert env.step("submit")[1:4] == (0.0, True, False)


def test_an_episode_that_is_over_wants_a_reset(env):
  env.step("submit")
  with pytest.raises(gymnasium.error.ResetNeeded, match="call reset"):
    env.step("ls")
  env.reset()
  assert env.step("ls")[0] == "\n".join(sorted(COUNT.files))


def test_nothing_of_an_episode_reaches_the_next(env):
  env.step("export LEFT=over; cd /tmp; touch here; cp /work/*.txt .")
  env.step("echo 1 > /work/ans; rm /work/*.txt; sleep 100 &")
  env.reset()
  assert env.step("pwd; echo [$LEFT]; ls /tmp")[0] == "/work\n[]"
  assert env.step("ls; jobs; ps -o comm | grep -c sleep")[0] == (
    "\n".join(sorted(COUNT.files)) + "\n0"
  )


def test_the_session_keeps_its_state_within_an_episode(env):
  env.step("cd /tmp; word=kept")
  assert env.step("echo $word; pwd")[0] == "kept\n/tmp"


@pytest.mark.parametrize(
  ("command", "observation", "exit_code"),
  [
    ("true", "", 0),
    ("false", "exit 1", 1),
    ("echo a; echo b; (exit 3)", "a\nb", 3),
    ("printf 'a\\n\\n'", "a\n", 0),
    ("exit 5", "exit 5", 5),
    ("", "", 0),
    ("printf '\\377'", "\ufffd", 0),
    ("echo é", "é", 0),
    ("a\0b", "[not run: the command holds a NUL or an unpaired surrogate]", None),
    ("\ud800", "[not run: the command holds a NUL or an unpaired surrogate]", None),
    ("x" * 65537, "[not run: the command is longer than 65536 characters]", None),
  ],
)
def test_what_a_command_shows(env, command, observation, exit_code):
  seen = env.step(command)
  assert seen[0] == observation
  assert seen[4] == {"exit_code": exit_code, "timed_out": False}


@pytest.mark.slow
def test_a_command_that_takes_too_long_is_an_observation(env):
  observation, reward, terminated, truncated, info = env.step("echo start; sleep 60")
  assert observation == "start\n[timed out after 2 s]"
  assert (reward, terminated, truncated, info["timed_out"]) == (0.0, False, False, True)
  assert env.step("echo still here")[0] == "still here"


def test_a_full_disk_is_an_observation(env):
  observation, *_, info = env.step("dd if=/dev/zero of=big bs=1M")
  assert "No space left" in observation and info["exit_code"] == 1
  assert env.step("submit")[1:3] == (0.0, True)
  env.reset()
  assert _solve(env)[1] == 1.0


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.slow
def test_sabotage_is_worth_zero_and_no_infrastructure_failure(backend):
  with terminal.TerminalEnv(task=COUNT, backend=backend, command_timeout=2.0) as env:
    for command in (
      "bomb() { bomb | bomb & }; bomb",
      "rm -rf / 2> /dev/null",
      "chmod 0 /work",
      "rm -rf *; mkdir -p a/b; ln -s a elk.txt; mkfifo ans",
      "dd if=/dev/zero of=big bs=1M 2> /dev/null; touch $(seq 1 500)",
      "trap '' TERM HUP INT; while :; do :; done &",
      "kill -9 -1",
      "while :; do touch ans; done & exec sleep 100",
    ):
      env.reset()
      env.step(command)
      assert env.step("submit")[1:3] == (0.0, True), command
    env.reset()
    assert _solve(env)[1] == 1.0


def test_a_killed_command_is_an_observation(env):
  assert env.step("sh -c 'kill -9 $$'")[4]["exit_code"] == 137
  env.step("kill -9 $$")
  assert env.step("echo again")[0] == "again"


def _result(output="", **changes):
  fields = {"exit_code": 0, "timed_out": False, "truncated": False, "duration": 0.0}
  return sandbox.CommandResult(output=output, **{**fields, **changes})


def test_a_long_output_loses_its_middle():
  text = "a" * 50 + "b" * 50 + "c" * 50
  seen = terminal.describe(_result(text + "\n"), 1.0, 100)
  assert seen == "a" * 50 + "\n[50 characters cut]\n" + "c" * 50
  assert terminal.describe(_result("a" * 100 + "\n"), 1.0, 100) == "a" * 100
  seen = terminal.describe(_result(text, truncated=True), 1.0, 100)
  assert "\n[more than 50 characters cut]\n" in seen
  assert terminal.describe(_result("", exit_code=None, timed_out=True), 1.5, 100) == (
    "[timed out after 1.5 s]"
  )
  assert terminal.describe(_result("", exit_code=None), 1.0, 100) == "killed"


def test_the_output_cap_of_the_sandbox_is_told(env):
  seen = env.step("seq 1 100000")[0]
  assert seen.startswith("1\n2\n") and seen.endswith("\n99999\n100000")
  assert "[more than 1" in seen and seen in env.observation_space


def test_the_same_seed_gives_the_same_task(cell):
  tasks = [f"{family}/{seed}" for family in families.FAMILIES for seed in range(4)]
  env = terminal.TerminalEnv(tasks=tasks, sandbox=cell)
  first = [env.reset(seed=seed) for seed in range(6)]
  assert first == [env.reset(seed=seed) for seed in range(6)]
  assert len({info["task_id"] for _, info in first}) > 3
  env.reset(seed=5)
  chain = [env.reset()[1]["task_id"] for _ in range(5)]
  env.reset(seed=5)
  assert chain == [env.reset()[1]["task_id"] for _ in range(5)]
  env.close()
  assert cell.alive()  # the caller's own sandbox is left alone


def test_an_option_names_the_task(cell, tmp_path):
  task.save_task(families.generate("move", 9), tmp_path)
  env = terminal.TerminalEnv(sandbox=cell)
  with pytest.raises(task.TaskError, match="no task to play"):
    env.reset(seed=0)
  assert env.reset(options={"task": tmp_path})[1]["task_id"] == "move/9"
  assert _solve(env)[1] == 1.0
  with pytest.raises(ValueError, match="unknown option 'tsak'"):
    env.reset(options={"tsak": "count/1"})


def test_a_task_directory_is_played(cell, tmp_path):
  (tmp_path / "task.toml").write_text('instruction = "Greet."\n')
  (tmp_path / "tests.sh").write_text('[ "$(cat out)" = hi ]\n')
  env = terminal.TerminalEnv(task=tmp_path, sandbox=cell)
  assert env.reset()[0] == "Greet."
  env.step("echo hi > out")
  assert env.step("submit")[1] == 1.0


def test_spaces_take_any_text():
  space = terminal.UnicodeText(40)
  assert "" in space and "ü\n\0漢" in space and "x" * 40 in space
  assert "x" * 41 not in space and 3 not in space and b"x" not in space
  space.seed(0)
  samples = [space.sample() for _ in range(20)]
  assert all(sample in space for sample in samples) and len(set(samples)) > 10
  space.seed(0)
  assert samples == [space.sample() for _ in range(20)]
  assert space == terminal.UnicodeText(40) and space != terminal.UnicodeText(41)


@pytest.mark.parametrize(
  ("arguments", "error", "message"),
  [
    ({"task": "count/1", "tasks": ["count/2"]}, ValueError, "task= or tasks=, not both"),
    ({"tasks": []}, ValueError, "tasks= is empty"),
    ({"task": "cuont/1"}, task.TaskError, "unknown task family 'cuont'"),
    ({"task": "nowhere"}, task.TaskError, "unknown task 'nowhere'"),
    ({"task": "count/1", "max_turns": 0}, ValueError, "max_turns is 0"),
    ({"task": "count/1", "command_timeout": 0.0}, ValueError, "must be above 0"),
    ({"task": "count/1", "max_observation": 10}, ValueError, "max_observation is 10"),
  ],
)
def test_bad_arguments_are_refused(arguments, error, message):
  with pytest.raises(error, match=message):
    terminal.TerminalEnv(**arguments)


def test_a_sandbox_and_a_pool_contradict_each_other(cell):
  with pool.SandboxPool(lambda: sandbox.make_sandbox(backend="bubblewrap"), 1, 1) as some:
    with pytest.raises(ValueError, match="sandbox= or pool=, not both"):
      terminal.TerminalEnv(sandbox=cell, pool=some)


def test_an_action_must_be_text(env):
  with pytest.raises(TypeError, match="an action is a string, not int"):
    env.step(3)


def test_tests_without_a_verdict_raise_and_the_next_episode_runs():
  hanging = task.Task("slow/1", "slow", "Wait.", {}, "sleep 60")
  with terminal.TerminalEnv(task=hanging, backend="bubblewrap", tests_timeout=0.5) as env:
    env.reset()
    with pytest.raises(scoring.TestsUnfinished):
      env.step("submit")
    env.reset(options={"task": COUNT})
    assert _solve(env)[1] == 1.0


def _kill(box):
  """Ends a sandbox behind the back of the environment."""
  if box.backend == "podman":
    subprocess.run(["podman", "kill", box.id], check=True, capture_output=True, timeout=30)
  else:
    box.close()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_lost_sandbox_raises_and_the_next_episode_gets_another(backend):
  with terminal.TerminalEnv(task=COUNT, backend=backend) as env:
    env.reset()
    _kill(lost := env.sandbox)
    with pytest.raises(sandbox.SandboxLost):
      env.step("ls")
    with pytest.raises(gymnasium.error.ResetNeeded):
      env.step("ls")
    env.reset()
    assert env.sandbox is not lost
    assert _solve(env)[1] == 1.0
    _kill(env.sandbox)  # between episodes
    with pytest.raises(sandbox.SandboxLost):
      env.reset()
    env.reset()
    assert _solve(env)[1] == 1.0


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_sandbox_lost_at_submit_is_no_zero(backend):
  with terminal.TerminalEnv(task=COUNT, backend=backend) as env:
    env.reset()
    _kill(env.sandbox)
    with pytest.raises(sandbox.SandboxLost):
      env.step("submit")


def test_a_pool_lends_a_sandbox_for_each_episode():
  with pool.SandboxPool(lambda: sandbox.make_sandbox(backend="bubblewrap"), 1, 2) as some:
    env = terminal.TerminalEnv(task=COUNT, pool=some)
    env.reset()
    first = env.sandbox
    assert _solve(env)[1] == 1.0 and env.sandbox is None
    env.reset()
    assert env.sandbox is first and env.step("ls")[0] == "\n".join(sorted(COUNT.files))
    env.reset()  # the episode is left unfinished; its sandbox has served twice
    assert env.sandbox is not first
    _kill(env.sandbox)
    with pytest.raises(sandbox.SandboxLost):
      env.step("ls")
    env.reset()
    assert _solve(env)[1] == 1.0
    env.reset()
    env.close()
    env.close()
    assert some.acquire(20.0).alive()
    assert some.counters["acquired"] == 6
