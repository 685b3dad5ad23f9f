"""What the policy did with its tools, counted over finished trajectories."""

from collections.abc import Sequence

import numpy as np

from rome.agent.parse import TOOLS, ToolCall, parse_reply
from rome.text import ByteTokenizer
from rome.text.tool_calls import looks_like_call, parse_all
from rome.trajectory import Trajectory

KINDS = (*TOOLS, "malformed")


def tool_use(
  trajectories: Sequence[Trajectory], tokenizer: ByteTokenizer, scaffold: bool = False
) -> dict[str, float | None]:
  """Shares of replies by what they called.

  Args:
    trajectories: finished ones.
    tokenizer: the policy's.
    scaffold: whether they were played by the loop of `rome agent`, where "sh" is the tool shell and
      "submit" an answer.
  Returns:
    {"calls_sh", "calls_submit", "calls_malformed"}, with a scaffold also "calls_other", which sum
    to 1, and "sh_ok", the share of shell commands that ended with exit code 0; None where there is
    nothing to count.
  """
  kinds = (*KINDS, "other") if scaffold else KINDS
  counts, codes = dict.fromkeys(kinds, 0), []
  for t in trajectories:
    # Calls are contiguous and in order; a reply was parsed from these very ids when it was played.
    bounds = np.searchsorted(t.call_ids[t.call_ids >= 0], np.arange(1, t.num_chunks))
    replies = np.split(t.tokens[t.call_ids >= 0], bounds) if t.num_chunks else []
    for k, reply in enumerate(replies):
      kind = (_of_scaffold if scaffold else _kind)(reply.tolist(), tokenizer)
      counts[kind] += 1
      if kind == "sh" and k < len(t.turns):
        codes.append(t.turns[k].exit_code == 0)
  total = sum(counts.values())
  shares = {f"calls_{kind}": counts[kind] / total if total else None for kind in kinds}
  return shares | {"sh_ok": float(np.mean(codes)) if codes else None}


def _kind(reply: list[int], tokenizer: ByteTokenizer) -> str:
  call = parse_reply(reply, tokenizer)
  return call.name if isinstance(call, ToolCall) else "malformed"


def _of_scaffold(reply: list[int], tokenizer: ByteTokenizer) -> str:
  if not reply or reply[-1] != tokenizer.end:
    return "malformed"
  content, calls = parse_all(tokenizer, (), tokenizer.decode(reply[:-1]))
  if not calls:
    return "malformed" if looks_like_call(content) else "submit"
  return "sh" if calls[0].name == "shell" else "other"
