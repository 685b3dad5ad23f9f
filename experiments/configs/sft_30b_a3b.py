"""Supervised fine-tuning at full scale: Qwen3-30B-A3B on demonstrations, Eqs. 1-2.

  rome plan --config=experiments/configs/sft_30b_a3b.py --topology=v5p:4x4x4

NOT YET TRAINABLE: the policies of the loop speak bytes, and an engine needs the whole model on one
device; `experiments.train` refuses the vocabulary by name. The stage itself is the loop's warm
start, on reference solutions of tasks; mixtures of recorded dialogues wait for `rome/data`.

Section 3.2 of arXiv:2512.24873 prints the loss, masks and the mixture (70 % agentic, 15 %
reasoning, 15 % general) and no rate, batch or count of examples. All numbers are choices: rows of
32,768 tokens, 256 an update (8.4 M tokens), a rate of 1e-5 with 100 updates of warm-up that falls
to a tenth, 2,000 updates.

Expected (estimate, nothing was run): 17 B tokens are 13 hours at least on v5p:4x4x4 at the bound of
docs/results/plan.md, 357 k tokens a second; a real step is slower.
"""

import ml_collections

from rome.ipa import IPAConfig
from rome.rollout import AgentConfig
from rome.train.config import ExpertsConfig, RLConfig, RunConfig, StageConfig, to_config_dict


def get_config() -> ml_collections.ConfigDict:
  return to_config_dict(
    RunConfig(
      model="qwen3_30b_a3b",
      demonstrations=60_000,
      row_length=32_768,
      agent=AgentConfig(max_turns=32, max_reply=4_096, context=32_768, max_observation=8_000),
      sft=StageConfig(
        steps=2_000,
        batch=256,
        learning_rate=1e-5,
        warmup=100,
        cooldown=1_900,
        weight_decay=0.1,
        micro_rows=64,
        checkpoint_every=100,
      ),
      rl=RLConfig(steps=0, batch=1, learning_rate=0.0),
      ipa=IPAConfig(lambda_il=0.0),
      experts=ExpertsConfig(batch=0),
    )
  )
