"""`rome agent -p`: outputs, exit codes, mad endpoints, signals, conversations taken up."""

import contextlib
import itertools
import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time

import jax
import pytest

from rome import models
from rome.agent import openai_model, sessions
from rome.agent.cli.main import main, parser
from rome.agent.cli.place import open_place
from rome.agent.world import SandboxConfig
from rome.text import ByteTokenizer
from tests.agent.raw_server import DONE, chunk, events, http, serving, whole

ROOT = pathlib.Path(__file__).parents[3]


def test_text_and_the_exit_code_of_an_answer(project, script, capsys):
  assert main(["-p", "fix it", script(), "--permission-mode=full"]) == 0
  assert capsys.readouterr().out == "Fixed; the test passes.\n"
  assert "$1 + $2" in (project / "add.sh").read_text()
  assert (project / "add.sh").stat().st_uid == os.getuid()


def test_streamed_json_and_a_limit_and_the_conversation_goes_on(project, script, capsys):
  stream = ["--output=stream-json", "--permission-mode=auto"]
  assert main(["-p", "fix it", script(), *stream, "--max-turns=3"]) == 3
  lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
  assert [line["type"] for line in lines if line["type"] != "text"] == [
    *("session", *["reply", "result"] * 3, "outcome")
  ]
  results = [line["outcome"] for line in lines if line["type"] == "result"]
  assert results == ["denied", "ok", "ok"]  # nobody is there to say yes to a command
  assert lines[-1]["reason"] == "max_turns" and lines[-1]["session"] == lines[0]["id"]
  assert main(["--continue", "-p", "go on", script(), "--output=json"]) == 0
  told = json.loads(capsys.readouterr().out)
  assert (told["reason"], told["session"]) == ("answered", lines[0]["id"])
  assert main(["--resume", lines[0]["id"][:15], "--export=out.json"]) == 0
  trajectory = json.loads((project / "out.json").read_text())
  sources = [step["source"] for step in trajectory["steps"]]
  assert sources == ["system", "user", "agent", "agent", "agent", "agent", "user", "agent"]
  script("- {text: Again.}\n" * 9)
  assert main(["--import=out.json", "-p", "and?", script("- {text: Again.}\n" * 9)]) == 0


def test_plan_only_reads(project, script, capsys):
  assert main(["-p", "fix it", script(), "--permission-mode=plan"]) == 0
  assert "$1 - $2" in (project / "add.sh").read_text()


def test_settings_of_the_directory_count_but_for_what_wants_consent(project, script, capsys):
  (project / ".rome").mkdir()
  (project / ".rome/agent.toml").write_text(
    'permissions.mode = "full"\nlimits.turns = 3\ntools.off = ["memory"]\n'
  )
  (project / "ROME.md").write_text("- Tests are in test.sh.\n")
  assert main(["-p", "fix it", script()]) == 3
  assert "nobody has consented" in capsys.readouterr().err
  assert "$1 - $2" in (project / "add.sh").read_text()
  assert main(["-p", "fix it", script(), "--trust", "--max-turns=9"]) == 0
  assert "$1 + $2" in (project / "add.sh").read_text()
  messages = sessions.settled(sessions.load(sessions.find(cwd=str(project))))
  assert "Tests are in test.sh." in messages[0]["content"]


def test_hooks_hear_a_session_and_may_refuse_it(project, script, capsys):
  home = pathlib.Path(os.environ["HOME"])
  (home / ".rome").mkdir()
  note = f"python3 -c 'import json,sys; print(json.dumps(json.load(sys.stdin)))' >> {home}/heard"
  events = ("SetUpEnvironment", "UserPromptSubmit", "SessionStart", "Stop", "SessionEnd")
  hooks = "".join(f"[[hooks.{event}]]\ncommand = {json.dumps(note)}\n" for event in events)
  (home / ".rome/agent.toml").write_text(hooks)
  assert main(["-p", "fix it", script(), "--permission-mode=full"]) == 0
  heard = [json.loads(line) for line in (home / "heard").read_text().splitlines()]
  assert [one["event"] for one in heard] == list(events)
  assert heard[1]["prompt"] == "fix it" and heard[-1]["reason"] == "answered"
  for event, code, says in (
    ("UserPromptSubmit", 130, "keeps this from the model: not now"),
    ("SetUpEnvironment", 2, "refuses the environment: not now"),
  ):
    refusing = f'[[hooks.{event}]]\ncommand = "echo not now >&2; exit 2"\n'
    (home / ".rome/agent.toml").write_text(refusing)
    assert main(["-p", "fix it", script()]) == code
    assert says in capsys.readouterr().err


@pytest.mark.parametrize(
  ("argv", "says"),
  [
    (["-p", "x"], "no model"),
    (["-p", "x", "--model=script:/nowhere"], "cannot be read"),
    (["-p", "x", "--model=nothing"], "there is no directory"),
    (["-p", " ", "--model=script:x"], "instruction is empty"),
    (["-p", "x", "SCRIPT", "--tools=shel"], "named 'shel'"),
    (["-p", "x", "SCRIPT", "--sandbox=none"], "isolates nothing"),
    (["-p", "x", "SCRIPT", "--image=x"], "--image needs"),
    (["-p", "x", "SCRIPT", "--resume=zzz"], "no conversation"),
    (["-p", "x", "SCRIPT", "--continue"], "no conversation"),
    (["-p", "x", "SCRIPT", "--allow-host=x"], "x"),
    (["SCRIPT"], "no terminal"),
  ],
)
def test_bad_usage_is_one_line(project, script, capsys, argv, says):
  assert main([script() if one == "SCRIPT" else one for one in argv]) in (1, 2)
  error = capsys.readouterr().err
  assert says in error and error.count("\n") == 1 and error.startswith("rome agent: ")


def test_a_tokenizer_that_is_none_is_one_line(project, script, capsys, monkeypatch):
  monkeypatch.setenv("ROME_AGENT_TOKENIZER", "/nowhere")
  assert main(["-p", "x", script()]) == 2
  error = capsys.readouterr().err
  assert error.startswith("rome agent: tokenizer: /nowhere has neither") and error.count("\n") == 1


def test_an_output_is_shown_as_far_as_in_training(project):
  with open_place(parser().parse_args([])) as sandbox:
    assert sandbox.limits.output_bytes == SandboxConfig().limits().output_bytes


def test_home_is_no_place_to_work_in(project, script, capsys, monkeypatch):
  monkeypatch.chdir(os.environ["HOME"])
  assert main(["-p", "x", script()]) == 1
  assert "change into the directory of one project" in capsys.readouterr().err


def test_the_instruction_on_stdin_goes_out_as_the_loop_made_it(project, capsys, monkeypatch):
  monkeypatch.setenv("MY_KEY", "secret")
  with serving(whole("", ("shell", '{"command": "echo hi"}')), whole("done")) as server:
    read, write = os.pipe()
    os.write(write, b"say hi")
    os.close(write)
    with open(read) as stdin:
      monkeypatch.setattr(sys, "stdin", stdin)
      options = [f"--endpoint={server.url}", "--model=m", "--api-key-variable=MY_KEY"]
      assert main(["-p", "-", *options, "--permission-mode=full", "--system=Be brief."]) == 0
  first, second = (json.loads(body) for body in server.bodies)
  assert first["messages"] == [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "say hi"},
  ]
  assert second["messages"][:2] == first["messages"] and second["tools"] == first["tools"]
  assert second["messages"][3] == {"role": "tool", "tool_call_id": "call_0_0", "content": "hi"}
  assert list(first) == ["model", "messages", "tools", "max_tokens"]


def test_thinking_is_told_and_goes_back_also_in_a_conversation_gone_on_with(project, capsys):
  def replying(delta):
    return events(chunk({"reasoning_content": "Hm."}), chunk(delta), chunk({}, "stop"), DONE)

  function = {"name": "shell", "arguments": '{"command": "echo hi"}'}
  call = {"index": 0, "id": "c", "type": "function", "function": function}
  answers = replying({"tool_calls": [call]}), replying({"content": "done"})
  with serving(*answers, answers[1]) as server:
    options = [f"--endpoint={server.url}", "--model=m", "--permission-mode=full"]
    options += ["--output=stream-json"]
    assert main(["-p", "say hi", *options]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert main(["--continue", "-p", "and?", *options]) == 0
  told = [line for line in lines if line["type"] in ("thinking", "reply")]
  assert [line.get("text") or line["reasoning_content"] for line in told] == ["Hm."] * 4
  bodies = [json.loads(body)["messages"] for body in server.bodies]
  for before, after in itertools.pairwise(bodies):
    assert after[: len(before)] == before
    assert [m.get("reasoning_content") for m in after[len(before) :]][0] == "Hm."


@pytest.mark.parametrize(
  "answer",
  [
    None,
    http(b"garbage"),
    events(chunk({"content": "half"})),
    events(b'data: {"choices": [{"delta": {"content": "' + b"x" * (10 << 20), DONE),
  ],
)
def test_an_endpoint_that_is_dead_or_mad(project, capsys, monkeypatch, answer):
  monkeypatch.setattr(openai_model, "_BACKOFF", 0.01)
  with socket.create_server(("127.0.0.1", 0)) as taken:
    url = f"http://127.0.0.1:{taken.getsockname()[1]}/v1"
  with serving(answer or b"") as server:
    where = url if answer is None else server.url
    assert main(["-p", "x", "--model=m", f"--endpoint={where}", "--output=stream-json"]) == 1
  out, error = capsys.readouterr()
  assert error.count("\n") == 1 and "rome agent: " in error and len(error) < 600
  assert json.loads(out.splitlines()[-1])["reason"] == "error"


SLEEPS = """
rules:
- when: "^go$"
  calls: [{shell: {command: "echo begun > begun; sleep 86399"}}]
- text: Done.
"""


def start(project, option, *more):
  environment = {**os.environ, "PYTHONPATH": str(ROOT)}
  command = [sys.executable, "-m", "rome.cli", "agent", "-p", "go", option, *more]
  process = subprocess.Popen(
    [*command, "--permission-mode=full", "--output=json"],
    env=environment,
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
    preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
  )
  wait_for(lambda: (project / "begun").exists())
  return process


def wait_for(what, seconds=60):
  deadline = time.monotonic() + seconds
  while not what():
    assert time.monotonic() < deadline, "it did not come"
    time.sleep(0.05)


def sleeper():
  """Whether the command of SLEEPS runs anywhere."""
  for path in pathlib.Path("/proc").glob("[0-9]*/cmdline"):
    try:
      if path.read_bytes() == b"sleep\x0086399\x00":
        return True
    except OSError:
      pass
  return False


@pytest.mark.slow
def test_killed_in_the_middle_it_leaves_nothing_and_is_taken_up(project, script, capsys):
  process = start(project, script(SLEEPS))
  assert sleeper()
  process.kill()
  process.communicate(timeout=30)
  wait_for(lambda: not sleeper())
  assert main(["--continue", "-p", "go on", script(SLEEPS), "--output=json"]) == 0
  messages = sessions.settled(sessions.load(sessions.find(cwd=str(project))))
  roles = [m["role"] for m in messages]
  assert roles == ["system", "user", "assistant", "tool", "assistant", "user", "assistant"]
  assert messages[3]["content"] == sessions.UNKNOWN and messages[-1]["content"] == "Done."


@pytest.mark.slow
def test_a_checkpoint_is_served_while_the_agent_lives(project, tmp_path, capsys):
  config = models.PRESETS["micro"]
  models.save(tmp_path / "model", config, models.init_params(config, jax.random.key(0)))
  ByteTokenizer().save(tmp_path / "model")
  options = ["--tools=todo", "--system=x", "--context=512", "--max-tokens=8", "--max-turns=1"]
  options += ["--temperature=0", "--output=json"]  # drawn tokens might end the reply
  assert main(["-p", "go", f"--model={tmp_path}/model", *options]) == 3
  told = json.loads(capsys.readouterr().out)
  assert told["reason"] == "max_turns" and told["tokens"]["completion"] == 8
  for path in pathlib.Path("/proc").glob("[0-9]*/cmdline"):
    with contextlib.suppress(OSError):
      assert f"{tmp_path}/model" not in path.read_text(errors="replace")


@pytest.mark.slow
def test_ctrl_c_stops_the_tool_and_then_the_turn(project, script):
  process = start(project, script(SLEEPS))
  process.send_signal(signal.SIGINT)
  out, error = process.communicate(timeout=60)
  assert process.returncode == 130 and json.loads(out)["reason"] == "stopped", error
  assert not sleeper()
  messages = sessions.settled(sessions.load(sessions.find(cwd=str(project))))
  assert messages[3]["content"].endswith("[interrupted by the user]")
  assert messages[-1] == {"role": "assistant", "content": sessions.INTERRUPTED}
  assert not list(sessions.sessions_dir().glob("*.undo"))
