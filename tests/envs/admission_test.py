"""The ledger under any order of operations, and what this host is taken to have."""

import os

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from rome.envs import admission
from rome.envs.admission import Capacity, CapacityExceeded, Ledger, dominant_share, needs
from rome.envs.common import Limits

TOTAL = Capacity(4.0, 1000, 500, 200)

amounts = st.builds(
  Capacity,
  st.integers(0, 3000).map(lambda n: n / 1000),
  st.integers(0, 600),
  st.integers(0, 300),
  st.integers(0, 120),
)


class Reservations(RuleBasedStateMachine):
  """Against a plain dictionary of what is held."""

  def __init__(self):
    super().__init__()
    self.ledger = Ledger(TOTAL)
    self.held = {}

  def sums(self):
    columns = zip(*(amount.units() for amount in self.held.values()), strict=True)
    return tuple(sum(column) for column in columns) or (0, 0, 0, 0)

  @rule(key=st.sampled_from("abcdef"), amount=amounts)
  def reserve(self, key, amount):
    if key in self.held:
      with pytest.raises(ValueError, match="already"):
        self.ledger.reserve(key, amount)
      return
    sums = zip(self.sums(), amount.units(), TOTAL.units(), strict=True)
    room = all(have + more <= limit for have, more, limit in sums)
    assert self.ledger.fits(amount) is room
    assert (self.ledger.shortage(amount) == "") is room
    assert self.ledger.reserve(key, amount) is room
    if room:
      self.held[key] = amount

  @rule(key=st.sampled_from("abcdef"))
  def release(self, key):
    assert self.ledger.release(key) is (self.held.pop(key, None) is not None)
    assert not self.ledger.release(key)

  @precondition(lambda self: self.held)
  @rule(data=st.data())
  def rename(self, data):
    old = data.draw(st.sampled_from(sorted(self.held)))
    new = data.draw(st.sampled_from("abcdefgh"))
    if new in self.held:
      with pytest.raises(ValueError, match="already"):
        self.ledger.rename(old, new)
    else:
      self.ledger.rename(old, new)
      self.held[new] = self.held.pop(old)

  @invariant()
  def adds_up(self):
    used, free = self.ledger.used().units(), self.ledger.free().units()
    assert used == self.sums()
    assert all(
      0 <= u <= t and u + f == t for u, f, t in zip(used, free, TOTAL.units(), strict=True)
    )
    assert len(self.ledger) == len(self.held)
    assert all(key in self.ledger for key in self.held)


TestReservations = Reservations.TestCase
TestReservations.settings = settings(max_examples=100, stateful_step_count=30, deadline=None)


def test_thousandths_do_not_drift():
  ledger = Ledger(Capacity(1.0, 0, 0, 0))
  for i in range(10):
    assert ledger.reserve(str(i), Capacity(0.1, 0, 0, 0))
  assert not ledger.reserve("more", Capacity(0.001, 0, 0, 0))
  for i in range(10):
    ledger.release(str(i))
  assert ledger.free() == ledger.total


def test_messages_name_what_is_short():
  ledger = Ledger(TOTAL)
  ledger.reserve("a", Capacity(3.5, 900, 0, 0))
  text = ledger.shortage(Capacity(1.0, 200, 10, 10))
  assert text == "cpus: 1 needed, 0.5 free of 4, memory_mb: 200 needed, 100 free of 1000"
  with pytest.raises(CapacityExceeded, match="memory_mb: 2000 needed, 1000 in all of 1000; ask"):
    ledger.check(Capacity(1.0, 2000, 10, 10))
  ledger.check(TOTAL)


def test_share():
  assert dominant_share(Capacity(1.0, 500, 0, 20), TOTAL) == 0.5
  assert dominant_share(Capacity(0, 0, 0, 0), Capacity(0, 0, 0, 0)) == 0
  assert dominant_share(Capacity(1.0, 0, 0, 0), Capacity(0, 1, 1, 1)) == float("inf")


def test_a_sandbox_reserves_its_limits_and_disk_as_memory():
  amount = needs(Limits(memory_mb=256, cpus=0.5, pids=64, disk_mb=16))
  assert amount == Capacity(0.5, 256 + 32, 32, 64 + 32)


@pytest.mark.parametrize("bad", [{"cpus": -1}, {"memory_mb": 1.5}, {"pids": True}, {"cpus": "1"}])
def test_wrong_amounts_are_refused(bad):
  with pytest.raises(ValueError, match=f"Capacity.{next(iter(bad))}"):
    Capacity(**{"cpus": 1.0, "memory_mb": 1, "disk_mb": 1, "pids": 1, **bad})


def test_the_hosts_capacity():
  one, two = admission.host_capacity(1.0), admission.host_capacity(2.0)
  assert one.cpus == len(os.sched_getaffinity(0)) and two.cpus == 2 * one.cpus
  physical = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") >> 20
  assert 0 <= one.memory_mb <= physical - 1024 and one.disk_mb == one.memory_mb
  assert 0 < one.pids < int(open("/proc/sys/kernel/pid_max").read())
  with pytest.raises(ValueError, match="cpu_overcommit"):
    admission.host_capacity(0)


def test_cgroups_bound_the_host_in_both_versions(tmp_path, monkeypatch):
  """A tree as the kernel shows it; the nearest limit is not the lowest."""
  files = {
    "proc/meminfo": "MemTotal:       8388608 kB\n",
    "proc/sys/kernel/pid_max": "32768\n",
    "proc/sys/kernel/threads-max": "100000\n",
    "proc/self/cgroup": "5:memory:/a/b\n0::/c/d\n",
    "sys/fs/cgroup/memory/a/b/memory.limit_in_bytes": f"{6 << 30}\n",
    "sys/fs/cgroup/memory/a/memory.limit_in_bytes": f"{5 << 30}\n",
    "sys/fs/cgroup/c/d/memory.max": "max\n",
    "sys/fs/cgroup/c/memory.max": f"{4 << 30}\n",
    "sys/fs/cgroup/c/d/pids.max": "10000\n",
  }
  for name, text in files.items():
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).write_text(text)
  monkeypatch.setattr(admission, "_ROOT", tmp_path)
  got = admission.host_capacity(1.0)
  assert got.memory_mb == 4096 - 1024 and got.pids == 10000 - 2048
  (tmp_path / "sys/fs/cgroup/c/memory.max").write_text("max\n")
  assert admission.host_capacity(1.0).memory_mb == 5120 - 1024
