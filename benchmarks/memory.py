"""What the trainer allocates on a GPU, by torch's own memory tracker, beside what dry_run.py computes.

    python benchmarks/memory.py                          # 3B and 7B, all layers, 16,384 tokens: 6 min, 2 GB
    python benchmarks/memory.py models=7B layers=2,4 tokens=4096

No GPU and no weights: tensors are fake, the process group of 4 is fake, everything else is the trainer's:
accelerate's sharding, the packed row, the log-prob head, two micro-batches forward and backward. Only the
text part is seen: the vision tower's windows depend on values, which fake tensors do not have. Attention is
the one for CPUs, which copies the prompt's keys for every completion. What vLLM, CUDA and NCCL take, and the
gaps between the allocator's blocks, are not seen.
"""

import dataclasses
import sys
import types
import warnings
from pathlib import Path

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parents[1]))
from config import Config, opt
from data import Prompt
from dry_run import GIB, Row, backward_bytes, published_config, sizes
from packing import pack, token_logps, use_logprob_head, use_packed_attention
from train_grpo import GRPOConfig

WORLD = 4


class MemoryConfig(Config):
    models: str = opt("3B,7B", "of Qwen2.5-VL, or names such as Qwen3-VL-4B")
    layers: str = opt("", "decoder layers, several with commas; empty: all")
    tokens: int = opt(16384, "of a packed row, four prompts with eight completions each", ge=4096)
    logit_chunk: int = opt(256, "tokens whose logits exist at the same time", ge=1)


def text_config(model: str, layers: int | None = None):
    """The published config with so many layers, and one vision block to be left out."""
    config = published_config(f"Qwen2.5-VL-{model}" if model in ("3B", "7B") else model)
    config.vision_config.depth = 1
    if layers:
        config.text_config.num_hidden_layers = layers
        if hasattr(config.text_config, "layer_types"):
            config.text_config.layer_types = config.text_config.layer_types[:layers]
    return config


def shard(model, mesh):
    """The model as accelerate shards it under distributed.make_accelerator, bf16 compute, fp32 gradients."""
    from accelerate import FullyShardedDataParallelPlugin
    from accelerate.utils.fsdp_utils import fsdp2_prepare_model
    from torch.distributed.fsdp import MixedPrecisionPolicy

    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        mixed_precision_policy=MixedPrecisionPolicy(torch.bfloat16, torch.float32),
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=[type(model.model.language_model.layers[0]).__name__],
        cpu_ram_efficient_loading=False,
    )
    accelerator = types.SimpleNamespace(
        state=types.SimpleNamespace(fsdp_plugin=plugin),
        parallelism_config=types.SimpleNamespace(fsdp_dim_names=["shard"]),
        mixed_precision="no",
        is_main_process=True,
        device=torch.device("cpu"),
        torch_device_mesh=mesh,
    )
    return fsdp2_prepare_model(accelerator, model)


def trace(config, tokens: int, chunk: int, prompts: int = 4, completions: int = 8):
    """Peak of two micro-batches by part, in bytes, and the Row; of process 0 of 4."""
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.distributed._tools.fsdp2_mem_tracker import FSDPMemTracker
    from torch.testing._internal.distributed.fake_pg import FakeStore
    from transformers import AutoModelForImageTextToText

    if not dist.is_initialized():
        dist.init_process_group("fake", rank=0, world_size=WORLD, store=FakeStore())
    mesh = dist.device_mesh.init_device_mesh("cpu", (WORLD,), mesh_dim_names=("shard",))
    length = tokens // prompts // 5  # of a prompt: a fifth of the row
    completion = [1] * ((tokens // prompts - length) // completions)
    texts = [(Prompt(None, [], [], [1] * length, None, None), [completion] * completions)] * prompts
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with mode:
        model = AutoModelForImageTextToText.from_config(config, dtype=torch.float32)
        use_packed_attention(model)
        use_logprob_head(model, [5], 1.0, chunk)
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.model.visual = torch.nn.Identity()
    packed = pack(texts, model)  # of real tensors: positions are computed from values
    packed = {name: value for name, value in packed.items() if name not in ("pixel_values", "image_grid_thw")}
    with mode, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # FSDP's of a view that nobody writes to
        model = shard(model.train(), mesh)
        row = {k: mode.from_tensor(v) if torch.is_tensor(v) else v for k, v in packed.items()}
        with FSDPMemTracker(model) as tracker:
            for _ in range(2):  # in the second the gradients of the first are there
                token_logps(model, row)[0].sum().backward()
                tracker.reset_mod_stats()
        (peak,) = tracker.get_tracker_snapshot("peak").values()
    named = {getattr(part, "value", part): size for part, size in peak.items() if size}
    return named, Row(packed["input_ids"].shape[1], len(packed["target_ids"]), 0)


def computed(config, row: Row, chunk: int) -> dict[str, float]:
    """The same by dry_run.py."""
    m = sizes(config)
    m = dataclasses.replace(m, parameters=m.parameters - m.vision, vision=0)
    cfg = GRPOConfig(logit_chunk=chunk)
    shards = {"weights": 4 * m.parameters / WORLD, "gradients": 4 * m.parameters / WORLD}
    return shards | backward_bytes(cfg, m, row, chunk, WORLD)


def main():
    cfg = MemoryConfig.parse_args()
    for model in cfg.models.split(","):
        for layers in cfg.layers.split(","):
            depth = int(layers) if layers else None
            seen, row = trace(text_config(model, depth), cfg.tokens, cfg.logit_chunk)  # leaves its mark on it
            config = text_config(model, depth)
            parts = computed(config, row, cfg.logit_chunk)
            total = seen.pop("Total")
            depth = config.text_config.num_hidden_layers
            print(f"{model}, {depth} layers, {row.tokens} tokens, GiB, process 0 of {WORLD}")
            for name, found in {"tracker": seen, "dry_run": parts}.items():
                text = ", ".join(f"{part} {size / GIB:.2f}" for part, size in found.items())
                print(f"  {name}: {sum(found.values()) / GIB:6.2f} = {text}")
            print(f"  dry_run / tracker: {sum(parts.values()) / total:.3f}", flush=True)


if __name__ == "__main__":
    main()
