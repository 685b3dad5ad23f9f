"""Where a run begins: its model, its first weights, and whether what it was given can work.

`init_from` names weights that exist: a run's workdir (its newest checkpoint), one checkpoint, or a
model as `rome.models.load` reads it. Sizes come from there too where `model` is "auto", each time
that they are needed; the weights are read once, as checkpoints of the run hold them from then on.

Left out: tokenizers of public checkpoints. Policies speak `rollout.policy_tokenizer()`, so weights
of another vocabulary are refused.
"""

import dataclasses
import functools
import json
import math
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections

from rome import ipa, models, rollout
from rome.models import lora, weights
from rome.rollout import custom
from rome.train import checkpoints
from rome.train.config import AUTO, ConfigError, RunConfig, chunk_slots, from_config_dict

# What may differ between a preset and weights of it: neither is read once there are weights.
_LOOSE = {"max_position_embeddings", "query_norm_init"}


def read_config(workdir: pathlib.Path) -> RunConfig:
  """The settings that a run left in its directory; raises ConfigError."""
  path = workdir / "config.json"
  try:
    values = json.loads(path.read_text())
  except OSError as error:
    raise ConfigError(f"{path} cannot be read ({error.strerror}); give a run's --workdir") from None
  except ValueError as error:
    raise ConfigError(f"{path} is not JSON ({error}); give back the run's") from None
  return from_config_dict(ml_collections.ConfigDict(values))


def model_of(config: RunConfig) -> models.ModelConfig:
  """The sizes of the model that a run trains; raises ConfigError where they cannot be read."""
  return _sizes(config.init_from) if config.model == AUTO else models.PRESETS[config.model]


def load_params(config: RunConfig) -> dict:
  """The weights of `init_from`, float32, adapters merged.

  Raises:
    ConfigError: they cannot be read, or are of other sizes than the run's model.
    CheckpointError: the checkpoint is damaged.
  """
  _check_sizes(config)
  checkpoint = _checkpoint(config.init_from)
  if checkpoint:
    params = jax.tree.map(jnp.asarray, checkpoints.load_params(checkpoint))
    return models.merge_lora(params) if lora.has_lora(params) else params
  try:
    return models.load(config.init_from)[1]
  except (OSError, ValueError) as error:
    raise _unreadable(config.init_from, error) from None


def estimator_of(config: RunConfig) -> Any:
  """The function of `config.estimator`, with the signature of `ipa.ipa_loss`."""
  if config.estimator in ipa.ESTIMATORS:
    return ipa.ESTIMATORS[config.estimator]
  names = ("logp_BxT", "batch", "config", "totals", "entropy_BxT")
  return custom.load(config.estimator, "estimator", *names)


def check(config: RunConfig, fresh: bool = True) -> None:
  """Finds before a run what would end it later. It starts no sandbox and reads no weights.

  Args:
    config: the run's settings.
    fresh: whether the run is at its beginning, so that `init_from` is needed.
  Raises:
    ConfigError: sizes, vocabulary or estimator do not fit.
    CustomError: an import path cannot be used.
    TaskError: there are no usable tasks.
  """
  if fresh and config.init_from:
    _check_sizes(config)
  model, ids = model_of(config), rollout.policy_tokenizer().vocab_size
  source = f"init_from={config.init_from}" if config.init_from else f"model={config.model}"
  if model.vocab_size != ids:
    raise ConfigError(
      f"config.{source} has a vocabulary of {model.vocab_size}, and policies are trained on the "
      f"{ids} ids of the byte tokenizer; choose a model of that vocabulary, such as tiny"
    )
  if (config.router_balance_weight or config.router_z_weight) and not model.num_experts:
    raise ConfigError(
      f"config.router_balance_weight and config.router_z_weight must be 0 for {source}, which has "
      "no experts"
    )
  _check_estimator(config)
  if config.reward:
    custom.load_reward(config.reward)
  custom.load_env(config.tasks.env)
  custom.make_factory(config.agent)
  rollout.TaskSource(config.tasks)


def check_trains(config: RunConfig) -> None:
  """Raises ConfigError for settings that can be evaluated and not trained with."""
  if config.native.endpoint:
    raise ConfigError(
      f"config.native.endpoint must be '' for training, got {config.native.endpoint!r}: the "
      "weights of another server are not the run's; python -m experiments.evaluate measures it"
    )


def empty_batch(config: RunConfig, rows: int) -> ipa.ChunkBatch:
  """A batch of a run's shapes with nothing in it."""
  return rollout.pack(
    [],
    config.ipa,
    step=0,
    row_length=config.row_length,
    max_chunks=chunk_slots(config.row_length),
    rows_multiple=rows,
    pad=0,
  )


def _check_estimator(config: RunConfig) -> None:
  """Traces the loss on a batch of the run's shapes, and looks at what comes out."""
  estimator, batch = estimator_of(config), empty_batch(config, config.rl.micro_rows)
  where = f"config.estimator={config.estimator!r}"
  logp = jax.ShapeDtypeStruct(batch.tokens.shape, jnp.float32)
  loss_fn = functools.partial(_loss, estimator, config.ipa)
  try:
    out = jax.eval_shape(loss_fn, logp, batch, logp)
    loss, metrics = out
    shapes = {"loss": loss.shape} | {str(name): x.shape for name, x in metrics.items()}
    floats = jnp.issubdtype(loss.dtype, jnp.floating)
  except Exception as error:  # whatever a user's function raises
    words = " ".join(f"{type(error).__name__}: {error}".split())[:300]
    raise ConfigError(
      f"{where} fails on a batch of this run ({words}); it must return a scalar loss and a dict of "
      "scalar metrics, see rome.ipa.ipa_loss"
    ) from error
  wrong = [name for name, shape in shapes.items() if shape != ()]
  if wrong or not floats:
    raise ConfigError(
      f"{where} must return a scalar loss and a dict of scalar metrics; {wrong or 'loss'} is not"
    )
  if config.numerics == "exact" and "mismatch_max" not in metrics:
    raise ConfigError(
      f"{where} must give the metric mismatch_max with numerics='exact', which is held to it; see "
      "rome.ipa.ipa_loss"
    )


def _loss(estimator: Any, settings: ipa.IPAConfig, logp: Any, batch: Any, entropy: Any) -> Any:
  return estimator(logp, batch, settings, ipa.loss_totals(batch), entropy)


# --- init_from -----------------------------------------------------------------------------------


def _unreadable(path: str, error: object) -> ConfigError:
  return ConfigError(
    f"config.init_from={path} cannot be read ({error}); give a run's workdir, one of its "
    "checkpoints/N, a directory with config.json and safetensors, or a .gguf file"
  )


def _checkpoint(init_from: str) -> pathlib.Path | None:
  """The checkpoint that is meant, None where it is a model's directory or file."""
  path = pathlib.Path(init_from).absolute()
  if path.parent.name == "checkpoints" and path.name.isdigit() and path.is_dir():
    return path
  if not (path / "checkpoints").is_dir():
    return None
  steps = checkpoints.Checkpoints(path, 1).steps()
  if not steps:
    raise _unreadable(init_from, "it has no finished checkpoint")
  return path / "checkpoints" / str(steps[-1])


def _sizes(init_from: str) -> models.ModelConfig:
  checkpoint = _checkpoint(init_from)
  try:
    if checkpoint:
      return model_of(read_config(checkpoint.parents[1]))
    return weights.read_config(init_from)
  except (OSError, ValueError) as error:
    raise _unreadable(init_from, error) from None


def _check_sizes(config: RunConfig) -> None:
  """Compares the sizes of `init_from` with those of a preset that was asked for by name."""
  have, want = _sizes(config.init_from), model_of(config)
  for field in dataclasses.fields(want):
    a, b = getattr(want, field.name), getattr(have, field.name)
    same = math.isclose(a, b, rel_tol=1e-6) if isinstance(a, float) else a == b
    if field.name not in _LOOSE and not same:
      raise ConfigError(
        f"config.model={config.model} has {field.name}={a}, and config.init_from="
        f"{config.init_from} has {b}; set config.model={AUTO} to take the sizes from there"
      )
