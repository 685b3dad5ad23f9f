"""All plugs together, as the guide joins them: the code is the guide's."""

import json
import pathlib
import re
import sys

import pytest

from rome.agent.model import Call, ModelReply
from rome.agent.settings import consent, load
from rome.agent.tools.base import EXECUTE, Tool, ToolResult, parameters

HERE = pathlib.Path(__file__).parent
GUIDE = HERE.parents[1] / "docs" / "guides" / "agent.md"
SERVER = [sys.executable, str(HERE / "mcp_server.py")]
SHELL = Tool(
  "shell",
  "Runs a command.",
  parameters({"command": {"type": "string"}}),
  lambda arguments: ToolResult(f"ran {arguments['command']}"),
  EXECUTE,
  subject=lambda arguments: arguments["command"],
)


class Script:
  """A model that gives these replies and keeps the requests."""

  def __init__(self, *replies):
    self.replies, self.requests = list(replies), []

  def complete(self, request):
    self.requests.append(request)
    return self.replies.pop(0)


def call(name, **arguments):
  return Call("", name, json.dumps(arguments))


def block(language):
  """The one of a language in the guide's section on configuration."""
  section = GUIDE.read_text().split("\n## Configuration\n")[1].split("\n## ")[0]
  (text,) = re.findall(rf"```{language}\n(.*?)```", section, re.DOTALL)
  return text


@pytest.fixture
def answer():
  """The function of the guide's section on configuration."""
  code = block("python")
  names: dict = {}
  exec(compile(code, str(GUIDE), "exec"), names)
  return names["answer"]


def test_the_guides_example_file_is_read(tmp_path, monkeypatch):
  monkeypatch.setenv("HOME", str(tmp_path))
  (tmp_path / ".rome").mkdir()
  (tmp_path / ".rome" / "agent.toml").write_text(block("toml"))
  settings = load(tmp_path, environment={}).settings
  assert settings.limits.turns == 50 and settings.mcp["git"].command == ("mcp-server-git",)


def test_a_session_with_all_plugs(tmp_path, monkeypatch, answer):
  home, project = tmp_path / "home", tmp_path / "project"
  monkeypatch.setenv("HOME", str(home))
  monkeypatch.setenv("ROME_GLOBAL_MEMORY", str(tmp_path / "none"))
  (project / ".rome" / "workflows").mkdir(parents=True)
  (project / "ROME.md").write_text("Indent by 2.")
  (project / ".rome" / "workflows" / "check.md").write_text(
    "---\narguments: [what]\n---\nCheck $what."
  )
  (project / ".rome" / "agent.toml").write_text(
    'model = "m"\n[permissions]\nmode = "auto"\nallow = ["shell(ls *)", "x__echo"]\n'
    f"[mcp.x]\ncommand = {json.dumps(SERVER)}\n"
    "[[hooks.PreToolUse]]\nmatcher = 'shell'\n"
    "command = 'grep -q secret && { echo no secrets >&2; exit 2; }; exit 0'\n"
    "[[hooks.SessionEnd]]\ncommand = 'cat > ended'\n"
  )
  calls = (
    call("shell", command="ls src"),
    call("shell", command="ls secret"),
    call("shell", command="ls; make"),
    call("x__echo", text="hi"),
    call("x__die"),
  )
  script = Script(ModelReply("", calls), ModelReply("it is fine"))
  assert answer(project, "/check src", script, [SHELL]) == "it is fine"
  told = [message["content"] for message in script.requests[1].messages[3:]]
  assert len(script.requests[0].tools) == 1 and told[0].startswith("denied: shell wants a yes")
  consent(load(project).withheld)
  script = Script(ModelReply("", calls), ModelReply("it is fine"))
  assert answer(project, "/check src", script, [SHELL]) == "it is fine"
  first, second = script.requests
  system, user = (message["content"] for message in first.messages)
  assert "Indent by 2." in system and user == "Check src."
  assert "x__echo" in [tool["function"]["name"] for tool in first.tools]
  ran, hooked, denied, echoed, unasked = (message["content"] for message in second.messages[3:])
  assert (ran, hooked) == ("ran ls src", "blocked by a hook: no secrets")
  assert denied.startswith("denied: shell wants a yes in mode auto, and nobody is there to ask")
  assert echoed == '{"text": "hi"}' and unasked.startswith("denied: x__die wants a yes")
  assert json.loads((project / "ended").read_text())["reason"] == "answered"
