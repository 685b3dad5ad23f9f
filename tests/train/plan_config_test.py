"""`rome plan --config`: shapes out of a run's settings, and the configs of full scale."""

import json
import pathlib

import pytest

from rome.train import chips, plan_cli, start
from rome.train.config import ConfigError

CONFIGS = pathlib.Path(__file__).parents[2] / "experiments" / "configs"
MICRO = """
from rome.rollout import AgentConfig
from rome.train.config import EngineConfig, RLConfig, RunConfig, StageConfig, to_config_dict

def get_config():
  return to_config_dict(RunConfig(
    model="micro", row_length=64, agent=AgentConfig(context=32, max_reply=8),
    engine=EngineConfig(slots=2),
    rl=RLConfig(steps=STEPS, batch=4, learning_rate=1e-3, micro_rows=4),
    sft=StageConfig(steps=1, batch=4, learning_rate=1e-3, micro_rows=2),
  ))
"""


@pytest.fixture
def micro(tmp_path):
  def write(steps: int) -> str:
    path = tmp_path / "micro_config.py"
    path.write_text(MICRO.replace("STEPS", str(steps)))
    return str(path)

  return write


def requests_of(config: str, *more: str):
  arguments = plan_cli._parser().parse_args([f"--config={config}", "--topology=v5p:4x4x4", *more])
  return plan_cli._requests(arguments)


@pytest.mark.parametrize(
  ("name", "shapes"),
  [
    ("cpt_30b_a3b", [(64, 32_768, ["train"])]),
    ("sft_30b_a3b", [(64, 32_768, ["train"])]),
    ("rl_30b_a3b", [(64, 32_768, ["train"]), (128, 32_768, ["decode"])]),
  ],
)
def test_full_scale(name, shapes):
  model, requests = requests_of(str(CONFIGS / f"{name}.py"))
  assert model == "qwen3_30b_a3b"
  assert [(r.batch, r.length, steps) for r, steps in requests] == shapes
  assert all(r.mesh == {"fsdp": 64, "context": 1} for r, _ in requests)
  assert all(r.topology == chips.parse_topology("v5p:4x4x4") for r, _ in requests)


@pytest.mark.parametrize("name", ["cpt_30b_a3b", "sft_30b_a3b", "rl_30b_a3b"])
def test_full_scale_is_refused_by_the_loop_in_one_line(name):
  arguments = plan_cli._parser().parse_args(
    [f"--config={CONFIGS / name}.py", "--topology=v5p:4x4x4"]
  )
  with pytest.raises(ConfigError, match="has a vocabulary of 151936, .* 264 ids of the byte token"):
    start.check(plan_cli._settings(arguments))


@pytest.mark.slow
def test_each_step_in_its_own_shape(micro, capsys):
  assert plan_cli.main([f"--config={micro(3)}", "--topology=cpu:1", "--json"]) == 0
  report = json.loads(capsys.readouterr().out)
  shapes = {step: (found["rows"], found["length"]) for step, found in report["steps"].items()}
  assert shapes == {"train": (4, 64), "decode": (2, 32)} and report["preset"] == "micro"
  assert all(found["fits"] for found in report["steps"].values())


def test_without_reinforcement_nothing_is_decoded(micro):
  _, requests = requests_of(micro(0))
  assert [(r.batch, r.length, steps) for r, steps in requests] == [(2, 64, ["train"])]
  with pytest.raises(ValueError, match="has rl.steps=0, so it never decodes"):
    requests_of(micro(0), "--steps", "decode")


@pytest.mark.parametrize(
  ("argv", "message"),
  [
    (["--config=nowhere.py"], "--config=nowhere.py gives no settings (FileNotFoundError"),
    (["--config=README.md"], "--config=README.md gives no settings (OSError: not a Python file)"),
    (["--config=x.py", "--preset=tiny"], "--preset is the settings' to say with --config"),
    ([], "give --config, or --preset, --batch and --length; --preset is missing"),
  ],
)
def test_bad_input_is_one_line(argv, message, capsys):
  assert plan_cli.main([*argv, "--topology=cpu:1"]) == 2
  error = capsys.readouterr().err
  assert message in error and error.count("\n") == 1
