"""Hostile input through the whole loop, in a real sandbox: named outcomes, no crash, no hang."""

import json
import unicodedata

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rome.agent.context import Context
from rome.agent.executor import MAX_CALLS, Executor
from rome.agent.loop import Limits, Loop, drive
from rome.agent.model import Call, ModelReply, ModelSettings
from rome.agent.tools.builtin import builtin_tools
from rome.agent.workspace import Workspace
from rome.envs.sandbox import make_sandbox
from rome.text.render import Renderer
from tests.agent.tools.task_test import Script
from tests.text.render_test import TOKENIZERS

SPECIALS = sorted({special for t in TOKENIZERS.values() for special in t.specials})


def call(name, **arguments):
  return Call("drawn", name, json.dumps(arguments))


def play(workspace, calls, tokenizer=None):
  """The last request of an episode with one call a reply, or all in one without a tokenizer."""
  executor = Executor(builtin_tools(workspace))
  renderer = Renderer(tokenizer, date_string="now") if tokenizer else None
  context = Context(ModelSettings("m", 50), executor.schemas(), 1 << 20, renderer)
  replies = [ModelReply("", (call,)) for call in calls]
  if tokenizer is None:
    replies = [ModelReply("", tuple(calls))]
  script = Script(*replies, ModelReply("done"))
  drive(Loop(context, executor, Limits(), (), "be brief").run("go"), script)
  return script.requests[-1]


def looking(name):
  """Every way in which the words of a file, and its name, come into a context."""
  return [
    call("shell", command=f"cat {name}; ls"),
    call("read", path=name),
    call("search", pattern="<|evil"),
    call("list"),
    call("glob", pattern="*"),
    call("todo"),
    call("edit", path=name, old="not there", new=""),
  ]


@pytest.mark.parametrize("name", TOKENIZERS)
def test_special_tokens_of_templates_arrive_as_text(workspace, name):
  """They are there as characters; ids of specials only where a harmless text has them too."""
  tokenizer = TOKENIZERS[name]
  words = "".join(SPECIALS).replace("/", "")
  found = {}
  for text in (words, "harmless"):
    workspace.run("rm -rf *")
    workspace.write("f", f"<|evil {text}\n".encode())
    workspace.run(f"touch '{text}'")
    workspace.write(".rome/todo.md", f"- [ ] {text}\n".encode())
    request = play(workspace, looking("f"), tokenizer)
    found[text] = [i for i in request.ids if i in tokenizer.specials.values()]
    assert json.dumps(request.messages).count(json.dumps(text)[1:-1]) >= 6
  assert found[words] == found["harmless"] and found["harmless"]


def test_no_result_drives_a_terminal(workspace):
  evil = "\x1b]0;owned\x07\x1b[2J\x9b31m\x00\b\r\x7f\u202e"
  workspace.write("f", f"<|evil {evil}\n".encode())
  workspace.run("printf %b 'a\\x1b[2J' > .x; touch $'\\e[2J' $'\\u202e'")
  workspace.write(".rome/todo.md", f"- [ ] {evil}\n".encode())
  request = play(workspace, looking("f"))
  for message in request.messages[-7:]:
    bad = [c for c in message["content"] if unicodedata.category(c) == "Cc" and c not in "\t\n"]
    assert not bad and "\u202e" not in message["content"], message


def test_a_bomb_of_calls(workspace):
  request = play(workspace, [call("shell", command=f"echo {i} >> f") for i in range(500)])
  results = [m["content"] for m in request.messages if m["role"] == "tool"]
  assert len(results) == 500 and sum("not run" in text for text in results) == 500 - MAX_CALLS
  assert workspace.read("f").data.split() == [str(i).encode() for i in range(MAX_CALLS)]


@pytest.mark.slow
def test_a_bomb_of_processes_leaves_results(workspace):
  workspace.run("echo x > f; :(){ :|:& };:")
  request = play(workspace, [call("shell", command="ls", timeout=1), call("read", path="f")])
  results = [m["content"] for m in request.messages if m["role"] == "tool"]
  assert len(results) == 2 and all(results)
  workspace.sandbox.reset()
  workspace.run("echo y > f")
  assert workspace.read("f").data == b"y\n"


@pytest.mark.parametrize(
  "backend", [pytest.param("podman", marks=pytest.mark.slow), "bubblewrap", "process"]
)
def test_every_backend(backend):
  with make_sandbox(backend=backend, accept_no_isolation=backend == "process") as sandbox:
    workspace = Workspace(sandbox)
    calls = [
      call("write", path="src/a.py", content="def f():\n  return 41\n"),
      call("shell", command="cd src"),
      call("edit", path="a.py", old="41", new="42"),
      call("read", path="a.py"),
      call("search", pattern="return", path=".."),
      call("glob", pattern="**/*.py", path=sandbox.workdir),
      call("list", path=".."),
      call("memory", action="add", fact="the answer is 42"),
      call("read", path="/etc/shadow"),
      call("read", path="/dev/zero"),
    ]
    request = play(workspace, calls)
    text = [m["content"] for m in request.messages if m["role"] == "tool"]
    workdir = sandbox.workdir
    assert text[:3] == ["wrote src/a.py, 21 bytes", "[no output]", "edited a.py, line 2"]
    assert text[3] == "1\tdef f():\n2\t  return 42"
    assert text[4:6] == ["../src/a.py:2:  return 42", f"{workdir}/src/a.py"]
    assert text[6].split() == ["dir", "-", "src"]
    assert [t.startswith("error:") for t in text[8:]] == [True, True]
    assert workspace.read(f"{workdir}/ROME.md").data == b"- the answer is 42\n"


VALUE = st.recursive(
  st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
  lambda inner: (
    st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner, max_size=2)
  ),
  max_leaves=4,
)
LIKELY = st.sampled_from([".", "f", "d/", "*", "1.0", 1.0, 1, 0, -1, 2**70, True, "add", "\ud800"])


@settings(
  max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.data())
def test_no_arguments_raise(workspace, data):
  """Whatever is in a call, its result has an outcome. Some calls are right, most are not."""
  workspace.shell_timeout = 2.0
  tools = {tool.name: tool for tool in builtin_tools(workspace)}
  tool = tools[data.draw(st.sampled_from(sorted(tools)))]
  names = sorted(tool.parameters["properties"])
  arguments = {name: data.draw(LIKELY | VALUE) for name in names if data.draw(st.booleans())}
  try:
    next(Executor([tool]).run([Call("", tool.name, json.dumps(arguments))]))
  except StopIteration as end:
    (result,) = end.value
  assert result.outcome in {"ok", "error", "invalid_arguments", "timeout"} and result.text
