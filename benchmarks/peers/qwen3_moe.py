"""The peer of benchmarks/model.py: transformers' Qwen3MoeForCausalLM, float32, on CPU.

Runs in an environment of its own (`scripts/setup_peers.sh`) and knows nothing of rome:

  .peers/bin/python benchmarks/peers/qwen3_moe.py CONFIG_JSON MODE EXPERTS COMPILE B T REPEATS

prints one JSON line: seconds of each timed call, and the peak memory of the process. MODE is
`forward` (all logits, no gradient) or `train` (loss, gradient, fused AdamW); EXPERTS one of
transformers' implementations; COMPILE 0 or 1 (torch.compile of the model).
"""

import json
import os
import resource
import sys
import time


def main() -> None:
  config, mode, experts, compiled, rows, tokens, repeats = sys.argv[1:]
  import torch
  import transformers

  transformers.logging.set_verbosity_error()
  torch.set_num_threads(os.cpu_count())
  torch.manual_seed(0)
  hf = transformers.Qwen3MoeConfig(**json.loads(config))
  hf._attn_implementation = "sdpa"
  hf._experts_implementation = experts
  model = transformers.Qwen3MoeForCausalLM(hf)
  ids = torch.randint(0, hf.vocab_size, (int(rows), int(tokens)))
  run = torch.compile(model) if compiled == "1" else model
  if mode == "train":
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
  else:
    model.eval()

  def step() -> object:
    if mode == "forward":
      with torch.no_grad():
        return run(input_ids=ids, use_cache=False).logits
    optimizer.zero_grad(set_to_none=True)
    run(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    return optimizer.step()

  seconds = []
  for _ in range(int(repeats) + 2):
    start = time.perf_counter()
    step()
    seconds.append(time.perf_counter() - start)
  peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
  versions = f"torch {torch.__version__}, transformers {transformers.__version__}"
  print(json.dumps({"seconds": seconds[2:], "peak_rss_mib": peak, "versions": versions}))


if __name__ == "__main__":
  main()
