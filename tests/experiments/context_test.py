"""The tasks of the experiment on context, its policy, and its report."""

import dataclasses
import json
import subprocess
import sys

import pytest

from experiments.contexts import report
from experiments.contexts.families import FACT, FAMILIES, LARGE, LETTERS, SMALL
from experiments.contexts.play import TECHNIQUES, Result, arms, play
from experiments.contexts.policy import Scripted, look
from experiments.contexts.teacher import demonstrate
from experiments.contexts.vocabulary import tokenizer
from rome.agent.model import ModelRequest, ModelSettings
from rome.envs import make_sandbox


@pytest.mark.slow
@pytest.mark.parametrize("size", [LARGE, SMALL], ids=["large", "small"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_task_is_solved_by_doing_its_units_once_and_not_otherwise(family, size):
  task = FAMILIES[family](3, size)
  with make_sandbox(None, "bubblewrap") as sandbox:
    for path, text in task.files.items():
      sandbox.write_file(path, text.encode())
    if task.change:
      sandbox.write_file(task.change[0], task.change[1].encode())
    facts = {}
    for unit in task.units:
      found = _output(sandbox, unit)
      if unit.name not in found and unit.backup:
        found = dict(FACT.findall(sandbox.run(unit.backup["command"]).output))
      facts |= found
    names = task.wanted or [unit.name for unit in task.units]
    answer = size.answer({name: facts[name] for name in names})
    assert task.solved(answer, sandbox)
    assert not task.solved(answer[:-1], sandbox) and not task.solved(f"{answer} 7", sandbox)
    if task.once:
      _output(sandbox, task.units[0])
      assert not task.solved(answer, sandbox)


def _output(sandbox, unit):
  if unit.tool == "shell":
    return dict(FACT.findall(sandbox.run(unit.arguments["command"]).output))
  lines = sandbox.read_file(unit.arguments["path"]).decode().split("\n")
  first = unit.arguments.get("offset", 1) - 1
  return dict(FACT.findall("\n".join(lines[first : first + unit.arguments.get("limit", 9999)])))


def test_families_are_made_of_their_seed_alone():
  for make in FAMILIES.values():
    assert make(1) == make(1) and make(1).answer != make(2).answer


def test_a_summary_says_what_is_stale_and_the_todo_list_still_has():
  task = FAMILIES["shared"](0, SMALL)
  note = "removed from the context.\nFACT a = kelp\nFACT b = unknown\nThe todo list:\nFACT b = iris"
  view = look(task, request(task, {"role": "user", "content": note}).messages)
  assert view.facts == {"a": "kelp"} and view.stale == {"b"}


def test_names_of_small_tasks_tell_what_comes_next():
  for make in FAMILIES.values():
    assert "".join(unit.name for unit in make(1, SMALL).units) == LETTERS


def request(task, *messages, purpose="turn"):
  tools = [{"function": {"name": "read"}}]
  first = {"role": "user", "content": task.objective}
  return ModelRequest([first, *messages], tools, ModelSettings("m", 9), purpose=purpose)


def test_the_policy_knows_only_what_it_sees():
  task = FAMILIES["facts"](0)
  first, second = (unit.name for unit in task.units[:2])
  call = {"id": "c", "function": {"name": "read", "arguments": '{"path": "docs/1"}'}}
  turn = [
    {"role": "assistant", "content": "", "tool_calls": [call]},
    {"role": "tool", "tool_call_id": "c", "content": f"words\nFACT {first} = 7\nwords"},
  ]
  policy = Scripted(task, 0)
  (asked,) = policy.complete(request(task)).calls
  assert json.loads(asked.arguments) == {"path": "docs/1"}
  reply = policy.complete(request(task, *turn))
  assert json.loads(reply.calls[0].arguments) == {"path": "docs/2"}
  assert Scripted(task, 0).complete(request(task, *turn)) == reply
  view = look(task, request(task, *turn).messages)
  assert view.facts == {first: "7"} and view.far > 0 and not view.rewritten
  note = {"role": "user", "content": f"removed from the context. FACT {second} = 9"}
  assert look(task, request(task, note).messages).facts == {second: "9"}
  changed = {"role": "user", "content": "Somebody else changed files: docs/1 (changed)."}
  assert look(task, request(task, *turn, changed).messages).facts == {}


@pytest.mark.slow
def test_episodes_repeat_and_need_what_they_are_meant_to_need():
  whole = play("busy", "all", 1, Scripted)
  assert whole.solved and whole == play("busy", "all", 1, Scripted)
  nothing = play("busy", "none", 1, Scripted)
  assert (nothing.solved, nothing.reason, nothing.rewrites) == (False, "context_full", 0)


def chunks(row):
  """What the policy is to say, reply by reply."""
  said = [row.tokens[row.call_ids == call].tolist() for call in range(row.num_chunks)]
  return [tokenizer().decode(ids) for ids in said]


@pytest.mark.slow
def test_demonstrations_are_rows_of_replies_and_lossy_summaries_are_only_read():
  whole, rows = demonstrate("facts", "compaction", 1000)
  assert whole.solved and whole.rewrites == len(rows) - 1 > 0
  said = [chunks(row) for row in rows]
  assert said[0][0] == "<|call|>read docs/a<|end|>"
  assert all(row[-1].startswith("Found so far:\nFACT a = ") for row in said[:-1])
  assert said[-1][-1] == f"{FAMILIES['facts'](1000, SMALL).answer}<|end|>"
  _, lossy = demonstrate("facts", "compaction", 1000, lossy=True)
  text = tokenizer().decode(lossy[0].tokens.tolist())
  assert text.endswith("<|end|>") and "Found so far" in text
  assert not any("Found" in reply for row in lossy for reply in chunks(row))


@pytest.mark.slow
def test_a_policy_is_trained_and_takes_part(tmp_path):
  weights, out = tmp_path / "weights", tmp_path / "out"
  run("experiments.contexts.train", f"--workdir={weights}", "--episodes=20", "--steps=2",
      "--batch=4", "--model=micro")  # fmt: skip
  assert len((weights / "metrics.jsonl").read_text().splitlines()) == 2
  run("experiments.context", f"--workdir={out}", f"--model={weights}", "--scale=small",
      "--seeds=1", "--families=facts", "--arms=compaction", "--jobs=1")  # fmt: skip
  (episode,) = json.loads((out / "results.json").read_text())["episodes"]
  assert episode["turns"] > 0 and episode["sampled"] > 0 and not episode["solved"]


def run(module, *arguments):
  command = [sys.executable, "-m", module, *arguments]
  done = subprocess.run(command, capture_output=True, text=True, timeout=250)
  assert done.returncode == 0, done.stderr


def test_arms_take_each_technique_off_and_on():
  sets = arms()
  assert sets["none"] == frozenset() and sets["all"] == frozenset(TECHNIQUES)
  for name in TECHNIQUES:
    assert sets["all"] - sets[f"all - {name}"] == {name}


def test_the_report_counts_what_was_solved_and_pairs_episodes(tmp_path):
  whole = Result("log", "all", 0, True, "answered", 9, 1, 2000, 1000, 50)
  results = [
    whole,
    dataclasses.replace(whole, seed=1),
    dataclasses.replace(whole, arm="all - todo", solved=False),
    dataclasses.replace(whole, arm="all - todo", seed=1, solved=False, reason="max_turns"),
  ]
  text = report.tables(results)
  assert "| all | 2/2 | 2/2 = 1.00 [0.34, 1.00] | 9.0 | 1.0 | 2.0 | 1.0 | 0.1 |" in text
  assert "| todo | 2 | 0 | log 2 |" in text
  assert "| all - todo | max_turns 1, wrong answer 1 |" in text
  report.draw(tmp_path / "x.png", results)
  assert (tmp_path / "x.png").stat().st_size > 5000
