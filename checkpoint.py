"""Checkpoints of both trainers: written whole or not at all, read by any number of processes.

    runs/7b/checkpoint-75/
        model/         fp32 weights, torch.distributed.checkpoint files: every process writes its shards
        optimizer/     AdamW's moments, likewise; may be deleted from a checkpoint that will not be continued
        rng-0.pt ...   random states of each process
        trainer.json   step, held-out scores, processes, fingerprint of the weights
        hf/            config, generation config, processor and chat template, for merge.py
A checkpoint is written as checkpoint-75.tmp and renamed when all of it is on disk: a run killed at any moment
leaves the previous one as it was. 12 bytes a parameter: 45 GB for 3B, 100 GB for 7B.

With adapters (lora.py), model/, optimizer/ and the fingerprint are of these alone. Under "adapters",
trainer.json then says what they belong to: rank, alpha, folder or Hub id of the frozen base, the dtype that
it was used in, and its fingerprint, so that another base is noticed.
"""

import contextlib
import json
import math
import os
import random
import re
import shutil
from pathlib import Path

import numpy as np
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from config import Config, write_whole
from distributed import gather
from lora import adapted_layers

SUMMED_AT_ONCE = 2**24  # values


class CheckpointError(ValueError):
    """A checkpoint that cannot be continued, or could not be written: names the folder and why."""


def checkpoints(out: Path) -> list[Path]:
    """Whole checkpoints of a run, oldest first."""
    found = [p for p in out.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", p.name)]
    return sorted(found, key=lambda p: int(p.name.split("-")[1]))


# ---- write -------------------------------------------------------------------------------------------------
def save(
    accelerator,
    model,
    optimizer,
    processor,
    out: Path,
    step: int,
    scores: dict,
    keep_last: int,
    best: str | None = None,
) -> None:
    """Write checkpoint-STEP, then drop all but the last `keep_last` and the one with the highest `best`.

    Collective. Raises: CheckpointError on every process if any of them could not write; what was there stays.
    """
    tmp, final = out / f"checkpoint-{step}.tmp", out / f"checkpoint-{step}"

    def together(write) -> None:
        """Run `write` on this process; if it failed on any, clean up and raise on all."""
        problem = None
        try:
            write()
        except (Exception, dcp.api.CheckpointException) as error:  # whatever it is, the others wait for us
            why = (str(error).strip() or repr(error)).splitlines()[-1]
            problem = f"process {accelerator.process_index}: {why}"
        if problems := [p for p in gather([problem]) if p]:
            if accelerator.is_main_process:
                shutil.rmtree(tmp, ignore_errors=True)
            left = checkpoints(out)
            raise CheckpointError(
                f"{final} could not be written ({problems[0]}); "
                f"{f'{left[-1]} is whole' if left else 'there is no earlier one'}"
            )

    def begin():
        if accelerator.is_main_process:
            for left in (*out.glob("checkpoint-*.tmp"), *out.glob("checkpoint-*.old")):  # by a killed run
                shutil.rmtree(left, ignore_errors=True)
            tmp.mkdir(parents=True)

    def write():
        dcp.save(model_state, checkpoint_id=tmp / "model")  # dcp passes one process's error to all
        dcp.save(optimizer_state, checkpoint_id=tmp / "optimizer")
        torch.save(rng_state(), tmp / f"rng-{accelerator.process_index}.pt")
        if accelerator.is_main_process:
            whole = accelerator.unwrap_model(model)
            whole.config.save_pretrained(tmp / "hf")
            whole.generation_config.save_pretrained(tmp / "hf")
            processor.save_pretrained(tmp / "hf")
            (tmp / "trainer.json").write_text(json.dumps(record))

    def finish():
        if accelerator.is_main_process:
            if final.exists():  # of an earlier attempt at this step
                remove(final)
            os.replace(tmp, final)
            rotate(out, keep_last, best)

    def shared():
        if not tmp.is_dir():
            raise OSError(f"{out} is not a folder that all processes share")

    together(begin)
    together(shared)
    model_state, optimizer_state = get_state_dict(model, optimizer)
    record = {"step": step, "scores": scores, "processes": accelerator.num_processes}
    if adapters := describe_adapters(accelerator, model):
        model_state = adapters_of(model_state)
        record |= {"fingerprint": fingerprint(accelerator, model, is_adapter), "adapters": adapters}
    else:
        record |= {"fingerprint": fingerprint(accelerator, model)}
    together(write)
    together(finish)


def remove(checkpoint: Path):
    """Delete a checkpoint that, killed halfway, must not be taken for a whole one."""
    doomed = checkpoint.with_name(checkpoint.name + ".old")
    os.replace(checkpoint, doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def rotate(out: Path, keep_last: int, best: str | None):
    """Drop all checkpoints but the last ones and the best."""
    found = checkpoints(out)
    scored = {}
    for p in found:
        with contextlib.suppress(CheckpointError):  # a damaged one has no score
            scored[p] = read_record(p)["scores"].get(best)
    scored = {p: score for p, score in scored.items() if score is not None}
    keep = {*found[-keep_last:], *([max(scored, key=scored.get)] if scored else [])}
    for old in found:
        if old not in keep:
            with contextlib.suppress(OSError):  # in use: the next rotation will try again
                remove(old)


def rng_state() -> dict:
    cuda = torch.cuda.get_rng_state() if torch.cuda.is_available() else None
    return {
        "torch": torch.get_rng_state(),
        "cuda": cuda,
        "python": random.getstate(),
        "numpy": np.random.get_state(legacy=False),
    }


@torch.no_grad()
def fingerprint(accelerator, model, wanted=lambda name: True) -> dict[str, list[float]]:
    """[sum of the values, of their magnitudes, of row number * magnitude] of the parameters, in float64.

    Computed on the shards, so that nothing is gathered; `merge.py` computes it again from what it wrote.
    Args: wanted: which names.
    """
    names, sums = [], []
    for name, p in accelerator.unwrap_model(model).named_parameters():
        if not wanted(name):
            continue
        local, first = (p.to_local(), first_row(p)) if hasattr(p, "to_local") else (p, 0)
        counted = hasattr(p, "to_local") or accelerator.is_main_process  # copies count once
        names.append(name.replace(".base_layer", ""))
        sums.append(row_sums(local, first) * counted)
    total = accelerator.reduce(torch.stack(sums).to(accelerator.device), "sum").tolist()
    return dict(zip(names, total, strict=True))


def row_sums(rows: torch.Tensor, first: int = 0) -> torch.Tensor:
    """The three sums of `fingerprint` over the rows of one tensor, which are numbered from `first`: (3,)."""
    sums = torch.zeros(3, dtype=torch.float64, device=rows.device)
    width = math.prod(rows.shape[1:])
    # In float64 a whole embedding would take 4 GB.
    for piece in rows.detach().split(max(1, SUMMED_AT_ONCE // max(1, width))):
        flat = piece.double().reshape(len(piece), width)  # a shard may have no rows
        size = flat.abs().sum(1)
        number = torch.arange(first, first + len(size), dtype=torch.float64, device=size.device)
        sums += torch.stack([flat.sum(), size.sum(), (number * size).sum()])
        first += len(piece)
    return sums


def same_sums(a: list[float], b: list[float]) -> bool:
    """Whether two fingerprints of a tensor are equal, but for the rounding of sums in another order."""
    scales = max(b[1], 1e-30), max(b[1], 1e-30), max(b[2], 1e-30)
    return all(abs(x - y) <= 1e-9 * scale for x, y, scale in zip(a, b, scales, strict=True))


def is_adapter(name: str) -> bool:
    return ".lora_" in name


def adapters_of(state: dict) -> dict:
    return {name: value for name, value in state.items() if is_adapter(name)}


def describe_adapters(accelerator, model) -> dict | None:
    """What a model's adapters are and belong to, as in trainer.json; None without adapters. Collective."""
    whole = accelerator.unwrap_model(model)
    if not (layers := adapted_layers(whole)):
        return None
    if not hasattr(whole, "adapters"):  # once: a frozen base never changes
        layer = next(iter(layers.values()))
        whole.adapters = {
            "rank": layer.r["default"],
            "alpha": layer.lora_alpha["default"],
            "base": whole.name_or_path,
            "base_dtype": str(layer.base_layer.weight.dtype).removeprefix("torch."),
            "base_fingerprint": fingerprint(accelerator, model, lambda name: not is_adapter(name)),
        }
    return whole.adapters


def first_row(p) -> int:
    """Index of a sharded parameter's first local row in the whole."""
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    return compute_local_shape_and_global_offset(p.shape, p.device_mesh, p.placements)[1][0]


# ---- read --------------------------------------------------------------------------------------------------
def read_record(checkpoint: Path) -> dict:
    try:
        record = json.loads((checkpoint / "trainer.json").read_text())
        return {"scores": {}, **record, "step": int(record["step"])}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{checkpoint}/trainer.json: expected a checkpoint's record, got {error!r}"
        ) from None


def load(accelerator, model, optimizer, checkpoint: Path) -> int:
    """Load a checkpoint into the prepared model and optimizer; returns the finished steps. Collective."""
    record, adapters = read_record(checkpoint), describe_adapters(accelerator, model)
    check_adapters(checkpoint, record.get("adapters"), adapters)
    state = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True))
    for name, part in state.items():
        held = adapters_of(part) if adapters and name == "model" else part  # the base stays as it is
        try:
            dcp.load(held, checkpoint_id=checkpoint / name)  # in place
        except (OSError, RuntimeError, ValueError, dcp.api.CheckpointException) as error:
            last = str(error).strip().splitlines()[-1]
            raise CheckpointError(f"{checkpoint / name}: expected this model's state, got {last}") from None
    set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    processes, rng_file = record.get("processes"), checkpoint / f"rng-{accelerator.process_index}.pt"
    if processes == accelerator.num_processes and rng_file.exists():
        rng = torch.load(rng_file, weights_only=False)
        torch.set_rng_state(rng["torch"])
        random.setstate(rng["python"])
        np.random.set_state(rng["numpy"])
        if rng["cuda"] is not None and torch.cuda.is_available():
            torch.cuda.set_rng_state(rng["cuda"])
    else:
        accelerator.print(
            f"{checkpoint} is of {processes} process(es), this run of {accelerator.num_processes}: model and "
            "optimizer continue; in other batches sums round differently, so samples will differ"
        )
    return record["step"]


def check_adapters(checkpoint: Path, theirs: dict | None, ours: dict | None):
    """Raises: CheckpointError if a checkpoint's adapters, or their absence, do not fit this run's model."""
    if bool(theirs) != bool(ours):
        kinds = "all parameters (lora_rank=0)", "adapters (lora_rank)"
        older = ", or LoRA of an older version" if ours else ""
        raise CheckpointError(f"{checkpoint}: expected {kinds[bool(ours)]}, got {kinds[bool(theirs)]}{older}")
    for key in ("rank", "alpha") if ours else ():
        if theirs[key] != ours[key]:
            raise CheckpointError(f"{checkpoint}: lora_{key}: expected {ours[key]}, got {theirs[key]}")
    if ours and (problem := other_base(ours["base_fingerprint"], theirs["base_fingerprint"])):
        raise CheckpointError(
            f"{checkpoint}: adapters for {theirs['base']}; {ours['base']} has other weights ({problem})"
        )


def other_base(ours: dict, theirs: dict) -> str | None:
    """What tells two fingerprints apart, in words; None if they are equal."""
    if ours.keys() != theirs.keys():
        return f"{sorted(ours.keys() ^ theirs.keys())[0]} is in one of them only"
    different = [name for name in ours if not same_sums(ours[name], theirs[name])]
    return f"{different[0]} and {len(different) - 1} more" if different else None


def resume(accelerator, model, optimizer, out: Path, how: str) -> int:
    """Continue from the run's last checkpoint; where there is none, from the checkpoint `how`, if it is one.

    Lines of metrics.jsonl beyond the checkpoint are of steps that are lost and are cut off.
    Returns: finished steps. Raises: CheckpointError.
    """
    found = checkpoints(out)
    if len({p.name for p in gather(found[-1:] or [Path(how)])}) > 1:
        raise CheckpointError(f"{out}: processes see different checkpoints; all must share the folder")
    if not found and how not in ("auto", "never"):
        if not (Path(how) / "trainer.json").exists():
            raise CheckpointError(f"resume={how}: expected auto, never or a checkpoint's folder")
        found = [Path(how)]
    step = load(accelerator, model, optimizer, found[-1]) if found and how != "never" else 0
    metrics = out / "metrics.jsonl"
    if accelerator.is_main_process and metrics.exists():
        lines = [
            line
            for line in metrics.read_text().splitlines(keepends=True)
            if line.endswith("\n") and step and json.loads(line)["step"] <= step
        ]
        with write_whole(metrics) as tmp:
            tmp.write_text("".join(lines))
    accelerator.wait_for_everyone()
    return step


def refuse_another_run(cfg: Config, out: Path, free: frozenset[str]):
    """Refuse to continue a run against resume=never, or under a config that would make it another one.

    Args: free: keys that may change. Raises: CheckpointError listing the keys with their old and new values.
    """
    held = (out / "metrics.jsonl").exists() or bool(checkpoints(out))
    record = out / "run.json"
    before = json.loads(record.read_text()).get("config", {}) if record.exists() else {}
    # A path starts a run elsewhere; the same command again continues that one.
    if held and cfg.resume != "auto" and (cfg.resume == "never" or before.get("resume") != cfg.resume):
        raise CheckpointError(f"{out} holds a run already: remove it, choose another out, or set resume=auto")
    if not checkpoints(out):
        return
    now = json.loads(cfg.model_dump_json())
    changed = [k for k in now if k not in free and k in before and before[k] != now[k]]
    if changed:
        lines = [f"  {k}: {before[k]!r} there, {now[k]!r} here" for k in changed]
        raise CheckpointError(
            "\n".join([f"{out} holds a run of another config: choose another out, or keep", *lines])
        )


def refuse_other_rows(accelerator, out: Path, rows: dict):
    """Refuse to continue a run on other training rows; else note them in its run.json. Collective.

    Args: rows: their number and fingerprint. Raises: CheckpointError with both.
    """
    path = out / "run.json"
    record = json.loads(path.read_text())
    if checkpoints(out) and record.get("trained_on", rows) != rows:
        was, now = (f"{r['rows']} with fingerprint {r['fingerprint']}" for r in (record["trained_on"], rows))
        raise CheckpointError(
            f"{out} holds a run on other rows: expected {was}, got {now}: choose another out"
        )
    accelerator.wait_for_everyone()  # all have read it
    if accelerator.is_main_process:
        with write_whole(path) as tmp:
            tmp.write_text(json.dumps(record | {"trained_on": rows}, indent=2) + "\n")
