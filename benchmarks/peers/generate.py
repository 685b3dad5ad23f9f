"""The peer of benchmarks/engine.py: transformers' `generate`, on a CPU or a CUDA device.

Runs in an environment of its own (`scripts/setup_peers.sh`) and knows nothing of rome:

  .peers/bin/python benchmarks/peers/generate.py CONFIG_JSON PEER DEVICE BATCH PROMPT NEW REPEATS

prints one JSON line: seconds of each timed call that samples NEW tokens a row, and of calls that
sample one (prefill and the first token), both at temperature 1 over the whole vocabulary. PEER is
`EXPERTS[+static][+compile]`: transformers' implementation of the experts (`default` for its own
choice and for dense models), its static cache, and torch.compile of the decode step by `generate`
itself, which needs the static cache. DEVICE is cpu or cuda.
"""

import json
import os
import resource
import sys
import time


def main() -> None:
  config, peer, device, batch, prompt, new, repeats = sys.argv[1:]
  import torch
  import transformers

  transformers.logging.set_verbosity_error()
  if device == "cpu":
    torch.set_num_threads(len(os.sched_getaffinity(0)))
  elif not torch.cuda.is_available():
    raise SystemExit("torch sees no CUDA device")
  torch.manual_seed(0)
  experts, *options = peer.split("+")
  sizes = json.loads(config)
  hf = transformers.AutoConfig.for_model(sizes.pop("model_type"), **sizes)
  hf._attn_implementation = "sdpa"
  if experts != "default":
    hf._experts_implementation = experts
  with torch.device(device):
    model = transformers.AutoModelForCausalLM.from_config(hf, dtype=hf.dtype)
  model.eval()
  settings = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "pad_token_id": 0}
  if "static" in options or "compile" in options:
    settings["cache_implementation"] = "static"
  settings["disable_compile"] = "compile" not in options
  if "compile" in options and device == "cpu":  # elsewhere the defaults do it
    settings["compile_config"] = transformers.CompileConfig(mode="default")
    settings["compile_config"]._compile_all_devices = True

  def generate(tokens: int) -> float:
    ids = torch.randint(0, hf.vocab_size, (int(batch), int(prompt)), device=device)
    start = time.perf_counter()
    with torch.no_grad():
      out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=tokens,
        min_new_tokens=tokens,
        **settings,
      )
    out = out.cpu()  # waits for the device
    seconds = time.perf_counter() - start
    assert out.shape == (int(batch), int(prompt) + tokens), out.shape
    return seconds

  timed = {}
  for tokens in (int(new), 1):
    for _ in range(2 if "compile" in options else 1):
      generate(tokens)
    timed[tokens] = [generate(tokens) for _ in range(int(repeats))]
  versions = f"torch {torch.__version__}, transformers {transformers.__version__}"
  if device == "cuda":
    versions += f", {torch.cuda.get_device_name()}"
  found = {"seconds": timed[int(new)], "first_seconds": timed[1], "versions": versions}
  found["parameters"] = sum(p.numel() for p in model.parameters())
  found["peak_rss_mib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
  print(json.dumps(found))


if __name__ == "__main__":
  main()
