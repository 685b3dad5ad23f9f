"""The quickstart's policy and tasks in the scaffold of `rome agent`, trainer-managed.

  python -m experiments.train --config=experiments/configs/scaffold.py --workdir=runs/scaffold

The loop, its tool layer and its settings are those of `rome agent` (`scaffold_agent.toml`), so that
what the policy reads in training is what it reads when a person runs it. Sizes and stages are the
quickstart's, but for a longer context: the prompt names the tools.
"""

import dataclasses

import ml_collections

from experiments.configs import quickstart
from rome.train.config import from_config_dict, to_config_dict


def get_config() -> ml_collections.ConfigDict:
  config = from_config_dict(quickstart.get_config())
  agent = dataclasses.replace(
    config.agent, context=256, scaffold="experiments/configs/scaffold_agent.toml"
  )
  return to_config_dict(dataclasses.replace(config, agent=agent))
