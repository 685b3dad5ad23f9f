"""What the policy did with its tools, counted over finished trajectories."""

from collections.abc import Sequence

import numpy as np

from rome.agent.parse import TOOLS, ToolCall, parse_reply
from rome.text import ByteTokenizer
from rome.trajectory import Trajectory

KINDS = (*TOOLS, "malformed")


def tool_use(
  trajectories: Sequence[Trajectory], tokenizer: ByteTokenizer
) -> dict[str, float | None]:
  """Shares of replies by what they called.

  Returns:
    {"calls_sh", "calls_submit", "calls_malformed"}, which sum to 1, and "sh_ok", the share of shell
    commands that ended with exit code 0; None where there is nothing to count.
  """
  counts, codes = dict.fromkeys(KINDS, 0), []
  for t in trajectories:
    # Calls are contiguous and in order; a reply was parsed from these very ids when it was played.
    bounds = np.searchsorted(t.call_ids[t.call_ids >= 0], np.arange(1, t.num_chunks))
    replies = np.split(t.tokens[t.call_ids >= 0], bounds) if t.num_chunks else []
    for k, reply in enumerate(replies):
      call = parse_reply(reply.tolist(), tokenizer)
      kind = call.name if isinstance(call, ToolCall) else "malformed"
      counts[kind] += 1
      if kind == "sh" and k < len(t.turns):
        codes.append(t.turns[k].exit_code == 0)
  total = sum(counts.values())
  shares = {f"calls_{kind}": counts[kind] / total if total else None for kind in KINDS}
  return shares | {"sh_ok": float(np.mean(codes)) if codes else None}
