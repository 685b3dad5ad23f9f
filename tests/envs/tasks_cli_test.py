"""`rome tasks`: what it prints and its exit status."""

import dataclasses

import pytest

from rome.envs import families, task, tasks_cli


def test_list_names_every_family_with_an_example(capsys):
  assert tasks_cli.main(["list"]) == 0
  lines = capsys.readouterr().out.splitlines()
  assert [line.split()[0] for line in lines] == list(families.FAMILIES)
  assert "How many lines in" in lines[0]


def test_show_prints_everything_about_a_task(capsys):
  made = families.generate("edit", 2)
  assert tasks_cli.main(["show", "edit/2"]) == 0
  shown = capsys.readouterr().out
  for path, file in made.files.items():
    assert f"--- {path} (mode 644, " in shown and file.data.decode() in shown
  assert made.instruction in shown and made.solution[0] in shown and made.tests in shown


@pytest.mark.parametrize(
  ("argv", "message"),
  [
    (["show", "nope/1"], "unknown task family 'nope'"),
    (["check", "nope"], "unknown task 'nope'"),
    (["check", "--seeds=0"], "--seeds=0 leaves nothing to check"),
  ],
)
def test_bad_input_is_one_line_and_status_2(argv, message, capsys):
  assert tasks_cli.main(argv) == 2
  error = capsys.readouterr().err
  assert message in error and error.count("\n") == 1


def test_check_admits_generated_tasks_and_refuses_bad_ones(capsys, tmp_path):
  assert tasks_cli.main(["check", "count", "move/5", "--seeds=2", "--backend=bubblewrap"]) == 0
  assert capsys.readouterr().out == "3 of 3 tasks admitted (bubblewrap)\n"
  task.save_task(dataclasses.replace(families.generate("count", 0), tests="true"), tmp_path / "t")
  assert tasks_cli.main(["check", str(tmp_path / "t"), "--backend=bubblewrap"]) == 1
  assert capsys.readouterr().out == (
    "count/0: the tests pass although nothing was done\n0 of 1 tasks admitted (bubblewrap)\n"
  )
