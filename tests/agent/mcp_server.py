"""An MCP server over stdio, as bad as asked: `python mcp_server.py [hang|bad|count FILE]`.

Written by hand, as the library would not let one break its protocol.
"""

import json
import os
import sys
import threading
import time

OBJECT = {"type": "object", "properties": {"text": {"type": "string"}}}
NAMES = ("echo", "slow", "hang", "die", "flood", "big", "image", "nonsense", "garbage", "fails")
BAD = {
  "a b": OBJECT,
  "a_b": OBJECT,
  "n" * 80: OBJECT,
  "far": {"type": "object", "properties": {"x": {"$ref": "http://127.0.0.1:9/schema"}}},
  "base": {"$id": "http://127.0.0.1:9/", "type": "object"},
  "nowhere": {"type": "object", "properties": {"x": {"$ref": "#/$defs/none"}}},
  "circle": {"type": "object", "allOf": [{"$ref": "#"}]},
  "wrong": {"type": "object", "properties": {"x": {"type": "strange"}}},
  "long": {"type": "object", "description": "x" * 50_000},
  "deep": {
    "type": "object",
    "properties": {"x": {"$ref": "#/$defs/x"}},
    "$defs": {"x": {"allOf": [{"$ref": "#/$defs/x"}]}},
  },
}


def say(**message):
  sys.stdout.write(json.dumps({"jsonrpc": "2.0", **message}) + "\n")
  sys.stdout.flush()


def content(*blocks, **more):
  return {"content": list(blocks), **more}


def text(words):
  return {"type": "text", "text": words}


def call(name, arguments, answer):
  if name == "slow":
    threading.Timer(30, answer, [content(text("late"))]).start()
  elif name == "hang":
    time.sleep(1000)
  elif name == "die":
    os._exit(3)
  elif name == "flood":
    while True:
      sys.stdout.write("x" * 65536)
  elif name == "nonsense":
    answer({"content": "what"})
  elif name == "garbage":
    sys.stdout.write("no json\n[]\n{}\n\x00\n")
    say(method="notifications/message", params={"level": "info", "data": "x" * 100_000})
    answer(content(text("still here")))
  else:
    blocks = {
      "image": {"type": "image", "mimeType": "image/png", "data": "QUJD" * 100},
      "big": text("b" * 5_000_000),
      "fails": text("no such thing"),
      "a b": text("spaced"),
    }
    block = blocks.get(name, text(json.dumps(arguments)))
    answer(content(block, isError=name == "fails"))


def main(mode="", file=""):
  if mode == "count":
    with open(file, "a") as log:
      log.write(f"{os.getpid()}\n")
  tools = BAD if mode == "bad" else dict.fromkeys(NAMES, OBJECT)
  for line in sys.stdin:
    message = json.loads(line)
    if "id" not in message:
      continue
    method, params = message["method"], message.get("params", {})

    def answer(result, id=message["id"]):
      say(id=id, result=result)

    if mode == "hang":
      continue
    if method == "initialize":
      capabilities = {"capabilities": {"tools": {}}, "serverInfo": {"name": "x", "version": "1"}}
      answer({"protocolVersion": params["protocolVersion"], **capabilities})
    elif method == "tools/list":
      listed = [{"name": name, "inputSchema": schema} for name, schema in tools.items()]
      listed[0]["annotations"] = {"readOnlyHint": True}
      answer({"tools": listed})
    elif method == "tools/call":
      call(params["name"], params.get("arguments", {}), answer)
    else:
      say(id=message["id"], error={"code": -32601, "message": "no such method"})


if __name__ == "__main__":
  main(*sys.argv[1:])
