"""From settings to a run and its report.

Every expected failure is one line and a non-zero exit code.
"""

import json
import pathlib
import sys
from collections.abc import Callable
from typing import Any

import jax
import ml_collections

from rome import files, models
from rome.envs import SandboxError
from rome.envs.task import TaskError
from rome.rollout import CustomError, TooManyAbandoned, TooManyInvalid
from rome.train import (
  alarms,
  checkpoints,
  division,
  lock,
  loop,
  memory,
  metrics,
  placement,
  play,
  processes,
  record,
  report,
  start,
  trackers,
)
from rome.train import config as config_lib
from rome.train import state as state_lib
from rome.train import summary as summary_lib

# What a run may end with; anything else is a bug and keeps its traceback.
FAILURES = (
  SandboxError,
  TaskError,
  TooManyAbandoned,
  TooManyInvalid,
  CustomError,
  alarms.AlarmStop,
  checkpoints.CheckpointError,
  config_lib.ConfigError,
  metrics.JsonlError,
  record.RecordError,
  report.ReportError,
  FloatingPointError,
  TimeoutError,
  OSError,
)


def train(values: ml_collections.ConfigDict, workdir: pathlib.Path, dry_run: bool = False) -> int:
  """Runs an experiment to its end and returns the exit code."""
  return _guard(lambda: _train(values, workdir, dry_run), workdir)


def evaluate(values: ml_collections.ConfigDict, workdir: pathlib.Path) -> int:
  """Evaluates the newest checkpoint of `workdir`, or `native.endpoint`; returns the exit code."""
  return _guard(lambda: _evaluate(values, workdir), workdir)


def _guard(work: Callable[[], None], workdir: pathlib.Path) -> int:
  try:
    work()
  except KeyboardInterrupt:
    print(
      f"\ninterrupted; the same command goes on from the last checkpoint in {workdir}",
      file=sys.stderr,
    )
    return 130
  except FAILURES as e:
    print(f"error: {e}", file=sys.stderr)
    return 1
  except (RuntimeError, ValueError) as e:
    if not processes.lost_peer(e):
      raise
    print(
      f"error: another process of this run ended ({str(e).splitlines()[0]}); what it wrote itself "
      "says why. Start all processes again with the same flags, or another number of them: they go "
      f"on from the last checkpoint in {workdir}",
      file=sys.stderr,
    )
    return 1
  return 0


def _train(values: ml_collections.ConfigDict, workdir: pathlib.Path, dry_run: bool) -> None:
  config = config_lib.from_config_dict(values)
  start.check_trains(config)
  start.check(config, fresh=not checkpoints.Checkpoints(workdir, config.keep_checkpoints).steps())
  trackers.check(config.trackers)
  mesh = placement.mesh_of(config, start.model_of(config))
  division.lent(config, mesh)
  if dry_run:
    _dry_run(config, values)
    return
  with processes.if_leading(lock.hold, workdir):
    if mesh is None:
      print("\n".join(memory.memory_plan(config).lines()))
    if processes.leads():
      prepare(workdir, values)
    _run(config, workdir)


def _run(config: config_lib.RunConfig, workdir: pathlib.Path) -> None:
  """Trains, and tells the end in a table."""
  run = loop.Run(config, workdir)
  try:
    summary = run.train()
  finally:
    run.close()
  if not processes.leads():
    return
  page = report.write_report(workdir)
  summary_lib.print_table(summary)
  print(
    f"checkpoint  {summary['checkpoint']}\n"
    f"summary     {workdir / 'summary.json'}\n"
    f"report      {page}"
  )


def _dry_run(config: config_lib.RunConfig, values: ml_collections.ConfigDict) -> None:
  """Prints the settings and the memory plan, and makes a sandbox and an agent; trains nothing."""
  print(values)
  with play.Player(config, start.model_of(config)) as player:
    player.world.agent(player.source.get("train", 0)).env.close()
    print(f"sandboxes: {player.world.backend}")
  print("\n".join(memory.memory_plan(config).lines()))


def _evaluate(values: ml_collections.ConfigDict, workdir: pathlib.Path) -> None:
  config = config_lib.from_config_dict(values)
  if endpoint := config.native.endpoint:
    workdir.mkdir(parents=True, exist_ok=True)
    model, params, key = None, None, jax.random.key(config.seed)
  else:
    start.check(config, fresh=False)
    model = start.model_of(config)
    state = _newest(config, model, workdir)
    params, key = state.params, state.key
  with play.Player(config, model) as player:
    result, trajectories = player.evaluate(params, key, config.eval.instances)
  if endpoint:
    result |= {"endpoint": endpoint, "model": config.native.model}
  rows = play.transcripts(trajectories, config.transcripts, "evaluation", 0)
  lines = "".join(json.dumps(row) + "\n" for row in rows)
  files.write_atomic(workdir / "evaluation_episodes.jsonl", lines)
  text = json.dumps(result)
  files.write_atomic(workdir / "evaluation.json", text + "\n")
  print(text)


def _newest(
  config: config_lib.RunConfig, model: models.ModelConfig, workdir: pathlib.Path
) -> state_lib.TrainState:
  """The newest state of the run in `workdir`."""
  optimizer = state_lib.make_optimizer(config.rl)
  found = checkpoints.Checkpoints(workdir, config.keep_checkpoints).restore(
    state_lib.init_state(model, optimizer, config.seed, adapters=config.lora),
    play.make_experts(config).arrays(),
  )
  if found is None:
    raise checkpoints.CheckpointError(
      f"no checkpoint in {workdir}; train first, or name the run's --workdir"
    )
  return found[0]


def prepare(workdir: pathlib.Path, values: ml_collections.ConfigDict) -> None:
  """Ties the work directory to its settings, all but those that may change.

  Raises:
    ConfigError: the directory cannot be written, or holds a run with other settings.
  """
  saved = workdir / "config.json"
  text = json.dumps(values.to_dict(), indent=2) + "\n"
  try:
    if not saved.exists():
      files.write_atomic(saved, text)
    old = json.loads(saved.read_text())
    new = json.loads(text)
    may = {name: new[name] for name in config_lib.MAY_CHANGE}
    if isinstance(old, dict) and any(old.get(name) != value for name, value in may.items()):
      old |= may
      if not _difference(old, new):
        files.write_atomic(saved, text)
  except OSError as e:
    raise config_lib.ConfigError(
      f"cannot write to --workdir {workdir} ({e.strerror}); choose another"
    ) from None
  except ValueError:
    raise config_lib.ConfigError(
      f"{saved} is not JSON; delete it to start afresh, or choose another --workdir"
    ) from None
  changed = _difference(old, json.loads(text))
  if changed:
    raise config_lib.ConfigError(
      f"--workdir {workdir} holds a run with {changed}; choose another --workdir"
    )


def _difference(old: Any, new: Any, path: str = "config") -> str:
  """The first setting in which two trees differ, with both values; "" where they agree."""
  if isinstance(old, dict) and isinstance(new, dict):
    for key in sorted(old.keys() ^ new.keys()):
      had, who = ("no", "had none") if key in new else ("a", "had one")
      return f"{had} {path}.{key}, as the rome that began it {who} (run.json has its commit)"
    for key in sorted(old):
      found = _difference(old.get(key), new.get(key), f"{path}.{key}")
      if found:
        return found
    return ""
  return "" if old == new else f"another {path} ({old!r}, not {new!r})"
