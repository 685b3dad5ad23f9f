"""Settings: every mistake is one clear line, and no setting is there for show."""

import ast
import dataclasses
import pathlib
import typing

import ml_collections
import pytest

from rome.train.config import ConfigError, RunConfig, from_config_dict, to_config_dict

ROOT = pathlib.Path(__file__).parents[2]


def change(**changes):
  """The default settings with `group__name`s changed, as a config file might have them."""
  values = to_config_dict(RunConfig()).to_dict()
  for name, value in changes.items():
    *groups, last = name.split("__")
    target = values
    for group in groups:
      target = target[group]
    target[last] = value
  return ml_collections.ConfigDict(values)


def test_round_trip():
  config = RunConfig(seed=3, model="micro")
  assert from_config_dict(to_config_dict(config)) == config
  assert hash(config) == hash(from_config_dict(to_config_dict(config)))  # static for jit


def test_overrides_arrive():
  config = from_config_dict(change(seed=5, rl__steps=7, tasks__families=["count"], ipa__gamma=1.0))
  assert (config.seed, config.rl.steps, config.ipa.gamma) == (5, 7, 1.0)
  assert config.tasks.families == ("count",)


def test_a_whole_number_will_do_for_a_float():
  rate = from_config_dict(change(rl__learning_rate=1)).rl.learning_rate
  assert rate == 1.0 and type(rate) is float


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"sead": 1}, r"unknown setting config.sead; known here: .*seed"),
    ({"rl__stepz": 1}, r"unknown setting config.rl.stepz; known here: .*steps"),
    ({"ipa__gama": 1.0}, "unknown setting config.ipa.gama"),
    ({"sandbox__limits": 1}, "unknown setting config.sandbox.limits"),
    ({"seed": 1.5}, "config.seed must be int, got 1.5"),
    ({"seed": True}, "config.seed must be int, got True"),
    ({"seed": None}, "config.seed must be int, got None"),
    ({"model": 3}, "config.model must be str, got 3"),
    ({"rl__learning_rate": "fast"}, "config.rl.learning_rate must be float, got 'fast'"),
    ({"sandbox__accept_no_isolation": 1}, "config.sandbox.accept_no_isolation must be bool, got 1"),
    ({"tasks__families": "count"}, "config.tasks.families must be a tuple of names, got 'count'"),
    ({"tasks__families": (1,)}, "config.tasks.families must be a tuple of names"),
    ({"rl": 3}, "config.rl must be a group of settings, got 3"),
    ({"model": "huge"}, "config.model must be one of tiny, micro, .*got 'huge'"),
    ({"router_balance_weight": -1.0}, "config.router_balance_weight must be at least 0 .*got -1.0"),
    ({"router_z_weight": float("inf")}, "config.router_z_weight must be at least 0 .*got inf"),
    (
      {"router_z_weight": 1e-3, "model": "smollm2_135m"},
      "config.router_z_weight must be 0 for model=smollm2_135m, which has no experts, got 0.001",
    ),
    ({"seed": -1}, "config.seed must be at least 0 and below"),
    ({"seed": 2**32}, "config.seed must be at least 0 and below"),
    ({"demonstrations": 0}, "config.demonstrations must be at least 1 while sft.steps=200 .*got 0"),
    ({"demonstrations": -1, "sft__steps": 0}, "config.demonstrations must be at least 0, got -1"),
    ({"transcripts": 0}, "config.transcripts must be at least 1, got 0"),
    ({"keep_checkpoints": 0}, "config.keep_checkpoints must be at least 1, got 0"),
    ({"engine__slots": 0}, "config.engine.slots must be at least 1, got 0"),
    ({"engine__prefill_tokens": 8}, "config.engine.prefill_tokens must be at least 16, got 8"),
    ({"eval__instances": 0}, "config.eval.instances must be at least 1, got 0"),
    ({"sft__batch": 0}, "config.sft.batch must be at least 1, got 0"),
    ({"rl__micro_rows": 0}, "config.rl.micro_rows must be at least 1, got 0"),
    ({"rl__checkpoint_every": 0}, "config.rl.checkpoint_every must be at least 1, got 0"),
    ({"rl__steps": -1}, "config.rl.steps must be at least 0, got -1"),
    ({"sft__learning_rate": -1.0}, "config.sft.learning_rate must be at least 0, got -1.0"),
    ({"rl__learning_rate": float("nan")}, "config.rl.learning_rate must be at least 0, got nan"),
    ({"rl__clip_norm": 0.0}, "config.rl.clip_norm must be above 0, got 0.0"),
    ({"agent__max_turns": 33}, "config.agent.max_turns must be at most 32, got 33"),
    ({"agent__context": 20}, "config.agent: agent.context must be at least twice"),
    ({"row_length": 10}, "config.row_length must be at least agent.context=[0-9]+, got 10"),
    ({"ipa__gamma": 0.0}, r"config.ipa: IPAConfig.gamma must be in \(0, 1\], got 0.0"),
    ({"sampling__temperature": 0.0}, "config.sampling: sampling.temperature must be a positive"),
    ({"sandbox__backend": "process"}, "config.sandbox: sandbox.backend=process isolates nothing"),
    ({"sandbox__backend": "lxc"}, "config.sandbox: sandbox.backend must be one of auto, podman"),
    ({"tasks__families": ("cuont",)}, "config.tasks: tasks.families must be among count, find"),
    ({"tasks__train_dir": "x"}, "config.tasks: .* must be given together"),
    ({"ipa__lambda_il": 0.0}, "config.ipa.lambda_il must be above 0 exactly when experts.batch"),
    ({"ipa__kl_weight": 0.1}, r"config.ipa.kl_weight must be 0.0 here \(no reference policy"),
    ({"ipa__centre": "group"}, "config.ipa.centre must be 'none' or 'batch' here"),
    ({"ipa__scale": "group"}, "config.ipa.scale must be 'none' or 'batch' here"),
    ({"experts__batch": 0}, "config.ipa.lambda_il must be above 0 exactly when experts.batch=0"),
    ({"experts__capacity": 8}, "config.experts.capacity must be at least experts.batch=64, got 8"),
    ({"estimator": "ppo"}, "config.estimator must be one of ipa, reinforce, .*, got 'ppo'"),
    ({"estimator": "gigpo"}, "config.estimator must be another one: the loop makes no advantages"),
    ({"estimator": "grpo"}, "config.ipa.centre must be 'group' or .* for estimator=grpo, and"),
    ({"estimator": "rloo"}, "rloo needs config.ipa.centre='leave_one_out', got 'none'"),
    (
      {"estimator": "reinforce", "ipa__mask_upper": 2.0},
      "config.ipa.mask_upper is not read by the estimator 'reinforce': leave it at 5.0, or choose",
    ),
    (
      {"estimator": "grpo", "ipa__centre": "group"},
      "config.ipa.centre must be .* here .a group has one member: raise rl.group_size",
    ),
    ({"model": "auto"}, "config.model must be a preset while init_from is empty"),
    ({"sandbox__backend": "none"}, "config.tasks.env must be an import path of your own with"),
    ({"tasks__families": ()}, "config.tasks: tasks.families must be among count, find"),
    (
      {"tasks__families": (), "tasks__env": "my:Env"},
      r"config.demonstrations must be 0 for tasks.families=\(\): numbered instances",
    ),
    (
      {"tasks__families": (), "tasks__env": "my:Env", "tasks__train_dir": "a",
       "tasks__held_out_dir": "b"},
      r"config.tasks: tasks.families=\(\) is for an own tasks.env without tasks.train_dir",
    ),
    ({"numerics": "bitwise"}, 'config.numerics must be "fast" or "exact", got \'bitwise\''),
    (
      {"numerics": "exact", "row_length": 160},
      "config.rl.micro_rows must be engine.slots=32 because of numerics='exact', got 8",
    ),
    (
      {"numerics": "exact", "rl__micro_rows": 32, "agent__context": 150},
      r"config.row_length must be 160 \(agent.context=150 in whole tiles of 16\) because of "
      "numerics='exact', got 256",
    ),
  ],
)
def test_one_clear_line(changes, message):
  with pytest.raises(ConfigError, match=message) as error:
    from_config_dict(change(**changes))
  assert "\n" not in str(error.value)


def test_a_setting_without_a_default_cannot_be_left_out():
  values = change()
  with values.unlocked():
    del values.rl.steps
  with pytest.raises(ConfigError, match="setting config.rl.steps is missing"):
    from_config_dict(values)


def settings_of(cls, path="config"):
  """(dotted name, field name) of every setting, groups and their members."""
  for field in dataclasses.fields(cls):
    hint = typing.get_type_hints(cls)[field.name]
    yield f"{path}.{field.name}", field.name
    if dataclasses.is_dataclass(hint):
      yield from settings_of(hint, f"{path}.{field.name}")


class Reads(ast.NodeVisitor):
  """Names read as attributes, those that only check a setting aside."""

  def __init__(self):
    self.names = set()

  def visit_FunctionDef(self, node):
    if node.name != "__post_init__":
      self.generic_visit(node)

  def visit_Attribute(self, node):
    if isinstance(node.ctx, ast.Load):
      self.names.add(node.attr)
    self.generic_visit(node)


def test_every_setting_is_read_somewhere():
  reads = Reads()
  checks_only = ROOT / "rome" / "train" / "config.py"
  for folder in ("rome", "experiments"):
    for file in (ROOT / folder).rglob("*.py"):
      if file != checks_only:
        reads.visit(ast.parse(file.read_text()))
  names = dict(settings_of(RunConfig))
  assert len(names) > 40
  assert [dotted for dotted, name in names.items() if name not in reads.names] == []


@pytest.mark.parametrize(
  ("value", "message"),
  [
    ("wide", "clip_upper must be float, got 'wide'"),
    (0.3, "clip_upper is not read by the estimator 'ipa': leave it at None, or choose one of grpo"),
  ],
)
def test_a_setting_that_may_be_none_is_typed(value, message):
  values = change()
  with values.unlocked():
    values.ipa.clip_upper = value
  with pytest.raises(ConfigError, match=rf"config.ipa.{message}"):
    from_config_dict(values)
