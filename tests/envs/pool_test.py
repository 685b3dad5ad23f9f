"""The pool: hand-out, reuse, replacement, deadlines, and its behaviour when starting fails."""

import os
import signal
import threading
import time

import pytest

from rome.envs import sandbox as lib
from rome.envs.pool import PoolClosed, SandboxPool


@pytest.fixture(params=[pytest.param("podman", marks=pytest.mark.slow), "bubblewrap"])
def make(request):
  return lambda: lib.make_sandbox(backend=request.param)


def eventually(condition, seconds=15.0):
  deadline = time.monotonic() + seconds
  while time.monotonic() < deadline:
    if condition():
      return True
    time.sleep(0.01)
  return False


def test_episodes_never_see_each_other(make):
  with SandboxPool(make, size=2, reuse=3) as pool:
    served = {}
    for _ in range(10):
      sandbox = pool.acquire()
      served[sandbox.id] = served.get(sandbox.id, 0) + 1
      assert sandbox.run("ls -A . /tmp /dev/shm; echo [$x]").output.endswith("[]\n")
      sandbox.run("x=1; touch trace /tmp/trace /dev/shm/trace")
      pool.release(sandbox)
    assert max(served.values()) <= 3 and sum(served.values()) == 10
    assert eventually(lambda: pool.counters["reset"] + pool.counters["replaced"] == 10)
    assert pool.counters["acquired"] == 10 and pool.counters["dead"] == 0


def test_dead_ones_are_replaced_before_hand_out(make):
  with SandboxPool(make, size=1, reuse=5) as pool:
    sandbox = pool.acquire()
    first = sandbox.id
    sandbox.verify("kill -9 1; true")  # root inside cannot end it either
    assert sandbox.alive()
    os.kill(sandbox._launched.pid, signal.SIGKILL)
    pool.release(sandbox)
    again = pool.acquire(timeout=30)
    assert again.id != first and again.run("echo hi").output == "hi\n"
    assert pool.counters["dead"] == 1


def test_unhealthy_ones_are_replaced(make):
  with SandboxPool(make, size=1, reuse=5) as pool:
    sandbox = pool.acquire()
    pool.release(sandbox, healthy=False)
    assert pool.acquire(timeout=30).id != sandbox.id
    assert eventually(lambda: not sandbox.alive())


def test_waiting_has_a_deadline_and_ends_at_close():
  pool = SandboxPool(lambda: lib.make_sandbox(backend="bubblewrap"), size=1)
  sandbox = pool.acquire()
  with pytest.raises(TimeoutError, match="1 of 1 in use"):
    pool.acquire(timeout=0.1)
  errors = []

  def wait():
    try:
      pool.acquire(timeout=60)
    except PoolClosed as error:
      errors.append(error)

  threads = [threading.Thread(target=wait) for _ in range(3)]
  for thread in threads:
    thread.start()
  time.sleep(0.05)
  pool.close()
  pool.close()
  for thread in threads:
    thread.join(timeout=5)
  assert len(errors) == 3
  assert not sandbox.alive()  # those in use are closed too
  pool.release(sandbox)  # too late, harmless
  with pytest.raises(PoolClosed):
    pool.acquire()


def test_close_leaves_none_behind_that_waits_to_be_replaced():
  made = []

  def make():
    made.append(lib.make_sandbox(backend="bubblewrap"))
    return made[-1]

  pool = SandboxPool(make, size=4, reuse=1)
  for sandbox in [pool.acquire() for _ in range(4)]:
    pool.release(sandbox)
  pool.close()
  assert len(made) >= 4 and not any(sandbox.alive() for sandbox in made)


def test_misuse_is_refused():
  with pytest.raises(ValueError, match="at least 1"):
    SandboxPool(lambda: lib.make_sandbox(backend="bubblewrap"), size=0)
  with SandboxPool(lambda: lib.make_sandbox(backend="bubblewrap"), size=1, reuse=2) as pool:
    sandbox = pool.acquire()
    pool.release(sandbox)
    with pytest.raises(ValueError, match="not handed out"):
      pool.release(sandbox)


def test_gives_up_when_nothing_starts():
  def make():
    raise lib.ImageError("image 'x' is not on this machine")

  with SandboxPool(make, size=2) as pool:
    with pytest.raises(PoolClosed, match="image 'x' is not on this machine"):
      pool.acquire(timeout=20)
    assert pool.counters["start_failures"] >= 3


def test_a_failed_start_is_tried_again():
  failures = iter([lib.SandboxLost("once")])

  def make():
    for failure in failures:
      raise failure
    return lib.make_sandbox(backend="bubblewrap")

  with SandboxPool(make, size=1) as pool:
    assert pool.acquire(timeout=20).alive()
    assert pool.counters["start_failures"] == 1


def test_many_threads():
  """No sandbox is ever in two hands, and every command answers its own question."""
  held, lock, wrong = set(), threading.Lock(), []

  with SandboxPool(lambda: lib.make_sandbox(backend="bubblewrap"), size=3, reuse=4) as pool:

    def work(number):
      for turn in range(5):
        sandbox = pool.acquire(timeout=60)
        with lock:
          wrong.extend([sandbox.id] if sandbox.id in held else [])
          held.add(sandbox.id)
        if sandbox.run(f"echo {number} {turn}").output != f"{number} {turn}\n":
          wrong.append(number)
        with lock:
          held.remove(sandbox.id)
        pool.release(sandbox)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
      thread.start()
    for thread in threads:
      thread.join(timeout=60)
    assert not wrong and pool.counters["acquired"] == 40
