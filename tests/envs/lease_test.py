"""Leases: a hung owner loses its sandboxes and is told so; one that renews never loses any."""

import signal
import subprocess
import sys
import threading
import time

import pytest

from rome.envs import lease, owner
from rome.envs.backends import podman_containers
from rome.envs.sandbox import make_sandbox, sweep

HUNG = """
import sys, time
from rome.envs import lease, owner
from rome.envs.sandbox import make_sandbox
mine = owner.take_lease(float(sys.argv[2]))
box, other = make_sandbox(backend=sys.argv[1]), make_sandbox(backend="bubblewrap")
mine.cover(box.id)
mine.renew()
print(box.id, other.id, flush=True)
sys.stdin.readline()
try:
  mine.renew()
except lease.LeaseLost as error:
  print(error, box.alive(), other.alive(), flush=True)
"""


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["bubblewrap", "podman"])
def test_a_hung_owner_loses_what_is_under_its_lease(backend):
  process = subprocess.Popen(
    [sys.executable, "-c", HUNG, backend, "6"],
    stdin=subprocess.PIPE,
    stdout=subprocess.PIPE,
    text=True,
  )
  try:
    box, other = process.stdout.readline().split()
    assert box not in sweep()
    process.send_signal(signal.SIGSTOP)
    time.sleep(6.2)
    sweep()  # or another process of this machine at the same time
    assert not (owner.runtime_dir() / box).exists()
    assert (owner.runtime_dir() / other).exists()  # it is under no lease
    end = time.monotonic() + 30  # another process may be about to remove it
    while box in dict(podman_containers.list_containers()):
      assert time.monotonic() < end
      time.sleep(0.1)
    process.send_signal(signal.SIGCONT)
    answer = process.communicate("go on\n", timeout=60)[0]
    assert "not renewed for 6 s" in answer and answer.strip().endswith("False True")
  finally:
    process.kill()
    process.wait()
  sweep()


def covered(directory, name, mine):
  (directory / name).mkdir()
  mine.cover(name)
  return directory / name


def alive(label):
  del label
  return False


def test_it_runs_out_is_revoked_once_and_says_so(tmp_path):
  mine = lease.Lease(tmp_path, "label", 0.2)
  box, free = covered(tmp_path, "rome-a", mine), tmp_path / "rome-b"
  free.mkdir()
  assert not lease.lapsed(box, alive)
  time.sleep(0.25)
  mine.renew()  # late, but nobody has looked
  assert not lease.lapsed(box, alive)
  time.sleep(0.25)
  assert lease.lapsed(box, alive) and lease.lapsed(box, alive) and not lease.lapsed(free, alive)
  with pytest.raises(lease.LeaseLost, match=mine.name):
    mine.renew()
  with pytest.raises(lease.LeaseLost):
    mine.renew()  # it stays lost
  lease.sweep(tmp_path, alive)
  assert (tmp_path / mine.name).exists()  # still named by a directory
  (box / "lease").unlink()
  lease.sweep(tmp_path, alive)
  assert not (tmp_path / mine.name).exists()
  mine.release()
  mine.release()


def test_leases_of_the_dead_are_removed(tmp_path):
  mine = lease.Lease(tmp_path, "label", 60.0)
  box = covered(tmp_path, "rome-a", mine)
  lease.sweep(tmp_path, alive)
  assert (tmp_path / mine.name).exists() and not lease.lapsed(box, alive)
  assert lease.lapsed(box, lambda label: label == "label")
  (box / "lease").unlink()
  lease.sweep(tmp_path, lambda label: True)
  assert not list(tmp_path.glob("lease-*"))
  mine.release()


@pytest.mark.parametrize("text", ["lease-0", "../lease-0", "", "lease-/../../etc/passwd", "x"])
def test_a_directory_that_names_no_lease_has_not_lapsed(tmp_path, text):
  (tmp_path / "rome-a").mkdir()
  (tmp_path / "rome-a" / "lease").write_text(text)
  assert not lease.lapsed(tmp_path / "rome-a", lambda label: True)


def test_who_renews_never_loses(tmp_path):
  """Many sweeps at once, and a lease that is short but renewed well before its end."""
  mine = lease.Lease(tmp_path, "label", 20.0)
  box = covered(tmp_path, "rome-a", mine)
  stop, taken = threading.Event(), []

  def look():
    while not stop.is_set():
      taken.extend([1] if lease.lapsed(box, alive) else [])
      lease.sweep(tmp_path, alive)

  threads = [threading.Thread(target=look) for _ in range(4)]
  for thread in threads:
    thread.start()
  end = time.monotonic() + 1.0
  while time.monotonic() < end:
    mine.renew()
  stop.set()
  for thread in threads:
    thread.join()
  mine.renew()
  assert not taken
  mine.release()


def test_renewal_and_revocation_agree(tmp_path):
  """At the very moment it runs out either the owner keeps it or a sweep takes it, never both."""
  for i in range(40):
    mine = lease.Lease(tmp_path, "label", 0.01)
    box = covered(tmp_path, f"rome-{i}", mine)
    time.sleep(0.008 + 0.0001 * i)
    taken = []
    thread = threading.Thread(
      target=lambda box=box, got=taken: got.append(lease.lapsed(box, alive))
    )
    thread.start()
    try:
      mine.seconds = 60.0
      mine.renew()
      kept = True
    except lease.LeaseLost:
      kept = False
    thread.join()
    assert taken == [not kept]
    mine.release()


def test_processes_of_another_namespace_are_not_taken_for_ours():
  """The number in the record means another process here; the directory stays for its own side."""
  box = make_sandbox(backend="bubblewrap")
  try:
    home = owner.runtime_dir() / box.id
    boot, _, pid, start = owner.label().split(":")
    record, was = home / "process", (home / "process").read_text()
    record.write_text(f"{boot}:1:{pid}:{start}")
    mine = owner.take_lease(0.05)
    mine.cover(box.id)
    time.sleep(0.1)
    assert box.id not in owner.sweep_dirs() and box.alive()
    record.write_text(was)
    mine.release()
  finally:
    box.close()
