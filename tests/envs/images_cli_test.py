"""`rome sandbox images`: what it prints and how it ends."""

import os

import pytest

from rome.envs import hub, sandbox_cli

pytestmark = pytest.mark.slow


def test_list_build_gc(tmp_path, monkeypatch, capsys):
  monkeypatch.setattr(hub, "PREFIX", f"localhost/rome-hub-test-{os.getpid()}/")
  (tmp_path / "tiny").mkdir()
  text = 'name = "tiny"\nbase = "rome-base"\ncommands = ["true"]'
  (tmp_path / "tiny/recipe.toml").write_text(text)
  source = ["--source", str(tmp_path)]
  assert sandbox_cli.main(["images", "list", *source]) == 0
  tag = hub.EnvHub(tmp_path).tag("tiny")
  assert capsys.readouterr().out.splitlines()[1].split() == ["tiny", "not", "built", "never", tag]
  assert sandbox_cli.main(["images", "build", "tiny", *source]) == 0
  assert capsys.readouterr().out == f"{tag}\n"
  sandbox_cli.main(["images", "list", *source])
  assert "MB" in capsys.readouterr().out
  assert sandbox_cli.main(["images", "gc", "--max_gb=0"]) == 0
  assert capsys.readouterr().out == f"{tag}\n1 removed\n"


def test_errors_are_one_line(tmp_path, capsys):
  assert sandbox_cli.main(["images", "build", "rust"]) == 2
  known = "agent-python, llm, mini-swe-agent, polyglot, python"
  assert f"no recipe 'rust'; there are {known}" in capsys.readouterr().err
  assert sandbox_cli.main(["images", "list", "--source", f"{tmp_path}/x"]) == 2
  assert capsys.readouterr().err.count("\n") == 1
  assert sandbox_cli.main(["images", "gc", "--max_gb=-1"]) == 2
