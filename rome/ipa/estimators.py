"""All estimators by name, and the check that none is given a setting that it would not read."""

import dataclasses
from collections.abc import Callable
from typing import Any

from rome.ipa.baselines import reinforce, rloo, tis, topr
from rome.ipa.clipped import cispo, dapo, gigpo, grpo, gspo
from rome.ipa.config import IPAConfig
from rome.ipa.loss import ipa_loss

ESTIMATORS: dict[str, Callable[..., Any]] = {
  "ipa": ipa_loss,
  "reinforce": reinforce,
  "tis": tis,
  "topr": topr,
  "rloo": rloo,
  "grpo": grpo,
  "dapo": dapo,
  "gspo": gspo,
  "cispo": cispo,
  "gigpo": gigpo,
}

_READERS = {
  "mask_upper": ("ipa", "topr"),
  "mask_lower": ("ipa", "topr"),
  "clip_lower": ("grpo", "dapo", "gspo", "cispo", "gigpo"),
  "clip_upper": ("grpo", "dapo", "gspo", "cispo", "gigpo"),
}


def check_estimator(name: str, config: IPAConfig) -> None:
  """Checks, before a run, that an estimator and its settings go together.

  Raises:
    ValueError: an unknown name; a mask or clip that was changed from its default and that this
      estimator does not read; "rloo" without `centre="leave_one_out"`.
  """
  if name not in ESTIMATORS:
    raise ValueError(f"unknown estimator {name!r}: one of {tuple(ESTIMATORS)}")
  for field in dataclasses.fields(config):
    changed, readers = getattr(config, field.name) != field.default, _READERS.get(field.name)
    if changed and readers and name not in readers:
      raise ValueError(
        f"IPAConfig.{field.name} is not read by the estimator {name!r}: leave it at "
        f"{field.default}, or choose one of {', '.join(readers)}"
      )
  if name == "rloo" and config.centre != "leave_one_out":
    raise ValueError(f"rloo needs IPAConfig.centre='leave_one_out', got {config.centre!r}")
