"""Settings of groups: what contradicts each other is one clear line, what is allowed arrives."""

import pytest

from rome.ipa import IPAConfig
from rome.rollout import Grouping
from rome.train.config import ConfigError, RLConfig, RunConfig, from_config_dict, to_config_dict
from rome.train.play import grouping


def rl(**changes):
  return RLConfig(**({"steps": 5, "batch": 12, "learning_rate": 1e-3} | changes))


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"group_size": 0}, "config.rl.group_size must be at least 1, got 0"),
    ({"group_size": 5}, "config.rl.batch must be a multiple of rl.group_size=5, got 12"),
    ({"group_redundancy": -1}, "config.rl.group_redundancy must be at least 0, got -1"),
    (
      {"group_redundancy": 1 << 16},
      "config.rl.group_size must be at most 65536 together with rl.group_redundancy=65536, got 1",
    ),
    ({"filter_groups": True}, "config.rl.group_size must be above 1 with rl.filter_groups"),
    (
      {"group_size": 4, "filter_groups": True, "filter_cap": 0.3},
      r"config.rl.filter_cap must be finite and at least 1/3 \(one of the 3 groups.*, got 0.3",
    ),
    ({"filter_cap": 1.0}, "config.rl.filter_cap must be 2.0 while rl.filter_groups is off"),
  ],
)
def test_one_clear_line(changes, message):
  with pytest.raises(ConfigError, match=message) as error:
    RunConfig(rl=rl(**changes))
  assert "\n" not in str(error.value)


@pytest.mark.parametrize("setting", ["centre", "scale"])
def test_group_statistics_need_groups(setting):
  ipa = IPAConfig(lambda_il=1.0, **{setting: "group"})
  with pytest.raises(ConfigError, match=rf"config.ipa.{setting} must be .*raise rl.group_size"):
    RunConfig(rl=rl(), ipa=ipa)
  config = RunConfig(rl=rl(group_size=4), ipa=ipa)
  assert from_config_dict(to_config_dict(config)) == config


def test_leave_one_out_needs_groups():
  ipa = IPAConfig(lambda_il=1.0, centre="leave_one_out")
  with pytest.raises(ConfigError, match="config.ipa.centre must be 'none' or 'batch' here"):
    RunConfig(rl=rl(), ipa=ipa)
  RunConfig(rl=rl(group_size=2), ipa=ipa)


def test_settings_by_hand():
  assert grouping(rl()) == Grouping(1, 0, 0)
  assert grouping(rl(group_size=4, group_redundancy=2)) == Grouping(4, 2, 0)
  many = rl(group_size=4, filter_groups=True, filter_cap=1.5)
  assert many.groups == 3 and grouping(many) == Grouping(4, 0, 4)
