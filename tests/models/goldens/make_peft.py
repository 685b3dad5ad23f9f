"""Writes peft_*: adapters as PEFT saves them, with what the adapted models say, for `peft_test.py`.

In an environment of its own (about 1 GB), never that of the project:

  python3 -m venv VENV
  VENV/bin/pip install torch==2.13.0 transformers==5.23.0 peft==0.21.2
  VENV/bin/python tests/models/goldens/make_peft.py
  VENV/bin/python tests/models/goldens/make_peft.py --read DIR --golden NAME

Each directory holds the frozen model as transformers writes it (config.json, model.safetensors),
`adapter`, a directory as PEFT writes it, `input_ids.npy` [B, T], and `logits.npy` [B, T, V] of the
adapted model. `--read` goes the other way: PEFT loads the adapter in DIR over the frozen weights
of a golden, and prints how far its logits are from the golden's.
"""

import argparse
import pathlib

import numpy as np
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model

GOLDENS = pathlib.Path(__file__).parent
SIZES = {
  "vocab_size": 40,
  "hidden_size": 16,
  "num_hidden_layers": 3,
  "num_attention_heads": 2,
  "num_key_value_heads": 1,
  "head_dim": 8,
  "intermediate_size": 24,
  "initializer_range": 0.3,
}
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
MODELS = {
  # Layer 0 is dense: PEFT cannot name its MLP.
  "peft_moe": (
    "Qwen3Moe",
    {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8, "norm_topk_prob": True}
    | {"mlp_only_layers": [0], "tie_word_embeddings": False},
    {
      "target_modules": [*ATTENTION, "lm_head"],
      "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
    },
  ),
  "peft_dense": (
    "Qwen3",
    {"tie_word_embeddings": True},
    {"target_modules": [*ATTENTION, "gate_proj", "up_proj", "down_proj"]},
  ),
}


def base_model(name: str) -> torch.nn.Module:
  family, sizes, _ = MODELS[name]
  config = getattr(transformers, f"{family}Config")(**SIZES, **sizes)
  torch.manual_seed(0)
  return getattr(transformers, f"{family}ForCausalLM")(config).eval()


def make(name: str) -> None:
  out = GOLDENS / name
  model = base_model(name)
  model.save_pretrained(out)
  (out / "generation_config.json").unlink(missing_ok=True)
  adapted = get_peft_model(
    model, LoraConfig(r=3, lora_alpha=5, task_type="CAUSAL_LM", **MODELS[name][2])
  )
  with torch.no_grad():
    for key, value in adapted.named_parameters():
      if "lora_B" in key:
        value.normal_(0, 0.3)
    tokens = torch.randint(0, SIZES["vocab_size"], (2, 12))
    logits = adapted(tokens).logits
    moved = (logits - base_model(name)(tokens).logits).abs().max().item()
  adapted.save_pretrained(out / "adapter", save_embedding_layers=False)
  (out / "adapter" / "README.md").unlink()
  np.save(out / "input_ids.npy", tokens.numpy().astype(np.int32))
  np.save(out / "logits.npy", logits.numpy())
  print(f"{out}: adapters move logits by up to {moved:.2f}")


def read(path: str, name: str) -> None:
  ids, want = (np.load(GOLDENS / name / f"{file}.npy") for file in ("input_ids", "logits"))
  adapted = PeftModel.from_pretrained(base_model(name), path).eval()
  with torch.no_grad():
    logits = adapted(torch.from_numpy(ids).long()).logits.numpy()
  print(f"max abs logit difference {np.abs(logits - want).max():.2e}")


if __name__ == "__main__":
  parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
  parser.add_argument("--read", metavar="DIR")
  parser.add_argument("--golden", choices=MODELS)
  args = parser.parse_args()
  if args.read:
    read(args.read, args.golden)
  else:
    for each in MODELS:
      make(each)
