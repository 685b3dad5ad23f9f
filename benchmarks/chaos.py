"""A run with a fault every few seconds, beside the same run undisturbed: prints one JSON line.

  python -m benchmarks.chaos [--minutes=30 --every=15 --seed=0 --updates=60]

Needs root: everything happens in a network namespace and on a small tmpfs of its own. Episodes are
played on two Ray nodes. Faults, drawn from the seed: a sandbox's first process is killed; one is
stopped, so that its tools hang until the deadline; a byte of a checkpoint is changed, of the one
that is being written if there is one; the disk of the run is full for some seconds; a Ray node dies
and another one joins; the trainer is killed with SIGKILL. A trainer that ended is started again,
until the run is finished; faults stop after --minutes. Told are the faults, how lives ended, held-
out success of both runs with intervals, and the ledger: every update trained on a whole batch, no
trajectory twice, nothing left behind. Exits with status 1 where it does not hold.
"""

import collections
import contextlib
import json
import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from typing import Any

from absl import app, flags

from benchmarks._lives import ROOT, Lives
from rome.envs import owner, sandbox_cli
from rome.envs.sandbox import sweep
from rome.train import record, start
from rome.train.metrics import read_jsonl
from rome.train.summary import provenance

_MINUTES = flags.DEFINE_float("minutes", 30.0, "Of faults.", lower_bound=0.1)
_EVERY = flags.DEFINE_float("every", 15.0, "Seconds between faults, on average.", lower_bound=1.0)
_SEED = flags.DEFINE_integer("seed", 0, "Of the faults.")
_UPDATES = flags.DEFINE_integer("updates", 60, "Of reinforcement learning.", lower_bound=2)
_WARM = flags.DEFINE_integer("warm_updates", 280, "Of the warm start.", lower_bound=1)
_INSIDE = flags.DEFINE_bool("inside", False, "Set by the program itself, in its namespaces.")

DISK_MB = 512
FAULTS = (
  "kill_sandbox",
  "hang_tool",
  "corrupt_checkpoint",
  "fill_disk",
  "kill_node",
  "kill_trainer",
)
_ENVIRON = {
  "RAY_USAGE_STATS_ENABLED": "0",
  "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
  "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
  "RAY_raylet_start_wait_time_s": "120",
}
_NODE = {
  **{"num_cpus": 1, "object_store_memory": 80 << 20, "include_dashboard": False},
  **{"include_log_monitor": False, "no_monitor": True, "node_ip_address": "127.0.0.1"},
}
_SETTINGS = (
  *("--sandbox=bubblewrap", "--config.sandbox.deadline=20", "--config.sandbox.reset_deadline=60"),
  *("--config.sandbox.invalid_cap=0.9", "--config.sandbox.close_deadline=10"),
  *("--config.workers.slots=16", "--config.rl.checkpoint_every=3", "--config.rl.cooldown=0"),
)


class Faults:
  """What may happen to a run, drawn from a seed."""

  def __init__(self, cluster: Any, disk: pathlib.Path, workdir: pathlib.Path, seed: int):
    self._cluster, self._disk, self._workdir = cluster, disk, workdir
    self.random = random.Random(seed)
    self._full_until = 0.0

  def strike(self, kind: str, trainer: subprocess.Popen) -> bool:
    """One fault; False where there is nothing that it could hit."""
    return bool(getattr(self, f"_{kind}")(trainer))

  def tend(self, now: float) -> None:
    """Ends faults that last."""
    if self._full_until and now > self._full_until:
      (self._disk / "ballast").unlink()
      self._full_until = 0.0

  def end(self) -> None:
    self.tend(float("inf"))

  def _sandboxes(self) -> list[int]:
    """First processes of live sandboxes of this run's hosts."""
    found = []
    for name, whose in sandbox_cli.owned_directories().items():
      with contextlib.suppress(OSError, ValueError, IndexError):
        pid = int((owner.runtime_dir() / name / "process").read_text().split(":")[2])
        mine = os.readlink(f"/proc/{whose.split(':')[2]}/ns/net") == os.readlink(
          "/proc/self/ns/net"
        )
        if mine and not owner.is_dead(whose):
          found.append(pid)
    return sorted(found)

  def _signal_sandbox(self, number: int) -> bool:
    pids = self._sandboxes()
    if not pids:
      return False
    with contextlib.suppress(ProcessLookupError):
      os.kill(self.random.choice(pids), number)
    return True

  def _kill_sandbox(self, _: subprocess.Popen) -> bool:
    return self._signal_sandbox(signal.SIGKILL)

  def _hang_tool(self, _: subprocess.Popen) -> bool:
    return self._signal_sandbox(signal.SIGSTOP)

  def _corrupt_checkpoint(self, _: subprocess.Popen) -> bool:
    directory = self._workdir / "checkpoints"
    under_way = sorted(directory.glob("*.orbax-checkpoint-tmp*"))
    finished = sorted(
      (p for p in directory.glob("*") if p.name.isdigit()), key=lambda p: int(p.name)
    )
    if len(finished) < 2:
      return False
    where = (under_way or finished)[-1]
    files = sorted(p for p in where.rglob("*") if p.is_file() and p.stat().st_size)
    if not files:
      return False
    chosen = self.random.choice(files)
    with contextlib.suppress(OSError):
      data = bytearray(chosen.read_bytes())
      data[self.random.randrange(len(data))] ^= 0xFF
      chosen.write_bytes(data)
    return True

  def _fill_disk(self, _: subprocess.Popen) -> bool:
    if self._full_until:
      return False
    with contextlib.suppress(OSError), open(self._disk / "ballast", "wb", buffering=0) as file:
      while True:
        file.write(bytes(1 << 20))
    self._full_until = time.monotonic() + 5.0
    return True

  def _kill_node(self, _: subprocess.Popen) -> bool:
    nodes = sorted(self._cluster.worker_nodes, key=lambda node: node.unique_id)
    self._cluster.remove_node(self.random.choice(nodes), allow_graceful=False)
    self._cluster.add_node(**_NODE)
    return True

  def _kill_trainer(self, trainer: subprocess.Popen) -> bool:
    trainer.kill()
    return True


def disturbed(runs: Lives, faults: Faults, settings: tuple[str, ...]) -> dict[str, Any]:
  """Carries the run to its end through faults."""
  counts: collections.Counter[str] = collections.Counter()
  endings: collections.Counter[str] = collections.Counter()
  began = time.monotonic()
  last, next_fault = began + 60 * _MINUTES.value, began + _EVERY.value
  trainer = runs.start("disturbed", *settings)
  while True:
    now = time.monotonic()
    faults.tend(now)
    if trainer.poll() is not None:
      if trainer.returncode == 0:
        break
      killed = trainer.returncode == -signal.SIGKILL
      endings[
        "killed" if killed else runs.said("disturbed").splitlines()[-1].split("/")[0][:80]
      ] += 1
      trainer = runs.start("disturbed", *settings)
    if next_fault < now < last:
      kind = faults.random.choice(FAULTS)
      counts[kind] += faults.strike(kind, trainer)
      next_fault = now + _EVERY.value * (0.5 + faults.random.random())
    time.sleep(0.1)
  faults.end()
  return {
    "faults": dict(sorted(counts.items())),
    "endings": dict(endings),
    "disturbed_s": round(time.monotonic() - began, 1),
  }


def ledger(workdir: pathlib.Path, batch: int) -> dict[str, Any]:
  """What the records of a run say: updates, trajectories, those that came twice."""
  updates = record.Updates(workdir, start.read_config(workdir))
  ids: list[str] = []
  for step in updates.steps():
    update = updates.read(step)
    assert len(update.trajectories) == batch, (step, len(update.trajectories))
    ids += [t.id for t in update.trajectories]
  return {
    "updates": len(updates.steps()),
    "trajectories": len(ids),
    "doubled": len(ids) - len(set(ids)),
    "rows": sum(row["phase"] == "rl" for row in read_jsonl(workdir / "metrics.jsonl")),
  }


def inside() -> dict[str, Any]:
  base = pathlib.Path(tempfile.mkdtemp(prefix="chaos-", dir="/tmp"))
  disk = base / "disk"
  disk.mkdir()
  (base / "ray").mkdir()
  (base / "ray_bootstrap_config.yaml").write_text("provider: {type: local}\n")
  subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={DISK_MB}m", "tmpfs", disk], check=True)
  cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
  os.environ.update(_ENVIRON, RAY_TMPDIR=str(base), HOME=str(base), XDG_CACHE_HOME=cache)
  from ray.cluster_utils import Cluster

  cluster = Cluster(initialize_head=True, head_node_args={**_NODE, "num_cpus": 0})
  try:
    cluster.add_node(**_NODE)
    runs = Lives(base, disk, *_SETTINGS, f"--config.workers.address={cluster.address}")
    warm = (f"--config.sft.steps={_WARM.value}", "--config.rl.steps=0")
    if runs.start("warm", *warm).wait():
      raise RuntimeError(f"warm start: {runs.said('warm')}")
    settings = (
      *(f"--config.init_from={disk / 'warm'}", "--config.sft.steps=0"),
      f"--config.rl.steps={_UPDATES.value}",
    )
    began = time.monotonic()
    if runs.start("calm", *settings).wait():
      raise RuntimeError(f"undisturbed run: {runs.said('calm')}")
    calm_seconds = round(time.monotonic() - began, 1)
    faults = Faults(cluster, disk, disk / "disturbed", _SEED.value)
    result = disturbed(runs, faults, settings)
    calm, after = (
      json.loads((disk / name / "summary.json").read_text()) for name in ("calm", "disturbed")
    )
    books = ledger(disk / "disturbed", 64)
  finally:
    cluster.shutdown()
  result |= {
    "calm_s": calm_seconds,
    "success_before": round(calm["success_before"], 3),
    "calm_success": round(calm["success_after"], 3),
    "calm_interval": [round(x, 3) for x in calm["success_after_interval"]],
    "disturbed_success": round(after["success_after"], 3),
    "disturbed_interval": [round(x, 3) for x in after["success_after_interval"]],
    "same_parameters": calm["params_sha256"] == after["params_sha256"],
    **books,
  }
  sweep()
  left = [w for w in sandbox_cli.owned_directories().values() if owner.is_dead(w)]
  result["left_behind"] = len(left)
  result["holds"] = (
    books["doubled"] == 0
    and books["updates"] == books["rows"] == _UPDATES.value
    and not left
    and calm["success_after_interval"][0] <= after["success_after_interval"][1]
    and after["success_after_interval"][0] <= calm["success_after_interval"][1]
  )
  subprocess.run(["umount", disk], check=False)
  shutil.rmtree(base, ignore_errors=True)
  return result


def main(argv: list[str]) -> None:
  if not _INSIDE.value:
    setup = 'mount --bind /dev/null /etc/resolv.conf && ip link set lo up && exec "$0" "$@"'
    command = [sys.executable, "-m", "benchmarks.chaos", "--inside", *sys.argv[1:]]
    sys.exit(
      subprocess.run(
        ["unshare", "--net", "--mount", "sh", "-c", setup, *command], cwd=ROOT, check=False
      ).returncode
    )
  result = inside()
  print(
    json.dumps(
      {
        "benchmark": "chaos",
        "minutes_at_most": _MINUTES.value,
        "every_s": _EVERY.value,
        **result,
        "seed": _SEED.value,
        **provenance(),
      }
    )
  )
  sys.exit(0 if result["holds"] else 1)


if __name__ == "__main__":
  app.run(main)
