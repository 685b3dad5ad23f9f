"""Continual pre-training at full scale, stage I: Qwen3-30B-A3B on 500 B tokens.

  rome plan --config=experiments/configs/cpt_30b_a3b.py --topology=v5p:4x4x4

NOT YET TRAINABLE: these are shapes for `rome plan`. The loop has no stage that learns from text,
its policies speak bytes, and an engine needs the whole model on one device; `experiments.train`
refuses the vocabulary by name.

From section 3.2 of arXiv:2512.24873: batches of 32 M tokens at a constant rate of 3e-5, weight
decay 0.1, about 500 B tokens of atomic skills. Stage II has about 300 B tokens of agentic
trajectories, so 8,941 updates, and its weight decay falls from 0.1 to 0.01, which no setting says
yet. Choice: rows of 32,768 tokens, 1,024 of them an update, 64 a device call; AdamW and clipping as
everywhere here; no warm-up, as the rate is said to be constant.

Expected (estimate, nothing was run): 16 days at least on v5p:4x4x4, as 500 B tokens take that long
at the bound of docs/results/plan.md, 357 k tokens a second; a real step is slower. Weights and
moments take 366 GB in float32.
"""

import ml_collections

from rome.ipa import IPAConfig
from rome.train.config import ExpertsConfig, RLConfig, RunConfig, StageConfig, to_config_dict

TOKENS = 500e9
ROW, ROWS = 32_768, 1_024  # 33.6 M tokens an update


def get_config() -> ml_collections.ConfigDict:
  return to_config_dict(
    RunConfig(
      model="qwen3_30b_a3b",
      row_length=ROW,
      sft=StageConfig(
        steps=round(TOKENS / (ROW * ROWS)),
        batch=ROWS,
        learning_rate=3e-5,
        warmup=0,
        weight_decay=0.1,
        micro_rows=64,
        checkpoint_every=200,
      ),
      rl=RLConfig(steps=0, batch=1, learning_rate=0.0),
      ipa=IPAConfig(lambda_il=0.0),
      experts=ExpertsConfig(batch=0),
    )
  )
