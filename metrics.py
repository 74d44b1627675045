"""What a GRPO step is measured by: its line in metrics.jsonl, on the terminal and in the tracker, and saved
completions.

docs/metrics.md says in one line each what the metrics mean. A name means the same wherever it stands: with
`val_` before it, in an evaluation's summary, and on the pages.
"""

import importlib
import json
import math
import os
import re
import secrets
from collections import Counter
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import torch

from config import to_yaml, write_whole
from scoring import means

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


def step_metrics(groups: list[list], stats: list[list[UpdateStats]]) -> dict:
    """Means over a step's completions and its updates. Args: groups: P lists of G scored rollouts, whose
    terms are what the reward looks at; stats: [process][update]."""
    rollouts = [r for group in groups for r in group]
    scores = [r.score for r in rollouts]
    total = {f.name: sum(getattr(one, f.name) for of in stats for one in of) for f in fields(UpdateStats)}
    updates = stats[0]  # norms are the same on every process
    finite = [one.grad_norm for one in updates if math.isfinite(one.grad_norm)]
    measured = means(scores)
    if any(hasattr(s, "matches") for s in scores):
        measured["mean_iou"] = mean(
            [iou for s in scores for *_, iou, _ in getattr(s, "matches", ())] or [0.0]
        )
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


def save_samples(folder: Path, groups: list[list], data, encoder, n: int = 4) -> list[tuple[list, list]]:
    """The first n prompts of a step: their images, all completions and what each earned.

    Returns: for each prompt (its images, [what stands in completions.jsonl about a completion of it]).
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with write_whole(folder) as tmp:
        return write_samples(tmp, groups[:n], data, encoder)


def write_samples(folder: Path, groups: list[list], data, encoder) -> list[tuple[list, list]]:
    folder.mkdir()
    saved = []
    for group in groups:
        sample = data[group[0].row]
        name = re.sub(r"[^\w.-]", "_", sample.id)[:80]
        images, lines = encoder.images(sample), []
        for k, image in enumerate(images):
            image.save(folder / f"{name}_{k}.png")
        for r in group:
            line = {"id": sample.id, "question": sample.question, "gold": sample.ground_truth, "text": r.text}
            line |= {"finished": r.finished}
            lines.append(line | vars(r.score) | line)  # a term named `text` hides none of these
        saved.append((images, lines))
    text = "".join(json.dumps(line) + "\n" for _, lines in saved for line in lines)
    (folder / "completions.jsonl").write_text(text)
    return saved


# ---- tracker -----------------------------------------------------------------------------------------------
def lacking_tracker(name: str) -> str | None:
    """Why `tracker=name` cannot be used here, in a line; None if it can."""
    modules = {"wandb": ("wandb", "init"), "tensorboard": ("torch.utils.tensorboard", "SummaryWriter")}
    if name in modules:
        module, needed = modules[name]
        try:  # a folder ./wandb, which its runs leave, imports as well, and is empty
            getattr(importlib.import_module(module), needed)
        except (ImportError, AttributeError):
            return f"tracker={name}: not installed (pip install {name}, or tracker=none)"
    return None


def start_tracker(accelerator, cfg, project: str, first: int):
    """Open the run's tracker, without the steps after `first`, which come again in a continued run.

    <out>/tracker.json keeps the project, name and id under which wandb knows the run; WANDB_PROJECT,
    WANDB_NAME and WANDB_RUN_ID choose them. Ends the program where the tracker does not open.
    """
    if cfg.tracker == "none":
        return
    run, options = {"project": project}, {"purge_step": first + 1 if first else 0}
    if cfg.tracker == "wandb":
        record = Path(cfg.out, "tracker.json")
        if accelerator.is_main_process and not record.exists():
            run |= {"name": Path(cfg.out).resolve().name, "id": secrets.token_hex(4)}
            chosen = {"project": "WANDB_PROJECT", "name": "WANDB_NAME", "id": "WANDB_RUN_ID"}
            run |= {key: os.environ[name] for key, name in chosen.items() if os.environ.get(name)}
            with write_whole(record) as tmp:
                tmp.write_text(json.dumps(run))
        accelerator.wait_for_everyone()
        run = json.loads(record.read_text())
        options = {"name": run["name"], "id": run["id"], "resume": "allow", "dir": cfg.out}
        options["config"] = cfg.model_dump(mode="json")
    try:
        accelerator.init_trackers(run["project"], init_kwargs={cfg.tracker: options})
    except Exception as error:  # no login, no network, no space: each has its own
        why = (str(error).strip() or repr(error)).splitlines()[0]
        raise SystemExit(f"error: tracker={cfg.tracker}: {why}") from None
    if cfg.tracker == "tensorboard":
        accelerator.log({"config": f"```\n{to_yaml(cfg)}```"}, step=first)


def end_tracker(accelerator):
    """Not accelerator.end_training, which takes the process group down: who comes late waits for ever."""
    for tracker in accelerator.trackers:
        tracker.finish()


def log_samples(accelerator, tracker: str, step: int, saved: list[tuple[list, list]]):
    """What `save_samples` has saved, in the tracker: a table with the images. On the main process."""
    if tracker == "wandb":
        import wandb

        n, data = max(len(images) for images, _ in saved), []
        for images, lines in saved:
            cells = [wandb.Image(image) for image in images] + [None] * (n - len(images))
            data += [[*cells, *line.values()] for line in lines]
        data = [[json.dumps(cell) if isinstance(cell, tuple) else cell for cell in row] for row in data]
        columns = [*(f"image_{k}" for k in range(n)), *saved[0][1][0]]
        accelerator.get_tracker("wandb").log_table("samples", columns=columns, data=data, step=step)
    elif tracker == "tensorboard":
        writer = accelerator.get_tracker("tensorboard", unwrap=True)
        for k, (images, lines) in enumerate(saved):
            for i, image in enumerate(images):
                writer.add_image(f"samples/{k}_{i}", np.asarray(image), step, dataformats="HWC")
            text = json.dumps(lines, indent=2)  # indented, it is shown as it is, with its tags
            writer.add_text(f"samples/{k}", "    " + text.replace("\n", "\n    "), step)
