"""What a GRPO config amounts to, without running it: arithmetic, memory, and what is missing on this machine.

    python train_grpo.py configs/7b.yaml dry_run=true

Reads rows, configs and headers, no weights: seconds for a data set on disk.
"""

import importlib.util
import os
import re

import torch

from config import to_yaml
from data import load_samples, report_rows
from packing import logit_chunk


def arithmetic(cfg, world: int, n_samples: int | None = None) -> str:
    """What the config amounts to, in one line."""
    sequences = cfg.prompts_per_step * cfg.group_size
    text = (
        f"{cfg.prompts_per_step} prompts x {cfg.group_size} = {sequences} sequences a step, "
        f"{cfg.updates_per_step} updates of {sequences // cfg.updates_per_step}, {cfg.steps} steps, "
        f"{world} process(es)"
    )
    epochs = cfg.steps * cfg.prompts_per_step / n_samples if n_samples else 0
    return text + (f", {epochs:.2f} epochs of {n_samples}" if epochs else "")


def count_parameters(model: str) -> float | None:
    """Parameters of a model from its config alone (no weights); None if the config is out of reach."""
    from transformers import AutoConfig, AutoModelForImageTextToText

    try:
        config = AutoConfig.from_pretrained(model)
    except (OSError, ValueError):
        return None
    with torch.device("meta"):
        return float(sum(p.numel() for p in AutoModelForImageTextToText.from_config(config).parameters()))


def dry_run(cfg) -> int:
    """Print the resolved config, its arithmetic, memory and what is missing; returns the exit status."""
    world = int(os.environ.get("WORLD_SIZE", max(1, torch.cuda.device_count())))
    print(to_yaml(cfg))
    missing = []
    try:
        samples = load_samples(**cfg.source(cfg.data, cfg.split))
        print(report_rows({"train": samples}))
        print(arithmetic(cfg, world, len(samples)))
    except (OSError, ValueError, RuntimeError) as error:  # the Hub client's errors derive from these
        why = f"{type(error).__name__}: {error}".splitlines()[0]
        missing.append(f"data: {cfg.data} ({cfg.split}) is not readable here: {why}")
        print(arithmetic(cfg, world))
    n = count_parameters(cfg.model)
    if n is None:
        missing.append(f"model: {cfg.model} is no folder here, not in the cache, and the Hub does not answer")
        size = re.search(r"(\d+(?:\.\d+)?)B\b", cfg.model)
        n = {"3": 3.75e9, "7": 8.29e9}.get(size[1], float(size[1]) * 1e9) if size else None
    if n:
        gib = n / 2**30
        head = (cfg.logit_chunk or logit_chunk(152064)) * 152064 * 4 * 2 / 2**30  # two copies
        print(
            f"memory per process at {n / 1e9:.2f}B parameters, sharded over {world}: fp32 weights, "
            f"gradients and Adam {16 * gib / world:.1f} GiB, reference "
            f"{2 * gib * (cfg.kl_coef > 0) / world:.1f} GiB, vLLM's bf16 weights "
            f"{2 * gib / cfg.tensor_parallel:.1f} GiB, logits {head:.1f} GiB; gathered layers, activations "
            "and KV cache come on top"
        )
    if cfg.sampler == "vllm" and importlib.util.find_spec("vllm") is None:
        missing.append("vllm: not installed (pip install -r requirements.txt, or sampler=hf)")
    if not torch.cuda.is_available() and n and n > 1e9:
        missing.append("GPU: none found; this model needs some")
    print("\n".join(f"missing: {m}" for m in missing) if missing else "nothing is missing")
    return 1 if missing else 0
