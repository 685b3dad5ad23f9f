"""Reinforcement learning at full scale: Qwen3-30B-A3B with IPA in real sandboxes.

  rome plan --config=experiments/configs/rl_30b_a3b.py --topology=v5p:4x4x4

NOT YET TRAINABLE: the policies of the loop speak bytes, and an engine needs the whole model on one
device; `experiments.train` refuses the vocabulary by name.

Section 3.2 of arXiv:2512.24873: IPA on about 2,000 instances of moderate difficulty. The paper
prints no discount, mask bound, weight, rate or group size; gamma 0.95, H 5, lambda_il 0.1, a rate
of 1e-6, clipping at 1 and no KL are this project's choices (spec/ipa). Choices as well: groups of 8
with two redundant members; 64 groups an update, so 31 updates are a pass and 300 are ten; episodes
of up to 32,768 tokens and 32 turns, the most that a trajectory has here (the paper's are longer);
64 rows a device call; 128 episodes at once; failures at -1 from update 50 on, as the team starts
with positives alone; one wrong episode in two may be infrastructure's.

Expected (estimate, nothing was run; `rome plan` as above, 2026-11-29): the train step takes 30.7 of
95.7 GiB a device and decoding 16.3. An update of 512 full episodes is 16.8 M tokens, 47 s at least.
Decoding is bound to 639 tokens a second, as every device gathers all weights for each token: 4,000
sampled tokens an episode would take 53 minutes an update. Rollout wants layouts of its own, which
the loop does not have yet.
"""

import ml_collections

from rome.ipa import IPAConfig
from rome.rollout import AgentConfig, SandboxConfig
from rome.train.config import (
  EngineConfig,
  ExpertsConfig,
  RLConfig,
  RunConfig,
  StageConfig,
  to_config_dict,
)


def get_config() -> ml_collections.ConfigDict:
  return to_config_dict(
    RunConfig(
      model="qwen3_30b_a3b",
      demonstrations=0,
      row_length=32_768,
      agent=AgentConfig(max_turns=32, max_reply=4_096, context=32_768, max_observation=8_000),
      engine=EngineConfig(slots=128, prefill_tokens=8_192),
      sandbox=SandboxConfig(
        reuse=1,
        memory_mb=4_096,
        cpus=2.0,
        pids=512,
        disk_mb=4_096,
        command_timeout=300.0,
        deadline=900.0,
        reset_deadline=600.0,
      ),
      sft=StageConfig(steps=0, batch=1, learning_rate=0.0),
      rl=RLConfig(
        steps=300,
        batch=512,
        learning_rate=1e-6,
        micro_rows=64,
        checkpoint_every=10,
        group_size=8,
        group_redundancy=2,
        filter_groups=True,
      ),
      ipa=IPAConfig(lambda_il=0.1, failure_reward=-1.0, negative_start_step=50),
      experts=ExpertsConfig(batch=64, capacity=2_000),
    )
  )
