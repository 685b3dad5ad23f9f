"""What is said of a sandbox that dies for want of memory, and what cannot make it die."""

import os
import time

import pytest

from experiments.isolation_attacks import runner
from rome.envs.backends import podman_memory
from rome.envs.sandbox import Limits, SandboxLost, make_sandbox

# Memory files of the sandbox's own disk belong to no process that could be killed for them.
_SMALL = Limits(memory_mb=32, disk_mb=64)


def _fill(sandbox):
  for i in range(8):
    sandbox.write_file(f"fill{i}", bytes(8 << 20))


def _wait_until_gone(sandbox, pid):
  deadline = time.monotonic() + 60
  while os.path.exists(f"/proc/{pid}") and time.monotonic() < deadline:
    time.sleep(0.05)


def test_lack_of_memory_is_told_at_once_and_long_after():
  with make_sandbox(backend="podman", limits=_SMALL) as sandbox:
    with pytest.raises(SandboxLost, match="out of memory"):
      _fill(sandbox)
    deadline = time.monotonic() + 60
    time.sleep(1)
    while podman_memory.memory._groups[sandbox.id].ended is None:
      assert time.monotonic() < deadline
      time.sleep(0.05)
    with pytest.raises(SandboxLost, match="out of memory"):
      sandbox.run("true")
    assert sandbox.lost_reason() == "out of memory"
  assert sandbox.id not in podman_memory.memory._groups


def test_another_end_is_not_called_lack_of_memory():
  with make_sandbox(backend="podman") as sandbox:
    pid = sandbox.pid
    os.kill(pid, 9)
    _wait_until_gone(sandbox, pid)
    with pytest.raises(SandboxLost, match="ended|stopped|stopping|exited"):
      sandbox.run("true")
    assert "memory" not in sandbox.lost_reason()


@pytest.mark.parametrize("backend", ["podman", "bubblewrap"])
@pytest.mark.parametrize("user", ["agent", "root"])
def test_objects_without_a_process_are_bounded(backend, user):
  """Else they fill the memory, and nothing but the whole sandbox could be ended for that."""
  with make_sandbox(backend=backend) as sandbox:
    sandbox.write_file("/tmp/payload", runner.payload().read_bytes(), mode=0o755)
    session = sandbox.session("s", user=user)
    output = session.run("/tmp/payload sysv; echo 1 > /proc/sys/kernel/shmall", 60).output
    counts = [int(line.split(": ")[1].split(",")[0]) for line in output.splitlines()[:3]]
    assert counts[0] <= sandbox.limits.disk_mb and counts[1] <= 32 and counts[2] <= 128
    assert "Read-only" in output or "denied" in output
    assert sandbox.alive()


def test_events_of_version_2_are_counted():
  text = b"low 0\nhigh 0\nmax 31\noom 2\noom_kill 3\noom_group_kill 1\n"
  assert podman_memory._events(text) == 5 and podman_memory._events(b"") == 0


def test_what_is_watched_is_let_go():
  descriptors = len(os.listdir("/proc/self/fd"))
  for _ in range(2):
    with make_sandbox(backend="podman") as sandbox:
      os.kill(sandbox.pid, 9)
  with make_sandbox(backend="podman"):
    pass
  assert len(os.listdir("/proc/self/fd")) <= descriptors + 2  # a connection to Podman's service
