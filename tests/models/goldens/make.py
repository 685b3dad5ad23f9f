"""Writes tiny random models with what transformers makes of them, for `parity_test.py`.

In an environment of its own (about 1 GB), never that of the project:

  python3 -m venv VENV
  VENV/bin/pip install torch==2.13.0 transformers==5.23.0 safetensors numpy
  VENV/bin/python tests/models/goldens/make.py [NAME ...]        # writes goldens beside this file
  VENV/bin/python tests/models/goldens/make.py --check DIR GOLDEN

Each directory holds config.json and safetensors as transformers writes them, `input_ids.npy`
[B, T], `logits.npy` [B, T, V] and `expected.json`: loss (mean next-token cross-entropy), global
norm of its gradient, load-balancing loss (unscaled; null where there are no experts), and the least
gap between the probability of an expert that was chosen and that of the next. Weights of norms are
made 1 + 0.2 N(0, 1) and biases 0.2 N(0, 1), so that a missing one shows.

`--check` loads DIR, which `rome.models.save` or `rome convert` wrote, and compares its logits on
the inputs of GOLDEN with those of GOLDEN.
"""

import argparse
import json
import pathlib

import numpy as np
import torch
import transformers
from transformers.models.qwen3_moe.modeling_qwen3_moe import load_balancing_loss_func

HERE = pathlib.Path(__file__).parent
BASE = {
  "vocab_size": 80,
  "hidden_size": 32,
  "num_hidden_layers": 2,
  "num_attention_heads": 4,
  "num_key_value_heads": 2,
  "head_dim": 12,
  "intermediate_size": 40,
  "rms_norm_eps": 1e-6,
  "rope_theta": 10_000.0,
  "tie_word_embeddings": False,
  "max_position_embeddings": 512,
  "initializer_range": 0.15,
}
EXPERTS = {
  "num_experts": 6,
  "num_experts_per_tok": 2,
  "moe_intermediate_size": 20,
  "norm_topk_prob": True,
}
# Name -> (model type, what differs).
GOLDENS = {
  "moe": ("qwen3_moe", EXPERTS),
  "moe_theta": ("qwen3_moe", EXPERTS | {"rope_theta": 123.0, "max_shard_size": "60KB"}),
  "moe_dense_first": ("qwen3_moe", EXPERTS | {"num_hidden_layers": 3, "mlp_only_layers": [0]}),
  "moe_tied": ("qwen3_moe", EXPERTS | {"tie_word_embeddings": True, "attention_bias": True}),
  "moe_no_norm_topk": ("qwen3_moe", EXPERTS | {"norm_topk_prob": False}),
  "moe_sparse_step": ("qwen3_moe", EXPERTS | {"num_hidden_layers": 4, "decoder_sparse_step": 2}),
  "qwen3": ("qwen3", {"tie_word_embeddings": True, "rms_norm_eps": 1e-5}),
  "llama": ("llama", {"head_dim": None, "attention_bias": True, "rope_theta": 50_000.0}),
}


def build(name):
  kind, changes = GOLDENS[name]
  changes = dict(changes)
  shard = changes.pop("max_shard_size", "1GB")
  torch.manual_seed(sorted(GOLDENS).index(name))
  config = transformers.AutoConfig.for_model(kind, **{**BASE, **changes})
  config._attn_implementation = "eager"
  config._experts_implementation = "eager"
  model = transformers.AutoModelForCausalLM.from_config(config)
  with torch.no_grad():
    for key, p in model.named_parameters():
      if key.endswith("norm.weight"):
        p.copy_(1 + 0.2 * torch.randn(p.shape))
      elif key.endswith(".bias"):
        p.copy_(0.2 * torch.randn(p.shape))
  return model, shard


def expected(model, ids, out):
  """Loss, gradient norm and load-balancing loss."""
  vocab = model.config.vocab_size
  loss = torch.nn.functional.cross_entropy(
    out.logits[:, :-1].reshape(-1, vocab), ids[:, 1:].reshape(-1)
  )
  loss.backward()
  norm = sum((p.grad.double() ** 2).sum() for p in model.parameters()).sqrt()
  result = {"loss": loss.item(), "grad_norm": norm.item(), "load_balancing_loss": None}
  router = getattr(out, "router_logits", None)
  if router is not None:
    experts, chosen = model.config.num_experts, model.config.num_experts_per_tok
    result["load_balancing_loss"] = load_balancing_loss_func(router, experts, chosen).item()
    top = [torch.softmax(r.float(), -1).topk(chosen + 1, -1).values for r in router]
    result["router_margin"] = min((t[:, -2] - t[:, -1]).min().item() for t in top)
  versions = {"torch": torch.__version__, "transformers": transformers.__version__}
  return result | versions


def write(name):
  model, shard = build(name)
  ids = torch.randint(0, BASE["vocab_size"], (2, 24))
  kwargs = {"output_router_logits": True} if name.startswith("moe") else {}
  out = model(input_ids=ids, use_cache=False, **kwargs)
  result = expected(model, ids, out)
  path = HERE / name
  model.save_pretrained(path, max_shard_size=shard)
  (path / "generation_config.json").unlink(missing_ok=True)
  np.save(path / "input_ids.npy", ids.numpy().astype(np.int32))
  np.save(path / "logits.npy", out.logits.detach().numpy())
  (path / "expected.json").write_text(json.dumps(result, indent=2) + "\n")
  size = sum(f.stat().st_size for f in path.iterdir())
  print(json.dumps({"golden": name, "bytes": size, **result}))


def check(directory, golden):
  model, info = transformers.AutoModelForCausalLM.from_pretrained(
    directory, attn_implementation="eager", output_loading_info=True, dtype=torch.float32
  )
  ids = torch.from_numpy(np.load(golden / "input_ids.npy")).long()
  with torch.no_grad():
    logits = model(input_ids=ids, use_cache=False).logits.numpy()
  error = float(np.abs(logits - np.load(golden / "logits.npy")).max())
  wrong = {k: sorted(map(str, v)) for k, v in info.items() if v}
  print(json.dumps({"model": str(directory), "max_abs_logit_error": error, "loading": wrong}))


def main():
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--check", nargs=2, metavar=("DIR", "GOLDEN"), type=pathlib.Path)
  parser.add_argument("names", nargs="*", help="which goldens to write; all if none is named")
  arguments = parser.parse_args()
  torch.set_num_threads(1)
  if arguments.check:
    check(*arguments.check)
    return
  for name in arguments.names or GOLDENS:
    write(name)


if __name__ == "__main__":
  main()
