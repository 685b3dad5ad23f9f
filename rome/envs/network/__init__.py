"""What a sandbox may reach, and the record of what it tried.

`policy` and `attempts` are light; `egress`, which serves sandboxes that have a policy, is imported
when the first one starts.
"""

from rome.envs.network.attempts import Attempt, EgressLog
from rome.envs.network.policy import NetworkPolicy, PolicyError

__all__ = ["Attempt", "EgressLog", "NetworkPolicy", "PolicyError"]
