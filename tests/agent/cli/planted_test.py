"""What git on this host would obey and the agent put there: it is told, whatever way it goes."""

import subprocess

import pytest

from rome.agent.cli.main import main
from rome.agent.cli.planted import Planted

EVIL = 'git config -f .git/e/config core.fsmonitor "touch ran"'


@pytest.mark.parametrize(
  ("command", "told"),
  [
    ("git init -q in; touch in/.git/hooks/post-commit", "in/.git/hooks/post-commit"),
    (f"mkdir .git/e; cp -r .git/HEAD .git/refs .git/e; {EVIL}", ".git/e/config"),
    ("echo e > .git/commondir", ".git/commondir"),
    ("echo '[core]' > .git/config.worktree", ".git/config.worktree"),
    ("mkdir d; echo 'gitdir: ../x' > d/.git", "d/.git"),
    ("mkdir d; ln -s ../x d/.git", "d/.git"),
    ("mkdir -p d/refs; touch d/HEAD; git init -q d/in", "d/in/.git/config"),
    ("git init -q --bare a/b/c", "a/b/c/config"),
    ("mkdir -p b/refs b/h; touch b/HEAD; ln -s h b/hooks", "b/hooks"),
    ("mkfifo .git/config.worktree", ".git/config.worktree"),
    ("mkdir -p $(printf 'd/%.0s' {1..150})", "(more directories than are looked at)"),
  ],
)
def test_what_is_new_is_told_once(tmp_path, command, told):
  subprocess.run(["git", "init", "-q", tmp_path], check=True)
  planted = Planted(str(tmp_path))
  (tmp_path / "file").write_text("x")
  assert planted.news() == []
  subprocess.run(["bash", "-c", command], cwd=tmp_path, check=True)
  assert told in planted.news() and planted.news() == []


def test_what_was_there_is_told_where_it_changes(tmp_path):
  subprocess.run(["git", "init", "-q", tmp_path / "in"], check=True)
  planted = Planted(str(tmp_path))
  with open(tmp_path / "in/.git/config", "a") as config:
    config.write("[core]\n  fsmonitor = false\n")
  assert planted.news() == ["in/.git/config"]


PLANTS = """
- calls: [{shell: {command: "mkdir .git/e; git config -f .git/e/config core.fsmonitor 'touch ran';
    echo ref > .git/e/HEAD; mkdir .git/e/refs; echo e > .git/commondir"}}]
- text: Done.
"""


def test_a_person_is_told_before_git_is_used(project, script, capsys):
  assert main(["-p", "go", script(PLANTS), "--permission-mode=full"]) == 0
  out, error = capsys.readouterr()
  assert out == "Done.\n" and error.count("\n") == 1
  assert "git on your side would obey" in error and ".git/commondir" in error
