"""The settings of a run: typed, validated and frozen before anything starts.

`RunConfig` is the one list of settings. A config file returns it as an `ml_collections.ConfigDict`
so that flags can override single fields; `from_config_dict` turns it back, refusing unknown names,
wrong types and contradictions.
"""

import dataclasses
import math
from typing import Any

import ml_collections

from rome import ipa, models
from rome.ipa import IPAConfig
from rome.ipa import config as ipa_config
from rome.models import exact
from rome.rollout import (
  MAX_MEMBERS,
  AgentConfig,
  NativeConfig,
  ResamplingConfig,
  SandboxConfig,
  TasksConfig,
  WorkersConfig,
)
from rome.train.alarms import AlarmsConfig
from rome.train.settings import ConfigError, build
from rome.train.settings import to_config_dict as to_config_dict  # for config files

MAX_CHUNKS = 32  # of a trajectory
OLD_LOGP_SOURCES = ("kept_weights", "engine", "current")
TRACKERS = ("wandb", "mlflow")
AUTO = "auto"  # model: the sizes of init_from
# Settings that may be others when a run goes on.
MAY_CHANGE = ("alarms", "mesh", "offload_optimizer")
_OF_GROUPS = ("group", "leave_one_out")  # values of ipa.centre and ipa.scale
# Estimators whose returns are advantages over groups (`rome.ipa.clipped`).
_GROUP_RELATIVE = ("grpo", "dapo", "gspo", "cispo")


def chunk_slots(row_length: int) -> int:
  """Chunk slots of a training row: enough that tokens fill it first, at 32 a turn or more."""
  return max(MAX_CHUNKS, row_length // 32)


@dataclasses.dataclass(frozen=True)
class EngineConfig:
  """Shapes of generation.

  Attributes:
    slots: episodes at once, in each process. With several devices they share them, so slots is a
      multiple of their number: episodes and sandboxes stay as many.
    prefill_tokens: context tokens a step of a device computes at most.
    steps: sampled tokens a device call.
    devices: how many of a process's devices generate, the last ones, each with all weights
      (`rome.train.division`); -1 for all. 1 is the first device, which also trains.
  """

  slots: int = 32
  prefill_tokens: int = 512
  steps: int = 8
  devices: int = 1


@dataclasses.dataclass(frozen=True)
class StageConfig:
  """One stage of training.

  Attributes:
    steps: updates.
    batch: trajectories an update.
    learning_rate: peak. 0 leaves the weights as they are.
    warmup: updates of linear warm-up.
    cooldown: updates at the end over which the rate falls linearly to a tenth.
    clip_norm: global gradient norm is clipped to this.
    weight_decay: AdamW's.
    micro_rows: rows a device call; times row_length its budget of tokens, full or not. A trajectory
      has at most as many, where its agent rewrites the context.
    log_every: updates a metrics row.
    checkpoint_every: updates a checkpoint.
  """

  steps: int
  batch: int
  learning_rate: float
  warmup: int = 10
  cooldown: int = 0
  clip_norm: float = 1.0
  weight_decay: float = 0.0
  micro_rows: int = 8
  log_every: int = 1
  checkpoint_every: int = 20


@dataclasses.dataclass(frozen=True)
class RLConfig(StageConfig):
  """Reinforcement learning: a stage whose trajectories are played, in groups.

  Attributes:
    group_size: trajectories of each task instance; batch is a multiple of it.
    group_redundancy: members that a group starts beyond them. The first group_size that finish are
      kept, so that a slow environment costs nothing; which they are depends on timing, so such a
      run does not repeat bit for bit.
    filter_groups: replace groups whose members all earned the same, which group statistics learn
      nothing from, by the next instances.
    filter_cap: groups that an update may replace, as a multiple of those it trains on; beyond it
      the batch is filled with such groups.
    max_staleness: the asynchronous ratio: versions of the weights that a trajectory may have begun
      before the update that uses it. 0 is synchronous: rollout and training take turns. Above 0
      they overlap, batches depend on timing, and a run does not repeat bit for bit.
    old_logp_source: with max_staleness, what the old log-probs of ratios are: "kept_weights" (each
      chunk scored under the version that sampled it; keeps max_staleness more copies of the
      weights), "engine" (as it was sampled), or "current" (every ratio is 1, and the mismatch mask
      measures staleness as well).
  """

  group_size: int = 1
  group_redundancy: int = 0
  filter_groups: bool = False
  filter_cap: float = 2.0
  max_staleness: int = 0
  old_logp_source: str = "kept_weights"

  @property
  def rescored(self) -> bool:
    """Whether old log-probs are computed apart: others than those of the weights in training."""
    return self.max_staleness > 0 and self.old_logp_source != "current"

  @property
  def groups(self) -> int:
    """Groups an update."""
    return self.batch // self.group_size


@dataclasses.dataclass(frozen=True)
class ExpertsConfig:
  """The imitation term of Eq. 10 (weighted by `ipa.lambda_il`).

  Attributes:
    batch: expert trajectories imitated an update, 0 for none.
    capacity: rows of verified successes kept, the newest; one each unless an agent rewrites its
      context.
  """

  batch: int = 64
  capacity: int = 8192


@dataclasses.dataclass(frozen=True)
class EvalConfig:
  """Evaluation on held-out instances, with the same sampling as training.

  Attributes:
    instances: held-out instances, shared out over the families.
    plateau: evaluations during the warm start, evenly spaced, the last one at its end.
  """

  instances: int = 204
  plateau: int = 3


@dataclasses.dataclass(frozen=True)
class MeshConfig:
  """How the devices of all processes share the trainer (`rome.models.sharding`, docs/design.md).

  All 1, the default, is one device. One size may be -1, for as many devices as there are.

  Attributes:
    data: rows of a micro-batch are split.
    fsdp: rows are split, and the hidden axis of parameters and optimiser state at rest.
    expert: rows are split, and experts.
    context: each row is split along its length.
    tensor: heads, inner widths and the vocabulary are split.
  """

  data: int = 1
  fsdp: int = 1
  expert: int = 1
  context: int = 1
  tensor: int = 1

  def __post_init__(self) -> None:
    sizes = dataclasses.asdict(self)
    for name, size in sizes.items():
      if size < 1 and size != -1:
        raise ValueError(f"mesh.{name} must be at least 1, or -1 for the rest, got {size}")
    free = [name for name, size in sizes.items() if size == -1]
    if len(free) > 1:
      raise ValueError(f"mesh: only one size may be -1, got {' and '.join(free)}")


@dataclasses.dataclass(frozen=True)
class LoraConfig:
  """Low-rank adapters (`rome.models.lora`), which alone are trained then.

  Attributes:
    rank: of the adapters; 0 trains all weights.
    alpha: adapters are scaled by alpha / rank.
    targets: projections that have one, of `rome.models.lora.TARGETS`.
  """

  rank: int = 0
  alpha: float = 32.0
  targets: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj")


@dataclasses.dataclass(frozen=True)
class RunConfig:
  """A whole run: warm start on demonstrations, then IPA.

  Attributes:
    seed: everything random follows from it.
    model: a preset of `rome.models.PRESETS`; "auto" for the sizes of `init_from`.
    init_from: where the weights come from that the run begins with, "" for random ones: the workdir
      of a run (its newest checkpoint), one of its checkpoints/N, a Hugging Face directory
      (config.json and safetensors) or a .gguf file.
    demonstrations: reference solutions that the warm start learns from, and the first experts; 0 is
      for sft.steps=0.
    transcripts: episodes an evaluation writes to episodes.jsonl.
    keep_checkpoints: the newest ones that stay.
    row_length: tokens of a training row, at least agent.context; short episodes share one.
    sampling: the distribution that replies are drawn from and scored under.
    numerics: "fast", or "exact": the engine's log-probs and those of reinforcement learning are the
      same bits, at the cost of `benchmarks/exact.py`. It fixes shapes on both sides: no packing,
      rl.micro_rows = engine.slots, and row_length = agent.context in whole tiles of 16 tokens.
    lora: adapters on the weights that the run begins with.
    native: the foreign agent, with agent.mode="native".
    sft: the warm start.
    workers: hosts on which episodes are played.
    rl: reinforcement learning.
    estimator: the loss: a name of `rome.ipa.ESTIMATORS`, or the import path of a function with the
      signature of `ipa.ipa_loss`, as "package.module:name" (`rome.rollout.custom`).
    ipa: settings of the loss.
    reward: import path of a function that rewards finished episodes, "" for the tests' reward.
    experts: verified successes that are imitated beside it.
    resampling: where episodes start on the expert of their task; then the experts of the batch's
      tasks are imitated, as far as its members started, at most experts.batch.
    router_balance_weight: of the load-balancing loss over experts, in both stages; with several
      micro-batches an update it costs one forward pass more (`rome.models.balance`).
    router_z_weight: of the router's z-loss.
    mesh: the devices that training is split over. A run may change it when it goes on; numbers then
      agree up to rounding.
    offload_optimizer: keep the optimiser's moments in the host's memory between updates, which
      then bring them to the device a layer at a time (`rome.train.optimise`): memory for time. The
      bits are the same, and a run may change it when it goes on.
    alarms: bounds beyond which an update of reinforcement learning warns, or stops the run. A run
      may change them when it goes on; all settings not said to may not.
    trackers: services that the figures go to as well, of TRACKERS (`rome.train.trackers`).
  """

  seed: int = 0
  model: str = "tiny"
  init_from: str = ""
  demonstrations: int = 96
  transcripts: int = 6
  keep_checkpoints: int = 3
  row_length: int = 256
  tasks: TasksConfig = TasksConfig()
  sandbox: SandboxConfig = SandboxConfig()
  agent: AgentConfig = AgentConfig()
  native: NativeConfig = NativeConfig()
  workers: WorkersConfig = WorkersConfig()
  engine: EngineConfig = EngineConfig()
  sampling: models.Sampling = models.Sampling()
  numerics: str = "fast"
  lora: LoraConfig = LoraConfig()
  sft: StageConfig = StageConfig(
    steps=200, batch=32, learning_rate=2e-3, log_every=5, checkpoint_every=50
  )
  rl: RLConfig = RLConfig(steps=100, batch=64, learning_rate=1e-3)
  estimator: str = "ipa"
  ipa: IPAConfig = IPAConfig(lambda_il=1.0)
  reward: str = ""
  experts: ExpertsConfig = ExpertsConfig()
  resampling: ResamplingConfig = ResamplingConfig()
  eval: EvalConfig = EvalConfig()
  router_balance_weight: float = 0.0
  router_z_weight: float = 0.0
  mesh: MeshConfig = MeshConfig()
  offload_optimizer: bool = False
  alarms: AlarmsConfig = AlarmsConfig()
  trackers: tuple[str, ...] = ()

  def __post_init__(self) -> None:
    known = f"one of {', '.join(models.PRESETS)}, or {AUTO!r}"
    self._check(self.model in (*models.PRESETS, AUTO), "model", known)
    preset = "a preset while init_from is empty: there is nothing to take sizes from"
    self._check(self.model != AUTO or self.init_from, "model", preset)
    self._check(0 <= self.seed < 1 << 32, "seed", "at least 0 and below 2**32")
    self._check(self.agent.max_turns <= MAX_CHUNKS, "agent.max_turns", f"at most {MAX_CHUNKS}")
    for name in (
      "transcripts",
      "keep_checkpoints",
      "engine.slots",
      "engine.steps",
      "eval.instances",
      "eval.plateau",
      "experts.capacity",
      *(
        f"{stage}.{field}"
        for stage in ("sft", "rl")
        for field in ("batch", "micro_rows", "log_every", "checkpoint_every")
      ),
    ):
      self._check(self._get(name) >= 1, name, "at least 1")
    for stage in ("sft", "rl"):
      for field in ("steps", "learning_rate", "warmup", "cooldown", "weight_decay"):
        self._check(self._get(f"{stage}.{field}") >= 0, f"{stage}.{field}", "at least 0")
      self._check(self._get(f"{stage}.clip_norm") > 0, f"{stage}.clip_norm", "above 0")
    self._check(self.engine.prefill_tokens >= 16, "engine.prefill_tokens", "at least 16")
    devices, slots = self.engine.devices, self.engine.slots
    self._check(devices >= 1 or devices == -1, "engine.devices", "at least 1, or -1 for all")
    shared = f"a multiple of engine.devices={devices}, which share them"
    self._check(devices == -1 or slots % devices == 0, "engine.slots", shared)
    self._check(
      self.row_length >= self.agent.context,
      "row_length",
      f"at least agent.context={self.agent.context}",
    )
    self._check(
      (self.ipa.lambda_il > 0) == (self.experts.batch > 0),
      "ipa.lambda_il",
      f"above 0 exactly when experts.batch={self.experts.batch} is",
    )
    enough = f"at least experts.batch={self.experts.batch}"
    self._check(self.experts.capacity >= self.experts.batch, "experts.capacity", enough)
    for name in ("router_balance_weight", "router_z_weight"):
      self._check(0 <= self._get(name) < math.inf, name, "at least 0 and finite")
      if self.model != AUTO and not models.PRESETS[self.model].num_experts:
        self._check(self._get(name) == 0, name, f"0 for model={self.model}, which has no experts")

    listed = len({*self.trackers} & {*TRACKERS}) == len(self.trackers)
    self._check(listed, "trackers", f"a tuple of {' and '.join(map(repr, TRACKERS))}, each once")
    self._check(self.numerics in ("fast", "exact"), "numerics", '"fast" or "exact"')
    if self.numerics == "exact":
      self._check_exact()
    self._check_lora()
    self._check_environments()
    self._check_native()
    self._check_groups()
    self._check_ipa()
    self._check_resampling()

  def _check_exact(self) -> None:
    """Exact numerics: training computes in the engine's shapes."""
    why = "because of numerics='exact'"
    slots, context = self.engine.slots, self.agent.context
    length = -(-context // exact.TILE) * exact.TILE
    self._check(self.rl.micro_rows == slots, "rl.micro_rows", f"engine.slots={slots} {why}")
    self._check(self.rl.max_staleness == 0, "rl.max_staleness", f"0 {why}: older weights differ")
    what = f"{length} (agent.context={context} in whole tiles of {exact.TILE}) {why}"
    self._check(self.row_length == length, "row_length", what)
    self._check(self.mesh == MeshConfig(), "mesh", f"one device, all sizes 1, {why}")
    self._check(self.engine.devices == 1, "engine.devices", f"1 {why}: shapes follow engine.slots")

  def _check_lora(self) -> None:
    lora, default = self.lora, LoraConfig()
    self._check(lora.rank >= 0, "lora.rank", "at least 0")
    if not lora.rank:
      for name in ("alpha", "targets"):
        wanted = getattr(default, name)
        what = f"{wanted!r} while lora.rank is 0, which it would not change"
        self._check(getattr(lora, name) == wanted, f"lora.{name}", what)
      return
    self._check(self.mesh == MeshConfig(), "mesh", "one device, all sizes 1, with lora.rank")
    self._check(
      self.numerics == "fast", "numerics", '"fast" with lora.rank: engines merge adapters'
    )

  def _check_environments(self) -> None:
    """Instances, and what the warm start learns of them."""
    self._check(self.demonstrations >= 0, "demonstrations", "at least 0")
    without = f"at least 1 while sft.steps={self.sft.steps} (0 goes with sft.steps=0)"
    self._check(self.demonstrations or not self.sft.steps, "demonstrations", without)
    if self.tasks.numbered:
      bare = "0 for tasks.families=(): numbered instances have no reference solution"
      self._check(not self.demonstrations, "demonstrations", bare)
    own = "an import path of your own with sandbox.backend='none': the default needs sandboxes"
    named = self.tasks.env != TasksConfig.env or self.sandbox.backend != "none"
    self._check(named, "tasks.env", own)

  def _check_native(self) -> None:
    """A foreign agent: settings of the managed one would have no effect."""
    if self.agent.mode != "native":
      what = "as it is by default with agent.mode='managed', which does not read it"
      self._check(self.native == NativeConfig(), "native", what)
      return
    why = "with agent.mode='native'"
    self._check(self.native.command.strip(), "native.command", f"what runs the agent {why}")
    isolated = f"auto, podman or bubblewrap {why}: the proxy is to be the agent's only way out"
    allowed = self.sandbox.backend in ("auto", "podman", "bubblewrap")
    self._check(allowed, "sandbox.backend", isolated)
    for name, value, reason in (
      ("agent.system", "", "the foreign agent has prompts of its own"),
      ("agent.factory", AgentConfig.factory, "the agent is native.command"),
      ("agent.scaffold", "", "the agent is native.command"),
      ("engine.devices", 1, "the proxy asks one engine"),
      ("demonstrations", 0, "nobody knows how a foreign agent would write them"),
      ("sft.steps", 0, "there are no demonstrations: begin with weights from init_from"),
      ("rl.max_staleness", 0, "batches of foreign agents are not played ahead"),
      ("resampling.mode", "off", "a foreign agent cannot be taken up in the middle"),
      ("workers.address", "", "the proxy and its agents share a host"),
      ("reward", "", "the environment's own reward counts"),
    ):
      self._check(self._get(name) == value, name, f"{value!r} {why}: {reason}")

  def _check_groups(self) -> None:
    rl = self.rl
    self._check(rl.group_size >= 1, "rl.group_size", "at least 1")
    self._check(rl.group_redundancy >= 0, "rl.group_redundancy", "at least 0")
    self._check(rl.max_staleness >= 0, "rl.max_staleness", "at least 0")
    sources = OLD_LOGP_SOURCES if rl.max_staleness else OLD_LOGP_SOURCES[:1]
    what = " or ".join(map(repr, sources))
    if not rl.max_staleness:
      what += " with rl.max_staleness=0, where all sources agree"
    self._check(rl.old_logp_source in sources, "rl.old_logp_source", what)
    most = f"at most {MAX_MEMBERS} together with rl.group_redundancy={rl.group_redundancy}"
    self._check(rl.group_size + rl.group_redundancy <= MAX_MEMBERS, "rl.group_size", most)
    what = f"a multiple of rl.group_size={rl.group_size}"
    self._check(rl.batch % rl.group_size == 0, "rl.batch", what)
    if rl.filter_groups:
      alone = "above 1 with rl.filter_groups: a group of one always earns the same"
      self._check(rl.group_size > 1, "rl.group_size", alone)
      # So that one group at least may be replaced.
      what = f"finite and at least 1/{rl.groups} (one of the {rl.groups} groups of an update)"
      self._check(1 <= rl.filter_cap * rl.groups < math.inf, "rl.filter_cap", what)
    else:
      default = RLConfig.filter_cap
      what = f"{default} while rl.filter_groups is off, which it would not change"
      self._check(rl.filter_cap == default, "rl.filter_cap", what)

  def _check_resampling(self) -> None:
    if self.resampling.mode == "off":
      default = ResamplingConfig()
      for field in dataclasses.fields(default):
        wanted = getattr(default, field.name)
        what = f"{wanted!r} while resampling.mode is 'off', which it would not change"
        self._check(
          self._get(f"resampling.{field.name}") == wanted, f"resampling.{field.name}", what
        )
      return
    why = f"with resampling.mode={self.resampling.mode!r}"
    if not self.tasks.train_dir:
      what = (
        f"at least rl.groups={self.rl.groups} {why}: a task's expert serves when it comes again"
      )
      self._check(self.tasks.train_count >= self.rl.groups, "tasks.train_count", what)
    if self.experts.batch:
      what = f"at least the {self.rl.groups} groups of an update {why}"
      self._check(self.experts.batch >= self.rl.groups, "experts.batch", what)
    if self.resampling.mode == "anchors" and {self.ipa.centre, self.ipa.scale} & set(_OF_GROUPS):
      least = 2 * self.resampling.anchors
      what = f"at least {least}, two for each of resampling.anchors, with statistics of groups"
      self._check(self.rl.group_size >= least, "rl.group_size", what)
    default_capacity = ExpertsConfig.capacity
    what = f"{default_capacity} {why}, which keeps one expert a task"
    self._check(self.experts.capacity == default_capacity, "experts.capacity", what)

  def _check_ipa(self) -> None:
    """Settings of the loss that this loop cannot serve are errors, not settings without effect."""
    own = ":" in self.estimator  # nothing is known of what a user's function reads
    known = f'one of {", ".join(ipa.ESTIMATORS)}, or an import path "package.module:name"'
    self._check(own or self.estimator in ipa.ESTIMATORS, "estimator", known)
    states = "another one: the loop makes no advantages by state, which gigpo is about; try grpo"
    self._check(self.estimator != "gigpo", "estimator", states)
    alone = "a group has one member: raise rl.group_size for group statistics"
    grouped = self.rl.group_size > 1
    for name, allowed, why in (
      ("kl_weight", (0.0,), "no reference policy is kept"),
      ("centre", ipa_config.CENTRES if grouped else ("none", "batch"), alone),
      ("scale", ipa_config.SCALES if grouped else ("none", "batch"), alone),
    ):
      what = f"{' or '.join(map(repr, allowed))} here ({why})"
      self._check(self._get(f"ipa.{name}") in allowed, f"ipa.{name}", what)
    if self.estimator in _GROUP_RELATIVE:
      what = f"'group' or 'leave_one_out' for estimator={self.estimator}, and rl.group_size above 1"
      self._check(self.ipa.centre in ("group", "leave_one_out"), "ipa.centre", what)
    if not own:
      try:
        ipa.check_estimator(self.estimator, self.ipa)
      except ValueError as error:
        raise ConfigError(str(error).replace("IPAConfig.", "config.ipa.")) from None

  def _get(self, name: str) -> Any:
    value: Any = self
    for part in name.split("."):
      value = getattr(value, part)
    return value

  def _check(self, holds: Any, name: str, what: str) -> None:
    if not holds:
      raise ConfigError(f"config.{name} must be {what}, got {self._get(name)!r}")


def from_config_dict(values: ml_collections.ConfigDict) -> RunConfig:
  """The frozen settings.

  Raises:
    ConfigError: naming the first setting that is unknown, missing, of the wrong type or
      contradictory.
  """
  return build(RunConfig, values.to_dict(), "config")
