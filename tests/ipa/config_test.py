"""Settings are checked when made, and the error names the one that is wrong."""

import math

import jax
import pytest

from rome import ipa


@pytest.mark.parametrize(
  ("name", "value"),
  [
    ("gamma", 0.0),
    ("gamma", 1.01),
    ("gamma", math.nan),
    ("gamma", "0.9"),
    ("gamma", True),
    ("mask_upper", 0.0),
    ("mask_upper", -1.0),
    ("mask_lower", -0.1),
    ("mask_lower", 5.5),
    ("normaliser", "tokens"),
    ("failure_reward", 0.5),
    ("failure_reward", -math.inf),
    ("negative_start_step", -1),
    ("negative_start_step", 1.5),
    ("negative_start_step", True),
    ("negative_weight", -0.1),
    ("negative_weight", math.inf),
    ("lambda_rl", -1.0),
    ("lambda_il", math.nan),
    ("lambda_il", None),
    ("il_weight", "literal"),
    ("centre", "mean"),
    ("scale", "leave_one_out"),
    ("truncated_episodes", "drop"),
    ("advantage_clip", 0.0),
    ("advantage_clip", math.nan),
    ("kl_weight", -1.0),
    ("entropy_weight", math.inf),
    ("clip_lower", -0.1),
    ("clip_upper", "0.2"),
  ],
)
def test_a_bad_setting_is_named(name, value):
  with pytest.raises(ValueError, match=rf"^IPAConfig\.{name} must be .*, got "):
    ipa.IPAConfig(**{name: value})


def test_defaults_and_extremes_pass():
  config = ipa.IPAConfig()
  assert (config.gamma, config.mask_upper, config.mask_lower) == (0.95, 5.0, 0.0)
  assert (config.lambda_il, config.lambda_rl, config.failure_reward) == (0.1, 1.0, 0.0)
  assert config.normaliser == "token_mean"
  ipa.IPAConfig(gamma=1, mask_upper=math.inf, mask_lower=1, failure_reward=-1, lambda_il=0)


def test_settings_are_static_arguments():
  assert hash(ipa.IPAConfig(gamma=0.5)) == hash(ipa.IPAConfig(gamma=0.5))
  scale = jax.jit(lambda step, config: config.negative_scale(step), static_argnums=1)
  config = ipa.IPAConfig(negative_start_step=3, negative_weight=0.5)
  assert [float(scale(step, config)) for step in range(5)] == [0, 0, 0, 0.5, 0.5]
