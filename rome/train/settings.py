"""Settings as frozen dataclasses on one side, as `ml_collections.ConfigDict` on the other.

A config file returns a ConfigDict, so that flags can override single fields; `build` turns it back
into dataclasses and refuses unknown names and wrong types. What contradicts what is the
dataclasses' own business (`__post_init__`).
"""

import dataclasses
import types
import typing
from typing import Any

import ml_collections


class ConfigError(ValueError):
  """A setting is unknown, of the wrong type, or contradicts another; the message names it."""


def to_config_dict(config: Any) -> ml_collections.ConfigDict:
  """The settings as a `ConfigDict`, for config files and flags."""
  return ml_collections.ConfigDict(_open(config))


def _open(config: Any) -> dict[str, Any]:
  """Settings as a dict, None as what a flag can set to a value of the setting's type."""
  values = {}
  for name, hint in typing.get_type_hints(type(config)).items():
    value = getattr(config, name)
    if dataclasses.is_dataclass(value):
      value = _open(value)
    elif value is None:
      value = ml_collections.config_dict.placeholder(_inner(hint))
    values[name] = value
  return values


def _inner(hint: Any) -> type:
  """X of `X | None`."""
  return next(h for h in typing.get_args(hint) if h is not types.NoneType)


def build(cls: type, values: dict[str, Any], path: str) -> Any:
  """A dataclass of settings from nested values.

  Args:
    cls: the dataclass.
    values: its fields; those with defaults may lack.
    path: its name, for messages.
  Raises:
    ConfigError: naming the first setting that is unknown, missing, of the wrong type or
      contradictory.
  """
  fields = {f.name: f for f in dataclasses.fields(cls)}
  hints = typing.get_type_hints(cls)
  for name in values:
    if name not in fields:
      raise ConfigError(f"unknown setting {path}.{name}; known here: {', '.join(sorted(fields))}")
  built = {}
  for name, field in fields.items():
    if name not in values:
      if field.default is dataclasses.MISSING:
        raise ConfigError(f"setting {path}.{name} is missing")
      continue
    value, hint = values[name], hints[name]
    if dataclasses.is_dataclass(hint):
      if not isinstance(value, dict):
        raise ConfigError(f"{path}.{name} must be a group of settings, got {value!r}")
      built[name] = build(typing.cast(type, hint), value, f"{path}.{name}")
    else:
      built[name] = _typed(value, hint, f"{path}.{name}")
  try:
    return cls(**built)
  except ConfigError:
    raise
  except ValueError as e:
    raise ConfigError(f"{path}: {e}") from None


def _typed(value: Any, hint: Any, path: str) -> Any:
  if isinstance(hint, types.UnionType):  # `X | None`
    if value is None:
      return None
    hint = _inner(hint)
  if hint is float and type(value) is int:
    return float(value)
  if typing.get_origin(hint) is tuple:
    if isinstance(value, (tuple, list)) and all(isinstance(v, str) for v in value):
      return tuple(value)
    raise ConfigError(f"{path} must be a tuple of names, got {value!r}")
  if type(value) is not hint:
    raise ConfigError(f"{path} must be {hint.__name__}, got {value!r}")
  return value
