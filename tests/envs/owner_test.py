"""Owners, and what is left after one died: by kill -9, by SIGTERM, by an ordinary end."""

import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from rome.envs import owner
from rome.envs.backends import podman_containers
from rome.envs.sandbox import sweep

BACKENDS = [pytest.param("podman", marks=pytest.mark.slow), "bubblewrap", "process"]

OWNER = """
import sys, time
from rome.envs.sandbox import make_sandbox
boxes = [make_sandbox(backend=sys.argv[1], accept_no_isolation=True) for _ in range(2)]
boxes[0].run("sleep 7331 & setsid sleep 7331 &")
print(*[box.id for box in boxes], flush=True)
if sys.argv[2] == "wait":
  time.sleep(60)
"""


def test_label_names_one_process_for_ever():
  assert not owner.is_dead(owner.label())
  boot, namespace, pid, start = owner.label().split(":")
  assert int(pid) == os.getpid()
  assert owner.is_dead(f"{boot}:{namespace}:{pid}:{int(start) - 1}")  # the pid was given out anew
  assert owner.is_dead(f"another-boot:{namespace}:{pid}:{start}")
  assert not owner.is_dead(f"{boot}:1:{pid}:{int(start) - 1}")  # another pid namespace: cannot know
  assert not owner.is_dead("nonsense")
  child = subprocess.Popen(["sleep", "60"])
  label = owner.label(child.pid)
  assert not owner.is_dead(label)
  child.kill()
  for _ in range(100):  # a zombie is dead, though its parent has not looked
    if owner.is_dead(label):
      break
    time.sleep(0.01)
  assert owner.is_dead(label)
  child.wait()


def test_runtime_dir_must_be_ours(tmp_path, monkeypatch):
  monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path)[:48])
  (tmp_path / f"rome-{os.getuid()}").mkdir(mode=0o777)
  (tmp_path / f"rome-{os.getuid()}").chmod(0o777)
  if len(str(tmp_path)) <= 48:
    with pytest.raises(PermissionError, match="mode 0700"):
      owner.runtime_dir()
  monkeypatch.setenv("XDG_RUNTIME_DIR", "/nonexistent")
  assert owner.runtime_dir().stat().st_mode & 0o777 == 0o700


def start_owner(backend, mode):
  process = subprocess.Popen(
    [sys.executable, "-c", OWNER, backend, mode], stdout=subprocess.PIPE, text=True
  )
  return process, process.stdout.readline().split()


def leftovers(names):
  """What of these sandboxes is on the machine: directories, containers, processes."""
  left = [name for name in names if (owner.runtime_dir() / name).exists()]
  left += [name for name, _ in podman_containers.list_containers() if name in names]
  for pid in filter(str.isdigit, os.listdir("/proc")):
    try:
      command = open(f"/proc/{pid}/cmdline").read()
    except OSError:
      continue
    left += [command for name in [*names, "sleep\0007331"] if name in command]
  return left


def eventually_gone(names):
  for _ in range(100):
    if not leftovers(names):
      return True
    time.sleep(0.05)
  return False


@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_outlives_a_killed_owner(own_runtime_dir, backend):
  process, names = start_owner(backend, "wait")
  try:
    assert len(names) == 2 and set(names) <= set(leftovers(names))
    sweep()
    assert set(names) <= set(leftovers(names))  # its owner lives: left alone
  finally:
    process.send_signal(signal.SIGKILL)
    process.wait()
  assert set(names) <= set(sweep())
  assert eventually_gone(names), leftovers(names)


@pytest.mark.parametrize("backend", BACKENDS)
def test_sigterm_closes(backend):
  process, names = start_owner(backend, "wait")
  process.terminate()
  assert process.wait(timeout=30) == 128 + signal.SIGTERM
  assert eventually_gone(names), leftovers(names)


@pytest.mark.parametrize("backend", BACKENDS)
def test_ordinary_end_closes(backend):
  process, names = start_owner(backend, "end")
  assert process.wait(timeout=30) == 0
  assert eventually_gone(names), leftovers(names)


def test_sweep_ends_the_processes_it_finds_recorded(own_runtime_dir):
  """A rocklet normally ends with its owner; the record is for one that could not."""
  stray = subprocess.Popen(["sleep", "60"])
  name = f"rome-test-{os.getpid()}"
  home = owner.new_dir(name)
  boot, namespace, pid, start = owner.label().split(":")
  (home / "owner").write_text(f"{boot}:{namespace}:{pid}:1")
  (home / "process").write_text(owner.label(stray.pid))
  assert name in owner.sweep_dirs()
  assert stray.wait(timeout=5) == -signal.SIGKILL and not home.exists()
  innocent = subprocess.Popen(["sleep", "60"])
  home = owner.new_dir(name)
  (home / "owner").write_text(f"{boot}:{namespace}:{pid}:1")
  (home / "process").write_text(f"{boot}:{namespace}:{innocent.pid}:1")  # its number's last owner
  owner.sweep_dirs()
  assert innocent.poll() is None
  innocent.kill()
  innocent.wait()


def test_sweep_bears_directories_that_vanish_meanwhile(tmp_path, monkeypatch):
  monkeypatch.setattr(owner, "runtime_dir", lambda: tmp_path)
  stop = threading.Event()

  def come_and_go():
    while not stop.is_set():
      for i in range(50):
        (tmp_path / f"rome-{i}").mkdir()
      for i in range(50):
        (tmp_path / f"rome-{i}").rmdir()

  thread = threading.Thread(target=come_and_go)
  thread.start()
  try:
    end = time.monotonic() + 0.5
    while time.monotonic() < end:
      assert owner.sweep_dirs() == []
  finally:
    stop.set()
    thread.join()
