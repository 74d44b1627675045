"""Turn a training checkpoint into a folder that `from_pretrained` and vLLM load, and prove nothing was lost.

    python merge.py runs/7b                        # its last checkpoint -> runs/7b/checkpoint-75-merged
    python merge.py runs/7b/checkpoint-50 my-model --dtype float32 --max_shard_size 2GB
    python merge.py runs/3b_lora --base models/Qwen2.5-VL-3B-Instruct    # adapters, whose base has moved

The folder holds the weights under the names of the published model, config, generation config, processor,
chat template and a model card. It is written under a temporary name, loaded back, and renamed once
its weights are the checkpoint's, bit for bit after the cast, and its logits on a fixed prompt are the same.
Of a checkpoint of adapters (`lora_rank`) the weights are those of the model that the run started from, which
has to be there and unchanged, plus scale * B @ A in float32.
Takes 10 s for a tiny model, memory for one copy of what is exported and a GiB.
"""

import argparse
import math
import shutil
import signal
import sys
import zlib
from pathlib import Path

import torch

from checkpoint import Planner, Reader, check_files, checkpoints, other_base, read_record, row_sums, same_sums
from config import path_argument, write_whole
from packing import check_family

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
SHARDS = "model"  # folder of torch.distributed.checkpoint files in a checkpoint
AT_ONCE = 2**30  # bytes read before they are cast: the peak above one copy of the exported model


# ---- read ----
def find_checkpoint(path: Path) -> Path:
    """The checkpoint itself, or the last one of a run's folder."""
    if (path / SHARDS).is_dir():
        return path
    if not (found := checkpoints(path)):
        here = sorted(p.name for p in path.iterdir()) if path.is_dir() else "no such folder"
        raise ValueError(f"{path}: expected {SHARDS}/ or checkpoint-N folders, got {here}")
    return found[-1]


def check_shards(folder: Path, shapes: dict[str, torch.Size], aliases: dict[str, str]):
    """The reader of a checkpoint whose files are whole and hold exactly the model's tensors.

    Args: shapes by parameter name; aliases: tied name -> the name that keeps the tensor; it may be absent.
    Raises: ValueError naming the file, the key, expected and got.
    """
    reader = Reader(folder)
    metadata = reader.read_metadata()
    found = metadata.state_dict_metadata
    if any(key.startswith("base_model.") for key in found):
        raise ValueError(
            f"{folder}: adapters in the form of an older version, which cannot be merged; that run's end is "
            f"{folder.parents[1] / 'final'}"
        )
    if missing := sorted(shapes.keys() - aliases.keys() - found.keys()):
        raise ValueError(f"{folder}: {len(missing)} missing keys, among them {missing[:3]}")
    if unexpected := sorted(found.keys() - shapes.keys()):
        raise ValueError(f"{folder}: {len(unexpected)} unexpected keys, among them {unexpected[:3]}")
    for key, tensor in found.items():
        if tensor.size != shapes[key]:
            raise ValueError(
                f"{folder}: {key}: expected shape {tuple(shapes[key])}, got {tuple(tensor.size)}"
            )
        n, held = tensor.size.numel(), sum(math.prod(chunk.sizes) for chunk in tensor.chunks)
        if n != held:
            raise ValueError(f"{folder}: {key}: expected {n} elements, got shards of {held}")
    for index, info in metadata.storage_data.items():
        file, end = folder / info.relative_path, info.offset + info.length
        if not file.exists():
            raise ValueError(f"{file}: missing; it holds {index.fqn} {tuple(found[index.fqn].size)}")
        if file.stat().st_size < end:
            raise ValueError(f"{file}: truncated: {index.fqn} ends at byte {end}, got {file.stat().st_size}")
    return reader, found


def read_weights(folder: Path, shapes, aliases, dtype: torch.dtype, fingerprint: dict | None) -> dict:
    """The checkpoint's tensors in `dtype`, tied ones once, read about a GiB at a time.

    Args: fingerprint: what the trainer wrote of its weights, {name: three sums}, or None.
    Raises: ValueError naming file, key, expected and got.
    """
    import torch.distributed.checkpoint as dcp

    try:
        reader, found = check_shards(folder, shapes, aliases)
    except (AttributeError, KeyError, TypeError) as error:  # torch's classes with somebody's contents
        raise ValueError(f"{folder}/.metadata: expected the index of a checkpoint, got {error!r}") from None
    state, batch, size = {}, {}, 0
    for k, (key, tensor) in enumerate(found.items()):
        batch[key] = torch.empty(tensor.size, dtype=tensor.properties.dtype)
        size += batch[key].nbytes
        if size < AT_ONCE and k + 1 < len(found):
            continue
        try:
            dcp.load(batch, storage_reader=reader, planner=Planner(), no_dist=True)
        except (Exception, dcp.api.CheckpointException) as error:  # what a damaged file makes of torch
            why = (str(error).strip() or repr(error)).splitlines()[-1]
            raise ValueError(f"{folder}: damaged, in one of {[*batch][:3]} ...: {why}") from None
        for name, values in batch.items():
            kept = aliases.get(name, name)
            if fingerprint is not None and name in fingerprint:
                check_fingerprint(folder, name, row_sums(values).tolist(), fingerprint[name])
            values = values.to(dtype)
            if kept in state and not torch.equal(values, state[kept]):
                raise ValueError(f"{folder}: {name} and {kept} are tied in config.json but differ here")
            state[kept] = values
        batch, size = {}, 0
    if missing := sorted(shapes.keys() - aliases.keys() - state.keys()):
        raise ValueError(f"{folder}: {len(missing)} missing keys, among them {missing[:3]}")
    return state


def check_fingerprint(folder: Path, name: str, got: list[float], expected: list[float]):
    if not same_sums(got, expected):
        raise ValueError(
            f"{folder}: {name}: not the weights that were trained: expected the sums {expected}, got {got}"
        )


# ---- build ----
def build_model(checkpoint: Path, dtype: torch.dtype, base: str | None = None):
    """The trainer's model in `dtype`, on the CPU, with the checkpoint's weights, adapters merged.

    Args: base: folder or Hub id of the frozen weights, where the checkpoint holds adapters and its own record
        of it no longer leads there.
    """
    from transformers import AutoConfig, GenerationConfig

    config, record = AutoConfig.from_pretrained(checkpoint / "hf"), read_record(checkpoint)
    if record.get("adapters"):
        model = build_adapted(checkpoint, config, record, dtype, base)
    elif base:
        raise ValueError(f"{checkpoint}: holds all parameters and needs no --base, got {base}")
    else:
        model = build_whole(checkpoint, config, record, dtype)
    model.generation_config = GenerationConfig.from_pretrained(checkpoint / "hf")
    return model.eval()


def build_whole(checkpoint: Path, config, record: dict, dtype: torch.dtype):
    """The model of a checkpoint that holds all parameters."""
    from accelerate import init_empty_weights
    from transformers import AutoModelForImageTextToText

    with init_empty_weights(include_buffers=False):  # real buffers: checkpoints lack the rotary frequencies
        model = AutoModelForImageTextToText.from_config(config, dtype=dtype)
    shapes = {key: tensor.shape for key, tensor in model.state_dict().items()}
    aliases = dict(model.all_tied_weights_keys)
    state = read_weights(checkpoint / SHARDS, shapes, aliases, dtype, record.get("fingerprint"))
    model.load_state_dict(state, strict=False, assign=True)  # strict already; tied names follow
    model.tie_weights()
    return model


def build_adapted(checkpoint: Path, config, record: dict, dtype: torch.dtype, base: str | None):
    """The model of a checkpoint that holds adapters: its base, checked, and scale * B @ A on top.

    Raises: ValueError saying which model is needed, if there is none or another one.
    """
    from transformers import AutoModelForImageTextToText

    held = record["adapters"]
    source, holds = base or held["base"], f"{checkpoint}: holds adapters for {held['base']}"
    load = AutoModelForImageTextToText.from_pretrained
    try:  # in the dtype that it was trained in, which may round the published one
        model = load(source, config=config, dtype=DTYPES[held["base_dtype"]])
    except (OSError, ValueError, RuntimeError) as error:
        why = (str(error).strip() or repr(error)).splitlines()[0]
        raise ValueError(f"{holds}; {source} is not to be had ({why}): name its folder by --base") from None
    sums = {name: row_sums(p).tolist() for name, p in model.named_parameters()}
    if problem := other_base(sums, held["base_fingerprint"]):
        raise ValueError(f"{holds}; {source} has other weights ({problem}): name the right one by --base")
    weights, shapes, rank = {}, {}, held["rank"]
    for name in record["fingerprint"]:  # LAYER.lora_A.default.weight, LAYER.lora_B.default.weight
        layer = name.partition(".lora_")[0]
        weights[layer] = model.get_submodule(layer).weight
        n_out, n_in = weights[layer].shape
        shapes[name] = torch.Size((rank, n_in) if ".lora_A." in name else (n_out, rank))
    adapters = read_weights(checkpoint / SHARDS, shapes, {}, torch.float32, record["fingerprint"])
    for layer, weight in weights.items():
        a, b = (adapters[f"{layer}.lora_{x}.default.weight"] for x in "AB")
        weight.data = (weight.data.float() + held["alpha"] / rank * (b @ a)).to(dtype)
    for p in model.parameters():  # model.to() would round the rotary frequencies as well
        p.data = p.data.to(dtype)
    return model


# ---- write ----
def model_card(checkpoint: Path, dtype: str, kind: str) -> str:
    """README.md of the exported folder: what it is, where it comes from, its held-out scores, its config."""
    trainer = read_record(checkpoint)
    settings = checkpoint.parent / "config.yaml"
    scores = {k: v for k, v in trainer["scores"].items() if isinstance(v, (int, float))}
    lines = ["---", "library_name: transformers", "pipeline_tag: image-text-to-text", "---"]
    lines += [
        f"# {checkpoint.name}",
        "",
        f"{kind} weights in {dtype}, exported after step {trainer['step']}.",
    ]
    if scores:
        lines += ["", "| held-out metric | value |", "|---|---|"]
        lines += [f"| {name} | {value:.4g} |" for name, value in scores.items()]
    if settings.exists():
        lines += ["", "Training config:", "", "```yaml", settings.read_text().rstrip(), "```"]
    return "\n".join(lines) + "\n"


def merge(
    checkpoint, out=None, dtype: str = "bfloat16", max_shard_size: str = "5GB", base: str | None = None
) -> Path:
    """Export a checkpoint (or a run's last one) and verify the copy.

    Args: out: folder to make, by default CHECKPOINT-merged beside the checkpoint (not inside: the trainer
        deletes old checkpoints); dtype: bfloat16, float16 or float32; base: of `build_model`.
    Returns: the folder. One that an earlier merge wrote is verified and stays.
    Raises: ValueError if `out` holds anything else or the checkpoint is not whole.
    """
    checkpoint = find_checkpoint(Path(checkpoint))
    out = Path(out) if out else checkpoint.with_name(checkpoint.name + "-merged")
    if dtype not in DTYPES:
        raise ValueError(f"dtype: expected one of {list(DTYPES)}, got {dtype!r}")
    card = out / "README.md"
    foreign = f"{out}: expected a new or empty folder, got one with content; name another"
    filled = out.exists() and (not out.is_dir() or any(out.iterdir()))
    if filled and not card.is_file():
        raise ValueError(foreign)
    check_files(checkpoint, unread=r"optimizer/|rng-")
    if not (checkpoint / "hf" / "config.json").exists():
        raise ValueError(f"{checkpoint}: expected hf/config.json, which the trainer writes; got none")

    if filled:  # perhaps of a merge that was killed behind its rename
        model = build_model(checkpoint, DTYPES[dtype], base)
        if card.read_bytes() != model_card(checkpoint, dtype, check_family("", model.config).name).encode():
            raise ValueError(foreign)
        verify(digest(model, out), out, DTYPES[dtype])
        print(f"{out} was written before: verified")
        return out
    with write_whole(out) as tmp:
        model = build_model(checkpoint, DTYPES[dtype], base)
        kind = check_family(str(checkpoint), model.config).name
        tmp.mkdir(parents=True)
        model.save_pretrained(tmp, max_shard_size=max_shard_size)
        for file in (checkpoint / "hf").iterdir():  # as they are: generation config, processor, chat template
            if file.name != "config.json":
                shutil.copy2(file, tmp)
        (tmp / "README.md").write_text(model_card(checkpoint, dtype, kind))
        expected = digest(model, tmp)
        del model  # one copy in memory at a time
        difference = verify(expected, tmp, DTYPES[dtype])
    print(f"verified: max |logit difference| = {difference:g}")
    print(f"wrote {out}")
    return out


def push(folder: Path, name: str):
    """Upload the folder to the Hub as NAME (owner/model), which is made, private, if need be.

    Raises: ValueError if the Hub refuses or does not answer; the folder stays.
    """
    from huggingface_hub import HfApi

    try:
        HfApi().create_repo(name, private=True, exist_ok=True)
        HfApi().upload_folder(repo_id=name, folder_path=folder)
    except Exception as error:  # the client's, its HTTP library's, the disk's: the folder stays in any case
        why = (str(error).strip() or repr(error)).splitlines()[0]
        raise ValueError(f"{folder} is whole, but was not pushed to {name}: {why}") from None
    print(f"pushed to https://huggingface.co/{name}")


# ---- verify ----
def digest(model, folder: Path) -> tuple[dict[str, int], torch.Tensor]:
    """What two equal models have in common: {key: crc32 of the bytes}, logits on a fixed prompt."""
    sums = {
        key: zlib.crc32(tensor.contiguous().flatten().view(torch.uint8).numpy())
        for key, tensor in model.state_dict().items()
    }
    return sums, logits(model, folder)


def verify(expected: tuple[dict[str, int], torch.Tensor], folder: Path, dtype: torch.dtype) -> float:
    """Load `folder` strictly and compare its digest; returns the largest logit difference.

    Raises: ValueError if a key is missing or a weight or logit differs.
    """
    from transformers import AutoModelForImageTextToText

    load = AutoModelForImageTextToText.from_pretrained
    copy, info = load(folder, dtype=dtype, output_loading_info=True)
    if problems := {kind: keys for kind, keys in info.items() if keys}:
        raise ValueError(f"{folder}: expected every key once, got {problems}")
    (ours, our_logits), (theirs, their_logits) = expected, digest(copy.eval(), folder)
    if different := [key for key in ours if ours[key] != theirs.get(key)]:
        raise ValueError(f"{folder}: {len(different)} weights are not the checkpoint's, e.g. {different[:3]}")
    difference = (our_logits - their_logits).abs().max().item()
    if difference > 0:
        raise ValueError(f"{folder}: equal weights give logits that differ by {difference:g}")
    return difference


@torch.inference_mode()
def logits(model, folder: Path) -> torch.Tensor:
    """Logits on a fixed prompt with one synthetic image: (1, L, V) float32."""
    import numpy as np
    from PIL import Image
    from transformers import AutoProcessor

    processor = AutoProcessor.from_pretrained(folder)
    ramp = np.linspace(0, 255, 112, dtype=np.uint8)
    image = Image.fromarray(np.stack([*np.meshgrid(ramp, ramp), np.full((112, 112), 90, np.uint8)], axis=-1))
    content = [{"type": "image"}, {"type": "text", "text": "Where is the cup relative to the plate?"}]
    chat = [{"role": "user", "content": content}]
    text = processor.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    inputs = processor(text=[text], images=[image], return_tensors="pt")
    inputs["mm_token_type_ids"] = (inputs["input_ids"] == model.config.image_token_id).int()
    inputs["pixel_values"] = inputs["pixel_values"].to(model.dtype)
    return model(**inputs).logits.float()


def main(argv=None):
    from transformers.utils.logging import disable_progress_bar

    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument(
        "checkpoint",
        type=path_argument,
        help="checkpoint folder, or a run's folder: then its last checkpoint",
    )
    parser.add_argument(
        "out", type=path_argument, nargs="?", help="folder to write (default: CHECKPOINT-merged)"
    )
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    parser.add_argument("--max_shard_size", default="5GB", help="largest weight file")
    parser.add_argument(
        "--base", type=path_argument, help="the model under the adapters, if it is not where the run found it"
    )
    parser.add_argument("--push_to_hub", metavar="NAME", help="upload the folder as owner/model (private)")
    args = parser.parse_args(argv)
    if not sys.stderr.isatty():
        disable_progress_bar()
    try:
        out = merge(args.checkpoint, args.out, args.dtype, args.max_shard_size, args.base)
        if args.push_to_hub:
            push(out, args.push_to_hub)
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from None


if __name__ == "__main__":
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # ends in order: nothing temporary stays
        signal.signal(number, lambda number, frame: sys.exit(128 + number))
    main()
