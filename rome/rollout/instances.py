"""Which task instances a run plays: procedural families, or directories of the user's own tasks.

Training and held-out instances are numbered; number n of a split is the same instance on every
machine, so a run's place among its tasks is one integer.
"""

import dataclasses
import os
import pathlib

from rome.agent.world import TERMINAL
from rome.envs import families
from rome.envs import task as task_lib

NUMBERED = "numbered"  # family of instances that are a number and nothing else


@dataclasses.dataclass(frozen=True)
class TasksConfig:
  """Where instances come from.

  Attributes:
    families: names of `rome.envs.families`, taken in turn. With an `env` of the user's, () for
      instances that are numbers alone, "numbered/SEED", and all else is the environment's.
    train_dir: a directory of task directories to train on instead; "" uses the families.
    held_out_dir: likewise for evaluation; needed with `train_dir`.
    train_count: instances of the families to train on, again and again; 0 never repeats one.
    env: import path of what makes environments, see `rome.agent.custom`.
  """

  families: tuple[str, ...] = tuple(families.FAMILIES)
  train_dir: str = ""
  held_out_dir: str = ""
  train_count: int = 0
  env: str = TERMINAL

  def __post_init__(self) -> None:
    unknown = [name for name in self.families if name not in families.FAMILIES]
    if unknown or not (self.families or self.numbered):
      raise ValueError(
        f"tasks.families must be among {', '.join(families.FAMILIES)}, got {self.families!r}"
      )
    if bool(self.train_dir) != bool(self.held_out_dir):
      raise ValueError("tasks.train_dir and tasks.held_out_dir must be given together")
    if self.train_count < 0 or (self.train_dir and self.train_count):
      raise ValueError(
        f"tasks.train_count must be at least 0, and 0 with tasks.train_dir, got {self.train_count}"
      )
    if self.train_dir and not self.families:
      raise ValueError("tasks.families=() is for an own tasks.env without tasks.train_dir")

  @property
  def numbered(self) -> bool:
    """Whether instances are numbers alone."""
    return not self.families and self.env != TERMINAL


class TaskSource:
  """Numbered instances of two splits, "train" and "held_out".

  Raises:
    TaskError: a directory has no task, or an unusable one.
  """

  def __init__(self, config: TasksConfig):
    self._families, self._count = config.families, config.train_count
    self._own: dict[str, list[task_lib.Task]] = {}
    if config.train_dir:
      self._own = {"train": _load_all(config.train_dir), "held_out": _load_all(config.held_out_dir)}

  def get(self, split: str, index: int) -> task_lib.Task:
    """Instance number `index` of a split.

    The user's own tasks come round again, families only with `train_count`.
    """
    if self._own:
      return self._own[split][index % len(self._own[split])]
    if self._count and split == "train":
      index %= self._count
    if not self._families:
      return _numbered(families.split_seed(split, index))
    family = self._families[index % len(self._families)]
    return families.generate(family, families.split_seed(split, index // len(self._families)))

  @property
  def training_tasks(self) -> list[str]:
    """Ids of the training tasks, in turn; empty where they never come round."""
    if self._own:
      return [task.id for task in self._own["train"]]
    return [self.get("train", index).id for index in range(self._count)]


def _numbered(seed: int) -> task_lib.Task:
  """An instance for an environment that makes everything from a seed."""
  # A task has to have an instruction and tests; nothing reads those of this one.
  return task_lib.Task(f"{NUMBERED}/{seed}", NUMBERED, f"Play {seed}.", {}, "false")


def _load_all(directory: str | os.PathLike) -> list[task_lib.Task]:
  path = pathlib.Path(directory)
  found = sorted(p for p in path.iterdir() if p.is_dir()) if path.is_dir() else []
  if not found:
    raise task_lib.TaskError(
      f"no task directories in {path}; each needs task.toml, tests.sh and files/"
    )
  return [task_lib.load_task(p) for p in found]
