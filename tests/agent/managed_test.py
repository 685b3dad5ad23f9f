"""The scaffold as the agent of an episode: in a real sandbox, by token ids, over rewrites."""

import json

import pytest

from rome.agent import NewRow
from rome.agent.assemble import Parts, assemble
from rome.agent.loop import drive
from rome.agent.managed import ManagedAgent, demonstration, scaffold
from rome.agent.model import Call, ModelReply
from rome.agent.settings import load_file
from rome.agent.workspace import Workspace
from rome.envs import TerminalEnv, generate, make_sandbox
from rome.envs.sandbox import SandboxError
from rome.envs.scoring import stage_task
from rome.text import ByteTokenizer
from rome.text.render import Renderer

T = ByteTokenizer()
TASK = generate("count", 3)
FILE = """
model = "rome"
max_tokens = 60
context_tokens = 6000
memory = false
limits = { turns = 12 }
permissions = { mode = "full" }
tools = { only = ["shell", "read", "todo"] }
"""


@pytest.fixture(scope="module")
def sandbox():
  with make_sandbox(backend="bubblewrap") as made:
    yield made


@pytest.fixture
def make_agent(sandbox, tmp_path):
  envs = []

  def make(text=FILE, max_reply=60, context=6000, max_turns=12, command_timeout=10.0):
    path = tmp_path / "agent.toml"
    path.write_text(text)
    envs.append(TerminalEnv(TASK, sandbox=sandbox))
    make_one = scaffold(str(path), max_reply, context, max_turns, command_timeout)
    return make_one(envs[-1], T, system="", max_turns=max_turns)

  yield make
  for env in envs:
    env.close()


def say(text):
  return [T.call, *T.encode(text), T.end]


def play(agent, replies):
  """Contexts as the policy saw them, and how often a row began."""
  contexts, rows = [list(agent.begin())], 0
  for reply in replies:
    more = agent.act(reply)
    if more is None:
      break
    if isinstance(more, NewRow):
      rows += 1
      contexts.append(list(more.ids))
    else:
      contexts.append([*contexts[-1], *reply, *more])
  return contexts, rows


def test_a_demonstration_solves_its_task(make_agent):
  agent = make_agent()
  contexts, rows = play(agent, demonstration(T, TASK.solution))
  assert (agent.reward, agent.end_reason, rows) == (1.0, "submitted", 0)
  assert [turn.action for turn in agent.turns][-1] == "done"
  assert [turn.exit_code for turn in agent.turns] == [0, 0, None]
  text = T.decode(contexts[-1])
  assert text.startswith("<|bos|><|system|>You are a coding agent")
  assert "tools: shell(command,timeout) read(" in text and TASK.instruction in text
  assert f"<|assistant|><|call|>shell {TASK.solution[0]}<|end|><|tool|>" in text


def test_a_policy_that_never_answers_is_judged_at_its_last_turn(make_agent):
  agent = make_agent()
  play(agent, [say(f"shell echo {i}") for i in range(20)])
  assert (agent.reward, agent.end_reason, len(agent.turns)) == (0.0, "max_turns", 12)


def test_a_compaction_begins_a_row_with_the_objective(make_agent):
  small = FILE.replace("6000", "2400") + "[skills.compress]\nturns = 1\n"
  agent = make_agent(small, context=2400)
  look = say("shell seq 1 120")
  contexts, rows = play(agent, [look] * 11)
  assert rows >= 1
  assert all(len(context) + 60 <= 2400 for context in contexts)
  for context in contexts:
    text = T.decode(context)
    assert TASK.instruction in text and text.count("<|system|>") == 1


def test_a_step_of_the_trainer_is_a_step_of_the_loop(make_agent, sandbox, tmp_path):
  """The bytes of every request are those of the same loop, driven over messages."""
  agent = make_agent()
  replies = [say(f"shell {line}") for line in TASK.solution]
  replies += [say("read nothing.txt"), [*T.encode("done"), T.end]]
  wires, ids = [], []
  context = agent.begin()
  for reply in replies:
    wires.append(agent.request.wire())
    ids.append(list(agent.request.ids))
    context = agent.act(reply)
  assert context is None

  sandbox.reset()
  stage_task(TASK, sandbox)
  agency = assemble(load_file(tmp_path / "agent.toml"), Workspace(sandbox), Parts(Renderer(T)))

  class Scripted:
    def __init__(self):
      self.sent, self.ids = [], []

    def complete(self, request):
      self.sent.append(request.wire())
      self.ids.append(list(request.ids))
      message = Renderer(T).parse(replies[len(self.sent) - 1], request.tools, (T.end,))
      calls = tuple(
        Call("any", c["function"]["name"], c["function"]["arguments"])
        for c in message.get("tool_calls", ())
      )
      return ModelReply(message["content"], calls)

  model = Scripted()
  outcome = drive(agency.loop().run(TASK.instruction), model)
  assert outcome.reason == "answered"
  assert model.sent == wires
  assert model.ids == ids  # spelled again from text, as these replies were
  assert json.loads(wires[0])["model"] == "rome"


@pytest.mark.parametrize(
  ("old", "new", "says"),
  [
    ("max_tokens = 60", "max_tokens = 61", "max_tokens is 61, but must be agent.max_reply=60"),
    ("memory = false", "memory = true", "memory is True"),
    ("turns = 12", "turns = 13", "agent.max_turns=12"),
    ("turns = 12", "turns = 12, seconds = 1", "a run has no clock"),
    ('model = "rome"', "modle = 3", "no setting modle"),
    ("memory = false", 'memory = false\n[mcp.x]\ncommand = ["y"]', "mcp"),
  ],
)
def test_a_file_that_contradicts_the_run_is_one_line(make_agent, old, new, says):
  text = FILE.replace(old, new) if "[mcp" not in new else FILE + '[mcp.x]\ncommand = ["y"]\n'
  with pytest.raises(ValueError, match=says.split(" is ")[0]) as error:
    make_agent(text)
  assert says in str(error.value) and "\n" not in str(error.value)


def test_a_prompt_that_leaves_no_room_is_given_as_it_is(make_agent):
  """Whoever has the engine refuses it; where that has room, the episode ends at once."""
  agent = make_agent(FILE.replace("6000", "130"), context=130)
  contexts, _ = play(agent, [say("shell ls")])
  assert len(contexts[0]) + 60 > 130 and contexts[0][-1] == T.assistant
  assert (agent.reward, agent.end_reason) == (0.0, "context_full")


def test_commands_of_a_reply_share_the_runs_timeout(make_agent):
  """Else a policy could sleep until its episode counts as a failure of the infrastructure."""
  agent = make_agent(command_timeout=3.0)
  agent.begin()
  said = T.decode(agent.act(say('shell {"command": "sleep 60", "timeout": 600}')))
  assert "[timed out at the 3 s of a reply's calls and stopped" in said
  again = T.decode(agent.act(say("shell echo a")))
  assert again == "<|tool|>a<|end|><|assistant|>"  # each reply has it anew


@pytest.mark.parametrize("end", ["stop", "answer"])
def test_an_episode_leaves_no_session_behind(make_agent, end):
  agent = make_agent()
  agent.begin()
  agent.act(say("shell echo a"))
  if end == "stop":
    agent.stop("context_full")
  else:
    assert agent.act([*T.encode("done"), T.end]) is None
  with pytest.raises(SandboxError):
    agent._workspace.ask("echo a")


def test_it_has_what_rollouts_ask_of_agents(make_agent):
  from rome.agent.custom import check_agent

  assert isinstance(check_agent(make_agent()), ManagedAgent)
