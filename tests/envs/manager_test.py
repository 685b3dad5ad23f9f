"""The manager over real sandboxes: admission, warm ones, time limits, deaths, and its own end.

Time limits are tested with a clock that the test sets; the reaper then works by `reap` alone.
"""

import collections
import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from rome.envs import admission, lease, lifecycle, owner
from rome.envs.admission import Capacity, CapacityExceeded
from rome.envs.common import ImageError, Limits, SandboxError, SandboxLost, SandboxSpec
from rome.envs.manager import RETENTION, Manager, make_from_spec
from rome.envs.queueing import QueueTimeout
from rome.envs.records import CreationFailed, ManagerClosed, UnknownSandbox
from rome.envs.sandbox import sweep

LIMITS = Limits(memory_mb=64, cpus=0.5, pids=32, disk_mb=4)
SPEC = SandboxSpec(backend="bubblewrap", limits=LIMITS, ttl=1000.0, idle_ttl=100.0)
OTHER = SandboxSpec(backend="bubblewrap", limits=Limits(memory_mb=80, cpus=0.5, disk_mb=4))
NEEDS = admission.needs(LIMITS)
PODMAN = pytest.param("podman", marks=pytest.mark.slow)


def room_for(count, amount=NEEDS):
  return Capacity(
    count * amount.cpus, count * amount.memory_mb, count * amount.disk_mb, count * amount.pids
  )


def eventually(condition, seconds=30.0):
  end = time.monotonic() + seconds
  while time.monotonic() < end:
    if condition():
      return True
    time.sleep(0.01)
  return False


class Clock:
  now = 100.0

  def __call__(self):
    return self.now


@pytest.fixture
def clock():
  return Clock()


@pytest.fixture
def managed():
  """Makes managers that are closed in the end and must have given everything back."""
  made = []

  def make(*args, **kwargs):
    made.append(Manager(*args, **kwargs))
    return made[-1]

  yield make
  for manager in made:
    manager.close()
    metrics = manager.metrics()
    assert metrics["used_memory_mb"] == metrics["used_pids"] == metrics["closing"] == 0
    assert metrics["total_reaper_errors"] == metrics["total_job_errors"] == 0


@pytest.mark.parametrize("backend", ["bubblewrap", PODMAN])
def test_from_request_to_deletion(managed, backend):
  manager = managed(room_for(4))
  spec = SandboxSpec(backend=backend, limits=LIMITS)
  record = manager.create(spec, tenant="me")
  assert record.state == "running" and record.host and record.error is None
  assert record.sandbox.run("echo hi").output == "hi\n"
  assert manager.get(record.id) is record and manager.list("me") == [record]
  assert manager.list("you") == []
  sandbox = record.sandbox
  manager.stop(record.id)
  assert record.state == "stopped" and record.sandbox is None
  manager.stop(record.id)
  manager.delete(record.id)
  manager.delete(record.id)
  manager.stop(record.id)
  assert [event.state for event in record.history] == ["pending", "running", "stopped", "deleted"]
  assert eventually(lambda: not sandbox.alive() and manager.metrics()["used_pids"] == 0)
  for call in (manager.get, manager.touch, manager.stop, manager.delete):
    with pytest.raises(UnknownSandbox, match="no sandbox 'sb-none'"):
      call("sb-none")


@pytest.mark.parametrize("backend", ["bubblewrap", PODMAN])
def test_a_fork_has_files_and_session_of_its_own(managed, backend):
  manager = managed(room_for(2))
  source = manager.create(SandboxSpec(backend=backend, limits=LIMITS), tenant="me")
  source.sandbox.run("cd /tmp; x=7; echo kept > note; sleep 100 &")
  copy = manager.fork(source.id)
  assert copy.id != source.id and copy.sandbox.id != source.sandbox.id
  assert (copy.tenant, copy.spec, copy.host) == ("me", source.spec, source.host)
  assert copy.sandbox.run("pwd; echo $x; cat note; jobs").output == "/tmp\n7\nkept\n"
  copy.sandbox.run("echo changed > note; x=8")
  assert source.sandbox.run("cat note; echo $x; kill %1 && echo ran").output == "kept\n7\nran\n"
  with pytest.raises(QueueTimeout, match="no room"):  # a fork takes room like any other
    manager.fork(source.id, deadline=0.2)
  manager.delete(source.id)
  assert copy.sandbox.run("cat note").output == "changed\n"
  with pytest.raises(CreationFailed, match="is deleted"):
    manager.fork(source.id)
  with pytest.raises(UnknownSandbox):
    manager.fork("sb-none")


def test_a_fork_that_fails_leaves_no_sandbox(managed):
  manager = managed(room_for(2))
  source = manager.create(SPEC)
  session = source.sandbox._session
  session.start("sleep 30")
  with pytest.raises(SandboxError):  # its state cannot be had while a command runs
    manager.fork(source.id, deadline=30)
  session.stop()
  copy = manager.list()[-1]
  assert copy.state == "deleted" and copy.history[-1].reason == "the fork failed"
  assert eventually(lambda: manager.metrics()["used_pids"] == NEEDS.pids)
  assert manager.fork(source.id, deadline=30).state == "running"


def test_a_fork_of_one_that_has_died(managed):
  manager = managed(room_for(2))
  source = manager.create(SPEC)
  os.kill(source.sandbox.pid, signal.SIGKILL)
  with pytest.raises(SandboxLost, match="is lost|ended while it was forked"):
    manager.fork(source.id, deadline=30)
  assert eventually(lambda: manager.metrics()["used_pids"] == 0)


def test_who_finds_no_room_waits_and_is_told_for_what(managed):
  manager = managed(room_for(1))
  first = manager.create(SPEC)
  with pytest.raises(
    QueueTimeout, match=r"within \d+\.\d s, 0 others.*memory_mb: 72 needed, 0 free"
  ):
    manager.create(SPEC, deadline=0.2)
  assert manager.list()[-1].state == "failed" and "no room" in manager.list()[-1].error
  waiting = manager.create(SPEC, wait=False)
  assert waiting.state == "pending" and manager.metrics()["queue_length"] == 1
  manager.stop(first.id)
  assert waiting.settled.wait(30) and waiting.state == "running"
  with pytest.raises(CapacityExceeded, match="can never start here.*memory_mb: 160"):
    manager.create(SandboxSpec(backend="bubblewrap", limits=Limits(memory_mb=128)))
  for bad in (0, -1, 1e9):
    with pytest.raises(ValueError, match="deadline"):
      manager.create(SPEC, deadline=bad)


def test_tenants_take_turns(managed):
  manager = managed(room_for(1))
  running = manager.create(SPEC, tenant="many")
  crowd = [manager.create(SPEC, tenant="many", wait=False) for _ in range(50)]
  single = manager.create(SPEC, tenant="one", wait=False)
  order = []
  for _ in range(2):
    manager.stop(running.id)
    assert eventually(lambda: any(r.state == "running" for r in [*crowd, single]))
    running = next(r for r in [*crowd, single] if r.state == "running")
    order.append(running.tenant)
  assert "one" in order
  for record in crowd:
    manager.delete(record.id)  # pending ones too
  assert manager.metrics()["queue_length"] == 0


def test_idle_and_absolute_limits(managed, clock):
  manager = managed(room_for(3), interval=3600.0, clock=clock)
  idle, busy, both = (manager.create(SPEC) for _ in range(3))
  clock.now += 99.0
  manager.touch(busy.id)
  manager.touch(both.id)
  manager.reap()
  assert {r.state for r in (idle, busy, both)} == {"running"}
  clock.now += 1.0
  manager.reap()
  assert idle.state == "stopped" and "not used for 100 s" in idle.history[-1].reason
  assert busy.state == both.state == "running"
  while clock.now < 100.0 + 1000.0:
    manager.touch(busy.id)
    manager.reap()
    clock.now += 50.0
  manager.reap()
  assert busy.state == "stopped" and "1000 s are over" in busy.history[-1].reason
  assert manager.metrics()["total_ttl"] == 1 and manager.metrics()["total_idle"] == 2


def test_deadlines_of_those_that_nobody_waits_for(managed, clock):
  go = threading.Event()

  def slow(spec):
    assert go.wait(60)
    return make_from_spec(spec)

  manager = managed(room_for(1), make=slow, interval=3600.0, clock=clock)
  starting = manager.create(SPEC, deadline=10.0, wait=False)
  queued = manager.create(SPEC, deadline=20.0, wait=False)
  clock.now += 10.0
  manager.reap()
  assert starting.state == "failed" and "still starting after 10.0 s" in starting.error
  assert queued.state == "pending"  # its room is still taken
  clock.now += 10.0
  manager.reap()
  assert queued.state == "failed" and "no room" in queued.error
  later = manager.create(SPEC, wait=False)
  go.set()
  assert later.settled.wait(30) and later.state == "running"
  assert manager.metrics()["used_pids"] == NEEDS.pids  # what came too late was closed


def test_stopped_while_it_starts(managed):
  begun, go = threading.Event(), threading.Event()

  def slow(spec):
    begun.set()
    assert go.wait(60)
    return make_from_spec(spec)

  manager = managed(room_for(1), make=slow)
  record = manager.create(SPEC, wait=False)
  assert begun.wait(30)
  manager.delete(record.id)
  assert record.state == "deleted" and manager.metrics()["used_pids"] == NEEDS.pids
  go.set()
  assert eventually(lambda: manager.metrics()["used_pids"] == 0)
  with pytest.raises(CreationFailed, match="deleted by request"):
    record.checked()


@pytest.mark.parametrize("backend", ["bubblewrap", PODMAN])
@pytest.mark.parametrize("how", ["get", "touch", "reaper"])
def test_a_sandbox_that_dies_by_itself_is_failed_and_its_room_free(managed, backend, how):
  manager = managed(room_for(2))
  spec = SandboxSpec(backend=backend, limits=LIMITS)
  record, neighbour = manager.create(spec), manager.create(spec)
  sandbox = record.sandbox
  os.kill(sandbox.pid, signal.SIGKILL)
  if how == "reaper":
    assert eventually(lambda: record.state == "failed")
  else:
    assert eventually(lambda: getattr(manager, how)(record.id).state == "failed")
  assert record.sandbox is None and record.id in record.error
  assert "its process ended with status" in record.error or "its container" in record.error
  assert record.history[-1].reason == record.error
  assert isinstance(record.cause, SandboxLost)
  assert neighbour.sandbox.run("echo well").output == "well\n"
  assert manager.create(spec, deadline=60).state == "running"
  assert manager.metrics()["total_lost"] == 1


def test_warm_ones_are_handed_out_and_replaced(managed):
  manager = managed(room_for(4), warm={SPEC: 2})
  assert eventually(lambda: manager.metrics()["warm_ready"] == 2)
  record = manager.create(SPEC)
  assert record.history[-1].reason == "started (warm)"
  assert manager.create(OTHER).history[-1].reason == "started (cold)"
  first = record.sandbox.id
  assert eventually(lambda: manager.metrics()["warm_ready"] >= 1)
  manager.stop(record.id)
  assert manager.create(SPEC).sandbox.id != first
  metrics = manager.metrics()
  assert metrics["total_warm"] == 2 and metrics["total_cold"] == 1 and metrics["handouts"] == 3
  assert metrics["used_memory_mb"] <= metrics["capacity_memory_mb"]


def test_a_dead_warm_one_is_never_handed_out(managed):
  made = []

  def make(spec):
    made.append(make_from_spec(spec))
    return made[-1]

  manager = managed(room_for(2), warm={SPEC: 1}, make=make)
  assert eventually(lambda: manager.metrics()["warm_ready"] == 1)
  os.kill(made[0].pid, signal.SIGKILL)
  record = manager.create(SPEC)
  assert record.sandbox is not made[0] and record.sandbox.run("echo hi").output == "hi\n"
  assert eventually(lambda: manager.metrics()["total_dead_warm"] == 1)
  assert eventually(lambda: manager.metrics()["warm_ready"] == 1)  # the room is used again


def test_warm_ones_give_way(managed):
  manager = managed(room_for(2), warm={SPEC: 2})
  assert eventually(lambda: manager.metrics()["warm_ready"] == 2)
  record = manager.create(OTHER, deadline=30)
  assert record.state == "running" and manager.metrics()["total_evicted"] == 2
  manager.stop(record.id)
  assert eventually(lambda: manager.metrics()["warm_ready"] == 2)


def test_a_start_that_fails(managed):
  def broken(spec):
    raise ImageError("image 'x' is not on this machine")

  manager = managed(room_for(2), make=broken, warm={SPEC: 1})
  with pytest.raises(ImageError, match="'x' is not"):
    manager.create(SPEC)
  record = manager.list()[-1]
  assert record.state == "failed" and record.error == "image 'x' is not on this machine"
  assert eventually(lambda: manager.metrics()["used_pids"] == 0)

  def buggy(spec):
    raise ZeroDivisionError("oops")

  manager = managed(room_for(1), make=buggy)
  with pytest.raises(CreationFailed, match="ZeroDivisionError: oops"):
    manager.create(SPEC)


def test_records_are_forgotten_after_a_while(managed, clock):
  manager = managed(room_for(2), interval=3600.0, clock=clock)
  gone, there = manager.create(SPEC), manager.create(SPEC)
  manager.stop(gone.id)
  clock.now += RETENTION - 1
  manager.touch(there.id)
  manager.reap()
  assert manager.get(gone.id).state == "stopped"
  clock.now += 1
  manager.reap()
  with pytest.raises(UnknownSandbox):
    manager.get(gone.id)
  assert gone.state == "deleted" and manager.get(there.id).state == "running"


def test_drain_and_close(managed):
  manager = managed(room_for(3), warm={OTHER: 1})
  record = manager.create(SPEC)
  assert eventually(lambda: manager.metrics()["warm_ready"] == 1)
  big = SandboxSpec(backend="bubblewrap", limits=Limits(memory_mb=200, cpus=0.5, disk_mb=4))
  waiting = manager.create(big, wait=False)
  assert manager.drain(0.1) == [record]
  assert waiting.state == "failed" and "drains" in waiting.error
  with pytest.raises(ManagerClosed):
    manager.create(SPEC)
  threading.Timer(0.3, manager.stop, [record.id]).start()
  assert manager.drain(30.0) == []
  manager.close()
  manager.close()
  assert manager.get(record.id).state == "stopped"


def test_close_ends_what_runs(managed):
  manager = managed(room_for(3), warm={SPEC: 1})
  sandboxes = [manager.create(SPEC).sandbox for _ in range(2)]
  waiting = manager.create(SPEC, wait=False)
  manager.close()
  assert not any(sandbox.alive() for sandbox in sandboxes)
  assert waiting.life.finished and not list(owner.runtime_dir().glob(manager._stock._lease.name))


def test_a_lost_lease_fails_what_was_under_it(managed):
  manager = managed(room_for(2), interval=3600.0)
  record = manager.create(SPEC)
  path = owner.runtime_dir() / record.sandbox.id
  assert (path / "lease").read_text() == manager._stock._lease.name
  manager._stock._lease.seconds = 0.01
  manager.reap()
  time.sleep(0.05)
  assert lease.lapsed(path, owner.is_dead)  # as a sweep of another process would
  manager.reap()
  assert record.state == "failed" and "not renewed" in record.error
  assert manager.create(SPEC).state == "running"  # under a new lease
  manager.reap()
  assert manager.metrics()["total_leases_lost"] == 1


def test_many_threads(managed):
  """Requests at once by several tenants: capacity holds, everyone is served, records are legal."""
  manager = managed(room_for(3), warm={SPEC: 1})
  over, states = [], collections.Counter()

  def work(tenant):
    for _ in range(4):
      record = manager.create(SPEC, tenant=tenant, deadline=120.0)
      assert record.sandbox.run(f"echo {record.id}").output == f"{record.id}\n"
      metrics = manager.metrics()
      if metrics["used_memory_mb"] > metrics["capacity_memory_mb"]:
        over.append(metrics)
      manager.delete(record.id)
      states[record.state] += 1

  threads = [threading.Thread(target=work, args=(f"t{i % 3}",)) for i in range(6)]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join(timeout=200)
  assert not over and states == {"deleted": 24}
  for record in manager.list():
    steps = [event.state for event in record.history]
    assert all(b in lifecycle.MOVES[a] for a, b in zip(steps, steps[1:], strict=False))


CHILD = """
import sys, time
from rome.envs.common import Limits, SandboxSpec
from rome.envs.manager import Manager
limits = Limits(memory_mb=64, cpus=0.5, pids=32, disk_mb=4)
manager = Manager()
spec = SandboxSpec(backend=sys.argv[1], limits=limits)
names = [manager.create(spec).sandbox.id for _ in range(2)]
print(*names, manager._stock._lease.name, flush=True)
time.sleep(120)
"""


@pytest.mark.parametrize("backend", ["bubblewrap", PODMAN])
def test_a_new_manager_removes_what_a_killed_one_left(own_runtime_dir, managed, backend):
  process = subprocess.Popen(
    [sys.executable, "-c", CHILD, backend], stdout=subprocess.PIPE, text=True
  )
  try:
    names = process.stdout.readline().split()
    assert len(names) == 3 and all((owner.runtime_dir() / name).exists() for name in names)
  finally:
    process.kill()
    process.wait()
  manager = managed()
  assert manager.metrics()["total_swept"] >= 2
  assert not any((owner.runtime_dir() / name).exists() for name in names)
  assert not set(names) & set(sweep())
