"""The cases of `fleet_test.py`: two hosts of Ray on this machine; a worker is killed."""

import os
import pathlib
import shutil
import signal
import tempfile
import time

import pytest

from rome.envs import owner, trees
from rome.envs.admission import CapacityExceeded, needs
from rome.envs.common import Limits, SandboxError, SandboxLost, SandboxSpec
from rome.envs.fleet import Fleet
from rome.envs.placement import add
from rome.envs.queueing import QueueTimeout
from rome.envs.sandbox import sweep
from rome.envs.snapshot import transplant
from tests.envs.service.conftest import running

LIMITS = Limits(memory_mb=64, cpus=0.5, pids=32, disk_mb=16)
SPEC = SandboxSpec(backend="bubblewrap", limits=LIMITS)
EACH = add([needs(LIMITS)] * 3)  # room for three on each host
ENVIRON = {
  "RAY_USAGE_STATS_ENABLED": "0",
  "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
  # Or Ray takes 127.0.0.1 for the address of a network card, and looks for that one.
  "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
  # A crowded machine is no reason to give a node up.
  "RAY_raylet_start_wait_time_s": "120",
  "RAY_health_check_failure_threshold": "60",
}
NODE = {
  "num_cpus": 1,
  "object_store_memory": 80 << 20,
  "include_dashboard": False,
  "include_log_monitor": False,
  "no_monitor": True,
  "node_ip_address": "127.0.0.1",
}


def eventually(condition, seconds=90.0):
  end = time.monotonic() + seconds
  while time.monotonic() < end:
    if condition():
      return True
    time.sleep(0.05)
  return False


@pytest.fixture(scope="module")
def cluster():
  directory = tempfile.mkdtemp(prefix="ray-", dir="/tmp")  # short enough for a socket's path
  os.mkdir(f"{directory}/ray")
  # Ray asks cloud providers' addresses where it runs, unless it has been told by this file.
  pathlib.Path(directory, "ray_bootstrap_config.yaml").write_text("provider: {type: local}\n")
  cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
  os.environ.update(ENVIRON, RAY_TMPDIR=directory, HOME=directory, XDG_CACHE_HOME=cache)
  import ray
  from ray._private import ray_constants
  from ray.cluster_utils import Cluster

  assert not ray_constants.ENABLE_RAY_CLUSTER, "ray was imported before this set it up"
  made = Cluster()
  try:
    for _ in range(2):
      made.add_node(**NODE)
    ray.init(address=made.address, log_to_driver=False, _node_ip_address="127.0.0.1")
    yield made
  finally:
    ray.shutdown()
    made.shutdown()
    shutil.rmtree(directory, ignore_errors=True)
    sweep()


@pytest.fixture(scope="module")
def fleet(cluster):
  with Fleet(EACH, strategy="spread", interval=0.3) as made:
    assert eventually(lambda: len(made.hosts()) == 2), made.metrics()
    yield made


def at_rest(fleet):
  return eventually(lambda: fleet.metrics()["used_pids"] == fleet.metrics()["closing"] == 0)


def test_sandboxes_of_two_hosts_have_the_interface_of_one_here(fleet, tmp_path):
  one, two = fleet.create(SPEC, tenant="me"), fleet.create(SPEC)
  assert one.host != two.host and {one.host, two.host} == set(fleet.hosts())
  box = one.sandbox
  assert box.host.name == one.host and box.backend == "bubblewrap" and box.alive()
  box.write_file("greeting", b"hello")
  assert box.run("cat greeting").output == box.read_file("greeting").decode() == "hello"
  result = box.run("sleep 5", timeout=0.2)
  assert result.timed_out and result.exit_code is None
  with box.open_upload("parts") as upload:
    for _ in range(3):
      upload.write(b"x" * (1 << 20))
    upload.finish()
  assert box.lstat("parts").size == 3 << 20
  second = box.session("second", pty=(24, 80))
  second.start("read -r line; echo got $line")
  second.send(b"typed\n")
  while (progress := second.poll()).result is None:
    pass
  assert "got typed" in progress.result.output
  second.close()
  assert box.verify("id -u").output == "0\n"
  with pytest.raises(SandboxError, match="nothing"):
    box.read_file("nothing")
  assert not two.sandbox.run("ls").output
  for record in (one, two):
    fleet.delete(record.id)
  assert at_rest(fleet)
  with pytest.raises(SandboxLost, match="is closed"):
    box.run("echo hi")


def test_trees_go_and_come(fleet, tmp_path):
  box = fleet.create(SPEC).sandbox
  tree = tmp_path / "tree"
  (tree / "sub").mkdir(parents=True)
  (tree / "sub" / "run.sh").write_text("echo ran")
  (tree / "sub" / "run.sh").chmod(0o775)
  (tree / "big").write_bytes(os.urandom(5 << 20))
  sent = box.upload(tree, "tree")
  assert box.run("tree/sub/run.sh; stat -c %a tree/sub/run.sh").output == "ran\n775\n"
  got = box.download("tree", tmp_path / "back")
  assert isinstance(got, trees.Transfer) and got.sha256 == sent.sha256
  assert (tmp_path / "back" / "big").read_bytes() == (tree / "big").read_bytes()
  box.close()
  assert at_rest(fleet)


def test_forks_on_a_host_and_snapshots_across_hosts(fleet):
  record = fleet.create(SPEC)
  box = record.sandbox
  box.run("cd /tmp; x=7; head -c 3000000 /dev/urandom > data; echo kept > note")
  copy = fleet.fork(record.id)
  assert copy.host == record.host
  assert copy.sandbox.run("pwd; echo $x; cat note").output == "/tmp\n7\nkept\n"
  taken = box.snapshot()
  assert taken.digest == copy.sandbox.snapshot().digest and taken.size > 3_000_000
  other = next(r for r in (fleet.create(SPEC), fleet.create(SPEC)) if r.host != record.host)
  other.sandbox.restore(taken)
  assert other.sandbox.run("pwd; echo $x; cat note").output == "/tmp\n7\nkept\n"
  other.sandbox.reset()
  transplant(box, other.sandbox)
  assert other.sandbox.run("cat /tmp/note").output == "kept\n"
  copy.sandbox.run("echo changed > note")
  assert box.run("cat note").output == "kept\n"
  for each in fleet.list():
    fleet.delete(each.id)
  assert at_rest(fleet)


def test_capacity_holds_over_all_hosts(fleet):
  records = [fleet.create(SPEC) for _ in range(6)]
  assert len({record.sandbox.id for record in records}) == 6
  assert [sum(r.host == host for r in records) for host in fleet.hosts()] == [3, 3]
  with pytest.raises(QueueTimeout, match="free of"):
    fleet.create(SPEC, deadline=0.5)
  with pytest.raises(CapacityExceeded, match="no host of the fleet"):
    fleet.create(SandboxSpec(backend="bubblewrap", limits=Limits(memory_mb=1024)))
  waiting = fleet.create(SPEC, wait=False)
  fleet.stop(records[0].id)
  assert waiting.settled.wait(60) and waiting.host == records[0].host
  for record in [*records, waiting]:
    fleet.delete(record.id)
  assert at_rest(fleet)


def test_a_lost_worker_takes_only_its_own_and_rejoins(fleet):
  import ray

  records = [fleet.create(SPEC) for _ in range(4)]
  host = records[0].host
  doomed = [r for r in records if r.host == host]
  others = [r for r in records if r.host != host]
  assert len(doomed) == len(others) == 2
  boxes = [r.sandbox for r in doomed]
  for number, record in enumerate(others):
    record.sandbox.run(f"x={number}; echo {number} > mine")
  _, pid = ray.get(boxes[0].host.actor.hello.remote())
  total = fleet.metrics()["capacity_pids"]
  os.kill(pid, signal.SIGKILL)
  with pytest.raises(SandboxLost, match=host):
    boxes[0].run("sleep 30", timeout=60)
  assert eventually(lambda: all(r.state == "failed" for r in doomed))
  assert all(f"host {host} is lost" in r.error for r in doomed)
  assert fleet.metrics()["total_lost"] == 2 and total == 2 * EACH.pids
  for number, record in enumerate(others):
    assert record.state == "running"
    assert record.sandbox.run("echo $x; cat mine").output == f"{number}\n{number}\n"
  capacities = {fleet.metrics()["capacity_pids"]}
  assert eventually(
    lambda: capacities.add(fleet.metrics()["capacity_pids"]) or host in fleet.hosts()
  )  # with a new worker
  assert EACH.pids in capacities
  metrics = fleet.metrics()
  assert metrics["total_hosts_lost"] == 1 and metrics["total_hosts_joined"] == 3
  assert metrics["capacity_pids"] == total and metrics["used_pids"] == 2 * needs(LIMITS).pids
  again = fleet.create(SPEC, deadline=60)
  assert again.host == host and again.sandbox.run("echo back").output == "back\n"
  for box in boxes:
    assert not (owner.runtime_dir() / box.id).exists()  # the new worker has swept
  full = [fleet.create(SPEC, deadline=60) for _ in range(3)]
  per_host = [sum(r.host == name for r in [*others, again, *full]) for name in fleet.hosts()]
  assert per_host == [3, 3]
  with pytest.raises(QueueTimeout):
    fleet.create(SPEC, deadline=0.5)
  for record in [*others, again, *full]:
    fleet.delete(record.id)
  assert at_rest(fleet)


def test_a_sandbox_that_dies_by_itself_is_told_with_its_reason(fleet):
  record, neighbour = fleet.create(SPEC), fleet.create(SPEC)
  os.kill(record.sandbox.pid, signal.SIGKILL)
  assert eventually(lambda: fleet.get(record.id).state == "failed")
  assert "its process ended with status" in record.error
  assert eventually(lambda: fleet.metrics()["used_pids"] == needs(LIMITS).pids)
  assert neighbour.sandbox.run("echo well").output == "well\n"
  fleet.delete(neighbour.id)
  assert at_rest(fleet)


def test_the_service_over_a_fleet(cluster, tmp_path):
  """Another fleet of the same hosts, behind HTTP."""
  (tmp_path / "in").write_bytes(b"over and back")
  with running(f"--ray={cluster.address}") as service, service.client() as client:
    with client.create(limits=LIMITS) as made:
      assert made.run("echo served > note; cat note").output == "served\n"
      made.upload(tmp_path / "in", "there")
      made.download("there", tmp_path / "out")
      assert (tmp_path / "out").read_bytes() == b"over and back"
      copy = made.fork()
      assert copy.run("cat note").output == "served\n"
      copy.close()
      assert made.view()["host"]
    with service.http() as http:
      made = http.post("/v1/envs", json={"task": "count/17"}).json()
      assert http.post(f"/v1/envs/{made['id']}/reset", json={}).status_code == 200
      step = http.post(f"/v1/envs/{made['id']}/step", json={"action": "submit"}).json()
      assert step["terminated"] and step["reward"] == 0.0
      assert http.delete(f"/v1/envs/{made['id']}").status_code == 204
    assert service.stop() == 0
