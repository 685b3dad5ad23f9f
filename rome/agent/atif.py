"""Conversations as ATIF, Harbor's Agent Trajectory Interchange Format, and back.

Source: Harbor's RFC 0001, "Agent Trajectory Interchange Format", schema ATIF-v1.5. A step is a
message of the system or the user, or a reply with its calls and their results. What the format has
no place for stands in `extra`: exact token ids and row numbers of a rewritten context, arguments as
the model wrote them, messages that are no step of their own. So nothing is lost on the way there
and back: `from_atif(to_atif(records))` has the same messages and replies.

Left out: pictures; references to trajectories of sub-agents; costs in money.
"""

import json
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

import rome
from rome.agent.model import Message

SCHEMA = "ATIF-v1.5"
_READABLE = tuple(f"ATIF-v1.{i}" for i in range(8))
Record = dict[str, Any]
Step = dict[str, Any]


class AtifError(ValueError):
  """A file is no trajectory; the message names the place."""


def to_atif(records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
  """A trajectory of the records of a conversation (`rome.agent.sessions`)."""
  head = records[0]
  steps: list[Step] = []
  replies: list[Mapping[str, Any]] = []
  aside: list[Mapping[str, Any]] = []
  row = 0
  for entry in records[1:]:
    if entry["type"] == "reply":
      (replies if entry.get("purpose", "turn") == "turn" else aside).append(entry)
    elif entry["type"] in ("messages", "rewrite"):
      row += entry["type"] == "rewrite"
      again = entry["type"] == "rewrite"
      _add(steps, entry, replies, row, again)
  for i, step in enumerate(steps):
    step["step_id"] = i + 1
  agent: dict[str, Any] = {"name": "rome", "version": head.get("version", rome.__version__)}
  if head.get("model"):
    agent["model_name"] = head["model"]
  if head.get("tools"):
    agent["tool_definitions"] = head["tools"]
  used = [s["metrics"] for s in steps if "metrics" in s]
  extra = {"rome": {"session": dict(head), "aside": aside, "unsettled": replies}}
  extra["rome"]["outcomes"] = [dict(r) for r in records if r["type"] == "outcome"]
  return {
    "schema_version": SCHEMA,
    "session_id": head["id"],
    "agent": agent,
    "steps": steps,
    "final_metrics": {
      "total_prompt_tokens": sum(m["prompt_tokens"] for m in used),
      "total_completion_tokens": sum(m["completion_tokens"] for m in used),
      "total_steps": len(steps),
    },
    "extra": extra,
  }


def _add(
  steps: list[Step],
  entry: Mapping[str, Any],
  replies: list[Mapping[str, Any]],
  row: int,
  again: bool,
) -> None:
  """Steps of the messages of one record; takes the replies that they are made of."""
  opened: Step | None = None
  for position, message in enumerate(entry["messages"]):
    where = {"row": row} | ({"begins": True} if again and not position else {})
    where |= {"record": True} if not position and not again else {}
    if message["role"] == "tool" and opened is not None and _fits(opened, message):
      result = {"source_call_id": message["tool_call_id"], "content": message["content"]}
      opened.setdefault("observation", {"results": []})["results"].append(result)
      continue
    opened = _step(message, where)
    if message["role"] == "assistant" and not again and replies:
      _measure(opened, replies.pop(0))
    if when := _stamp(entry.get("time")):
      opened["timestamp"] = when
    steps.append(opened)


def _fits(step: Step, message: Message) -> bool:
  """Whether a result belongs to the reply that is open, in the form that is made again."""
  calls = [call["tool_call_id"] for call in step.get("tool_calls", ())]
  done = [r["source_call_id"] for r in step.get("observation", {}).get("results", ())]
  return (
    set(message) == {"role", "tool_call_id", "content"}
    and message["tool_call_id"] in calls
    and message["tool_call_id"] not in done
    and step["extra"].get("message") is None
  )


def _step(message: Message, where: Mapping[str, Any]) -> Step:
  sources = {"system": "system", "user": "user", "assistant": "agent"}
  content = message.get("content")
  step: Step = {
    "step_id": 0,
    "source": sources.get(message["role"], "system"),
    "message": content if isinstance(content, str) else "",
    "extra": dict(where),
  }
  if calls := message.get("tool_calls"):
    step["tool_calls"] = [_call(call) for call in calls]
    step["extra"]["arguments"] = [call["function"]["arguments"] for call in calls]
  if _message(step) != message:
    step["extra"]["message"] = message
  return step


def _call(call: Mapping[str, Any]) -> dict[str, Any]:
  function = call["function"]
  try:
    arguments = json.loads(function["arguments"])
  except (RecursionError, ValueError):
    arguments = None
  return {
    "tool_call_id": call["id"],
    "function_name": function["name"],
    "arguments": arguments if isinstance(arguments, dict) else {},
  }


def _measure(step: Step, reply: Mapping[str, Any]) -> None:
  metrics = {name: reply[name] for name in ("prompt_tokens", "completion_tokens")}
  ids = reply.get("extra", {})
  if "prompt_ids" in ids:
    metrics["prompt_token_ids"] = ids["prompt_ids"]
    metrics["completion_token_ids"] = ids["completion_ids"]
  if "logprobs" in ids:
    metrics["logprobs"] = ids["logprobs"]
  step["metrics"] = metrics
  step["extra"]["reply"] = {k: v for k, v in reply.items() if k not in metrics and k != "extra"}
  rest = {k: v for k, v in ids.items() if k not in ("prompt_ids", "completion_ids", "logprobs")}
  if rest:
    step["extra"]["reply"]["extra"] = rest


def _stamp(seconds: float | None) -> str:
  if seconds is None:
    return ""
  return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")


def from_atif(trajectory: Any) -> list[Record]:
  """Records of a trajectory, of rome's or anybody's.

  Raises:
    AtifError: it is none.
  """
  match trajectory:
    case {"schema_version": str() as version, "agent": dict() as agent, "steps": list() as steps}:
      if version not in _READABLE:
        raise AtifError(f"schema_version {version!r} is none that is known, such as {SCHEMA}")
    case _:
      raise AtifError("a trajectory has schema_version, agent and steps")
  ours = (trajectory.get("extra") or {}).get("rome") or {}
  head = ours.get("session") or {
    "type": "session",
    "id": str(trajectory.get("session_id", "")),
    "model": agent.get("model_name", ""),
    "cwd": "",
    "version": str(agent.get("version", "")),
  }
  records: list[Record] = [dict(head)]
  for i, step in enumerate(steps):
    try:
      _take(records, step)
    except (AttributeError, KeyError, TypeError) as error:
      raise AtifError(f"step {i + 1} is no step: {type(error).__name__} {error}") from error
  records += ours.get("aside", ()) or ()
  records += ours.get("unsettled", ()) or ()
  records += ours.get("outcomes", ()) or ()
  return records


def _take(records: list[Record], step: Mapping[str, Any]) -> None:
  extra = step.get("extra") or {}
  messages = [extra["message"] if "message" in extra else _message(step)]
  for result in (step.get("observation") or {}).get("results", ()):
    messages.append(
      {
        "role": "tool",
        "tool_call_id": result.get("source_call_id") or "",
        "content": result.get("content") or "",
      }
    )
  if step["source"] == "agent" and not extra.get("begins") and "metrics" in step:
    reply = _reply(step, extra)
    records.append(reply)
  if extra.get("begins"):
    records.append({"type": "rewrite", "messages": messages})
  elif records[-1]["type"] in ("messages", "rewrite") and not extra.get("record"):
    records[-1]["messages"] += messages
  else:
    records.append({"type": "messages", "messages": messages})


def _reply(step: Mapping[str, Any], extra: Mapping[str, Any]) -> Record:
  metrics = step["metrics"]
  found: Record = {
    "type": "reply",
    "content": step["message"],
    "calls": [
      [c["tool_call_id"], c["function_name"], json.dumps(c["arguments"], ensure_ascii=False)]
      for c in step.get("tool_calls") or ()
    ],
    "finish": "tool_calls" if step.get("tool_calls") else "stop",
    "prompt_tokens": metrics.get("prompt_tokens", 0),
    "completion_tokens": metrics.get("completion_tokens", 0),
    **extra.get("reply", {}),
  }
  more = dict(found.get("extra", {}))
  names = {"prompt_token_ids": "prompt_ids", "completion_token_ids": "completion_ids"}
  for name in ("prompt_token_ids", "completion_token_ids", "logprobs"):
    if name in metrics:
      more[names.get(name, name)] = metrics[name]
  return found | ({"extra": more} if more else {})


def _message(step: Mapping[str, Any]) -> Message:
  """The message that a step stands for."""
  role = {"agent": "assistant"}.get(step["source"], step["source"])
  content = step["message"]
  if isinstance(content, list):  # parts, of which text is understood
    content = "".join(part.get("text") or "" for part in content)
  message: Message = {"role": role, "content": content}
  extra = step.get("extra") or {}
  calls = step.get("tool_calls") or ()
  texts = extra.get("arguments") or [json.dumps(c["arguments"], ensure_ascii=False) for c in calls]
  if calls:
    message["tool_calls"] = [
      {
        "id": call["tool_call_id"],
        "type": "function",
        "function": {"name": call["function_name"], "arguments": text},
      }
      for call, text in zip(calls, texts, strict=True)
    ]
  return message
