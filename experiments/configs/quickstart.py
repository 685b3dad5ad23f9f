"""The quickstart: a 2.2 M-parameter ROME learns six families of shell tasks on two CPU cores.

  make quickstart

Warm start: 480 demonstrations (80 a family), seen 19 times each; held-out success still rises when
it stops. Then IPA on fresh instances; every verified success is kept as an expert and imitated
beside the policy's own chunks (Eq. 10). Failures carry no reward (positive-only learning): with
failure_reward=-1 and no experts, success fell from 0.6 to 0.1-0.4 within 30 updates at rates 5e-4
and 1e-3. Minutes and success to expect are in docs/results/quickstart.md.
"""

import ml_collections

from rome.ipa import IPAConfig
from rome.train.config import ExpertsConfig, RLConfig, RunConfig, StageConfig, to_config_dict


def get_config() -> ml_collections.ConfigDict:
  return to_config_dict(
    RunConfig(
      model="tiny",
      demonstrations=480,
      # 32 demonstrations fill some 11 rows: calls of 4 leave fewer of them empty than calls of 8.
      sft=StageConfig(
        steps=280, batch=32, learning_rate=3e-3, micro_rows=4, log_every=5, checkpoint_every=70
      ),
      rl=RLConfig(steps=120, batch=64, learning_rate=2e-3, cooldown=50),
      ipa=IPAConfig(lambda_il=1.0),
      experts=ExpertsConfig(batch=96),
    )
  )
