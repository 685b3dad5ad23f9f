"""A run: warm start on demonstrations, evaluate, improve by IPA, evaluate.

The order of this file is the order of a run. Everything that a run is sits in a `TrainState` and a
JSON cursor, saved together; batches follow from the seed, the step and the next instance, so a
killed run that is started again ends with the same bits. With `rl.max_staleness` above 0 rollout
goes on while updates are computed (`rome.rollout.stream`); then it loses nothing that was played
and not trained on, but batches depend on timing.

Of several processes each runs this loop, see `rome.train.processes`.

Left out for now: curricula.
"""

import contextlib
import dataclasses
import json
import pathlib
import time
from collections.abc import Iterator
from typing import Any

import chex
from tqdm import tqdm

from rome import files, rollout
from rome.train import alarms, division, launches, nonfinite, placement, processes, record, trackers
from rome.train import state as state_lib
from rome.train import summary as summary_lib
from rome.train.checkpoints import CheckpointError, Checkpoints
from rome.train.config import RunConfig, StageConfig
from rome.train.learner import Learner, rollout_row
from rome.train.metrics import STAGES, JsonlFile, MetricsWriter, StageTimer
from rome.train.old_policy import KeptWeights
from rome.train.play import RL_STREAM, Player, grouping, make_experts, transcripts
from rome.train.progress import Progress
from rome.train.step import NonFinite
from rome.trajectory import Trajectory


class Run:
  """One run in one work directory; `train` carries it from wherever it stands to its end.

  The cursor holds: phase ("sft", "rl" or "done"), instance (number of the next training instance),
  open (instances under way while updates are computed; played again) and buffer (the checkpoint
  whose record has what was played and not trained on),
  evals (results by name), alarms (streaks), wall (seconds), sums (counts and seconds for the
  summary), backend, settings (their hash), scaffold (that of the agent's), and the positions of the
  metric files.

  Raises:
    CheckpointError: no checkpoint is whole, or the newest is of another model or other settings.
    ConfigError: a tracker is not installed, run.json was damaged, or training leaves no device to
      generate on.
  """

  def __init__(self, config: RunConfig, workdir: pathlib.Path):
    self.config, self.workdir = config, workdir
    trackers.check(config.trackers)
    self._started = time.monotonic()
    timeline = workdir / "timeline.json" if processes.leads() else None
    self._timeline = rollout.Timeline(timeline, config.engine.slots)
    self._learner = Learner(config, self._timeline)
    self._lent = division.lent(config, self._learner.placement.mesh)
    self._metrics = processes.if_leading(MetricsWriter, workdir)
    self._episodes = processes.if_leading(JsonlFile, workdir / "episodes.jsonl")
    self._checkpoints = Checkpoints(workdir, config.keep_checkpoints)
    self._timer = StageTimer()
    self._experts = make_experts(config)
    self._updates = processes.if_leading(record.Updates, workdir, config)
    self._player: Player
    self._stream: rollout.Stream | None = None
    source, behind = config.rl.old_logp_source, config.rl.max_staleness
    self._kept = KeptWeights(behind + 1 if source == "kept_weights" else 0)
    self._restore()
    where = self.cursor["phase"], int(self.state.step)
    start = launches.record_start(workdir, config, *where) if processes.leads() else {}
    names = config.trackers if processes.leads() else ()
    self._trackers = trackers.Trackers(names, workdir, dataclasses.asdict(config), start)

  def close(self) -> None:
    """Waits for the checkpoint under way, then for the trackers.

    Raises:
      CheckpointError: it could not be written.
    """
    with contextlib.ExitStack() as stack:
      stack.callback(self._trackers.close, self.cursor["phase"] == "done")
      for part in (self._metrics, self._episodes, self._timeline, self._checkpoints):
        stack.callback(part.close)

  def train(self) -> dict[str, Any]:
    """Runs every phase that is left, writes summary.json and returns it.

    Raises:
      SandboxError, TaskError, CheckpointError, TooManyInvalid, TooManyAbandoned, AlarmStop,
      FloatingPointError: see their texts; the last checkpoint is intact.
    """
    try:
      return self._train()
    except NonFinite as error:
      if not processes.leads():
        raise
      raise nonfinite.dump(error, self.workdir, self.cursor["phase"]) from error

  def _train(self) -> dict[str, Any]:
    if self.cursor["phase"] != "done":
      with Player(self.config, self._learner.model, self._timeline) as self._player:
        self.cursor["backend"] = self._player.world.backend
        tqdm.write(f"sandboxes: {self.config.engine.slots} x {self.cursor['backend']}")
        if self._lent:
          tqdm.write(f"devices that generate, and train during updates: {len(self._lent)}")
        if self.cursor["phase"] == "sft":
          self._warm_start()
          self._next_phase("rl", self._learner.reinforcing(self.state))
        self._reinforce()
        self._evaluate("after")
        self._next_phase("done", self.state)
    self._settle()
    summary = summary_lib.summarise(
      self.config,
      self.state.params,
      self.cursor,
      self._checkpoints.path(self._checkpoints.steps()[-1]),
    )
    if processes.leads():
      files.write_atomic(self.workdir / "summary.json", json.dumps(summary, indent=2) + "\n")
    return summary

  # --- where the run stands --------------------------------------------------------------------

  def _restore(self) -> None:
    """Takes up the newest checkpoint that is whole, or starts at the beginning.

    Files are cut back to where it stood.
    """
    fresh, experts = self._learner.fresh(), self._experts.arrays()
    settings = record.origin(self.config)["settings"]
    scaffold = rollout.scaffold_digest(self.config.agent)
    self.state, store, self.cursor = self._checkpoints.resume(fresh, experts, tqdm.write) or (
      self._learner.begin(),
      experts,
      {
        "phase": "sft",
        "instance": self.config.demonstrations,
        "evals": {},
        "wall": 0.0,
        "peak_rss_mb": 0,
        "backend": "",
        "sums": dict.fromkeys(("sampled", "trained", "env_steps", "rollout", "wall", *STAGES), 0.0),
        "metrics": 0,
        "episodes": 0,
        "alarms": {},
        "open": [],
        "buffer": None,
        "settings": settings,
        "scaffold": scaffold,
      },
    )
    if self.cursor.get("settings") != settings:  # of earlier commits it has none
      raise CheckpointError(
        f"checkpoint {self._checkpoints.path(self._checkpoints.steps()[-1])} was made under other "
        "settings than this run's; use those it was made with or another --workdir"
      )
    if self.cursor.get("scaffold", "") != scaffold:
      raise CheckpointError(
        f"config.agent.scaffold={self.config.agent.scaffold}, or the system prompt it names, was "
        f"changed since {self.workdir} was begun; give the file back its old content, or choose "
        "another --workdir"
      )
    self._experts.load(store)
    self._metrics.restore(self.cursor["metrics"])
    self._episodes.restore(self.cursor["episodes"])
    self._updates.forget_after(0 if self.cursor["phase"] == "sft" else int(self.state.step))
    if self.cursor["metrics"]:
      tqdm.write(
        f"resuming {self.workdir}: phase {self.cursor['phase']}, update {int(self.state.step)}"
      )

  def _save(self) -> None:
    now = time.monotonic()
    self.cursor |= {
      "metrics": self._metrics.position(),
      "episodes": self._episodes.position(),
      "wall": self.cursor["wall"] + now - self._started,
      "peak_rss_mb": max(self.cursor["peak_rss_mb"], summary_lib.peak_rss_mb()),
    }
    self._started = now
    done = int(self.state.step) + (0 if self.cursor["phase"] == "sft" else self.config.sft.steps)
    # The end of a phase and its last update share a number of updates; doubling keeps their
    # checkpoints apart.
    number = 2 * done + (self.cursor["phase"] == "done")
    with self._timeline.stage("checkpoint"):
      self._settle()  # first, since it drops buffers without a checkpoint
      if self._stream is not None:
        stands = self._stream.snapshot()
        self._updates.write_buffer(number, stands.buffer)
        self.cursor |= {"instance": stands.instance, "open": stands.open, "buffer": number}
      self._checkpoints.save(number, self.state, self._experts.arrays(), self.cursor)

  def _settle(self) -> None:
    """Waits for the checkpoint under way; then drops the records that none of them needs."""
    self._checkpoints.wait()
    if processes.leads() and (steps := self._checkpoints.steps()):
      oldest = record.update_of(steps[0], self.config)
      self._updates.prune(oldest + 1, self._checkpoints.size())
      self._updates.prune_buffers(steps)

  def _next_phase(self, phase: str, state: state_lib.TrainState) -> None:
    self.cursor["phase"], self.state = phase, state
    self._save()

  # --- phases ----------------------------------------------------------------------------------

  def _warm_start(self) -> None:
    """Supervised learning on a fixed set of demonstrations (Eq. 1).

    Evaluations on the way show its plateau.
    """
    config, count = self.config.sft, self.config.eval.plateau
    with self._timeline.stage("demonstrations"):
      demos = self._player.demonstrate(self.config.demonstrations)
    self._timeline.mark("demonstrations", 0)
    self._updates.write_demonstrations(demos)
    names = {round(config.steps * k / count): f"plateau_{k}" for k in range(1, count)}
    with self._progress("warm start", config.steps) as bar:
      for step in range(int(self.state.step), config.steps):
        self._timer.reset()
        with self._timer.stage("train"):
          self.state, learned, tokens = self._learner.imitate(self.state, demos, step)
        speed = self._timer.rate(tokens, "train")
        row = learned | {"tokens_per_s_trained": speed}
        bar.update(loss=f"{row['loss']:.3f}", trained=f"{row['tokens_per_s_trained']:.0f} tok/s")
        if step + 1 in names:
          self._evaluate(names[step + 1])
        self._end_update(config, "sft", step + 1, row)
    self._experts.add(demos)
    self._evaluate("before")

  def _reinforce(self) -> None:
    """IPA on fresh training instances: one update a batch.

    Past successes are imitated beside it.
    """
    config = self.config.rl
    for name in ("group_redundancy", "max_staleness"):
      if getattr(config, name):
        tqdm.write(
          f"rl.{name}={getattr(config, name)}: batches depend on timing, so this run does not "
          "repeat bit for bit"
        )
    with self._progress("IPA", config.steps) as bar, self._overlapping():
      for step in range(int(self.state.step), config.steps):
        self._timer.reset()
        trajectories, stats = self._rollout(step)
        with self._timer.stage("train"):
          imitated = self._learner.choose(self._experts, step, trajectories)
          self.state, learned, tokens = self._learner.reinforce(
            self.state, trajectories, imitated, step, self._old_weights()
          )
        if self.config.numerics == "exact" and learned["mismatch_max"] != 0:
          raise FloatingPointError(
            f"update {step}: numerics='exact', but log-probs of engine and trainer differ by up to "
            f"{learned['mismatch_max']:.3g} nats; please report this with config.json"
          )
        self._experts.add(trajectories)
        row = learned | rollout_row(trajectories, stats, step)
        scaffold = bool(self.config.agent.scaffold)
        row |= rollout.tool_use(trajectories, self._player.tokenizer, scaffold)
        row |= self._speed_row(stats, tokens)
        bar.update(
          success=f"{row['success']:.2f}",
          loss=f"{row['loss']:.3f}",
          sampled=f"{row['tokens_per_s_sampled']:.0f} tok/s",
          trained=f"{row['tokens_per_s_trained']:.0f} tok/s",
          env=f"{row['env_steps_per_s']:.0f} steps/s",
        )
        row |= self._learner.place(step, self._experts) | self._experts.row(trajectories)
        self._updates.write(step + 1, trajectories, stats, imitated, row)
        self._end_update(config, "rl", step + 1, row)

  @contextlib.contextmanager
  def _overlapping(self) -> Iterator[None]:
    """Within it rollout goes on while updates are computed, if the settings say so."""
    config = self.config.rl
    if not config.max_staleness:
      yield
      return
    buffer = self.cursor["buffer"]
    stands = rollout.Snapshot(
      self.cursor["instance"],
      tuple(self.cursor["open"]),
      () if buffer is None else tuple(self._updates.read_buffer(buffer)),
    )
    left = config.steps - int(self.state.step)
    with self._player.stream(
      self.state.key, stands, config, left, self._experts.start, self._lent
    ) as self._stream:
      yield
    self._stream = None

  def _rollout(self, step: int) -> tuple[list[Trajectory], rollout.RolloutStats]:
    """The batch of update `step`, and what was played since the last one."""
    started = time.monotonic()
    with self._timeline.stage("rollout"):
      if self._stream is None:
        trajectories, stats = self._player.play(
          self.state.params,
          self.state.key,
          "train",
          self.cursor["instance"],
          self.config.rl.groups,
          RL_STREAM,
          step,
          grouping(self.config.rl),
          self._experts.start,
        )
        self.cursor["instance"] += stats.instances
      else:
        self._kept.add(step, self.state.params)
        self._stream.publish(placement.local(self.state.params), step)
        trajectories, stats = self._stream.fetch()
    # What the trainer waited, in the proportion in which rollout generated and waited.
    waited = time.monotonic() - started
    generated = stats.generate_seconds / max(stats.seconds, 1e-9)
    self._timer.add("generate", waited * generated)
    self._timer.add("env", waited * (1 - generated))
    return trajectories, stats

  def _old_weights(self) -> dict[int, chex.ArrayTree] | None:
    """By version, those under which old log-probs are computed; None: those that are updated."""
    return self._kept.params if self.config.rl.rescored else None

  def _evaluate(self, name: str) -> None:
    """Success on the held-out instances.

    Every evaluation has the same instances, settings and randomness.
    """
    with self._timeline.stage("evaluation"):
      result, trajectories = self._player.evaluate(
        self.state.params, self.state.key, self.config.eval.instances
      )
    self._timeline.mark("eval", int(self.state.step))
    self.cursor["evals"][name] = result
    step, (low, high) = int(self.state.step), result["interval"]
    self._metrics.write(
      "eval",
      step,
      {
        "name": name,
        "success": result["success"],
        "low": low,
        "high": high,
        "n": result["n"],
        **{
          f"family_{family}": figures["success"] for family, figures in result["families"].items()
        },
      },
    )
    for row in transcripts(trajectories, self.config.transcripts, name, step):
      self._episodes.append(row)
    tqdm.write(
      f"held-out success, {name}: {result['success']:.3f} [{low:.3f}, {high:.3f}] of {result['n']}"
    )

  # --- pieces of an update ---------------------------------------------------------------------

  def _progress(self, name: str, total: int) -> Progress:
    return processes.if_leading(Progress, name, total, int(self.state.step))

  def _end_update(self, config: StageConfig, phase: str, done: int, row: dict[str, Any]) -> None:
    if done % config.log_every == 0:
      self._metrics.write(phase, done, row)
    stop = self._alarms(done, row) if phase == "rl" else None
    if (done % config.checkpoint_every == 0 and done < config.steps) or stop:
      self._save()
    self._timeline.mark(phase, done)
    self._checkpoints.check()
    if stop:
      self._settle()
      raise alarms.AlarmStop(
        f"update {done}: {stop.text}; its checkpoint is saved. The same command goes on from it "
        f"with another --config.alarms.{stop.rule}.stop, or updates=0 to switch the rule off"
      )

  def _alarms(self, done: int, row: dict[str, Any]) -> alarms.Alarm | None:
    """Tells and writes what the rules say of an update; the one that stops the run, if any."""
    stop = None
    for alarm in alarms.check(self.config.alarms, row, self.cursor["alarms"]):
      tqdm.write(f"update {done}: {alarm.text}")
      self._metrics.write("alarm", done, alarm.row())
      stop = stop or (alarm if alarm.stop else None)
    return stop

  def _speed_row(self, stats: rollout.RolloutStats, trained: int) -> dict[str, float | None]:
    """Rates and stage shares of one update; their sums go to the cursor."""
    seconds = {stage: self._timer.seconds(stage) for stage in STAGES}
    counts = {"sampled": stats.sampled_tokens, "trained": trained, "env_steps": stats.env_steps}
    played = stats.seconds
    for name, value in (
      counts | seconds | {"rollout": played, "wall": self._timer.total()}
    ).items():
      self.cursor["sums"][name] += value
    return {
      "tokens_per_s_sampled": stats.sampled_tokens / played,
      "tokens_per_s_trained": self._timer.rate(trained, "train"),
      "env_steps_per_s": stats.env_steps / played,
      **self._timer.shares(),
    }
