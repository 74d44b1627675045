"""Turn a training checkpoint into a folder that `from_pretrained` and vLLM load, and prove nothing was lost.

    python merge.py runs/7b                        # its last checkpoint -> runs/7b/checkpoint-75-merged
    python merge.py runs/7b/checkpoint-50 my-model --dtype float32 --max_shard_size 2GB

The folder holds the weights under the names of the published Qwen2.5-VL, config, generation config,
processor, chat template and a model card. It is written under a temporary name, loaded back, and renamed once
its weights are the checkpoint's, bit for bit after the cast, and its logits on a fixed prompt are the same.
Takes 10 s for a tiny model; memory for the checkpoint and two copies of what is exported.
"""

import argparse
import json
import os
import re
import shutil
import sys
from pathlib import Path

import torch

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
WEIGHTS = "model.safetensors"  # of accelerate's save_state, single process
SHARDS = "pytorch_model_fsdp_0"  # of accelerate's save_state under FSDP: torch.distributed.checkpoint files


# ---- read ----
def find_checkpoint(path: Path) -> Path:
    """The checkpoint itself, or the last one of a run's folder."""
    if (path / WEIGHTS).exists() or (path / SHARDS).is_dir():
        return path
    found = [p for p in path.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", p.name)]
    if not found:
        here = sorted(p.name for p in path.iterdir()) if path.is_dir() else "no such folder"
        raise ValueError(f"{path}: expected {WEIGHTS}, {SHARDS}/ or checkpoint-N folders, got {here}")
    return max(found, key=lambda p: int(p.name.split("-")[1]))


def read_weights(checkpoint: Path, shapes: dict[str, torch.Size], aliases: dict[str, str]) -> dict:
    """The checkpoint's tensors, exactly those that the model has; tied ones once.

    Args: shapes by parameter name; aliases: tied name -> the name that keeps the tensor.
    Raises: ValueError naming the file, the key, expected and got.
    """
    sharded = (checkpoint / SHARDS).is_dir()
    file = checkpoint / (SHARDS if sharded else WEIGHTS)
    state = read_sharded(file) if sharded else read_safetensors(file)
    for tied, kept in aliases.items():
        twin = state.pop(tied, None)
        if kept not in state and twin is not None:
            state[kept] = twin
        elif twin is not None and not torch.equal(twin, state[kept]):
            raise ValueError(f"{file}: {tied} and {kept} are tied in config.json but differ here")
    expected = shapes.keys() - aliases.keys()
    if missing := sorted(expected - state.keys()):
        raise ValueError(f"{file}: {len(missing)} missing keys, among them {missing[:3]}")
    if unexpected := sorted(state.keys() - expected):
        raise ValueError(f"{file}: {len(unexpected)} unexpected keys, among them {unexpected[:3]}")
    for key, tensor in state.items():
        if tensor.shape != shapes[key]:
            raise ValueError(f"{file}: {key}: expected shape {tuple(shapes[key])}, got {tuple(tensor.shape)}")
    return state


def read_safetensors(file: Path) -> dict[str, torch.Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(file)
    except SafetensorError as error:
        raise ValueError(f"{file}: expected a whole safetensors file, got {error}") from None


def read_sharded(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of an FSDP checkpoint, put together without a process group."""
    import torch.distributed.checkpoint as dcp

    reader = dcp.FileSystemReader(folder)
    metadata = reader.read_metadata().state_dict_metadata
    state = {key: torch.empty(m.size, dtype=m.properties.dtype) for key, m in metadata.items()}
    dcp.load(state, storage_reader=reader, no_dist=True)
    # accelerate saves {"model": state_dict}
    return {key.removeprefix("model."): tensor for key, tensor in state.items()}


# ---- build ----
def build_model(checkpoint: Path, dtype: torch.dtype):
    """The trainer's model in `dtype`, on the CPU, with the checkpoint's weights."""
    from accelerate import init_empty_weights
    from transformers import AutoConfig, AutoModelForImageTextToText, GenerationConfig

    config = AutoConfig.from_pretrained(checkpoint / "hf")
    with init_empty_weights(include_buffers=False):  # real buffers: checkpoints lack the rotary frequencies
        model = AutoModelForImageTextToText.from_config(config, dtype=dtype)
    shapes = {key: tensor.shape for key, tensor in model.state_dict().items()}
    aliases = dict(model.all_tied_weights_keys)
    state = {key: tensor.to(dtype) for key, tensor in read_weights(checkpoint, shapes, aliases).items()}
    model.load_state_dict(state, strict=False, assign=True)  # strict already; tied names follow
    model.tie_weights()
    model.generation_config = GenerationConfig.from_pretrained(checkpoint / "hf")
    return model.eval()


# ---- write ----
def model_card(checkpoint: Path, dtype: str) -> str:
    """README.md of the exported folder: where it comes from, its held-out scores, its config."""
    record = checkpoint / "trainer.json"
    trainer = json.loads(record.read_text()) if record.exists() else {}
    settings = checkpoint.parent / "config.yaml"
    step = f" after step {trainer['step']}" if "step" in trainer else ""
    scores = {k: v for k, v in trainer.get("scores", {}).items() if isinstance(v, (int, float))}
    lines = ["---", "library_name: transformers", "pipeline_tag: image-text-to-text", "---"]
    lines += [f"# {checkpoint.name}", "", f"Qwen2.5-VL weights in {dtype}, exported{step}."]
    if scores:
        lines += ["", "| held-out metric | value |", "|---|---|"]
        lines += [f"| {name} | {value:.4g} |" for name, value in scores.items()]
    if settings.exists():
        lines += ["", "Training config:", "", "```yaml", settings.read_text().rstrip(), "```"]
    return "\n".join(lines) + "\n"


def merge(checkpoint, out=None, dtype: str = "bfloat16", max_shard_size: str = "5GB") -> Path:
    """Export a checkpoint (or a run's last one) and verify the copy.

    Args: out: folder to make, by default CHECKPOINT-merged beside the checkpoint (not inside: the trainer
        deletes old checkpoints); dtype: bfloat16, float16 or float32. Returns: the folder.
    Raises: ValueError if `out` is not empty or the checkpoint is not whole.
    """
    checkpoint = find_checkpoint(Path(checkpoint))
    out = Path(out) if out else checkpoint.with_name(checkpoint.name + "-merged")
    if dtype not in DTYPES:
        raise ValueError(f"dtype: expected one of {list(DTYPES)}, got {dtype!r}")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out}: expected a new or empty folder, got one with content; name another")
    if not (checkpoint / "hf" / "config.json").exists():
        raise ValueError(f"{checkpoint}: expected hf/config.json, which the trainer writes; got none")

    model = build_model(checkpoint, DTYPES[dtype])
    tmp = out.with_name(f".{out.name}.{os.getpid()}")
    tmp.mkdir(parents=True)
    try:
        model.save_pretrained(tmp, max_shard_size=max_shard_size)
        for file in (checkpoint / "hf").iterdir():  # as they are: generation config, processor, chat template
            if file.name != "config.json":
                shutil.copy2(file, tmp)
        (tmp / "README.md").write_text(model_card(checkpoint, dtype))
        difference = verify(model, tmp)
        os.replace(tmp, out)
    finally:
        shutil.rmtree(tmp, ignore_errors=True)
    print(f"verified: max |logit difference| = {difference:g}")
    print(f"wrote {out}")
    return out


# ---- verify ----
def verify(model, folder: Path) -> float:
    """Load `folder` and compare it with the trainer's model; returns the largest logit difference.

    Raises: ValueError if a key is missing or a weight or logit differs.
    """
    from transformers import AutoModelForImageTextToText

    load = AutoModelForImageTextToText.from_pretrained
    copy, info = load(folder, dtype=model.dtype, output_loading_info=True)
    if problems := {kind: keys for kind, keys in info.items() if keys}:
        raise ValueError(f"{folder}: expected every key once, got {problems}")
    ours, theirs = model.state_dict(), copy.state_dict()
    if different := [key for key in ours if not torch.equal(ours[key], theirs[key])]:
        raise ValueError(f"{folder}: {len(different)} weights are not the checkpoint's, e.g. {different[:3]}")
    difference = (logits(model, folder) - logits(copy.eval(), folder)).abs().max().item()
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
    parser.add_argument("checkpoint", help="checkpoint folder, or a run's folder: then its last checkpoint")
    parser.add_argument("out", nargs="?", help="folder to write (default: CHECKPOINT-merged)")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    parser.add_argument("--max_shard_size", default="5GB", help="largest weight file")
    args = parser.parse_args(argv)
    if not sys.stderr.isatty():
        disable_progress_bar()
    try:
        merge(args.checkpoint, args.out, args.dtype, args.max_shard_size)
    except ValueError as error:
        raise SystemExit(f"error: {error}") from None


if __name__ == "__main__":
    main()
