"""mini-swe-agent, unmodified, trained through the model proxy (docs/guides/native.md).

  rome sandbox images build mini-swe-agent
  python -m experiments.train --config=experiments/configs/native.py --workdir=runs/native \
    --config.init_from=runs/quickstart

With another model in the policy's place, measured on the same tasks:

  python -m experiments.evaluate --config=experiments/configs/native.py --workdir=runs/measured \
    --config.native.endpoint=https://api.example.com/v1 --config.native.model=NAME

A template for an agent of your own: `native` says how it is run, `sandbox.image` where it is
installed. An episode costs some seconds of processor time for Python to start in its sandbox. What
the small model of the quickstart learns from it has not been measured: its demonstrations were of
another agent.
"""

import ml_collections

from rome.envs import hub
from rome.ipa import IPAConfig
from rome.rollout import AgentConfig, NativeConfig, SandboxConfig
from rome.train.config import (
  EngineConfig,
  EvalConfig,
  ExpertsConfig,
  RLConfig,
  RunConfig,
  StageConfig,
  to_config_dict,
)

SETTINGS = """cat > ~/mini.yaml <<END
agent:
  system_template: "Use bash. Leave by: echo COMPLETE_TASK_AND_SUBMIT_FINAL_OUTPUT"
  instance_template: "{{task}}"
  cost_limit: 0
model:
  model_name: openai/$OPENAI_MODEL
  cost_tracking: ignore_errors
  observation_template: "{{output.output[:200]}}"
  format_error_template: "{{error}}"
END
"""
COMMAND = """export MSWEA_CONFIGURED=true MSWEA_SILENT_STARTUP=1 LITELLM_LOCAL_MODEL_COST_MAP=True
exec mini -c ~/mini.yaml -t "$ROME_INSTRUCTION" --yolo --exit-immediately -o ~/mini.json
"""


def get_config() -> ml_collections.ConfigDict:
  return to_config_dict(
    RunConfig(
      model="tiny",
      demonstrations=0,
      sft=StageConfig(steps=0, batch=1, learning_rate=0.0),
      row_length=1024,
      agent=AgentConfig(mode="native", context=1024, max_reply=96, max_turns=12),
      native=NativeConfig(command=COMMAND, install=SETTINGS),
      sandbox=SandboxConfig(
        backend="podman", image=hub.EnvHub().tag("mini-swe-agent"), memory_mb=768, disk_mb=64
      ),
      engine=EngineConfig(slots=8),
      rl=RLConfig(steps=50, batch=16, learning_rate=5e-4, group_size=4),
      ipa=IPAConfig(lambda_il=1.0),
      experts=ExpertsConfig(batch=16),
      eval=EvalConfig(instances=24),
    )
  )
