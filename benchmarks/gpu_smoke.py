"""Ten minutes that show whether this machine trains as it should: kernels, accuracy, memory, speed, engines.

    python benchmarks/gpu_smoke.py                               # one GPU; on a CPU what it can, tiny
    python benchmarks/gpu_smoke.py attention head --minutes 3    # some stages
    python benchmarks/gpu_smoke.py --stage model                 # one, in this process, with its traceback

Needs the repository and its packages, no network, 30 GB of disk for temporary files (TMPDIR says where).

| stage          | what must hold, and what is measured                                                     |
|----------------|------------------------------------------------------------------------------------------|
| versions       | packages, card, kernels, speed of a matrix product                                       |
| fork           | asking for a GPU leaves CUDA usable in a forked process                                  |
| attention      | packed rows and images, forward and backward, within rounding of float64; ms             |
| head           | log-probs and gradients of a 152k vocabulary against float64; ms and GiB by chunk        |
| model          | 3B widths, few layers: policy = reference, ratio 1, finite gradient; GiB, share of peak  |
| checkpoint     | save, resume in a new learner, the same update again, merge: nothing differs; GB/s       |
| grpo_hf        | two steps of the tiny model with transformers: sampler and trainer agree                 |
| vllm_sleep_0-2 | the same with vLLM; the same greedy tokens after sleep and sync; free memory             |
| evaluate       | evaluate.py on drawn rows through vLLM in a process of its own                           |

Every stage runs in a process of its own, within twice its share of the time left: a crash costs that stage
alone. It prints one line of JSON: stage, status (passed, failed or skipped), seconds, figures, error. A table
ends the program, with status 1 if a stage failed. Peaks are of what torch allocated.
"""

import argparse
import contextlib
import dataclasses
import functools
import gc
import importlib.metadata
import importlib.util
import inspect
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
import traceback
from pathlib import Path

import torch
import torch.nn.functional as F

REPO = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPO))
import packing  # noqa: E402
import train_grpo as grpo  # noqa: E402
from backends import has_gpu  # noqa: E402
from checkpoint import resume, save  # noqa: E402
from data import PromptCache, PromptEncoder, Sample  # noqa: E402
from distributed import make_accelerator, whole_weights  # noqa: E402
from dry_run import CARDS  # noqa: E402
from merge import merge  # noqa: E402
from metrics import check_mismatch, step_metrics  # noqa: E402
from scoring import columns_of, load_reward  # noqa: E402
from stvqa import write_parquet  # noqa: E402
from tiny import rows  # noqa: E402

TINY = REPO / "assets" / "tiny"
PACKAGES = "torch transformers accelerate vllm flash-attn datasets numpy triton".split()
U16, U32 = 2.0**-8, 2.0**-24  # the most that one rounding to bf16 or float32 changes a number, relative
ON_GPU = has_gpu()
DEVICE, DTYPE = ("cuda", torch.bfloat16) if ON_GPU else ("cpu", torch.float32)


# ---- what stages share -------------------------------------------------------------------------------------
class Skip(Exception):
    """Why a stage cannot run here."""


class Report:
    """What a stage has measured, and which of its bounds did not hold."""

    def __init__(self):
        self.figures, self.failures = {}, []

    def add(self, **figures):
        self.figures |= {k: v for k, v in figures.items() if v is not None}

    def at_most(self, name: str, value: float, bound: float):
        self.add(**{name: value})
        if not value <= bound:  # nan is not
            self.failures.append(f"{name} {value:.3g}, expected at most {bound:.3g}")


def timed(f, *arguments):
    """(what f returns, seconds until the GPU has done it)."""
    wait = torch.cuda.synchronize if ON_GPU else lambda: None
    wait()
    start = time.perf_counter()
    result = f(*arguments)
    wait()
    return result, time.perf_counter() - start


def milliseconds(f, *arguments) -> float:
    """The least of three runs, after one to warm up."""
    f(*arguments)
    return 1e3 * min(timed(f, *arguments)[1] for _ in range(3))


def peak_gib() -> float | None:
    """Peak of allocated GPU memory since the last call; None on a CPU."""
    if not ON_GPU:
        return None
    peak = torch.cuda.max_memory_allocated() / 2**30
    torch.cuda.reset_peak_memory_stats()
    return peak


def free_gib() -> float | None:
    return torch.cuda.mem_get_info()[0] / 2**30 if ON_GPU else None


def peak_tflops() -> float | None:
    name = torch.cuda.get_device_name() if ON_GPU else ""
    return next((flops / 1e12 for card, (_, flops, _) in CARDS.items() if card in name), None)


def distance(got, want) -> float:
    """Relative, in the norm over all elements."""
    return float((got.double() - want.double()).norm() / want.double().norm())


def largest(a: dict, b: dict) -> float:
    """The largest difference of two sets of tensors."""
    return max(float((a[k] - b[k]).abs().max()) for k in a)


# ---- versions and fork -------------------------------------------------------------------------------------
def versions(report: Report, scratch: Path):
    for package in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            report.add(**{package: importlib.metadata.version(package)})
    host = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    report.add(python=sys.version.split()[0], cores=os.cpu_count(), host_gib=host)
    report.add(disk_free_gib=shutil.disk_usage(scratch).free / 2**30)
    with contextlib.suppress(ImportError):  # torch's kernel for sequences of all lengths: versions differ
        from torch.nn.attention.varlen import varlen_attn

        report.add(varlen=" ".join(inspect.signature(varlen_attn).parameters))
    if not ON_GPU:
        return report.add(device="cpu")
    card = torch.cuda.get_device_properties(0)
    report.add(device=card.name, gpus=torch.cuda.device_count(), gib=card.total_memory / 2**30)
    report.add(capability=f"{card.major}.{card.minor}", cuda=torch.version.cuda)
    report.add(cudnn=torch.backends.cudnn.version(), cudnn_sdp=torch.backends.cuda.cudnn_sdp_enabled())
    a = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    tflops = 2 * 8192**3 / milliseconds(lambda: a @ a) / 1e9
    report.add(matmul_tflops=tflops, peak_tflops=peak_tflops())


FORK = """
import os, torch
if child := os.fork():
    os._exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
try:
    torch.zeros(1, device="cuda").item()
except RuntimeError as error:
    print(error)
    os._exit(1)
os._exit(0)
"""


def fork(report: Report, scratch: Path):
    if not ON_GPU:
        raise Skip("no GPU")

    def fails_after(ask: str) -> bool:
        environ = {k: v for k, v in os.environ.items() if k != "PYTORCH_NVML_BASED_CUDA_CHECK"}
        return subprocess.run([sys.executable, "-c", ask + FORK], cwd=REPO, env=environ).returncode != 0

    report.add(torch_check_poisons=fails_after("import torch; torch.cuda.is_available()"))
    report.at_most("has_gpu_poisons", fails_after("import backends; backends.has_gpu()"), 0)


# ---- attention ---------------------------------------------------------------------------------------------
def attention(report: Report, scratch: Path):
    # Of text: prompts, their tokens, completions of each, their tokens. Of images: windows and their patches.
    row, windows = ((4, 750, 8, 450), (200, 64)) if ON_GPU else ((2, 30, 3, 20), (6, 16))
    check_attention(report, "text", text_kernels(), lay_out(*row), *(28, 4, 128) if ON_GPU else (6, 2, 32))
    images = [(at, at + windows[1], 0, 0) for at in range(0, windows[0] * windows[1], windows[1])]
    heads = (16, 16, 80) if ON_GPU else (4, 4, 32)
    check_attention(report, "vision", vision_kernels(), tuple(images), *heads, causal=False)
    if ON_GPU:
        x = torch.randn(1, 28, 800, 128, device=DEVICE, dtype=DTYPE)
        for name, enabled in (("on", True), ("off", False)):
            torch.backends.cuda.enable_cudnn_sdp(enabled)
            _, seconds = timed(fifty_shapes, x)
            report.add(**{f"50_shapes_cudnn_{name}_ms": 1e3 * seconds})


def fifty_shapes(x):
    """Attention of 50 lengths; the first time, where every shape needs a plan, it takes that long too."""
    for n in range(700, 800, 2):
        F.scaled_dot_product_attention(*[x[:, :, :n]] * 3, is_causal=True)


def check_attention(
    report, of: str, kernels: dict, segments, heads: int, kv_heads: int, width: int, causal=True
):
    """Every kernel, forward and backward, against `exact_attention`, and its time."""
    n, keys = segments[-1][1], max(end - start + b - a for start, end, a, b in segments)
    torch.manual_seed(0)
    shapes = [(1, h, n, width) for h in (heads, kv_heads, kv_heads)] + [(1, n, heads, width)]
    q, k, v, grad = (torch.randn(shape, device=DEVICE).to(DTYPE) for shape in shapes)

    def with_gradients(attend, *inputs) -> list:
        leaves = [x.detach().requires_grad_() for x in inputs[:3]]
        out = attend(*leaves, segments)
        out.backward(inputs[3])
        return [out.detach(), *(x.grad for x in leaves)]

    exact = with_gradients(lambda *row: exact_attention(*row, causal), *(x.double() for x in (q, k, v, grad)))
    # Sums of so many float32 terms, forward and backward, ten times what chance makes of them. What is stored
    # in bf16 is rounded further: probabilities and output; for gradients also dP, the product, and the sum
    # over the completions of a prompt (8 roundings at random add up like 3).
    sums, stored = 10 * U32 * math.sqrt(2 * (width + keys) + n), U16 if ON_GPU else 0
    bounds = {"out": sums + 2 * stored} | dict.fromkeys(("dq", "dk", "dv"), sums + 8 * stored)
    for kernel, attend in kernels.items():
        got = with_gradients(attend, q, k, v, grad)
        for (name, bound), a, b in zip(bounds.items(), got, exact, strict=True):
            report.at_most(f"{of}_{kernel}_{name}", distance(a, b), bound)
        forward = milliseconds(attend, q, k, v, segments)
        both = milliseconds(with_gradients, attend, q, k, v, grad)
        report.add(**{f"{of}_{kernel}_forward_ms": forward, f"{of}_{kernel}_backward_ms": both - forward})


def lay_out(prompts: int, length: int, completions: int, steps: int) -> tuple:
    """Segments of a packed row, as `packing.pack` has them."""
    segments = []
    for at in range(0, prompts * (length + completions * steps), length + completions * steps):
        starts = range(at + length, at + length + completions * steps, steps)
        segments += [(at, at + length, 0, 0), *((s, s + steps, at, at + length) for s in starts)]
    return tuple(segments)


def exact_attention(q, k, v, segments, causal: bool):
    """As the textbook has it: a token sees its segment's prompt and, if causal, no token behind itself."""
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    pieces = []
    for start, end, a, b in segments:
        keys, values = (torch.cat([x[0, :, a:b], x[0, :, start:end]], dim=1) for x in (k, v))
        scores = q[0, :, start:end] @ keys.transpose(1, 2) / math.sqrt(q.shape[3])  # (H, steps, keys)
        own = torch.arange(end - start, device=q.device)
        later = torch.cat([own.new_full((b - a,), -1), own])[None] > own[:, None]
        pieces.append(scores.masked_fill(later & causal, -math.inf).softmax(-1) @ values)
    return torch.cat(pieces, dim=1).transpose(0, 1)[None]  # (1, T, H, D)


def text_kernels() -> dict:
    """{name: (q, k, v, segments) -> (1, T, H, D)}: what the trainer uses here, and its fallback."""

    def used(q, k, v, segments):
        return packing.packed_attention(None, q, k, v, None, scaling=q.shape[3] ** -0.5, segments=segments)[0]

    def by_segment(q, k, v, segments):
        return packing.by_segment(q, k, v, segments, q.shape[3] ** -0.5, causal=True)

    return {"used": used, "by_segment": by_segment} if ON_GPU else {"used": used}


def vision_kernels() -> dict:
    def used(q, k, v, segments):
        bounds = torch.tensor([0, *(end for _, end, *_ in segments)], dtype=torch.int32, device=q.device)
        most = {"cu_seq_lens_q": bounds, "max_length_q": max(end - start for start, end, *_ in segments)}
        return packing.vision_attention(None, q, k, v, None, scaling=q.shape[3] ** -0.5, **most)[0]

    return {"used": used}


# ---- head --------------------------------------------------------------------------------------------------
def head(report: Report, scratch: Path):
    n, width, vocabulary = (12_000, 3584, 152_064) if ON_GPU else (96, 64, 700)
    if ON_GPU and free_gib() < 40:  # float64 copies of the head's gradient take 20 GB at the full width
        width = 1024
    chunks, temperature, some = (256, 1024, 4096) if ON_GPU else (16, 96), 0.7, slice(64)
    torch.manual_seed(0)
    hidden = torch.randn(n, width, device=DEVICE, dtype=DTYPE).requires_grad_()
    weight = torch.randn(vocabulary, width, device=DEVICE, dtype=DTYPE) * (3 / math.sqrt(width))
    targets, bias = torch.randint(vocabulary, (n,), device=DEVICE), torch.zeros(vocabulary, device=DEVICE)
    weight.requires_grad_()

    def run(chunk: int, at=slice(None)):
        """Log-probs and entropies; the gradients of the log-probs' sum are left in hidden and weight."""
        hidden.grad = weight.grad = None
        out = packing.ChunkedLogProbs.apply(hidden[at], weight, targets[at], bias, temperature, chunk)
        out[0].sum().backward()
        return out.detach()

    # d log p / d logits = (1[target] - p) / temperature
    h, w, t = hidden.detach()[some].double(), weight.detach().double(), targets[some, None]
    exact = (h @ w.T / temperature).log_softmax(-1)  # (64, V)
    d = (torch.zeros_like(exact).scatter_(1, t, 1) - exact.exp()) / temperature
    logp, entropy = run(16, some)
    # A logit is a sum of `width` float32 terms, a norm one of V. In bf16 the largest would be 0.06 off.
    sums = 10 * U32 * math.sqrt(width + vocabulary)
    bound = sums * float(exact.abs().max())
    report.at_most("logp_error", float((logp - exact.gather(1, t)[:, 0]).abs().max()), bound)
    report.at_most("entropy_error", float((entropy + (exact.exp() * exact).sum(-1)).abs().max()), bound)
    rounded = ((hidden[some] @ weight.T).bfloat16().float() / temperature).log_softmax(-1).detach()
    report.add(logp_error_of_bf16_logits=float((rounded - exact).gather(1, t).abs().max()))
    # p is off by p times the error of log p; d, the product and the whole are stored in bf16.
    bound += 3 * U16 if ON_GPU else 0
    report.at_most("dhidden_error", distance(hidden.grad[some], d @ w), bound)
    report.at_most("dweight_error", distance(weight.grad, d.T @ h), bound)
    del h, w, exact, d, rounded
    for chunk in chunks:
        peak_gib()
        ms = milliseconds(run, chunk)
        report.add(**{f"chunk_{chunk}_ms": ms, f"chunk_{chunk}_gib": peak_gib()})


# ---- a model, its prompts, its learner ---------------------------------------------------------------------
def write_model(folder: Path):
    """A random Qwen2.5-VL of the 3B's widths with fewer layers (CPU: the tiny model's size)."""
    from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

    config = AutoConfig.from_pretrained(TINY)
    text, tower = config.text_config, config.vision_config
    if ON_GPU:
        layers, blocks = (12, 8) if torch.cuda.mem_get_info()[1] > 60 * 2**30 else (3, 3)
        text.vocab_size, text.hidden_size, text.intermediate_size = 151_936, 2048, 11_008
        text.num_hidden_layers, text.num_attention_heads, text.num_key_value_heads = layers, 16, 2
        text.layer_types, text.max_position_embeddings = ["full_attention"] * layers, 32_768
        text.rope_parameters |= {"rope_theta": 1e6, "mrope_section": [16, 24, 24]}
        tower.hidden_size, tower.intermediate_size, tower.num_heads, tower.depth = 1280, 3420, 16, blocks
        tower.out_hidden_size, tower.fullatt_block_indexes = 2048, [blocks - 1]
    torch.manual_seed(0)
    with torch.device(DEVICE):
        model = AutoModelForImageTextToText.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    AutoProcessor.from_pretrained(TINY).save_pretrained(folder)


@dataclasses.dataclass
class Run:
    """What `train_grpo.train` has at hand when its first step begins."""

    cfg: grpo.GRPOConfig
    accelerator: object
    encoder: PromptEncoder
    samples: list[Sample]
    prompt_of: PromptCache
    forbidden: list[int]  # tokens of images, which nobody may sample

    def learner(self):
        return grpo.make_learner(self.accelerator, self.cfg, self.forbidden, self.prompt_of)


def set_up(model: Path, n: int, **settings) -> Run:
    """A run of two updates a step on n drawn rows. Images are scaled up to min_pixels."""
    from transformers import AutoProcessor

    same = dict(template="spatial_thinker", prompts_per_step=n, updates_per_step=2, tracker="none")
    cfg = grpo.GRPOConfig(model=str(model), **same | settings)
    samples = []
    for row in rows(n, 0, "smoke", set()):
        asked = row["question_with_options"], tuple(row["options"])
        gold = row["answer_option_text_only"], row["answer_option_text"]
        samples.append(Sample(row["image_id"], (row["images"],), (84, 84), *asked, *gold))
    encoder = PromptEncoder(
        AutoProcessor.from_pretrained(model), cfg.template, cfg.min_pixels, cfg.max_pixels
    )
    prompt_of = PromptCache(lambda k: encoder(samples[k]), 2, 2**30)
    forbidden = encoder.processor.tokenizer.convert_tokens_to_ids(["<|image_pad|>", "<|video_pad|>"])
    accelerator = make_accelerator(["Qwen2_5_VLDecoderLayer", "Qwen2_5_VLVisionBlock"])
    return Run(cfg, accelerator, encoder, samples, prompt_of, forbidden)


def synthetic(scratch: Path, **settings) -> tuple[Run, list]:
    """(a run of `write_model`'s model, rollouts of random tokens with advantages of 1 and -1).

    On a GPU each update has 4 images of 729 tokens, each with 8 completions of 300 to 500 tokens, which fill
    a row of 16,384 tokens.
    """
    write_model(scratch / "model")
    n, group, pixels, lengths = (8, 8, 560_000, (300, 500)) if ON_GPU else (4, 3, 784, (10, 40))
    settings |= dict(group_size=group, min_pixels=pixels, learning_rate=1e-4, out=str(scratch / "run"))
    run, rng, rollouts = set_up(scratch / "model", n, **settings), random.Random(0), []
    for k in range(n * group):
        ids = [rng.randrange(300, 600) for _ in range(rng.randint(*lengths))]
        rollouts.append(
            grpo.Rollout(k // group, len(run.prompt_of(k // group).ids), ids, [0.0] * len(ids), "", True)
        )
        rollouts[-1].advantage = (-1.0) ** k
    return run, rollouts


# ---- model -------------------------------------------------------------------------------------------------
def model(report: Report, scratch: Path):
    run, rollouts = synthetic(scratch)
    cfg = run.cfg
    peak_gib()
    learner, seconds = timed(run.learner)
    policy, size = learner.policy, sum(p.numel() for p in learner.policy.parameters())
    report.add(parameters=size, load_s=seconds, load_gib=peak_gib())

    plans = grpo.plan_updates(rollouts, cfg, 1)
    old = grpo.rollout_logps(learner, policy, rollouts, plans, cfg)
    start, seconds = timed(grpo.rollout_logps, learner, learner.reference, rollouts, plans, cfg)
    batches = [list(grpo.packed_batches(learner, rollouts, shares, cfg)) for shares in plans]
    tokens = [sum(packed["input_ids"].numel() for _, packed in of_update) for of_update in batches]
    report.add(logps_gib=peak_gib(), logps_tokens_per_s=sum(tokens) / seconds)
    report.at_most("policy_minus_reference", largest(old, start), 0)
    for k, r in enumerate(rollouts):
        r.logp_old, r.logp_ref, r.sampler_logps = old[k], start[k], old[k].tolist()
    adam_memory(report, policy)

    ks, packed = batches[0][0]
    times, visual = [], learner.base.model.visual

    def clock(*_):
        times.append(timed(time.perf_counter)[0])

    hooks = visual.register_forward_pre_hook(clock), visual.register_forward_hook(clock)
    logp, _ = packing.token_logps(policy, packed)
    report.add(vision_forward_ms=1e3 * (times[1] - times[0]))
    for hook in hooks:
        hook.remove()
    ratio = float((logp.detach() - torch.cat([old[k] for k in ks])).abs().max())
    report.at_most("log_ratio_before_the_first_update", ratio, 0)
    del logp
    report.add(**launches(learner, [rollouts[k] for k in ks], packed, cfg))

    peak_gib()
    for k, shares in enumerate(plans, 1):  # the first one makes Adam's moments, the second is timed
        stats, seconds = timed(grpo.update, learner, rollouts, shares, cfg, cfg.learning_rate)
        report.add(**{f"grad_norm_{k}": stats.grad_norm, f"kl_{k}": stats.kl / stats.tokens})
        report.add(**{f"update_{k}_s": seconds, f"update_{k}_gib": peak_gib()})
        report.at_most(f"update_{k}_skipped", int(stats.skipped or not stats.grad_norm > 0), 0)
    tflops = sum(update_flops(learner.base, packed) for _, packed in batches[-1]) / seconds / 1e12
    report.add(tokens=tokens[-1], tokens_per_s=tokens[-1] / seconds, tflops=tflops)
    report.add(share_of_peak=tflops / peak_tflops() if peak_tflops() else None)
    moved = largest(grpo.rollout_logps(learner, policy, rollouts, plans, cfg), old)
    report.add(moved_by_two_updates=moved)
    report.at_most("updates_in_vain", int(not moved > 0), 0)
    size, seconds = timed(lambda: sum(w.nbytes for _, w in whole_weights(learner.base)))
    report.add(whole_weights_s=seconds, whole_weights_gb=size / 1e9)


def adam_memory(report: Report, policy):
    """Peak and time of a step of AdamW once it has its moments, by lists of tensors and by one kernel."""
    for p in policy.parameters():
        p.grad = torch.zeros_like(p)
    for kind in ("foreach", "fused"):
        adam = torch.optim.AdamW(policy.parameters(), lr=0.0, weight_decay=0.0, **{kind: True})
        adam.step()
        peak_gib()
        report.add(**{f"step_{kind}_ms": 1e3 * timed(adam.step)[1], f"step_{kind}_gib": peak_gib()})
        del adam
    for p in policy.parameters():
        p.grad = None


def launches(learner, batch: list, packed: dict, cfg) -> dict:
    """Kernels that a micro-batch launches, forward and backward; on a CPU operators that it calls."""
    from torch.profiler import ProfilerActivity, profile

    def micro_batch():
        logp, _ = packing.token_logps(learner.policy, packed)
        learner.accelerator.backward(grpo.batch_loss(batch, logp, cfg)[0])

    with profile(activities=[ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * ON_GPU) as seen:
        timed(micro_batch)
    learner.optimizer.zero_grad()
    name, kind = ("kernel_launches", "LaunchKernel") if ON_GPU else ("operators", "aten::")
    return {name: sum(event.count for event in seen.key_averages() if kind in event.key)}


def update_flops(base, packed: dict) -> int:
    """Floating-point operations of a packed row, forward and backward; what is recomputed counts once.

    6 for each parameter of a layer and token, likewise of the head and completion token, of a vision block
    and patch; 12 x layers x heads x width for each query and key that it sees. Attention of images is not
    counted.
    """
    text, sizes = base.config.text_config, [(end - start, b - a) for start, end, a, b in packed["segments"]]
    pairs = sum(n * prompt + n * (n + 1) // 2 for n, prompt in sizes)

    def parameters(module):
        return sum(p.numel() for p in module.parameters())

    layers = parameters(base.model.language_model.layers) * packed["input_ids"].numel()
    of_head = text.vocab_size * text.hidden_size * len(packed["target_ids"])
    vision = parameters(base.model.visual.blocks) * len(packed["pixel_values"])
    return 6 * (layers + of_head + vision) + 12 * text.num_hidden_layers * text.hidden_size * pairs


# ---- checkpoint --------------------------------------------------------------------------------------------
def checkpoint(report: Report, scratch: Path):
    from transformers import AutoModelForImageTextToText

    free = shutil.disk_usage(scratch).free / 1e9
    if ON_GPU and free < 30:
        raise Skip(f"{scratch}: expected 30 GB of free disk, got {free:.0f}; set TMPDIR")
    run, rollouts = synthetic(scratch, kl_coef=0.0, is_cap=0.0)
    cfg, out, shares = run.cfg, scratch / "run", grpo.plan_updates(rollouts, run.cfg, 1)
    out.mkdir()

    def update(learner, k: int) -> float:
        return grpo.update(learner, rollouts, shares[k], cfg, cfg.learning_rate).grad_norm

    def state(learner) -> list:
        """Weights and moments of a layer and a vision block, as this process holds them."""
        blocks = learner.base.model.language_model.layers[0], learner.base.model.visual.blocks[0]
        some = [p for block in blocks for p in block.parameters()]
        held = [learner.optimizer.state[p] for p in some]
        tensors = some + [moments[name] for moments in held for name in ("exp_avg", "exp_avg_sq")]
        return [(t.to_local() if hasattr(t, "to_local") else t).detach().clone() for t in tensors]

    learner = run.learner()
    update(learner, 0)
    saved, models = state(learner), (learner.policy, learner.optimizer, run.encoder.processor)
    _, seconds = timed(lambda: save(run.accelerator, *models, out, 1, {}, keep_last=1))
    gb = sum(p.stat().st_size for p in out.rglob("*") if p.is_file()) / 1e9
    report.add(save_s=seconds, checkpoint_gb=gb, save_gb_per_s=gb / seconds)
    undisturbed = update(learner, 1)
    del learner, models
    run.accelerator.free_memory()
    gc.collect()

    learner = run.learner()
    models = run.accelerator, learner.policy, learner.optimizer
    peak_gib()
    step, seconds = timed(resume, *models, out, "auto")
    report.add(resume_s=seconds, resume_gb_per_s=gb / seconds, resume_gib=peak_gib())
    report.at_most("steps_lost", abs(step - 1), 0)
    differ = sum(not torch.equal(a, b) for a, b in zip(state(learner), saved, strict=True))
    report.at_most("resumed_tensors_that_differ", differ, 0)
    # The same sums again; on a GPU atomic additions take another order, of what is stored in bf16.
    gap = abs(update(learner, 1) / undisturbed - 1)
    report.at_most("next_grad_norm_error", gap, U16 if ON_GPU else 0)

    resume(*models, out, "auto")  # its weights again, before that update
    merged, seconds = timed(merge, out, scratch / "merged")
    report.add(merge_s=seconds)
    copy = AutoModelForImageTextToText.from_pretrained(merged, dtype=torch.bfloat16).state_dict()
    differ = sum(not torch.equal(w.bfloat16().cpu(), copy[name]) for name, w in whole_weights(learner.base))
    report.at_most("merged_tensors_that_differ", differ, 0)


# ---- engines -----------------------------------------------------------------------------------------------
def need(*packages: str):
    if missing := [p for p in packages if importlib.util.find_spec(p) is None]:
        raise Skip(f"no {' and no '.join(missing)}")


def vllm_sleep(report: Report, scratch: Path, level: int):
    need("vllm")
    if level and not ON_GPU:
        raise Skip("vLLM sleeps on a GPU only")
    tiny_grpo(report, scratch, "vllm", level)


def tiny_grpo(report: Report, scratch: Path, engine: str, sleep_level: int = 0):
    """Two GRPO steps of the tiny model, and what sleep and sync do to its greedy answers."""
    # A learning rate so large that an engine with the weights before a step is far from the trainer's.
    settings = dict(group_size=4, learning_rate=1e-3, min_pixels=784, max_prompt_length=128)
    settings |= dict(max_completion_length=192 if ON_GPU else 32, gradient_checkpointing=False)
    settings |= dict(sampler=engine, sleep_level=sleep_level, vllm_memory=0.3 if ON_GPU else 0.5)
    run = set_up(TINY, 4, out=str(scratch), **settings)
    cfg, learner, places = run.cfg, run.learner(), [*range(4)]
    if engine == "vllm":
        sampler, seconds = timed(grpo.VLLMSampler, cfg, run.encoder, run.forbidden, 1)
        report.add(engine_start_s=seconds)
    else:
        sampler = grpo.HFSampler(cfg, run.encoder, run.forbidden)
    prompts = [sampler.encode(sample) for sample in run.samples]
    sampler.sync(learner.base)

    def greedy() -> list:
        return [group[0].completion_ids for group in sampler.generate(places, prompts, 1, 0.0, places)]

    before = greedy()
    report.add(free_awake_gib=free_gib())
    sampler.sleep()
    report.add(free_asleep_gib=free_gib())
    _, seconds = timed(sampler.sync, learner.base)
    report.add(sync_s=seconds, free_awake_again_gib=free_gib(), greedy_tokens=sum(map(len, before)))
    differ = sum(a != b for a, b in zip(before, greedy(), strict=True))
    report.at_most("greedy_answers_that_differ", differ, 0)

    reward = load_reward(cfg.reward, **cfg.scoring)
    moved = {}  # by a step: how far off a sampler with the weights before it would be, nats a token
    for step in (1, 2):
        seeds = [100 * step + k for k in places]
        groups, seconds = timed(sampler.generate, places, prompts, cfg.group_size, 1.0, seeds)
        rollouts = [r for group in groups for r in group]
        for r in rollouts:
            r.score = reward(r.text, columns_of(run.samples[r.row], {}))
        # A little noise, since so few rewards may all be equal, and there has to be something to learn.
        rewards = grpo.reward_matrix(groups) + 0.01 * torch.rand(4, cfg.group_size, dtype=torch.float64)
        for r, advantage in zip(rollouts, grpo.group_advantages(rewards).flatten().tolist(), strict=True):
            r.advantage = advantage
        sampler.sleep()
        plans = grpo.plan_updates(rollouts, cfg, 1)
        for name, of in (("logp_old", learner.policy), ("logp_ref", learner.reference)):
            for k, logp in grpo.rollout_logps(learner, of, rollouts, plans, cfg).items():
                setattr(rollouts[k], name, logp)
        updates = [grpo.update(learner, rollouts, shares, cfg, cfg.learning_rate) for shares in plans]
        new = grpo.rollout_logps(learner, learner.policy, rollouts, plans, cfg)
        moved[step] = float(torch.cat([(new[k] - r.logp_old).abs() for k, r in enumerate(rollouts)]).mean())
        sampler.sync(learner.base)
        m = step_metrics(groups, [updates])
        report.add(**{f"mismatch_{step}": m["mismatch_mean"], f"mismatch_{step}_max": m["mismatch_max"]})
        report.add(**{f"reward_{step}": m["reward"], f"gen_tokens_per_s_{step}": m["tokens"] / seconds})
        report.at_most(f"updates_skipped_{step}", m["skipped"], 0)
        check_mismatch({"step": step} | m, on_gpu=ON_GPU)
    report.add(mismatch_of_stale_weights=moved[1])
    report.at_most("mismatch_2", m["mismatch_mean"], moved[1] / 4)
    sampler.close()


def evaluate(report: Report, scratch: Path):
    need("vllm", "datasets")
    write_parquet(scratch / "val.parquet", rows(32, 0, "val", set()))
    command = [sys.executable, "evaluate.py", "--dataset", str(scratch / "val.parquet")]
    command += ["--model_path", str(TINY), "--provider", "vllm", "--min_pixels", "784"]
    command += ["--max_new_tokens", "192", "--out", str(scratch), "--custom_filename", "answers"]
    done, seconds = timed(lambda: subprocess.run(command, cwd=REPO))
    report.at_most("status", abs(done.returncode), 0)
    summary = json.loads((scratch / "answers.summary.json").read_text())
    report.add(items=summary["n"], accuracy=summary["accuracy"], command_s=seconds)
    report.at_most("items_failed", summary["failed"] + summary["missing"], 0)


STAGES = {  # name: (function, its share of the time: seconds of ten minutes)
    "versions": (versions, 30),
    "fork": (fork, 30),
    "attention": (attention, 40),
    "head": (head, 35),
    "model": (model, 90),
    "checkpoint": (checkpoint, 85),
    "grpo_hf": (lambda *at: tiny_grpo(*at, "hf"), 40),
    "vllm_sleep_0": (lambda *at: vllm_sleep(*at, 0), 60),
    "vllm_sleep_1": (lambda *at: vllm_sleep(*at, 1), 60),
    "vllm_sleep_2": (lambda *at: vllm_sleep(*at, 2), 60),
    "evaluate": (evaluate, 70),
}


# ---- one stage, in its process -----------------------------------------------------------------------------
def run_stage(name: str, scratch: Path) -> dict:
    """The stage's line."""
    report, started, status, error = Report(), time.time(), "passed", ""
    try:
        STAGES[name][0](report, scratch)
    except Skip as reason:
        status, error = "skipped", str(reason)
    except (Exception, SystemExit) as failure:  # whatever it is, it is what there is to say of this stage
        traceback.print_exc()
        report.failures.append(f"{type(failure).__name__}: {last_line(str(failure))}")
    if report.failures:
        status, error = "failed", "; ".join(report.failures)
    figures = {k: short(v) for k, v in report.figures.items()}
    line = {"stage": name, "status": status, "seconds": round(time.time() - started, 1), "figures": figures}
    return line | ({"error": error} if error else {})


def show_stage(name: str, scratch: Path) -> bool:
    """Run a stage here and print its line, alone on stdout; returns whether it failed."""
    stdout = os.dup(1)
    os.dup2(2, 1)  # what the stage and its engines print is no line of JSON
    if not ON_GPU:
        torch.set_num_threads(1)  # with so little to compute several would wait for each other
    line = run_stage(name, scratch)
    os.write(stdout, (json.dumps(line) + "\n").encode())
    return line["status"] == "failed"


def short(value):
    """A float with four digits; nan and infinity as text, which JSON lacks."""
    if not isinstance(value, float):
        return value
    return float(f"{value:.4g}") if math.isfinite(value) else str(value)


def last_line(text: str) -> str:
    return (text.strip().splitlines() or ["no message"])[-1].strip()


# ---- all of them -------------------------------------------------------------------------------------------
def start_stage(name: str, limit_s: float, scratch: Path, log: Path) -> dict:
    """The line of a stage that runs in a process of its own, or what can be said of one that did not end."""
    command = [sys.executable, str(Path(__file__).resolve()), "--stage", name, "--scratch", str(scratch)]
    started, why = time.time(), None
    with open(log, "w") as errors:
        child = subprocess.Popen(
            command, cwd=REPO, stdout=subprocess.PIPE, stderr=errors, text=True, start_new_session=True
        )
        try:
            out, _ = child.communicate(timeout=limit_s)
        except subprocess.TimeoutExpired:
            out, why = "", f"not done after {limit_s:.0f} s"
        finally:  # and what it has started: engines have processes of their own
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
            child.wait()
    with contextlib.suppress(ValueError, IndexError):
        return json.loads(out.splitlines()[-1])
    why = why or f"ended with status {child.returncode}: {last_line(log.read_text(errors='replace'))}"
    seconds = round(time.time() - started, 1)
    return {"stage": name, "status": "failed", "seconds": seconds, "figures": {}, "error": why}


def table(lines: list[dict]) -> str:
    rows = [f"{'stage':14} {'status':8} {'s':>6}  figures"]
    for line in lines:
        texts = [f"{k} {v}" for k, v in line["figures"].items()]
        texts = ([line["error"]] if "error" in line else []) + texts
        head = f"{line['stage']:14} {line['status']:8} {line['seconds']:6.1f}  "
        later = {"subsequent_indent": " " * len(head), "break_on_hyphens": False}
        rows += textwrap.wrap(" | ".join(texts), 118, initial_indent=head, **later) or [head.rstrip()]
    counts = [f"{sum(x['status'] == s for x in lines)} {s}" for s in ("passed", "failed", "skipped")]
    return "\n".join([*rows, ", ".join(counts)])


def start_all(names: list[str], end: float, folder: Path) -> bool:
    """Run stages one after the other, print their lines and the table; returns whether any failed."""
    lines, logs = [], Path(tempfile.mkdtemp(prefix="gpu_smoke-logs-"))
    for k, name in enumerate(names):
        # What one leaves is the others'; one that hangs takes at most twice its share of what is left.
        shares, left = [STAGES[name][1] for name in names[k:]], max(0.0, end - time.time())
        limit_s = left * min(1, 2 * shares[0] / sum(shares))
        scratch, log = folder / name, logs / f"{name}.log"
        scratch.mkdir()
        lines.append(start_stage(name, limit_s, scratch, log))
        print(
            json.dumps(lines[-1]),
            *[f"its log: {log}"] * (lines[-1]["status"] == "failed"),
            sep="\n",
            flush=True,
        )
        shutil.rmtree(scratch, ignore_errors=True)
    print(f"\n{table(lines)}")
    failed = any(line["status"] == "failed" for line in lines)
    if not failed:
        shutil.rmtree(logs)
    return failed


def main():
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("stages", nargs="*", metavar="STAGE", help="all if none is named")
    parser.add_argument(
        "--minutes", type=float, default=10, help="for all; early stages leave time to others"
    )
    parser.add_argument("--stage", choices=STAGES, help="run this one here and print its line alone")
    parser.add_argument("--scratch", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if unknown := set(args.stages) - set(STAGES):
        parser.error(f"expected stages of {', '.join(STAGES)}, got {', '.join(sorted(unknown))}")
    own = functools.partial(tempfile.TemporaryDirectory, prefix="gpu_smoke-", ignore_cleanup_errors=True)
    with contextlib.nullcontext(args.scratch) if args.scratch else own() as folder:
        if args.stage:
            failed = show_stage(args.stage, Path(folder))
        else:
            failed = start_all(args.stages or [*STAGES], time.time() + 60 * args.minutes, Path(folder))
    sys.stdout.flush()
    os._exit(failed)  # without last words of engines and process groups


if __name__ == "__main__":
    main()
