"""The quickstart: a 2.2 M-parameter ROME learns six families of shell tasks on two CPU cores."""

from rome.train.config import RunConfig
from rome.train.config import to_config_dict


def get_config():
  return to_config_dict(RunConfig())
