"""What somebody else changed is told, what the agent changed is not."""

import time

import pytest

from rome.agent.executor import Executor
from rome.agent.model import ModelReply
from rome.agent.skills import Environment
from rome.agent.tools.builtin import builtin_tools
from rome.agent.workspace import Workspace
from rome.envs import make_sandbox
from tests.agent.skills.places import play, texts, use

DONE = ModelReply("done")
CHANGED = "Somebody else changed files: "


def played(place, *replies):
  """What each request's last message says; replies may be pairs of what somebody does, a reply."""

  def acting(act, reply):
    def complete(request):
      time.sleep(0.05)  # the kernel's stamps are coarse
      act()
      time.sleep(0.05)
      return reply

    return complete

  steps = [acting(*r) if isinstance(r, tuple) else r for r in replies]
  environment = Environment(place)
  executor = Executor(builtin_tools(place), [environment.gate])
  _, requests, _ = play(executor, [environment], *steps, DONE)
  return [texts(request)[-1] for request in requests[1:]]


def other(place, command):
  """Somebody else: another session of the sandbox."""

  def act():
    session = place.sandbox.session("other")
    assert session.run(command).exit_code == 0
    session.close()

  return act


def test_a_file_that_somebody_else_changed_or_removed(place):
  place.run("echo one > a; echo two > b")
  read = use("read", path="a")
  said = played(
    place,
    read,
    use("read", path="b"),
    (other(place, "echo three > a"), use("list")),
    read,
    (other(place, "rm b"), use("list")),
    use("list"),
  )
  assert [CHANGED in text for text in said] == [False, False, True, False, True, False]
  assert f"{CHANGED}a (changed)" in said[2] and f"{CHANGED}b (gone)" in said[4]


def test_what_the_agent_changed_is_not_told_even_while_others_work(place):
  place.run("echo one > a; echo one > b")
  said = played(
    place,
    use("read", path="a"),
    use("read", path="b"),
    use("write", path="a", content="mine"),
    use("shell", command="echo mine > a"),
    use("edit", path="a", old="mine", new="still mine"),
    (other(place, "echo theirs > b"), use("shell", command="sleep 0.1; echo mine >> a")),
  )
  assert [CHANGED in text for text in said] == [False] * 5 + [True]
  assert f"{CHANGED}b (changed)" in said[5]


def test_a_directory_that_is_gone_and_a_command_that_was_stopped(place):
  said = played(
    place,
    use("shell", command="mkdir -p d && cd d && pwd"),
    (other(place, "rmdir /work/d"), use("shell", command="true")),
    use("shell", command="true"),
    use("shell", command="cd /work"),
    use("shell", command="sleep 5", timeout=0.2),
  )
  assert ["directory is gone" in text for text in said] == [False, True, False, False, False]
  assert "shell was stopped at its time limit" in said[4]


def test_many_files_and_strange_names(place):
  place.run('for i in $(seq 62); do echo $i > "f \'$i"; done')
  reads = [use("read", path=f"f '{i}") for i in range(1, 63)]
  said = played(
    place, *reads, (other(place, 'for i in $(seq 62); do echo x > "f \'$i"; done'), use("list"))
  )
  assert "(changed) and 52 more." in said[-1] and said[-1].count("(changed)") == 8


@pytest.mark.slow
def test_a_file_that_only_git_knows():
  with make_sandbox(None, "process", accept_no_isolation=True) as sandbox:
    place = Workspace(sandbox)
    place.run(
      "git init -q . && git config user.email a@b && git config user.name a && mkdir d &&"
      " echo one > d/a && echo one > b && git add . && git commit -qm x"
    )
    said = played(
      place,
      use("shell", command="echo mine > b"),
      (other(place, "echo theirs > d/a"), use("list")),
      use("list"),
    )
    place.close()
  assert [CHANGED in text for text in said] == [False, True, False]
  assert f"{CHANGED}d/a (changed)" in said[1]
