"""What a GRPO step is measured by: its line in metrics.jsonl and on the terminal, and saved completions.

The README's glossary says in one line each what the metrics mean.
"""

import json
import math
import re
from collections import Counter
from pathlib import Path

import numpy as np
import torch

from checkpoint import gather

HELD_OUT = ("reward", "format", "count", "spatial", "accuracy", "mean_iou", "recall50")  # as val_...


def step_metrics(rollouts: list, advantages: torch.Tensor, sums: list[Counter]) -> dict:
    """Means over a step's completions and the updates of all processes. The README defines each."""
    scores = [r.score for r in rollouts]
    updates = gather(sums)
    total = Counter()
    for one in updates:
        total.update({k: v for k, v in one.items() if k not in ("grad_norm", "skipped")})
    norms = [one["grad_norm"] for one in sums]  # the same on every process
    finite = [x for x in norms if math.isfinite(x)]
    return {
        **{
            name: float(np.mean([getattr(s, name) for s in scores]))
            for name in ("reward", "format", "count", "accuracy", "spatial")
        },
        "reward_std": float(np.std([s.reward for s in scores])),
        "mean_iou": float(np.mean([iou for s in scores for *_, iou, _ in s.matches] or [0.0])),
        "rejected": dict(Counter(s.reason for s in scores if s.reason)),
        "dead": float(np.mean([not any(row) for row in advantages.tolist()])),
        "cut": float(np.mean([not r.finished for r in rollouts])),
        "length": float(np.mean([len(r.completion_ids) for r in rollouts])),
        **{
            name: total[name] / total["tokens"]
            for name in ("loss", "kl", "entropy", "clip_low", "clip_high", "clip_dual", "capped")
        },
        "mismatch_mean": total["mismatch"] / total["tokens"],
        "mismatch_max": max(one["mismatch_max"] for one in updates),
        "grad_norm": float(np.mean(finite or [0.0])),
        "skipped": len(norms) - len(finite),
        "tokens": total["tokens"],
        "trained": total["trained"],
    }


def mem_gb() -> float:
    """Peak memory of this process so far: on the GPU where there is one."""
    import resource

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def check_mismatch(m: dict, on_gpu: bool):
    """Trainer and sampler must hold the same model: in float32 they agree to 1e-4 nats a token, in bf16 less.

    Raises: RuntimeError where the difference can only be a bug: stale weights, another prompt or image.
    """
    limit, value = (0.5, m["mismatch_mean"]) if on_gpu else (1e-2, m["mismatch_max"])
    if value > limit:
        raise RuntimeError(
            f"step {m['step']}: trainer and sampler differ by {value:.2g} nats a token, "
            f"expected at most {limit}: the sampler holds other weights or another prompt"
        )


def step_line(m: dict, steps: int, elapsed_s: float, done: int) -> str:
    """The terminal's line for one step."""
    parts = [f"step {m['step']}/{steps}"]
    if "reward" in m:
        parts += [
            f"reward {m['reward']:.3f}",
            f"fmt {m['format']:.2f} cnt {m['count']:.2f} acc {m['accuracy']:.2f} spa {m['spatial']:.2f}",
            f"dead {m['dead']:.0%} cut {m['cut']:.0%}",
            f"len {m['length']:.0f}",
            f"kl {m['kl']:.4f}",
            f"gnorm {m['grad_norm']:.2f}",
            f"mis {m['mismatch_max']:.0e}",
            f"gen {m['gen_s']:.1f}s upd {m['update_s']:.1f}s",
            f"{m['mem_gb']:.1f}GB",
            f"eta {(steps - m['step']) * elapsed_s / max(done, 1) / 3600:.2f}h",
        ]
    if "val_accuracy" in m:
        shown = [k for k in ("reward", "accuracy", "mean_iou", "format") if f"val_{k}" in m]
        parts.append("held out: " + " ".join(f"{k} {m[f'val_{k}']:.3f}" for k in shown))
    return " | ".join(parts)


def save_samples(folder: Path, groups: list[list], data, encode, n: int = 4):
    """The first n prompts of a step: their images, all completions and what each earned."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for group in groups[:n]:
        sample = data[group[0].row]
        name = re.sub(r"[^\w.-]", "_", sample.id)[:80]
        for k, image in enumerate(encode(group[0].row).images):
            image.save(folder / f"{name}_{k}.png")
        for r in group:
            line = {"id": sample.id, "question": sample.question, "gold": sample.ground_truth, "text": r.text}
            lines.append(json.dumps(line | {"finished": r.finished} | vars(r.score)) + "\n")
    (folder / "completions.jsonl").write_text("".join(lines))
