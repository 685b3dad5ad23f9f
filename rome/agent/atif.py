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
from rome.agent.model import REASONING, Message

SCHEMA = "ATIF-v1.5"
_READABLE = tuple(f"ATIF-v1.{i}" for i in range(8))
_ROLES = ("system", "user", "assistant", "tool")
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
  if name := next((name for name in REASONING if isinstance(message.get(name), str)), ""):
    step["reasoning_content"], step["extra"]["reasoning"] = message[name], name
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
  extra = trajectory.get("extra")
  ours = _table(extra.get("rome")) if isinstance(extra, dict) else {}
  head = _table(ours.get("session")) or {
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
    except (AttributeError, KeyError, TypeError, ValueError) as error:
      raise AtifError(f"step {i + 1} is no step: {type(error).__name__} {error}") from error
  for kind in ("aside", "unsettled", "outcomes"):
    for i, entry in enumerate(ours.get(kind) or ()):
      match entry:
        case {"type": "outcome"} if kind == "outcomes":
          records.append(entry)
        case {"type": "reply", "content": str(), "calls": list() as calls} if all(
          isinstance(call, list) and list(map(type, call)) == [str] * 3 for call in calls
        ):
          records.append(entry)
        case _:
          raise AtifError(f"extra.rome.{kind}: entry {i + 1} is no record of rome's")
  return records


def _table(value: Any) -> Record:
  """The value where it is a table, else {}."""
  return value if isinstance(value, dict) else {}


def _checked(message: Any) -> Message:
  """A message that can be gone on with.

  Raises:
    TypeError: it is none.
    KeyError: something is missing.
  """
  if not isinstance(message, dict):
    raise TypeError(f"a message is a {type(message).__name__}")
  texts = [message["role"], message["content"]]
  texts += [message[name] for name in REASONING if name in message]
  if message["role"] == "tool":
    texts.append(message["tool_call_id"])
  for call in message.get("tool_calls", ()):
    texts += [call["id"], call["function"]["name"], call["function"]["arguments"]]
  if message["role"] not in _ROLES or not all(isinstance(text, str) for text in texts):
    raise TypeError(f"a message of {str(message['role'])[:40]!r} has what is no text")
  return message


def _take(records: list[Record], step: Mapping[str, Any]) -> None:
  extra = step.get("extra") or {}
  messages = [_checked(extra["message"] if "message" in extra else _message(step))]
  for result in (step.get("observation") or {}).get("results", ()):
    messages.append(
      _checked(
        {
          "role": "tool",
          "tool_call_id": result.get("source_call_id") or "",
          "content": _text(result.get("content") or ""),
        }
      )
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


def _text(content: Any) -> Any:
  """Of parts, what is text; all else as it is."""
  if not isinstance(content, list):
    return content
  return "".join(part.get("text") or "" for part in content)


def _message(step: Mapping[str, Any]) -> Message:
  """The message that a step stands for."""
  role = {"agent": "assistant"}.get(step["source"], step["source"])
  message: Message = {"role": role, "content": _text(step["message"])}
  extra = step.get("extra") or {}
  if (name := extra.get("reasoning")) in REASONING:  # other endpoints may take no such field
    message[name] = _text(step["reasoning_content"])
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
