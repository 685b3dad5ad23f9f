"""Permissions: modes, rules, and that no command hides behind the syntax of shells."""

import json
import posixpath
import subprocess

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from rome.agent.commands import split
from rome.agent.executor import Executor
from rome.agent.model import Call
from rome.agent.permissions import MODES, Permissions, Rules, parse_rule
from rome.agent.tools.base import EXECUTE, NETWORK, NOTE, READ, WRITE, Tool, ToolResult, parameters


def tool(name, kind, key="path"):
  return Tool(
    name,
    "",
    parameters({key: {"type": "string"}}),
    lambda arguments: ToolResult("ran"),
    kind,
    subject=lambda arguments: arguments[key],
  )


SHELL = tool("shell", EXECUTE, "command")
READER, WRITER, EDITOR = tool("read", READ), tool("write", WRITE), tool("edit", WRITE)
FETCH, NOTES = tool("web__fetch", NETWORK), tool("todo", NOTE)


def gate(mode="ask", allow=(), ask=(), deny=(), person=None, root="/w"):
  return Permissions(Rules(mode, allow, ask, deny), root, person, posixpath.normpath)


def shell(gate_, command):
  return gate_.decide(SHELL, {"command": command}).verdict


@pytest.mark.parametrize(
  ("of", "path", "verdicts"),
  [
    (READER, "a", "allow allow allow allow"),
    (READER, "../a", "ask ask ask allow"),
    (READER, "", "allow allow allow allow"),
    (NOTES, "a", "allow allow allow allow"),
    (WRITER, "a", "deny ask allow allow"),
    (WRITER, "/w/b/../a", "deny ask allow allow"),
    (WRITER, "b/../../a", "deny ask ask allow"),
    (WRITER, "/w2", "deny ask ask allow"),
    (WRITER, ".git/hooks/pre-commit", "deny ask ask allow"),
    (WRITER, "a/../.rome/agent.toml", "deny ask ask allow"),
    (READER, ".rome/agent.toml", "allow allow allow allow"),
    (WRITER, ".github/a", "deny ask allow allow"),
    (FETCH, "u", "deny ask ask allow"),
  ],
)
def test_modes(of, path, verdicts):
  found = [gate(mode).decide(of, {"path": path}).verdict for mode in MODES]
  assert found == verdicts.split()


def test_modes_of_commands():
  verdicts = [shell(gate(mode), "ls > f; $x") for mode in MODES]
  assert verdicts == ["deny", "ask", "ask", "allow"]
  assert shell(gate("plan", allow=("shell",)), "ls") == "deny"


def test_a_link_does_not_lead_out_of_the_workspace(tmp_path):
  root, outside = tmp_path / "w", tmp_path / "out"
  root.mkdir(), outside.mkdir()
  (root / "link").symlink_to(outside)
  of_host = Permissions(Rules("auto"), root)
  assert of_host.decide(WRITER, {"path": "new"}).verdict == "allow"
  assert of_host.decide(WRITER, {"path": "link/new"}).verdict == "ask"


def test_relative_paths_begin_where_tools_say(tmp_path):
  at = ["/etc"]

  def place(path):
    if not at:
      raise ValueError("the directory is gone")
    return posixpath.join(at[0], path)

  moved = Permissions(
    Rules("auto", deny=("write(/etc/**)",)), "/w", None, posixpath.normpath, place
  )
  assert moved.decide(WRITER, {"path": "passwd"}).verdict == "deny"
  at[0] = "/w/sub"
  assert moved.decide(WRITER, {"path": "../a"}).verdict == "allow"
  assert moved.decide(WRITER, {"path": "../../a"}).verdict == "ask"
  at.clear()
  decision = moved.decide(WRITER, {"path": "a"})
  assert decision.verdict == "ask" and "the directory is gone" in decision.why
  assert Permissions(Rules("auto"), tmp_path).decide(WRITER, {"path": "a\0b"}).verdict == "ask"


@pytest.mark.parametrize(
  ("rule", "path", "holds"),
  [
    ("write(src/**)", "src/a/b.py", True),
    ("write(src/**)", "src", True),
    ("write(src/**)", "src/../etc", False),
    ("write(src/**)", "/src/a", False),
    ("write(src/*)", "src/a/b", False),
    ("write(**/t.py)", "t.py", True),
    ("write(**/t.py)", "a/b/t.py", True),
    ("write(*.py)", "a/b.py", True),
    ("write(/etc/**)", "/etc/passwd", True),
    ("edit(src/**)", "src/a", False),
    ("wr*", "x", True),
  ],
)
def test_patterns_of_paths(rule, path, holds):
  verdict = gate(allow=(rule,)).decide(WRITER, {"path": path}).verdict
  assert (verdict == "allow") == holds


def test_a_rule_may_name_a_kind():
  strict = gate("full", deny=("write(.git/**)", "read(.env)"))
  for of in (WRITER, EDITOR):
    assert strict.decide(of, {"path": "x/../.git/config"}).verdict == "deny"
  assert strict.decide(READER, {"path": "sub/.env"}).verdict == "deny"
  assert strict.decide(READER, {"path": "sub/env"}).verdict == "allow"


def test_the_order_of_rules():
  allow, ask, deny = ("shell(git *)",), ("shell(git push *)",), ("shell(* --force)",)
  for mode in ("ask", "auto", "full"):
    found = [
      shell(gate(mode, allow, ask, deny), f"git {x}") for x in ("log", "push", "push --force")
    ]
    assert found == ["allow", "ask", "deny"]


@pytest.mark.parametrize(
  ("command", "verdict"),
  [
    ("git status", "allow"),
    ("git  'status' -s", "allow"),
    ("git status 2>&1 | wc -l", "allow"),
    ("git status >/dev/null && wc -l\ngit status;", "allow"),
    ('git status "a; rm b"', "allow"),
    ("git statusx", "ask"),
    ("git status; make", "ask"),
    ("git status & make", "ask"),
    ("git status\nmake", "ask"),
    ("X=1 git status", "ask"),
    ("git status > f", "ask"),
    ("git status $(make)", "ask"),
    ('git status "`make`"', "ask"),
    ("git status <(make)", "ask"),
    ("git status 'a", "ask"),
    ("", "ask"),
    ("rm x", "deny"),
    ("git status && /bin/r'm' -r x", "deny"),
    ("X=1 \\rm x", "deny"),
    ("r\\\nm x", "deny"),
    ("ls | env A=1 xargs rm", "deny"),
    ("sh -c 'git status; rm x'", "deny"),
    ("find . -exec rm x ';'", "deny"),
    ("nice -n 5 bash -c \"eval 'rm x'\"", "deny"),
  ],
)
def test_a_command_is_allowed_whole_or_not(command, verdict):
  rules = gate("auto", allow=("shell(git status *)", "shell(wc *)"), deny=("shell(rm *)",))
  assert shell(rules, command) == verdict


@pytest.mark.parametrize(
  "command",
  [
    *("$(echo rm) x", "${x} y", "r? x", "~/rm", "if true; then rm x; fi", "rm(){ :; }", "! rm x"),
    *("test -v 'a[$(rm x)]'", "echo rm x | sh", "echo rm | xargs env", "alias ls=rm", ". ./f"),
    *("PS4='$(rm x)' ls", "PATH=. ls", "ls # \r rm x", "cat <<E\nE", "echo rm | xargs -I@ @"),
    *("trap 'r$y' EXIT", "coproc rm", "hash -p /bin/rm ls", "env -S 'rm x'", "{ rm x; }", "a\x00b"),
    *("eval 'r{m,} x'", "sh -c 'r?'", "find . -name r* -exec '{}' ';'", "flock f -c 'r[m] x'"),
    *("find . -name 'r*' -exec '{}' +", "ls | xargs -i '{}'", "echo rm | sudo -s", "bash -i"),
  ],
)
def test_what_cannot_be_read_is_asked(command):
  allowed = gate("full", allow=("shell",), deny=("shell(rmdir)",))
  assert shell(allowed, command) == "ask"
  assert shell(gate("full"), command) == "allow"  # where no rule would have to read it


@pytest.mark.parametrize("command", ["git pus? x", "git {push,x}", "git add *", "git -[f]"])
def test_a_pattern_may_stand_for_what_is_denied(command):
  for deny in ("shell(git push *)", "shell(* -f)"):
    assert shell(gate("full", deny=(deny,)), command) == "ask"
  assert shell(gate("full", deny=("shell(rm *)",)), command) == "allow"


CANARY = "canary"
PIECES = st.sampled_from(
  [
    *("canary", "./canary", "can", "ary", "echo", "true", "test -v", "env", "command", "eval"),
    *("sh -c", "xargs", "exec", "nohup", "find . -exec", "trap", "EXIT", "x=1", "printf", "bash"),
    *(" ", " ", " ", "\n", "\t", "\r", ";", "&", "&&", "|", "||", "|&", "<", ">", ">&", "2>&1"),
    *(">/dev/null", "<<<", "<<E", "E", "(", ")", "$(", "`", "${", "}", "{", ",", "'", '"', "\\"),
    *("\\\n", "#", "!", "$", "$'", "\\x63", "*", "?", "[", "]", "a[", "~", "=", "-", "--", "@"),
    *(
      "if",
      "then",
      "fi",
      "time",
      "-c",
      "-I@",
      "-i",
      "'{}'",
      "jobs -x",
      "flock f",
      "-v",
      ".",
      "\x0b",
      "\u00a0",
      "é",
      "^",
      "%",
    ),
  ]
)
TEXT = st.lists(PIECES, min_size=1, max_size=14).map("".join)


@pytest.fixture(scope="module")
def cage(tmp_path_factory):
  """A directory with the canary, which leaves a mark in it, and with few other programs."""
  directory = tmp_path_factory.mktemp("cage")
  (directory / CANARY).write_text("#!/bin/sh\n: > mark\n")
  (directory / CANARY).chmod(0o755)
  for name in ("env", "xargs", "find", "nohup", "sh", "bash"):
    (directory / name).symlink_to(f"/usr/bin/{name}")
  return directory


@pytest.mark.slow
@settings(max_examples=700, deadline=None)
@given(TEXT)
@example("test -v 'a[$(canary)]'")
@example("echo canary | xargs env")
@example("echo canary | bash")
@example("x=1 canary")
@example("env x=1 ./canary")
@example("true &\\\n&\\\ncan\\\nary")
@example('eval "can""ary"')
@example("trap canary EXIT")
@example("eval 'canar{y,}'")
@example("find . -name canary -exec '{}' ';'")
def test_no_syntax_of_the_shell_runs_what_is_denied(cage, text):
  """Everything is allowed but the canary; what gets through is run by bash."""
  allowed = gate("full", allow=("shell(*)",), deny=("shell(canary*)",))
  if shell(allowed, text) != "allow":
    return
  subprocess.run(
    ["/usr/bin/bash", "-c", text],
    cwd=cage,
    env={"PATH": str(cage)},
    stdin=subprocess.DEVNULL,
    stdout=subprocess.DEVNULL,
    stderr=subprocess.DEVNULL,
    timeout=10,
  )
  assert not (cage / "mark").exists()


@settings(max_examples=150, deadline=None)
@given(st.text("ab '\"\\;|$\n#()`!é=0>&2", max_size=14))
@example("a'b\"c'\"d'\\x\"\\e")
def test_words_are_those_of_bash(text):
  """printf shows what bash takes the words for, where they are clear and one command's."""
  text = f"printf '%s\\0' w {text}"
  try:
    (found,) = split(text)
  except ValueError:
    return
  ran = subprocess.run(["bash", "-c", text], capture_output=True, cwd="/")
  assert list(found.words[2:]) == ran.stdout.decode().split("\0")[:-1]


def run(gate_, arguments, of=SHELL):
  try:
    next(Executor([of], [gate_]).run([Call("", of.name, json.dumps(arguments))]))
  except StopIteration as end:
    return end.value[0]


def test_a_person_is_asked():
  asked, answers = [], ["no", "yes", "always"]

  def person(of, arguments, why):
    asked.append(why)
    return answers.pop(0)

  asking = gate("ask", person=person, deny=("shell(rm *)",))
  outcomes = [run(asking, {"command": "make"}).outcome for _ in range(5)]
  assert outcomes == ["denied", "ok", "ok", "ok", "ok"] and len(asked) == 3
  assert asked[0] == "shell wants a yes in mode ask"
  assert run(asking, {"command": "rm x"}).text.startswith("denied: the rule shell(rm *) forbids it")
  assert len(asked) == 3


def test_always_is_for_the_same_arguments_where_a_tool_has_no_subject():
  asked = []
  server = Tool("s__do", "", {"type": "object"}, lambda arguments: ToolResult("ran"), NETWORK)
  asking = gate(person=lambda of, arguments, why: asked.append(arguments) or "always")
  for arguments in ({"to": "a"}, {"to": "a"}, {"to": "b"}):
    assert run(asking, arguments, server).outcome == "ok"
  assert asked == [{"to": "a"}, {"to": "b"}]


@pytest.mark.parametrize(
  ("mode", "of", "says"),
  [
    ("plan", WRITER, "mode auto (in the workspace) or an allow rule"),
    ("ask", WRITER, "mode auto (in the workspace) or an allow rule would allow it"),
    ("auto", SHELL, "mode full or an allow rule would allow it"),
  ],
)
def test_where_nobody_is_there_the_refusal_names_the_cure(mode, of, says):
  result = run(gate(mode), {_key(of): "a"}, of)
  assert result.outcome == "denied" and says in result.text


def _key(of):
  return next(iter(of.parameters["properties"]))


@pytest.mark.parametrize("text", ["", "(x)", "shell(", "shell)", "a b", "shell(x) y"])
def test_what_is_no_rule(text):
  with pytest.raises(ValueError, match="is no rule; write a tool"):
    parse_rule(text)
  with pytest.raises(ValueError, match="no permission mode 'yolo'"):
    gate("yolo")
