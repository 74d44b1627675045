"""What a GRPO step is measured by: its line in metrics.jsonl and on the terminal, and saved completions.

docs/metrics.md says in one line each what the metrics mean. A name means the same wherever it stands: with
`val_` before it, in an evaluation's summary, and on the pages.
"""

import json
import math
import re
from collections import Counter
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import torch

from config import write_whole

# Of the held-out rows, as val_...; those that need a gold scene are missing where there is none.
HELD_OUT = ("reward", "format", "count", "spatial", "exact", "accuracy", "mean_iou", "recall50")


@dataclass
class UpdateStats:
    """What one update saw on one process: sums over its completion tokens, unless it is said otherwise."""

    tokens: int = 0  # completion tokens
    trained: int = 0  # tokens of the sequences, each with its whole prompt
    loss: float = 0.0
    kl: float = 0.0  # to the reference, nats
    entropy: float = 0.0  # nats
    clip_low: int = 0  # tokens at this bound of the loss
    clip_high: int = 0
    clip_dual: int = 0
    capped: int = 0  # tokens whose importance weight is at is_cap
    mismatch: float = 0.0  # |trainer's log-prob - sampler's|, nats
    mismatch_max: float = 0.0  # the largest of them
    grad_norm: float = 0.0  # of the whole update before clipping: the same on every process
    skipped: bool = False  # the norm was not finite, so no weight has moved

    def add(self, *, mismatch_max: float, **sums) -> None:
        """Count a micro-batch in. Raises: AttributeError for a name that is not declared here."""
        self.mismatch_max = max(self.mismatch_max, mismatch_max)
        for name, value in sums.items():
            setattr(self, name, getattr(self, name) + (value.item() if torch.is_tensor(value) else value))


PER_TOKEN = ("loss", "kl", "entropy", "clip_low", "clip_high", "clip_dual", "capped")


def step_metrics(groups: list[list], stats: list[list[UpdateStats]], scenes: bool = True) -> dict:
    """Means over a step's completions and its updates.

    Args: groups: P lists of G scored rollouts; stats: [process][update]; scenes: whether the reward looks at
        scenes (else there is no count, spatial term or IoU to speak of).
    """
    rollouts = [r for group in groups for r in group]
    scores = [r.score for r in rollouts]
    total = {f.name: sum(getattr(one, f.name) for of in stats for one in of) for f in fields(UpdateStats)}
    updates = stats[0]  # norms are the same on every process
    finite = [one.grad_norm for one in updates if math.isfinite(one.grad_norm)]
    terms = {"reward": "reward", "format": "format", "exact": "accuracy"}
    terms |= {"count": "count", "spatial": "spatial"} if scenes else {}
    measured = {name: mean(getattr(s, term) for s in scores) for name, term in terms.items()}
    if scenes:
        measured["mean_iou"] = mean([iou for s in scores for *_, iou, _ in s.matches] or [0.0])
    return measured | {
        "accuracy": mean(r.correct for r in rollouts),
        "reward_std": float(np.std([s.reward for s in scores])),
        "rejected": dict(Counter(s.reason for s in scores if s.reason)),
        "dead": mean(not any(r.advantage for r in group) for group in groups),
        "cut": mean(not r.finished for r in rollouts),
        "length": mean(len(r.completion_ids) for r in rollouts),
        **{name: total[name] / total["tokens"] for name in PER_TOKEN},
        "mismatch_mean": total["mismatch"] / total["tokens"],
        "mismatch_max": max(one.mismatch_max for of in stats for one in of),
        "grad_norm": mean(finite or [0.0]),
        "skipped": len(updates) - len(finite),
        "tokens": total["tokens"],
        "trained": total["trained"],
    }


def mean(values) -> float:
    return float(np.mean(list(values)))


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
    # In bf16 a right sampler is 0.01 to 0.03 nats a token away in the mean; another image costs about two.
    limit, value = (0.1, m["mismatch_mean"]) if on_gpu else (1e-2, m["mismatch_max"])
    if value > limit:
        raise RuntimeError(
            f"step {m['step']}: trainer and sampler differ by {value:.2g} nats a token, "
            f"expected at most {limit}: the sampler holds other weights or another prompt"
        )


def step_line(m: dict, steps: int, elapsed_s: float, done: int) -> str:
    """The terminal's line for one step."""
    parts = [f"step {m['step']}/{steps}"]
    if "reward" in m:
        short = {"fmt": "format", "cnt": "count", "acc": "accuracy", "spa": "spatial"}
        parts += [
            f"reward {m['reward']:.3f}",
            " ".join(f"{name} {m[key]:.2f}" for name, key in short.items() if key in m),
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


def save_samples(folder: Path, groups: list[list], data, encoder, n: int = 4):
    """The first n prompts of a step: their images, all completions and what each earned."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with write_whole(folder) as tmp:
        write_samples(tmp, groups[:n], data, encoder)


def write_samples(folder: Path, groups: list[list], data, encoder):
    folder.mkdir()
    lines = []
    for group in groups:
        sample = data[group[0].row]
        name = re.sub(r"[^\w.-]", "_", sample.id)[:80]
        for k, image in enumerate(encoder.images(sample)):
            image.save(folder / f"{name}_{k}.png")
        for r in group:
            line = {"id": sample.id, "question": sample.question, "gold": sample.ground_truth, "text": r.text}
            lines.append(json.dumps(line | {"finished": r.finished} | vars(r.score)) + "\n")
    (folder / "completions.jsonl").write_text("".join(lines))
