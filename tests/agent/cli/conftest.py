"""A project with a bug, a home of its own, and `rome agent` in it."""

import subprocess

import pytest

FIX = """
- text: I run the tests first.
  calls: [{shell: {command: "bash test.sh"}}]
- calls: [{read: {path: add.sh}}]
- text: The sign is wrong.
  calls: [{edit: {path: add.sh, old: "$1 - $2", new: "$1 + $2"}}]
- calls: [{shell: {command: "bash test.sh"}}]
- text: Fixed; the test passes.
"""


@pytest.fixture
def project(tmp_path, monkeypatch):
  """The current directory: a repository with a failing test."""
  home, path = tmp_path / "home", tmp_path / "project"
  home.mkdir()
  path.mkdir()
  # What is compiled and built once is kept outside the home.
  from rome.envs.rocklet import cache_dir

  monkeypatch.setenv("XDG_CACHE_HOME", str(cache_dir().parent))
  monkeypatch.setenv("HOME", str(home))
  for name in ("ROME_AGENT_MODEL", "ROME_AGENT_ENDPOINT", "OPENAI_API_KEY", "NO_COLOR"):
    monkeypatch.delenv(name, raising=False)
  subprocess.run(["git", "init", "-q", path], check=True)
  (path / "add.sh").write_text("add() {\n  echo $(($1 - $2))\n}\n")
  (path / "test.sh").write_text(
    '. ./add.sh\n[ "$(add 2 3)" = 5 ] && echo ok && exit\n'
    'echo "FAIL: 2 + 3 is $(add 2 3)"\nexit 1\n'
  )
  monkeypatch.chdir(path)
  return path


@pytest.fixture
def script(tmp_path):
  """Makes a scripted model of a text; returns its option."""

  def make(text: str = FIX) -> str:
    path = tmp_path / "script.yaml"
    path.write_text(text)
    return f"--model=script:{path}"

  return make
