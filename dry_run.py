"""What a GRPO config amounts to, without running it: arithmetic, memory, time, and what is missing here.

    python train_grpo.py configs/7b.yaml dry_run=true                    # for the GPUs of this machine
    python train_grpo.py configs/7b.yaml dry_run=true gpus=4x80GB        # for cards that are elsewhere

Reads rows, configs and headers, no weights: seconds for a data set on disk. Every figure is computed. What
the trainer allocates is held against torch's memory tracker, at full widths by tests/test_dry_run.py, at full
depth by benchmarks/memory.py. What CUDA, NCCL and vLLM take beyond its share is an assumption, named below.
"""

import importlib.util
import itertools
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch

from checkpoint import SUMMED_AT_ONCE
from config import to_yaml
from data import load_samples, report_rows
from metrics import lacking_tracker
from packing import check_family
from scoring import load_reward

GIB = 2**30
# ---- assumptions ----
USABLE = 0.95  # of a card's memory: gaps between the allocator's blocks take the rest
VISIBLE = 0.99  # of a card's nominal memory in GiB: one of 80 GB shows 79.2
CONTEXT = 2 * GIB  # CUDA context, kernels, NCCL's and cuBLAS's buffers, what vLLM keeps while it sleeps
PROCESS = 4 * GIB  # host memory of a process that has loaded torch, CUDA and vLLM, without weights and images
TEXT_TOKENS = 400  # of a prompt, beside its image's
COMPLETION_TOKENS = 450  # of an average completion
IMAGE_PIXELS = 640 * 480  # of an average image, before it is scaled; the largest is taken to have max_pixels
UTILISATION = 0.4  # of the card's peak, in matrix products
OVERHEAD_S = 30  # a step: what of images, rewards, weight sync and packing the GPU waits for
DISK_RATE = 1e9  # bytes a second
CARDS = {  # name in torch.cuda.get_device_name: memory GB, dense bf16 FLOP/s, bytes/s (vendors' data sheets)
    "H200": (141, 989e12, 4.8e12),
    "H100": (80, 989e12, 3.35e12),
    "A100": (80, 312e12, 2.0e12),
    "L40S": (48, 362e12, 0.86e12),
    "RTX 4090": (24, 165e12, 1.0e12),
    "A10": (24, 125e12, 0.6e12),
}
# Published config.json, for where the Hub is out of reach: type; of the text widths, layers, heads,
# vocabulary, tied; of the vision tower what tells it from the type's default.
QWEN25_TOWER = dict(hidden_size=1280, intermediate_size=3420, depth=32, num_heads=16)
SMALL_TOWER = dict(depth=24, hidden_size=1024, intermediate_size=4096, deepstack_visual_indexes=[5, 11, 17])
QWEN = {
    "Qwen2-VL-2B": ("qwen2_vl", 1536, 8960, 28, 12, 2, 151936, True, {}),
    "Qwen2-VL-7B": ("qwen2_vl", 3584, 18944, 28, 28, 4, 152064, False, {}),
    "Qwen2.5-VL-3B": ("qwen2_5_vl", 2048, 11008, 36, 16, 2, 151936, True, QWEN25_TOWER),
    "Qwen2.5-VL-7B": ("qwen2_5_vl", 3584, 18944, 28, 28, 4, 152064, False, QWEN25_TOWER),
    "Qwen3-VL-2B": ("qwen3_vl", 2048, 6144, 28, 16, 8, 151936, True, SMALL_TOWER),
    "Qwen3-VL-4B": ("qwen3_vl", 2560, 9728, 36, 32, 8, 151936, True, SMALL_TOWER),
    "Qwen3-VL-8B": ("qwen3_vl", 4096, 12288, 36, 32, 8, 151936, False, {}),
}


# ---- the model ---------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Sizes:
    """Parameter counts of what FSDP gathers at a time, and widths that activations grow with."""

    parameters: int
    layer: int  # of one decoder layer
    embedding: int
    tail: int  # final norm and head; with tied weights that is the embedding, too
    vision: int  # the tower
    per_rank: int  # of adapters of rank 1 on the language model's linear layers
    vision_per_rank: int  # on the tower's
    tied: bool
    layers: int
    hidden: int
    query: int  # width of the queries
    kv: int  # of the keys, and of the values
    normed: int  # of the queries and keys that have a norm of their own
    intermediate: int
    vocabulary: int
    vision_layers: int
    vision_hidden: int
    vision_intermediate: int
    patch: int  # values of one
    cell: int  # pixels of the patches that are merged into one image token


def published_config(name: str):
    """The config of a Qwen-VL as its authors published it; None if the name is none of theirs."""
    from transformers import AutoConfig

    known = next((numbers for known, numbers in QWEN.items() if known in name), None)
    if known is None:
        return None
    kind, hidden, intermediate, layers, heads, kv_heads, vocabulary, tied, vision = known
    text = dict(hidden_size=hidden, intermediate_size=intermediate, num_hidden_layers=layers)
    text |= dict(num_attention_heads=heads, num_key_value_heads=kv_heads, vocab_size=vocabulary)
    text |= {"rope_parameters": {"rope_type": "default", "mrope_section": [16, 24, 24], "rope_theta": 1e6}}
    out = "hidden_size" if kind == "qwen2_vl" else "out_hidden_size"
    tower = vision | {out: hidden}
    return AutoConfig.for_model(kind, text_config=text, vision_config=tower, tie_word_embeddings=tied)


def sizes(config) -> Sizes:
    """Count the parameters of a model from its config alone, on the meta device."""
    from transformers import AutoModelForImageTextToText

    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config)

    def count(module):
        return sum(p.numel() for p in module.parameters())

    def linear(module):
        return sum(m.in_features + m.out_features for m in module.modules() if isinstance(m, torch.nn.Linear))

    text, vision = config.text_config, config.vision_config
    language, tower = model.model.language_model, model.model.visual
    attention, block = language.layers[0].self_attn, tower.blocks[0]
    query, kv = attention.q_proj.out_features, attention.k_proj.out_features
    # Names of the tower's widths differ between families, its layers say them alike.
    mlp = [m.out_features for m in block.mlp.modules() if isinstance(m, torch.nn.Linear)]
    return Sizes(
        parameters=count(model),
        layer=count(language.layers[0]),
        embedding=count(language.embed_tokens),
        tail=count(language.norm) + count(model.lm_head),
        vision=count(tower),
        per_rank=linear(language),
        vision_per_rank=linear(tower),
        tied=model.lm_head.weight is language.embed_tokens.weight,
        layers=text.num_hidden_layers,
        hidden=text.hidden_size,
        query=query,
        kv=kv,
        normed=(query + kv) * hasattr(attention, "q_norm"),
        intermediate=text.intermediate_size,
        vocabulary=text.vocab_size,
        vision_layers=vision.depth,
        vision_hidden=block.attn.proj.in_features,
        vision_intermediate=max(mlp),
        patch=vision.in_channels * vision.temporal_patch_size * vision.patch_size**2,
        cell=(vision.patch_size * vision.spatial_merge_size) ** 2,
    )


# ---- the cards ---------------------------------------------------------------------------------------------
def read_gpus(text: str) -> tuple[int, int]:
    """(number of cards, bytes of one) of "4x80GB" or "4xH100". Raises: ValueError."""
    match = re.fullmatch(r"([1-9]\d*)x(?:([1-9]\d*)GB|(.+))", text)
    if not match or not (match[2] or match[3] in CARDS):
        raise ValueError(f"gpus: expected cards x memory, as 4x80GB, or x one of {[*CARDS]}, got {text!r}")
    return int(match[1]), int(int(match[2] or CARDS[match[3]][0]) * VISIBLE * GIB)


@dataclass(frozen=True)
class Cards:
    world: int  # processes, one a card
    per_node: int
    memory: int  # bytes of one
    names: tuple[str, ...]  # of CARDS: the one it is, or those it may be


def find_cards(cfg) -> Cards | None:
    """The cards of `gpus`, or of this machine; None if there are none."""
    if cfg.gpus:
        world, memory = read_gpus(cfg.gpus)
        nominal = round(memory / VISIBLE / GIB)
        return Cards(
            world, min(world, 8), memory, tuple(n for n, card in CARDS.items() if card[0] == nominal)
        )
    if not torch.cuda.is_available():
        return None
    here = torch.cuda.device_count()
    world = int(os.environ.get("WORLD_SIZE", here))
    memory = min(torch.cuda.get_device_properties(i).total_memory for i in range(here))
    names = tuple(n for n in CARDS if n in torch.cuda.get_device_name(0))[:1]
    return Cards(world, min(world, int(os.environ.get("LOCAL_WORLD_SIZE", here))), memory, names)


# ---- memory of a GPU ---------------------------------------------------------------------------------------
# Bytes a value: float32 4, bf16 2. Bytes a token in a decoder layer (transformers' modeling_qwen2_5_vl.py),
# with D the hidden width, Q the queries', K the keys', I the MLP's, N that of normed queries and keys:
#   saved for the backward pass:  16 D of two norms (float32 input, bf16 quotient and output), 4 Q of queries
#                                 and attention's output, 4 K of keys and values, 8 N, 8 I of the MLP
#   most on top of it:            in the MLP's backward three gradients of width I and two of width D, when
#                                 the MLP's last product is gone: 6 I - 2 I + 4 D
#   forward without gradients:    gate, up and product 6 I, input, norm and residual 6 D
# A block of the vision tower is at most the same with K = D, the queries' storage shared with keys and
# values; an MLP without a gate takes less.
# FSDP holds the layer in use and the next one in bf16, and sums up gradients in float32: the whole layer's
# and its own share. The tail (norm, head) stays gathered after a forward pass until its backward pass.


@dataclass(frozen=True)
class Row:
    """The largest packed row."""

    tokens: int
    completion: int  # of the tokens
    patches: int


def largest_row(cfg, m: Sizes) -> Row:
    """Tokens and patches of one micro-batch: groups with the largest image and average completions."""
    image = cfg.max_pixels // m.cell
    prompt = min(image + TEXT_TOKENS, cfg.max_prompt_length)
    # A sequence is not cut, however long it is.
    tokens = max(cfg.max_tokens_per_micro_batch, prompt + cfg.max_completion_length)
    group = prompt + cfg.group_size * min(COMPLETION_TOKENS, cfg.max_completion_length)
    groups = max(1.0, tokens / group)
    image = min(image, cfg.max_prompt_length)
    return Row(tokens, tokens - int(groups * prompt), int(4 * image * groups))


def logit_rows(cfg, m: Sizes, memory: int) -> int:
    """Tokens whose logits exist at the same time; where it is open, two copies take 1/32 of the memory."""
    if cfg.logit_chunk is not None:
        return cfg.logit_chunk
    return 2 ** int(memory / 32 / (8 * m.vocabulary)).bit_length() // 2


def forward_bytes(m: Sizes, row: Row, chunk: int) -> dict[str, float]:
    """What a forward pass without gradients holds at its largest, beside the weights' shards."""
    activations = row.tokens * 6 * (m.intermediate + m.hidden) + 2 * row.completion * m.hidden
    vision = row.patches * 6 * (m.vision_intermediate + m.vision_hidden)
    return {
        "gathered": 2 * 2 * m.layer + 2 * m.tail,
        "activations": max(activations, vision),
        "head": 8 * chunk * m.vocabulary,
    }


def backward_bytes(cfg, m: Sizes, row: Row, chunk: int, world: int) -> dict[str, float]:
    """What a micro-batch, forward and backward, holds at its largest beside all shards."""
    D, K, I, T = m.hidden, m.kv, m.intermediate, row.tokens  # noqa: E741
    saved, most = 16 * D + 4 * m.query + 4 * K + 8 * m.normed + 8 * I, 4 * I + 4 * D
    inputs = T * m.layers * (2 * D if cfg.gradient_checkpointing else saved)
    inputs += 2 * row.completion * D + 4 * T * D  # of the head, and the last hidden state with its gradient
    vd, vi = m.vision_hidden, m.vision_intermediate
    vision_saved = 30 * vd + 8 * vi
    vision_trained = not cfg.freeze_vision and (cfg.lora_vision or not cfg.lora_rank)
    images = row.patches * 6 * m.patch  # float32 as they come, bf16 as they are used
    if vision_trained:
        images += row.patches * (
            m.vision_layers * (2 * vd if cfg.gradient_checkpointing else vision_saved) + 14 * vd
        )
    again = cfg.gradient_checkpointing  # a layer's activations are computed again, layer by layer
    layer = T * (saved * again + most)
    block = row.patches * (vision_saved * again + 4 * vd + 4 * vi) if vision_trained else 0
    full = cfg.lora_rank == 0
    reduced = 4 * (1 + 1 / world) * full  # of a unit's gradients, float32: whole, and this process's share
    layers, last = 2 * 2 * m.layer, m.layer if m.tied else max(m.layer, m.tail)
    # Tied weights are needed, and gather gradients, from the head down to the embedding.
    held = (2 + 2 * full) * m.tail if m.tied else 0
    moments = [
        {  # the head's backward
            "gathered": 2 * m.tail + 2 * m.layer,
            "activations": inputs + images + 4 * row.completion * D,
            "head": 6 * chunk * m.vocabulary + 6 * m.tail * full,  # logits float32 and bf16; weight
        },
        {  # a layer's
            "gathered": layers + held + reduced * last + 2 * D * I * full,
            "activations": inputs + images + layer,
        },
        {"gathered": held + reduced * m.layer, "activations": images + block},  # the vision tower's
        {"gathered": held + 2 * m.embedding * full + reduced * m.embedding, "activations": images},
    ]
    return max(moments, key=lambda parts: sum(parts.values()))


def vllm_needs(cfg, m: Sizes, memory: int) -> tuple[float, float]:
    """(bytes without KV cache, bytes of KV cache a token) of one process."""
    batched = cfg.vllm_max_batched_tokens or (16384 if memory > 70 * GIB else 8192)  # vLLM's own defaults
    seqs = cfg.vllm_max_seqs or (1024 if memory > 70 * GIB else 256)
    work = batched * 6 * (m.intermediate + m.hidden) + 8 * seqs * m.vocabulary  # activations, float32 logits
    return 2 * m.parameters / cfg.tensor_parallel + work, 4 * m.layers * m.kv / cfg.tensor_parallel


def phases(cfg, m: Sizes, world: int, memory: int) -> dict[str, dict[str, float]]:
    """Bytes on a GPU by phase and part, each phase at its largest.

    Args: world: processes; memory: bytes of one card, of which vLLM takes its share.
    """
    adapters = cfg.lora_rank * (m.per_rank + m.vision_per_rank * cfg.lora_vision)
    trained = adapters or m.parameters - m.vision * cfg.freeze_vision
    weights = (2 * m.parameters + 4 * adapters if adapters else 4 * m.parameters) / world
    reference = bool(cfg.kl_coef and not adapters)
    units = m.layer, m.embedding, m.tail
    row, chunk = largest_row(cfg, m), logit_rows(cfg, m, memory)
    shards = {"weights": weights, "other": CONTEXT}
    if reference:  # its tail is gathered once and stays
        shards["reference"] = 2 * m.parameters / world
    # A unit is whole on the GPU before it is sharded; after the policy's shards come the reference's.
    loading = max((2 if adapters else 4) * max(units), reference * 2 * (m.parameters / world + max(units)))
    adam, gradients = {"Adam": 8 * trained / world}, {"gradients": 4 * trained / world}
    whole = {"sampler": 2 * m.parameters} if cfg.sampler == "hf" else {}
    engine = {"sampler": cfg.vllm_memory * memory} if cfg.sampler == "vllm" else whole
    asleep = engine if cfg.sampler == "hf" or not cfg.sleep_level else {}
    tail = {"gathered": 2 * m.tail * reference}
    started = shards | adam | engine

    def plus(parts: dict, more: dict) -> dict:
        return parts | {name: parts.get(name, 0) + value for name, value in more.items()}

    training = plus(shards | adam | asleep, tail)
    fingerprint = 16 * SUMMED_AT_ONCE  # values and magnitudes in float64
    return {
        "load": {"weights": weights, "gathered": loading, "other": CONTEXT},
        "resume": shards | adam | gradients,
        "engine start": plus(started, {"gathered": 2 * m.embedding * (1 + 1 / world)}),  # and first sync
        "rollout": plus(started, tail),
        "log-probs": plus(training, forward_bytes(m, row, chunk)),
        "update": plus(training | gradients, backward_bytes(cfg, m, row, chunk, world)),
        "optimizer step": training | gradients,
        "save": plus(plus(started, tail), {"other": fingerprint}),
    }


def misfits(cfg, m: Sizes, cards: Cards) -> list[str]:
    """One line for each phase that takes more than the card has, and for an engine that is too small."""
    lines = []
    for name, parts in phases(cfg, m, cards.world, cards.memory).items():
        if (needed := sum(parts.values())) > USABLE * cards.memory:
            lines.append(f"{name} takes {needed / GIB:.1f} GiB of {USABLE * cards.memory / GIB:.1f}")
    fixed, per_token = vllm_needs(cfg, m, cards.memory)
    needed = fixed + per_token * (cfg.max_prompt_length + cfg.max_completion_length)
    if cfg.sampler == "vllm" and cfg.vllm_memory * cards.memory < needed:
        share = needed / cards.memory
        lines.append(
            f"vLLM needs {needed / GIB:.1f} GiB for one sequence: vllm_memory of at least {share:.2f}"
        )
    return lines


# ---- what would make it fit --------------------------------------------------------------------------------
def choices(cfg) -> dict[str, list]:
    """Other values of the keys that decide about memory, the mildest change first."""
    values = {"max_tokens_per_micro_batch": [], "max_pixels": []}
    for key, least in {"max_tokens_per_micro_batch": 4096, "max_pixels": max(cfg.min_pixels, 512**2)}.items():
        start = getattr(cfg, key)
        values[key] = [start >> k for k in range(1, 20) if start >> k >= least]
    if cfg.sampler == "vllm":  # larger shares as well: an engine may be too small for its weights
        shares = [k / 20 for k in range(2, 20) if k / 20 != cfg.vllm_memory]
        values["vllm_memory"] = sorted(shares, key=lambda share: abs(share - cfg.vllm_memory))
        values["sleep_level"] = [1] if cfg.sleep_level == 0 else []
    return {key: values[key] for key in sorted(values, reverse=True) if values[key]}  # vLLM's first


def remedies(cfg, m: Sizes, cards: Cards) -> list[dict]:
    """Overrides under which all phases fit, with as few keys as it takes: of all parameters, then of LoRA.

    Of each set of keys the mildest values that fit.
    """

    def smallest(fixed: dict) -> list[dict]:
        others = choices(cfg)
        for n in range(not fixed, len(others) + 1):
            found = []
            for keys in itertools.combinations(others, n):
                for values in itertools.product(*(others[key] for key in keys)):
                    overrides = fixed | dict(zip(keys, values, strict=True))
                    if not misfits(cfg.model_copy(update=overrides), m, cards):
                        found.append(overrides)
                        break
            if found:
                return found
        return []

    return smallest({}) + (smallest({"lora_rank": 16}) if cfg.lora_rank == 0 else [])


def room(cfg, m: Sizes, cards: Cards) -> dict:
    """The largest vllm_memory and the largest micro-batch, each alone, under which all phases still fit."""
    larger = {"max_tokens_per_micro_batch": [cfg.max_tokens_per_micro_batch << k for k in (3, 2, 1)]}
    if cfg.sampler == "vllm":
        larger["vllm_memory"] = [k / 20 for k in range(19, 0, -1) if k / 20 > cfg.vllm_memory]
    fits = {}
    for key, values in larger.items():
        found = [x for x in values if not misfits(cfg.model_copy(update={key: x}), m, cards)]
        fits |= {key: found[0]} if found else {}
    return fits


# ---- host, disk, time --------------------------------------------------------------------------------------
def host_bytes(cfg, m: Sizes, cards: Cards) -> dict[str, float]:
    """Host memory of a node by part."""
    parts = {
        "processes": PROCESS * cards.per_node,
        "one whole model while loading": (2 if cfg.lora_rank else 4) * m.parameters,  # one after the other
        "images at most": cfg.image_cache_gb * GIB * cards.per_node,
    }
    if cfg.sampler == "vllm" and cfg.sleep_level == 1:
        parts["sleeping engines"] = 2 * m.parameters / cfg.tensor_parallel * cards.per_node
    return parts


def checkpoint_bytes(cfg, m: Sizes) -> float:
    """Weights and two moments of what is trained, float32, and what else of the model is not."""
    if cfg.lora_rank:
        return 12 * cfg.lora_rank * (m.per_rank + m.vision_per_rank * cfg.lora_vision)
    return 12 * m.parameters - 8 * m.vision * cfg.freeze_vision


def step_seconds(cfg, m: Sizes, cards: Cards, peak: float, bandwidth: float) -> dict[str, float]:
    """Seconds of a step by phase, on average images and completions."""
    rate = UTILISATION * peak * cards.world
    image = min(max(IMAGE_PIXELS, cfg.min_pixels), cfg.max_pixels) / m.cell
    prompt, completion = image + TEXT_TOKENS, min(COMPLETION_TOKENS, cfg.max_completion_length)
    prompts, n = cfg.prompts_per_step, cfg.prompts_per_step * cfg.group_size
    tokens = prompts * (prompt + cfg.group_size * completion)
    body, head = m.layers * m.layer, m.vocabulary * m.hidden
    # Two operations a parameter and token; a prompt is run once for its group.
    forward = 2 * (tokens * body + n * completion * head + prompts * 4 * image * m.vision) / rate
    passes = (cfg.updates_per_step > 1) + (cfg.kl_coef > 0)
    read = n * completion * (prompt + completion / 2) * 4 * m.layers * m.kv  # keys and values, at every token
    return {
        "rollout": forward + read / bandwidth / cards.world,
        "log-probs": passes * forward,
        "update": (4 if cfg.gradient_checkpointing else 3) * forward,  # backward two, recomputation one
        "rest": OVERHEAD_S,
        "saving": checkpoint_bytes(cfg, m) / DISK_RATE / cfg.save_every,
    }


# ---- the report --------------------------------------------------------------------------------------------
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


def memory_table(cfg, m: Sizes, cards: Cards) -> str:
    """Phases in rows, parts in columns, GiB; * at the phase that decides."""
    names = "weights gradients Adam reference gathered activations head sampler other".split()
    table = phases(cfg, m, cards.world, cards.memory)
    sums = {phase: sum(parts.values()) for phase, parts in table.items()}
    lines = [
        f"memory of each of {cards.world} GPU(s), GiB, of {cards.memory / GIB:.1f} "
        f"({USABLE * cards.memory / GIB:.1f} usable):",
        f"  {'':15}" + "".join(f"{name:>12}" for name in (*names, "sum")),
    ]
    for phase, parts in table.items():
        mark = "*" if sums[phase] == max(sums.values()) else " "
        cells = "".join(f"{parts[name] / GIB:12.1f}" if parts.get(name) else f"{'':12}" for name in names)
        lines.append(f"{mark} {phase:15}{cells}{sums[phase] / GIB:12.1f}")
    row = largest_row(cfg, m)
    lines.append(
        f"  in rows of {row.tokens} tokens with {row.patches} image patches, "
        f"{logit_rows(cfg, m, cards.memory)} tokens of logits at a time"
    )
    if cfg.sampler == "vllm":
        fixed, per_token = vllm_needs(cfg, m, cards.memory)
        cached = max(0, cfg.vllm_memory * cards.memory - fixed) / per_token
        prompts = cfg.prompts_per_step / cards.world * cfg.tensor_parallel
        image = min(max(IMAGE_PIXELS, cfg.min_pixels), cfg.max_pixels) / m.cell
        wanted = prompts * (image + TEXT_TOKENS + cfg.group_size * COMPLETION_TOKENS)
        lines.append(
            f"  KV cache of {cached * per_token / GIB:.1f} GiB = {cached:,.0f} tokens; the engine's "
            f"{prompts * cfg.group_size:,.0f} completions want up to {wanted:,.0f} to run at once"
        )
    return "\n".join(lines)


def rest_of_plan(cfg, m: Sizes, cards: Cards) -> str:
    """Host memory, disk and time, a line each."""
    host = host_bytes(cfg, m, cards)
    checkpoint, merged = checkpoint_bytes(cfg, m) / 1e9, 2 * m.parameters / 1e9
    kept = cfg.keep_last + bool(cfg.keep_best) + 1
    parts = ", ".join(f"{name} {size / GIB:.0f}" for name, size in host.items())
    lines = [
        f"host memory of a node, {cards.per_node} process(es), GiB: {sum(host.values()) / GIB:.0f} ({parts})",
        f"disk, GB: {kept * checkpoint + 2 * merged:.1f} ({kept} checkpoints of {checkpoint:.1f}, one being "
        f"written; the start and a merged model, {merged:.1f} each)",
    ]
    for name in cards.names:
        seconds = step_seconds(cfg, m, cards, *CARDS[name][1:])
        step = sum(seconds.values())
        parts = ", ".join(f"{phase} {s:.0f}" for phase, s in seconds.items())
        lines.append(
            f"time on {name}: {step / 60:.1f} min a step, {step * cfg.steps / 3600:.1f} h in all (s: {parts})"
        )
    if not cards.names:
        lines.append(f"time: not computed, known are {', '.join(CARDS)}")
    lines.append(
        f"all this is computed, not measured: images of {IMAGE_PIXELS / 1e6:.1f} Mpixel on average and of "
        f"max_pixels at most, {TEXT_TOKENS} further tokens a prompt, {COMPLETION_TOKENS} a completion, "
        f"{UTILISATION:.0%} of the peak FLOP/s, {DISK_RATE / 1e9:.0f} GB/s of disk, held-out runs not counted"
    )
    return "\n".join(lines)


def advice(cfg, m: Sizes, cards: Cards) -> tuple[str, list[str]]:
    """What fits, or what would make it fit; and what does not."""
    wrong = misfits(cfg, m, cards)

    def written(overrides):
        return " ".join(f"{key}={value}" for key, value in overrides.items())

    if not wrong:
        more = room(cfg, m, cards)
        alone = f"; there is room for {' or '.join(written({k: v}) for k, v in more.items())}" if more else ""
        return f"every phase fits{alone}", []
    found = remedies(cfg, m, cards)
    if found:
        return "it does not fit; it would with any of:\n" + "\n".join(f"  {written(o)}" for o in found), wrong
    return "no value of vllm_memory, max_tokens_per_micro_batch, max_pixels and lora_rank makes it fit", wrong


def plan(cfg, cards: Cards | None) -> list[str]:
    """Print memory and time on the cards; returns what is missing for the model, and what does not fit."""
    from transformers import AutoConfig

    missing = []
    try:
        config = AutoConfig.from_pretrained(cfg.model)
    except (OSError, ValueError):
        missing.append(f"model: {cfg.model} is no folder here, not in the cache, and the Hub does not answer")
        config = published_config(cfg.model)
    if config is None:
        return missing
    try:
        family = check_family(cfg.model, config)
    except ValueError as error:
        return [f"model: {error}"]
    if cfg.box_frame != family.box_frame:
        print(f"note: {family.name} was made with box_frame={family.box_frame}, here it is {cfg.box_frame}")
    m = sizes(config)
    print(f"model: {m.parameters / 1e9:.2f}B parameters, {m.vision / 1e9:.2f}B of them the vision tower")
    if cards is None:
        if m.parameters > 1e9:
            missing.append("GPU: none found, and this model needs some; gpus=4x80GB plans for four elsewhere")
        return missing
    if cards.world % cfg.tensor_parallel:
        return [
            *missing,
            f"tensor_parallel {cfg.tensor_parallel}: expected a divisor of {cards.world} processes",
        ]
    said, wrong = advice(cfg, m, cards)
    print(memory_table(cfg, m, cards), rest_of_plan(cfg, m, cards), said, sep="\n")
    missing += [f"memory: {line}" for line in wrong]
    return missing + (lacking_here(cfg, m, cards) if not cfg.gpus else [])


def lacking_here(cfg, m: Sizes, cards: Cards) -> list[str]:
    """What this machine has too little of, beside its GPUs."""
    host = sum(host_bytes(cfg, m, cards).values())
    there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    folder = next(p for p in (Path(cfg.out).absolute(), *Path(cfg.out).absolute().parents) if p.exists())
    free, kept = shutil.disk_usage(folder).free, cfg.keep_last + bool(cfg.keep_best) + 1
    needed = kept * checkpoint_bytes(cfg, m)
    lines = [f"host memory: {there / GIB:.0f} GiB of {host / GIB:.0f}"] * (there < host)
    return lines + [f"disk: {free / 1e9:.0f} GB free at {folder}, of {needed / 1e9:.0f}"] * (free < needed)


def dry_run(cfg) -> int:
    """Print the resolved config, its arithmetic, memory and what is missing; returns the exit status."""
    cards = find_cards(cfg)
    world = cards.world if cards else int(os.environ.get("WORLD_SIZE", 1))
    print(to_yaml(cfg))
    missing, loaded, where = [], {}, (cfg.data, cfg.split)
    try:
        loaded["train"] = load_samples(**cfg.source(*where))
        if cfg.val_every and cfg.val_split:
            where = cfg.val_data or cfg.data, cfg.val_split
            apart = {"limit": cfg.val_limit, "apart_from": loaded["train"]}
            loaded["held out"] = load_samples(**cfg.source(*where), **apart)
    except (OSError, ValueError, RuntimeError) as error:  # the Hub client's errors derive from these
        why = f"{type(error).__name__}: {error}".splitlines()[0]
        missing.append(f"data: {where[0]} ({where[1]}) is not readable here: {why}")
    if loaded:
        print(report_rows(loaded))
    print(arithmetic(cfg, world, len(loaded["train"]) if loaded else None))
    missing += plan(cfg, cards)
    if cfg.sampler == "vllm" and importlib.util.find_spec("vllm") is None:
        missing.append("vllm: not installed (pip install -r requirements.txt, or sampler=hf)")
    try:
        load_reward(cfg.reward, **cfg.scoring)
    except ValueError as error:
        missing.append(str(error))
    missing += [why] if (why := lacking_tracker(cfg.tracker)) else []
    print("\n".join(f"missing: {m}" for m in missing) if missing else "nothing is missing")
    return 1 if missing else 0
