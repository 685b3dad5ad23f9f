"""Whole runs whose episodes the scaffold of `rome agent` plays: they train, resume and replay."""

import shutil
import signal

import pytest

from rome.train.metrics import read_jsonl
from tests.train import loop_test as loop

pytestmark = pytest.mark.slow

environment = loop.environment
CONFIG = "--config=experiments/configs/scaffold.py"


@pytest.fixture(scope="module")
def agent(tmp_path_factory):
  """A copy of the scaffold's file and its prompt."""
  directory = tmp_path_factory.mktemp("agent")
  for name in ("scaffold_agent.toml", "scaffold_prompt.txt"):
    shutil.copy(loop.ROOT / "experiments/configs" / name, directory)
  return directory / "scaffold_agent.toml"


@pytest.fixture(scope="module")
def flags(agent):
  return [f"--config.agent.scaffold={agent}"]


@pytest.fixture(scope="module")
def whole(environment, flags, tmp_path_factory):
  workdir = tmp_path_factory.mktemp("runs") / "scaffold"
  return workdir, loop.run(environment, workdir, *flags, config=CONFIG)


def test_it_trains_and_counts_what_was_called(whole):
  workdir, done = whole
  assert done.returncode == 0, done.stderr
  rows = [row for row in read_jsonl(workdir / "metrics.jsonl") if row["phase"] == "rl"]
  assert len(rows) == loop.STEPS["rl"]
  for row in rows:
    kinds = ("calls_sh", "calls_submit", "calls_malformed", "calls_other")
    assert sum(row[kind] for kind in kinds) == pytest.approx(1)
  shown = read_jsonl(workdir / "episodes.jsonl")
  assert {row["end_reason"] for row in shown} <= {"submitted", "max_turns", "context_full"}


def test_a_killed_one_ends_with_the_same_bits(whole, environment, flags, tmp_path):
  workdir = tmp_path / "killed"
  process = loop.start(environment, workdir, *flags, config=CONFIG)
  loop.wait_until(process, lambda: len(loop.rows_of(workdir, "rl")) >= 2, "two updates")
  process.send_signal(signal.SIGKILL)
  process.communicate()
  again = loop.run(environment, workdir, *flags, config=CONFIG)
  assert again.returncode == 0, again.stderr
  assert loop.measured(workdir) == loop.measured(whole[0])
  assert loop.summary(workdir)["params_sha256"] == loop.summary(whole[0])["params_sha256"]


@pytest.mark.parametrize("name", ["scaffold_agent.toml", "scaffold_prompt.txt"])
def test_a_scaffold_that_was_changed_is_noticed(whole, environment, agent, flags, name):
  """Also where the name is the same, as it is in config.json."""
  path = agent.parent / name
  before = path.read_bytes()
  path.write_bytes(before + b"# another line\n")
  try:
    done = loop.run(environment, whole[0], *flags, config=CONFIG)
  finally:
    path.write_bytes(before)
  loop.fails_with_one_line(done, f"agent.scaffold={agent}", "was changed since", "--workdir")


def test_contradictions_are_one_line(environment, tmp_path):
  for flags, says in (
    (("--config.agent.context=250",), "context_tokens is 256, but must be agent.context=250"),
    (("--config.agent.scaffold=nowhere.toml",), "nowhere.toml: there is no such file"),
    (("--config.agent.system=x",), "agent.system is not read with agent.scaffold"),
  ):
    done = loop.run(environment, tmp_path / "run", *flags, config=CONFIG)
    loop.fails_with_one_line(done, says)
