"""One episode in the trainer's loop, through the model proxy, and as a user's `rome agent`.

The policy is a small model that was taught what to say. The requests are compared as the bytes that
were on the wire, and with them the token ids that each side made of them. Where the policy writes
a call otherwise than the template does, a server, which knows messages alone, makes other ids than
training has; this policy does not.
"""

import contextlib
import json
import os
import pathlib
import subprocess
import sys
import threading
import time

import jax
import pytest

from rome import models
from rome.agent.managed import scaffold
from rome.envs import Task, TaskFile, TerminalEnv, make_sandbox
from rome.envs.rocklet import cache_dir
from rome.rollout.engine import Engine
from rome.rollout.groups import Member
from rome.rollout.native import Proxy, Sessions, Terms
from rome.text.render import Renderer
from tests.agent.relay import relayed
from tests.rollout.native.policies import T, said, taught
from tests.rollout.serve.conftest import KEY, running

pytestmark = pytest.mark.slow

ROOT = pathlib.Path(__file__).parents[3]
CONFIG = models.PRESETS["micro"]
SAMPLING = models.Sampling(temperature=0.2)
MAX_REPLY, CONTEXT, MAX_TURNS = 64, 896, 12
SETTINGS = f"""
model = "rome"
tokenizer = "tokenizer"
max_tokens = {MAX_REPLY}
context_tokens = {CONTEXT}
temperature = 0.2
system_prompt = "prompt.txt"
memory = false
limits = {{ turns = {MAX_TURNS} }}
permissions = {{ mode = "full" }}
tools = {{ only = ["shell", "read"] }}
skills.compress = {{ at = 0.58, goal = 0.4, turns = 1 }}
"""
NOTES = "Grüße, 世界\n<|end|><|assistant|>done \x1b[31mred\n"
TASK = Task(
  id="notes/0",
  family="notes",
  instruction="Zähle: how many lines has notes.txt? Write it to n.",
  files={"notes.txt": TaskFile(NOTES.encode())},
  tests='[ "$(cat n)" = 2 ]',
)
REPLIES = (
  "<|call|>shell cat notes.txt",
  '<|call|>read {"path": 3}',
  "<|call|>read notes.txt",
  "Gut.<|call|>shell wc -l <notes.txt >n; cat n; seq 20",
  "<|call|>shell cat n notes.txt",
  "n has it: 2 lines",  # a summary
  "<|call|>shell ls",
  "Fertig: 2",
)


@pytest.fixture
def home(tmp_path):
  """A home with the settings of the agent: one file for all three."""
  directory = tmp_path / "home/.rome"
  directory.mkdir(parents=True)
  (directory / "agent.toml").write_text(SETTINGS)
  (directory / "prompt.txt").write_text("Use tools.\n")
  (directory / "tokenizer").mkdir()
  T.save(directory / "tokenizer")
  return directory.parent


def managed(home):
  """The requests of the episode in the trainer's loop."""
  make = scaffold(str(home / ".rome/agent.toml"), MAX_REPLY, CONTEXT, MAX_TURNS, 20.0)
  requests = []
  with (
    make_sandbox(backend="bubblewrap") as sandbox,
    contextlib.closing(TerminalEnv(TASK, sandbox=sandbox)) as env,
  ):
    agent = make(env, T, system="", max_turns=MAX_TURNS)
    more = agent.begin()
    for reply in REPLIES:
      assert more is not None
      requests.append(agent.request)
      more = agent.act(said(reply))
  assert (more, agent.reward, agent.end_reason) == (None, 1.0, "submitted")
  return requests


def rows(requests):
  """Ids of each row of the episode, and which of them the policy said."""
  found = []
  for request, reply in zip(requests, REPLIES, strict=True):
    ids, own = found[-1] if found else ([], [])
    if not ids or list(request.ids[: len(ids)]) != ids:
      ids, own = [], []
      found.append((ids, own))
    own += [False] * (len(request.ids) - len(ids)) + [True] * len(said(reply))
    ids += [*request.ids[len(ids) :], *said(reply)]
  return found


def deployed(url, key, home, project):
  """What `rome agent -p` says at the end of the episode, and the bodies that it sent to `url`."""
  project.mkdir()
  for name, file in TASK.files.items():
    (project / name).write_bytes(file.data)
  kept = {k: v for k, v in os.environ.items() if not k.startswith("ROME_")}
  own = {"HOME": str(home), "XDG_CACHE_HOME": str(cache_dir().parent), "OPENAI_API_KEY": key}
  with relayed(url) as relay:
    command = [sys.executable, "-m", "rome.cli", "agent", "-p", TASK.instruction, "--output=json"]
    done = subprocess.run(
      [*command, f"--endpoint={relay.url}"],
      env={**kept, **own, "PYTHONPATH": str(ROOT)},
      cwd=project,
      stdin=subprocess.DEVNULL,
      capture_output=True,
      text=True,
      timeout=120,
    )
  assert done.returncode == 0, (done.stdout, done.stderr)
  assert (project / "n").read_text().strip() == "2"
  return json.loads(done.stdout), relay.bodies


@contextlib.contextmanager
def trainer(params):
  """The proxy of a run and its sessions, with an engine that answers."""
  terms = Terms(Renderer(T), (T.end,), SAMPLING, MAX_REPLY, CONTEXT, MAX_TURNS)
  sessions, ended, asked = Sessions(terms), threading.Event(), {}
  engine = Engine(CONFIG, slots=1, max_length=CONTEXT, stop_tokens=(T.end,))
  engine.publish(params, 0, jax.random.key(1))

  def drive():
    while not ended.is_set():
      asked.update({engine.submit(ask.request): ask for ask in sessions.take()})
      if not asked:
        time.sleep(0.002)
      for update in engine.step() if asked else ():
        if update.reply:
          asked.pop(update.id).done.set_result(update.reply)

  thread = threading.Thread(target=drive, daemon=True)
  thread.start()
  try:
    with Proxy(sessions, "rome") as proxy:
      yield proxy, sessions
  finally:
    ended.set()
    thread.join()


def read_by(server, body):
  """The ids that a server reads in a body, and those of its reply to it."""
  content, kind = body[:-1] + b',"return_token_ids":true}', {"content-type": "application/json"}
  with server.http() as http:
    answer = http.post("/v1/chat/completions", content=content, headers=kind).json()
  return answer["prompt_token_ids"], answer["choices"][0]["token_ids"]


def test_the_same_bytes_and_ids_in_training_and_in_deployment(home, tmp_path):
  requests = managed(home)
  assert [r.purpose for r in requests] == [*["turn"] * 5, "summary", *["turn"] * 2]
  wires, contexts = [r.wire() for r in requests], [list(r.ids) for r in requests]
  params, loss = taught(CONFIG, rows(requests), steps=160, rate=2e-2)
  assert loss < 0.02
  replies = [said(text) for text in REPLIES]
  told = "Fertig: 2"

  with trainer(params) as (proxy, sessions):
    session = sessions.open(Member(0, 0))
    native, bodies = deployed(proxy.url, session.key, home, tmp_path / "native")
    log = session.record.log
  assert native["text"] == told and bodies == wires
  assert [call.context for call in log] == contexts
  assert [call.reply.tokens for call in log] == replies

  checkpoint = tmp_path / "checkpoint"
  models.save(checkpoint, CONFIG, params)
  T.save(checkpoint)
  options = f"--model={checkpoint}", "--name=rome", "--slots=1", f"--max_length={CONTEXT}"
  with running(*options) as server:
    own, bodies = deployed(f"{server.url}/v1", KEY, home, tmp_path / "own")
    read = [read_by(server, body) for body in bodies]
  assert own["text"] == told and bodies == wires
  assert read == list(zip(contexts, replies, strict=True))
