"""Checkpoints of both trainers: written whole or not at all, read by any number of processes.

    runs/7b/checkpoint-75/
        model/         fp32 weights, torch.distributed.checkpoint files: every process writes its shards
        optimizer/     AdamW's moments, likewise; may be deleted from a checkpoint that will not be continued
        rng-0.json ... random states of each process
        trainer.json   step, held-out scores, processes, fingerprint of the weights
        hf/            config, generation config, processor and chat template, for merge.py
        b2sums.txt     a hash of every file: `b2sum -c b2sums.txt`
A checkpoint is written as checkpoint-75.tmp and renamed when all of it is on disk: a run killed at any moment
leaves the previous one as it was. 12 bytes a parameter: 45 GB for 3B, 100 GB for 7B. Who reads one checks the
hashes, follows no symbolic link, and runs nothing that a file might name (torch's own files are pickles).

With adapters (lora.py), model/, optimizer/ and the fingerprint are of these alone. Under "adapters",
trainer.json then says what they belong to: rank, alpha, folder or Hub id of the frozen base, the dtype that
it was used in, and its fingerprint, so that another base is noticed.
"""

import contextlib
import hashlib
import io
import json
import math
import os
import pickle
import random
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from config import Config, discard, why_full, write_whole
from distributed import gather
from lora import adapted_layers

SUMMED_AT_ONCE = 2**24  # values
SUMS = "b2sums.txt"


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
            why = why_full(error) or no_room(tmp) or (str(error).strip() or repr(error)).splitlines()[-1]
            problem = f"process {accelerator.process_index}: {why}"
        if problems := [p for p in gather([problem]) if p]:
            if accelerator.is_main_process:
                discard(tmp)
            left = checkpoints(out)
            raise CheckpointError(
                f"{final} could not be written ({problems[0]}); "
                f"{f'{left[-1]} is whole' if left else 'there is no earlier one'}"
            )

    def begin():
        if accelerator.is_main_process:
            for left in (*out.glob("checkpoint-*.tmp"), *out.glob("checkpoint-*.old")):  # by a killed run
                discard(left)
            tmp.mkdir(parents=True)

    def write():
        check_sums(record["fingerprint"])  # what cannot be continued must not displace what can
        dcp.save(model_state, checkpoint_id=tmp / "model")  # dcp passes one process's error to all
        dcp.save(optimizer_state, checkpoint_id=tmp / "optimizer")
        (tmp / f"rng-{accelerator.process_index}.json").write_text(json.dumps(rng_state()))
        if accelerator.is_main_process:
            whole = accelerator.unwrap_model(model)
            whole.config.save_pretrained(tmp / "hf")
            whole.generation_config.save_pretrained(tmp / "hf")
            processor.save_pretrained(tmp / "hf")
            (tmp / "trainer.json").write_text(json.dumps(record))
        mine.update(hashes(tmp, [f for f in files_of(tmp) if writer_of(f) == accelerator.process_index]))

    def finish():
        if accelerator.is_main_process:
            write_sums(tmp, {name: digest for part in parts for name, digest in part.items()})
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
    mine = {}
    together(write)
    parts = gather([mine])
    together(finish)


def no_room(folder: Path) -> str | None:
    """`disk full (...)` if a MiB does not fit: torch does not tell why a file of its own could not grow."""
    try:
        (folder / f"probe-{os.getpid()}").write_bytes(bytes(2**20))
    except OSError as error:
        return why_full(error)


def remove(checkpoint: Path):
    """Delete a checkpoint that, killed halfway, must not be taken for a whole one."""
    doomed = checkpoint.with_name(checkpoint.name + ".old")
    os.replace(checkpoint, doomed)
    discard(doomed)


def rotate(out: Path, keep_last: int, best: str | None):
    """Drop all checkpoints but the last ones and the best; links are somebody else's and stay."""
    found = [p for p in checkpoints(out) if not p.is_symlink()]
    scored = {}
    for p in found:
        with contextlib.suppress(CheckpointError):  # a damaged one has no score
            scored[p] = read_record(p)["scores"].get(best)
    scored = {p: score for p, score in scored.items() if is_finite(score)}
    keep = {*found[-keep_last:], *([max(scored, key=scored.get)] if scored else [])}
    for old in found:
        if old not in keep:
            with contextlib.suppress(OSError):  # in use: the next rotation will try again
                remove(old)


def rng_state() -> dict:
    """The states of all generators of this process, as JSON can hold them."""
    numpy = np.random.get_state(legacy=False)
    numpy["state"]["key"] = numpy["state"]["key"].tolist()
    cuda = torch.cuda.get_rng_state().tolist() if torch.cuda.is_available() else None
    return {
        "torch": torch.get_rng_state().tolist(), "cuda": cuda, "python": random.getstate(), "numpy": numpy,
    }  # fmt: skip


def set_rng_state(state: dict):
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    torch.set_rng_state(torch.tensor(state["torch"], dtype=torch.uint8))
    np.random.set_state(state["numpy"])
    if state["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state(torch.tensor(state["cuda"], dtype=torch.uint8))


# ---- hashes ----
def files_of(checkpoint: Path) -> list[str]:
    """Names of all files below a folder. Raises: CheckpointError at what is neither file nor folder."""
    found = []
    for path in (checkpoint, *sorted(checkpoint.rglob("*"))):  # rglob enters no link
        if path.is_symlink():
            raise CheckpointError(f"{path}: expected no symbolic link, got one to {os.readlink(path)}")
        if path.is_file():
            found.append(path.relative_to(checkpoint).as_posix())
        elif not path.is_dir():
            raise CheckpointError(f"{path}: expected a file or a folder, got a pipe or a device")
    return found


def writer_of(name: str) -> int:
    """The process that wrote a file of a checkpoint."""
    own = re.search(r"(?:^rng-|/__)(\d+)[_.]", name)
    return int(own[1]) if own else 0


def hashes(checkpoint: Path, names: list[str]) -> dict[str, str]:
    """{name: BLAKE2b as `b2sum` prints it}, at a GB/s or more a file, four files at a time."""

    def digest(name):
        with open(checkpoint / name, "rb") as file:
            return hashlib.file_digest(file, "blake2b").hexdigest()

    with ThreadPoolExecutor(4) as pool:
        return dict(zip(names, pool.map(digest, names), strict=True))


def write_sums(checkpoint: Path, sums: dict[str, str]):
    lines = [f"{digest}  {name}\n" for name, digest in sorted(sums.items())]
    (checkpoint / SUMS).write_text("".join(lines))


def check_files(checkpoint: Path, unread: str = "$^", share: slice = slice(None)):
    """Check that the files of a checkpoint are those that were written, each a file and no link.

    Args: unread: pattern of files that nobody will read; share: which of the hashes this process computes.
    Raises: CheckpointError naming the first file that is not.
    """
    if not checkpoint.is_dir():
        raise CheckpointError(f"{checkpoint}: expected a checkpoint's folder, got none")
    found = files_of(checkpoint)
    if SUMS not in found:
        if any(re.fullmatch(r"rng-\d+\.pt", name) for name in found):  # as written before there were hashes
            return
        raise CheckpointError(f"{checkpoint / SUMS}: expected the hashes of all files, got no such file")
    text = (checkpoint / SUMS).read_text(errors="replace")
    sums = {name: digest for digest, _, name in (line.partition("  ") for line in text.splitlines())}
    sums = {name: digest for name, digest in sums.items() if not re.match(unread, name)}
    if not {"trainer.json", "model/.metadata"} <= sums.keys():
        raise CheckpointError(f"{checkpoint / SUMS}: expected the hashes of all files, got {len(sums)}")
    if missing := sorted(sums.keys() - set(found)):
        raise CheckpointError(f"{checkpoint / missing[0]}: missing, though {SUMS} lists it")
    if extra := [name for name in found if "/" in name and name not in sums and not re.match(unread, name)]:
        raise CheckpointError(f"{checkpoint / extra[0]}: not a file of this checkpoint: {SUMS} lacks it")
    for name, digest in hashes(checkpoint, sorted(sums)[share]).items():
        if digest != sums[name]:
            raise CheckpointError(f"{checkpoint / name}: not as it was written, by its hash in {SUMS}")


# ---- indices ----
# torch keeps the index of a folder, and every optimizer setting, as a pickle, and runs what it names.
DESCRIPTIONS = {
    "pathlib": "PosixPath PurePosixPath",
    "torch": "Size",
    "torch.serialization": "_get_layout",
    "torch.distributed.checkpoint.filesystem": "_StorageInfo",
    "torch.distributed.checkpoint.metadata": "BytesStorageMetadata ChunkStorageMetadata Metadata "
    "MetadataIndex StorageMeta TensorProperties TensorStorageMetadata _MEM_FORMAT_ENCODING",
}


class Index(pickle.Unpickler):
    """Reads torch's descriptions of tensors and of places in files, and no other class or function."""

    def find_class(self, module, name):
        a_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if a_dtype or name in DESCRIPTIONS.get(module, "").split():
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"{module}.{name}, which has no place in one")


class Reader(dcp.FileSystemReader):
    """torch's reader of a folder, which runs nothing that the index names and reads no file elsewhere."""

    def read_metadata(self, *args, **kwargs):
        file = Path(self.path) / ".metadata"
        try:
            index = Index(io.BytesIO(file.read_bytes())).load()
            if not isinstance(index, Metadata) or not isinstance(index.state_dict_metadata, dict):
                raise ValueError(f"a {type(index).__name__}")
            names = {info.relative_path for info in index.storage_data.values()}
            if elsewhere := [name for name in names if name != os.path.basename(name)]:
                raise ValueError(f"a place in {elsewhere[0]}")
        except Exception as error:  # a damaged pickle raises anything
            raise CheckpointError(f"{file}: expected the index of a checkpoint, got {error!r}") from None
        index.storage_meta = StorageMeta(load_id=self.load_id)
        return index


class Planner(dcp.DefaultLoadPlanner):
    """torch's plan of what to read, with optimizer settings that are numbers, texts and lists of them."""

    def load_bytes(self, read_item, value):
        harmless = io.BytesIO()  # torch would execute the value itself
        try:
            torch.save(torch.load(value, weights_only=True), harmless)
        except pickle.UnpicklingError:
            name = read_item.dest_index.fqn
            raise ValueError(f"a class for {name}, which is not run") from None
        harmless.seek(0)
        super().load_bytes(read_item, harmless)


# ---- weights in three numbers ----


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


def check_sums(sums: dict[str, list[float]]):
    """Raises: ValueError if a fingerprint is none, or of weights that are not finite."""
    for name, three in sums.items():
        if len(three) != 3 or not all(map(is_finite, three)):
            raise ValueError(f"weights of {name}: expected finite sums, got {three}")


def is_finite(x) -> bool:
    return type(x) in (int, float) and math.isfinite(x)


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
        record = {"scores": {}} | json.loads((checkpoint / "trainer.json").read_text())
        if type(record["step"]) is not int or not isinstance(record["scores"], dict):
            raise ValueError(f"step {record['step']!r}, scores {record['scores']!r}")
        check_sums(record.get("fingerprint") or {})
        if adapters := record.get("adapters"):
            check_sums({**record["fingerprint"], **adapters["base_fingerprint"]})
            {key: adapters[key] for key in ("rank", "alpha", "base", "base_dtype")}
        return record
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(
            f"{checkpoint}/trainer.json: expected a checkpoint's record, got {error!r}"
        ) from None


def load(accelerator, model, optimizer, checkpoint: Path) -> int:
    """Load a checkpoint into the prepared model and optimizer; returns the finished steps. Collective."""
    rank, world, adapters = (
        accelerator.process_index,
        accelerator.num_processes,
        describe_adapters(accelerator, model),
    )
    problem = None
    try:
        check_files(checkpoint, share=slice(rank, None, world))
        record = read_record(checkpoint)
        check_adapters(checkpoint, record.get("adapters"), adapters)
        for name in ("model", "optimizer"):
            Reader(checkpoint / name).read_metadata()
    except (CheckpointError, OSError) as error:  # the others wait for us
        problem = str(error)
    if problems := [p for p in gather([problem]) if p]:
        raise CheckpointError(problems[0])
    state = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True))
    for name, part in state.items():
        held = adapters_of(part) if adapters and name == "model" else part  # the base stays as it is
        try:
            dcp.load(held, storage_reader=Reader(checkpoint / name), planner=Planner())  # in place
        except (Exception, dcp.api.CheckpointException) as error:  # what a damaged file makes of torch
            last = (str(error).strip() or repr(error)).splitlines()[-1]
            raise CheckpointError(f"{checkpoint / name}: expected this model's state, got {last}") from None
    set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    check_trained(accelerator, model, checkpoint, record)
    processes, rng_file = record.get("processes"), checkpoint / f"rng-{rank}.json"
    if processes != world:
        accelerator.print(
            f"{checkpoint} is of {processes} process(es), this run of {world}: model and "
            "optimizer continue; in other batches sums round differently, so samples will differ"
        )
    elif not rng_file.exists():
        accelerator.print(f"{checkpoint} has random states as a pickle, of an older version: they start anew")
    else:
        try:
            set_rng_state(json.loads(rng_file.read_text()))
        except (OSError, ValueError, LookupError, TypeError, RuntimeError) as error:
            raise CheckpointError(f"{rng_file}: expected random states, got {error!r}") from None
    return record["step"]


def check_trained(accelerator, model, checkpoint: Path, record: dict):
    """Raises: CheckpointError if the model does not hold the weights that the trainer had. Collective."""
    if sums := record.get("fingerprint"):
        ours = fingerprint(accelerator, model, is_adapter if record.get("adapters") else lambda name: True)
        if problem := other_base(ours, sums):
            raise CheckpointError(f"{checkpoint}/model: not the weights that were trained: {problem}")


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


def resume(
    accelerator, model, optimizer, out: Path, how: str, steps: float = math.inf, or_longer: str = ""
) -> int:
    """Continue from the run's last checkpoint; where there is none, from the checkpoint `how`, if it is one.

    Lines of metrics.jsonl beyond the checkpoint are of steps that are lost and are cut off.
    Args: steps: of the whole run; or_longer: what but another `out` a run that has them all can be given.
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
    if step >= steps:
        accelerator.print(f"{out} holds a run that is finished at step {step}: choose another out{or_longer}")
    elif step:
        accelerator.print(f"continuing from {found[-1]}")
    metrics = out / "metrics.jsonl"
    if accelerator.is_main_process and metrics.exists():
        try:
            lines = [
                line
                for line in metrics.read_text().splitlines(keepends=True)
                if line.endswith("\n") and step and json.loads(line)["step"] <= step
            ]
        except (ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{metrics}: expected a line of JSON a step, got {error!r}") from None
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
    try:
        before = json.loads(record.read_text()).get("config", {}) if record.exists() else {}
    except (ValueError, AttributeError) as error:
        raise CheckpointError(f"{record}: expected the record of a run, got {error!r}") from None
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
