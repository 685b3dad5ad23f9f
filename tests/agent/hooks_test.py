"""Hooks: real commands that block, warn, add, hang, flood and leave processes behind."""

import json
import time

import pytest

from rome.agent.context import Context
from rome.agent.executor import Executor
from rome.agent.hooks import EVENTS, MAX_STOPS, Hook, Hooks, run
from rome.agent.loop import Limits, Loop, drive
from rome.agent.model import Call, ModelReply, ModelSettings
from rome.agent.tools.base import EXECUTE, Tool, ToolResult, parameters
from rome.agent.tools.task import AgentDefinition, Surroundings, task_tool

SHELL = Tool(
  "shell",
  "",
  parameters({"command": {"type": "string"}}),
  lambda arguments: ToolResult(f"ran {arguments['command']}", facts={"exit_code": 0}),
  EXECUTE,
  parallel=True,
)


class Script:
  def __init__(self, *replies):
    self.replies, self.requests = list(replies), []

  def complete(self, request):
    self.requests.append(request)
    return self.replies.pop(0)


def play(hooks, *replies, prompt="go"):
  executor = Executor([SHELL], [hooks.gate], [hooks.observe])
  context = Context(ModelSettings("m", 50), executor.schemas(), 100_000)
  script = Script(*replies)
  return drive(Loop(context, executor, Limits(), [hooks]).run(prompt), script), script.requests


def call(command):
  return Call("", "shell", json.dumps({"command": command}))


def said(request):
  return [message["content"] for message in request.messages]


def test_every_event_reaches_its_commands(tmp_path):
  hooks = Hooks({event: [Hook("cat >> told; echo >> told")] for event in EVENTS}, tmp_path, "s1")
  hooks.fire("SetUpEnvironment")
  hooks.fire("UserPromptSubmit", prompt="go")
  play(hooks, ModelReply("", (call("ls"),)), ModelReply("done"))
  hooks.subagent("tester").final(None, "tested")
  hooks.fire("Notification", message="a yes is wanted")
  hooks.fire("SessionEnd", reason="answered")
  told = [json.loads(line) for line in (tmp_path / "told").read_text().splitlines()]
  assert {one["event"] for one in told} == set(EVENTS)
  assert {(one["session"], one["directory"]) for one in told} == {("s1", str(tmp_path))}
  by_event = {one["event"]: one for one in told}
  pre, post = by_event["PreToolUse"], by_event["PostToolUse"]
  assert (pre["tool"], pre["kind"], pre["arguments"]) == ("shell", "execute", {"command": "ls"})
  assert (post["result"], post["outcome"]) == ("ran ls", "ok")
  assert by_event["Stop"]["answer"] == "done" and by_event["SubagentStop"]["agent"] == "tester"


def test_a_hook_blocks_a_call(tmp_path):
  check = Hook("grep -q 'rm ' && { echo 'no rm here' >&2; exit 2; }; exit 0", "sh.*")
  hooks = Hooks({"PreToolUse": [check, Hook("exit 7", "other")]}, tmp_path)
  replies = ModelReply("", (call("rm x"), call("ls"))), ModelReply("done")
  _, (_, second) = play(hooks, *replies)
  assert said(second)[2:] == ["blocked by a hook: no rm here", "ran ls"]


def test_what_hooks_say_reaches_the_model(tmp_path):
  def say(**what):
    return Hook(f"echo '{json.dumps(what)}'")

  hooks = Hooks(
    {
      "SessionStart": [say(additional_context="the branch is main")],
      "PreToolUse": [say(decision="warn", reason="slow")],
      "PostToolUse": [say(decision="block", reason="secret")],
    },
    tmp_path,
  )
  _, (first, second) = play(hooks, ModelReply("", (call("ls"),)), ModelReply("done"))
  told = "go\n\n<system-reminder>\nthe branch is main\n</system-reminder>"
  assert said(first) == [told]
  result, reminders = said(second)[2:]
  assert result == "it ran, but a hook withholds the result: secret"
  assert reminders == "<system-reminder>\na hook warns: slow\n</system-reminder>"


def test_a_stop_may_be_refused_so_often(tmp_path):
  lines = []
  hooks = Hooks({"Stop": [Hook("echo 'tests fail' >&2; exit 2")]}, tmp_path, warn=lines.append)
  outcome, requests = play(hooks, *[ModelReply(f"done {i}") for i in range(9)])
  assert (outcome.reason, outcome.text) == ("answered", f"done {MAX_STOPS}")
  assert "a hook does not let you stop yet: tests fail" in said(requests[1])[-1]
  assert len(lines) == 1 and "refused 3 answers" in lines[0]


def test_a_sub_agent_has_its_own_stop_and_hears_its_own_warnings(tmp_path):
  check = Hook("""echo '{"decision": "warn", "reason": "slow"}'""")
  stop = Hook("grep -q '\"stops\": 0' && { echo 'say more' >&2; exit 2; }; exit 0")
  hooks = Hooks({"PreToolUse": [check], "SubagentStop": [stop]}, tmp_path)
  definition = AgentDefinition("tester", "Tests.", "You test.")
  settings = ModelSettings("m", 50)
  around = Surroundings(
    settings, 9000, None, [hooks.gate], [hooks.observe], lambda name: [hooks.subagent(name)]
  )
  executor = Executor([SHELL, task_tool([definition], [SHELL], around)], [])
  context = Context(settings, executor.schemas(), 100_000)
  task = Call("", "task", json.dumps({"agent": "tester", "instruction": "test it"}))
  script = Script(
    ModelReply("", (task,)),
    ModelReply("", (call("ls"),)),
    ModelReply("fine"),
    ModelReply("fine, all 3 pass"),
    ModelReply("done"),
  )
  drive(Loop(context, executor, Limits(), [hooks]).run("go"), script)
  heard, refused, told = (said(request) for request in script.requests[2:])
  assert "a hook warns: slow" in heard[-1] and "say more" in refused[-1]
  assert told[-1] == "fine, all 3 pass"  # and no reminder of what was the sub-agent's


@pytest.mark.parametrize(
  ("command", "outcome", "reason"),
  [
    ("exit 0", "ok", ""),
    ("echo fine", "ok", ""),
    ("exec >&- 2>&-; exit 0", "ok", ""),
    ("echo bad >&2; exit 1", "failed", "exit 1: bad"),
    ("exit 2", "block", "it gave no reason"),
    ("/no/such/program", "failed", "exit 127"),
    ("echo '{'", "failed", "no JSON"),
    ('echo \'{"decision": "maybe"}\'', "failed", "no decision 'maybe'"),
    ("echo '{\"decision\": [1]}'", "failed", "no decision [1]"),
    ("kill -9 $$", "failed", "exit -9"),
    ("printf '\\377\\0' >&2; exit 2", "block", "\ufffd"),
  ],
)
def test_what_an_exit_means(command, outcome, reason, tmp_path):
  ran = run(Hook(command, timeout=20), b"x" * 300_000, str(tmp_path))
  assert ran.outcome == outcome and reason in ran.reason


def test_a_hook_that_hangs_ends_with_all_its_processes(tmp_path):
  hang = Hook("trap '' TERM; sleep 1000 & echo $! > pid; sleep 1000", timeout=0.5)
  lines = []
  hooks = Hooks({"PreToolUse": [hang], "PostToolUse": [hang]}, tmp_path, warn=lines.append)
  _, (_, second) = play(hooks, ModelReply("", (call("ls"),)), ModelReply("done"))
  assert "did not end within 0.5 s and was killed" in said(second)[2]  # a check that never passed
  assert len(lines) == 0
  assert hooks.observe(SHELL, {}, ToolResult("kept")).text == "kept"
  assert len(lines) == 1 and "did not end within 0.5 s" in lines[0]
  _wait_gone(int((tmp_path / "pid").read_text()))


def test_what_a_hook_leaves_behind_is_ended(tmp_path):
  ran = run(Hook("sleep 1000 & echo $! > pid", timeout=20), b"", str(tmp_path))
  assert ran.outcome == "ok"
  _wait_gone(int((tmp_path / "pid").read_text()))
  away = Hook("setsid sleep 9 & sleep 0.2; echo '{}'", timeout=5)  # beyond the group, holds a pipe
  assert run(away, b"", str(tmp_path)).outcome == "ok"


def test_a_flood_is_cut_and_ends(tmp_path):
  ran = run(Hook("yes >&2", timeout=0.5), b"", str(tmp_path))
  assert ran.outcome == "timeout"
  much = Hook("head -c 30000000 /dev/zero | tr '\\0' x >&2; exit 2", timeout=60)
  ran = run(much, b"", str(tmp_path))
  assert ran.outcome == "block" and len(ran.reason) == 4000


def test_words_of_the_model_stay_data(tmp_path):
  hooks = Hooks({"PreToolUse": [Hook("cat > told")]}, tmp_path)
  hostile = "'; touch owned; $(touch owned) `touch owned` \ud800 \x00"
  assert hooks.gate(SHELL, {"command": hostile}) is None
  assert not (tmp_path / "owned").exists()
  assert json.loads((tmp_path / "told").read_text())["arguments"] == {"command": hostile}


def test_settings_that_are_wrong(tmp_path):
  with pytest.raises(ValueError, match="no event 'PreTool'; there are: PreToolUse"):
    Hooks({"PreTool": []}, tmp_path)
  with pytest.raises(ValueError, match=r"matcher '\(' is no regular expression"):
    Hooks({"PreToolUse": [Hook("true", "(")]}, tmp_path)
  ran = run(Hook("true"), b"", str(tmp_path / "gone"))
  assert ran.outcome == "failed" and "cannot start" in ran.reason


def _wait_gone(pid):
  deadline = time.monotonic() + 10
  while _alive(pid):
    assert time.monotonic() < deadline
    time.sleep(0.02)


def _alive(pid):
  try:
    with open(f"/proc/{pid}/stat") as file:
      return file.read().rsplit(")", 1)[1].split()[0] != "Z"
  except FileNotFoundError:
    return False
