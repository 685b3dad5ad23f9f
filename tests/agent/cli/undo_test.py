"""/undo: files as they were, what it says of others, and that it writes nowhere else."""

import os

import pytest

from rome.agent.cli import undo as undo_lib
from rome.agent.cli.undo import Undo
from rome.envs import HostDirectory, make_sandbox


@pytest.fixture
def place(tmp_path):
  root = tmp_path / "root"
  (root / "d").mkdir(parents=True)
  with make_sandbox(backend="bubblewrap", directory=HostDirectory(str(root))) as sandbox:
    made = Undo(str(root), tmp_path / "store")
    yield root, made, sandbox
    made.close()
  assert not (tmp_path / "store").exists()


def test_what_was_changed_made_and_removed_is_taken_back(place):
  root, made, sandbox = place
  (root / "a").write_text("1")
  (root / "d/b").write_text("2")
  (root / "tool").write_text("3")
  (root / "tool").chmod(0o755)
  made.keep()
  sandbox.run("echo x > a; rm -r d; mkdir e; echo y > e/new; chmod 644 tool; ln -s a link")
  made.keep()
  sandbox.run("echo z > a")
  assert made.undo(sandbox) == ["restored a"] and (root / "a").read_text() == "x\n"
  told = made.undo(sandbox)
  assert sorted(told) == ["removed e/new", "removed link"] + [
    f"restored {name}" for name in ("a", "d/b", "tool")
  ]
  assert (root / "a").read_text() == "1" and (root / "d/b").read_text() == "2"
  assert os.access(root / "tool", os.X_OK) and not (root / "e/new").exists()
  with pytest.raises(LookupError):
    made.undo(sandbox)


def test_nothing_is_written_or_read_through_a_link(place, tmp_path):
  root, made, sandbox = place
  outside = tmp_path / "outside"
  outside.mkdir()
  (outside / "b").write_text("not ours")
  (root / "d/b").write_text("ours")
  made.keep()
  sandbox.run(f"rm -r d; ln -s {outside} d")
  told = made.undo(sandbox)
  assert (outside / "b").read_text() == "not ours"
  assert told == ["removed d", "restored d/b"] and (root / "d/b").read_text() == "ours"


def test_what_is_too_large_is_named_and_nothing_unknown_is_removed(place, monkeypatch):
  root, made, sandbox = place
  monkeypatch.setattr(undo_lib, "MAX_FILE", 10)
  (root / "big").write_text("x" * 20)
  made.keep()
  sandbox.run("echo changed > big; echo x > new")
  assert made.undo(sandbox) == ["removed new", "left as it is, too large: big"]
  monkeypatch.setattr(undo_lib, "MAX_FILES", 1)
  (root / "later").write_text("mine")
  made.keep()
  sandbox.run("echo x > new")
  (told,) = made.undo(sandbox)
  assert "not all of" in told and (root / "later").exists() and (root / "new").exists()


def test_old_states_are_dropped_with_their_copies(place, monkeypatch, tmp_path):
  root, made, sandbox = place
  monkeypatch.setattr(undo_lib, "KEPT", 2)
  for i in range(5):
    (root / "a").write_text(f"state {i}")
    made.keep()
  assert len(list((tmp_path / "store").iterdir())) == 2


def test_a_file_whose_time_was_set_back_is_brought_back(place):
  root, made, sandbox = place
  (root / "a").write_text("old")
  made.keep()
  sandbox.run("touch -r a /tmp/then; printf new > a; touch -r /tmp/then a")
  assert made.undo(sandbox) == ["restored a"] and (root / "a").read_text() == "old"


def test_directories_in_directories_without_end(place):
  root, made, sandbox = place
  (root / "a").write_text("old")
  sandbox.run("echo new > a; for i in {1..1200}; do mkdir d; cd d; done; cd /", 60)
  made.keep()
  sandbox.run(f"echo newer > {root}/a")
  assert "not all of" in made.undo(sandbox)[0] and (root / "a").read_text() == "new\n"
  assert sandbox.run(f"rm -r {root}/d", 60).exit_code == 0  # which Python's shutil cannot remove
