"""The quickstart: a 2.2 M-parameter ROME learns six families of shell tasks on two CPU cores.

  make quickstart

Warm start: 360 demonstrations, seen about 27 times each, far past the point where held-out success stops rising. Then IPA
on fresh instances, every verified success kept as an expert and imitated beside the policy's own chunks (Eq. 10). Failures
carry no reward (positive-only learning): with failure_reward=-1 the policy collapsed at every rate that learnt at all.
Minutes and success to expect are in docs/results/quickstart.md.
"""

from rome.ipa import IPAConfig
from rome.train.config import ExpertsConfig
from rome.train.config import RunConfig
from rome.train.config import StageConfig
from rome.train.config import to_config_dict


def get_config():
  return to_config_dict(RunConfig(
      model="tiny",
      demonstrations=360,
      sft=StageConfig(steps=300, batch=32, learning_rate=3e-3, log_every=5, checkpoint_every=50),
      rl=StageConfig(steps=100, batch=64, learning_rate=2e-3, cooldown=30),
      ipa=IPAConfig(lambda_il=1.0),
      experts=ExpertsConfig(batch=64),
  ))
