"""GRPO with the gated spatial reward: rollout (vLLM), reward, group advantage, clipped update, weight sync.

    accelerate launch train_grpo.py configs/7b.yaml              # the paper's run: 4 x 80 GB, hours
    python train_grpo.py configs/measured.yaml                   # the whole loop on a laptop CPU, minutes
    python train_grpo.py configs/7b.yaml dry_run=true            # what would run, and what is missing

What separates this from GRPO as first published (arXiv:2402.03300), beside the reward:
  - loss: one token mean over all sequences of an update (a mean per sequence favours short right answers and
    long wrong ones), clipped higher than lower (DAPO), dual-clipped for negative advantages;
  - KL to the start: k3 estimator, weighted by the ratio so that its gradient is that of the KL;
  - the sampler's own log-probs enter as a truncated importance weight, since vLLM's arithmetic is its own;
  - a group of (nearly) equal rewards gives exactly zero advantage instead of amplified float noise;
  - a prompt and its images are run once for all completions of its group, exactly (packing.py).
Batch and seeds are functions of (seed, step): a resumed run repeats what an undisturbed one would have done.

Read down to `update`, then `train`: samplers and models between them are plumbing.
"""

import itertools
import json
import math
import os
import re
import shlex
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import numpy as np
import torch
from pydantic import model_validator
from tqdm import tqdm

from backends import hf_generate, start_vllm, vllm_generate, vllm_reload
from checkpoint import CheckpointError, refuse_another_run, refuse_other_rows, resume, save
from config import DataConfig, DiskFull, append, opt, plain_errors, write_run_record
from data import Prompt, PromptCache, PromptEncoder, batch_at, load_samples, report_rows
from distributed import (
    Stop,
    gather,
    in_turn,
    launch_alone,
    launched,
    leave,
    make_accelerator,
    remove_stale_shared_memory,
    return_freed_memory,
    whole_weights,
)
from dry_run import arithmetic, dry_run, read_gpus
from lora import adapters_off, add_adapters
from metrics import (
    HELD_OUT,
    UpdateStats,
    check_mismatch,
    end_tracker,
    lacking_tracker,
    log_samples,
    mem_gb,
    save_samples,
    start_tracker,
    step_line,
    step_metrics,
)
from packing import (
    FORBIDDEN_BIAS,
    balance,
    check_family,
    micro_batches,
    pack,
    token_logps,
    use_logprob_head,
    use_packed_attention,
)
from results import grade, summarise
from rewards import Weights
from scoring import RewardError, make_scorer, means


class GRPOConfig(DataConfig):
    val_every: int = opt(5, "steps between held-out evaluations (greedy); 0: none", ge=0)
    image_cache_gb: float = opt(8, "host memory for the images of a step, GiB per process", ge=0)
    # reward
    reward: str = opt("spatial", "spatial, vanilla (accuracy + format), or yours: FILE.py:NAME", path=True)
    weight_format: float = opt(0.1, "reward weight", ge=0, le=1)
    weight_count: float = opt(0.2, "reward weight", ge=0, le=1)
    weight_accuracy: float = opt(0.5, "reward weight", ge=0, le=1)
    weight_spatial: float = opt(0.2, "reward weight", ge=0, le=1)
    # not in the paper, of reward=spatial
    weight_relation: float = opt(0.0, "reward weight of the share of gold relations found", ge=0, le=1)
    gate: bool = opt(True, "a wrong answer earns no spatial and relation term")
    box_credit: Literal["ciou", "positive_ciou", "iou50"] = opt(
        "ciou", "what a matched box earns: (CIoU + 1) / 2, max(CIoU, 0), or IoU where that is at least 0.5"
    )
    need_label: bool = opt(False, "a box matched under an unrelated label earns nothing")
    judge_answers: bool = opt(False, "open answers are right as evaluation reads them, not as equal texts")
    # rollout
    model: str = opt(
        "Qwen/Qwen2.5-VL-7B-Instruct", "Hub id or folder of the start (and of the KL reference)", path=True
    )
    sampler: Literal["vllm", "hf"] = opt("vllm", "vLLM in this process, or transformers' generate")
    prompts_per_step: int = opt(512, "P: prompts drawn a step, over all processes", ge=1)
    group_size: int = opt(8, "G: completions a prompt", ge=2)
    temperature: float = opt(1.0, "of the rollouts", gt=0)
    max_completion_length: int = opt(2048, "tokens; what has not ended by then is cut", ge=1)
    vllm_memory: float = opt(0.5, "share of the GPU's memory for vLLM (on a CPU: GiB of KV cache)", gt=0)
    vllm_max_seqs: int | None = opt(None, "completions sampled at the same time; empty: vLLM's choice", ge=1)
    vllm_max_batched_tokens: int | None = opt(None, "tokens in one engine step; empty: vLLM's choice", ge=1)
    tensor_parallel: int = opt(1, "processes that share one vLLM engine", ge=1)
    sleep_level: int = opt(
        1,
        "vLLM in updates on a GPU: 0 keeps its memory, 1 moves weights to the host, 2 drops them",
        ge=0,
        le=2,
    )
    resample_dead_groups: int = opt(0, "rounds of other prompts for groups of equal rewards", ge=0)
    # update
    steps: int = opt(75, "rollout + update rounds", ge=1)
    updates_per_step: int = opt(4, "optimizer steps a round, on P / updates_per_step prompts each", ge=1)
    learning_rate: float = opt(1e-6, "AdamW step size after the warm-up", gt=0)
    warmup_steps: int = opt(0, "steps of linear warm-up", ge=0)
    final_learning_rate: float | None = opt(None, "where a straight line ends it; empty: constant", ge=0)
    weight_decay: float = opt(0.01, "AdamW", ge=0)
    adam_beta2: float = opt(0.999, "AdamW second moment decay", gt=0, lt=1)
    max_grad_norm: float = opt(1.0, "gradient clipping", gt=0)
    clip_low: float = opt(0.2, "the ratio is clipped to [1 - clip_low, 1 + clip_high]", gt=0, lt=1)
    clip_high: float = opt(0.3, "the ratio is clipped to [1 - clip_low, 1 + clip_high]", gt=0)
    dual_clip: float = opt(3.0, "bound on ratio * |advantage| where the advantage is negative", gt=1)
    kl_coef: float = opt(0.01, "weight of the KL to the start; 0: no reference model in memory", ge=0)
    is_cap: float = opt(2.0, "cap of the trainer / sampler importance weight; 0: off", ge=0)
    max_skipped: int = opt(3, "updates in a row without a finite gradient that end the run", ge=1)
    freeze_vision: bool = opt(False, "train the language model only")
    lora_rank: int = opt(0, "of adapters on the language model's linear layers; 0: all parameters", ge=0)
    # At the customary alpha of 32 LoRA takes ten times a full run's learning rate: here that factor is in it.
    lora_alpha: int = opt(320, "scale * lora_rank; at 320 the learning_rate of a full run serves", ge=1)
    lora_vision: bool = opt(False, "adapters on the vision tower's linear layers as well")
    max_tokens_per_micro_batch: int = opt(16384, "tokens packed into one forward pass, per process", ge=1)
    logit_chunk: int | None = opt(None, "tokens whose logits exist at the same time; empty: by memory", ge=1)
    gradient_checkpointing: bool = opt(True, "recompute activations: less memory, a third more time")
    # run
    out: str = opt("runs/grpo", "folder of the run", path=True)
    seed: int = opt(0, "of batch order and sampling", ge=0)
    save_every: int = opt(5, "steps between checkpoints (and one at the end)", ge=1)
    keep_last: int = opt(2, "checkpoints kept, besides the best", ge=1)
    keep_best: str | None = opt("val_reward", "held-out metric of the checkpoint to keep; empty: none")
    resume: str = opt(
        "auto", "auto: continue a run found in out; never: refuse to; or a checkpoint's folder", path=True
    )
    samples_every: int = opt(5, "steps between saved samples of completions with their images; 0: none", ge=0)
    timeout_min: float = opt(120, "minutes that a process waits for the others before it gives up", gt=0)
    dry_run: bool = opt(False, "print what would run and what is missing, load no model, exit")
    gpus: str | None = opt(None, "cards to plan for without having them, as 4x80GB or 8xH100")

    @model_validator(mode="after")
    def _check(self):
        if self.prompts_per_step % self.updates_per_step:
            raise ValueError(
                f"prompts_per_step {self.prompts_per_step} is not a multiple of "
                f"updates_per_step {self.updates_per_step}: prompts would be dropped"
            )
        if self.lora_vision and (self.freeze_vision or not self.lora_rank):
            raise ValueError("lora_vision: expected lora_rank above 0 and no freeze_vision")
        if self.keep_best not in (None, *(names := [f"val_{k}" for k in HELD_OUT])):
            raise ValueError(f"keep_best: expected one of {names}, got {self.keep_best!r}")
        _ = self.scoring  # raises if they add up to more than 1
        if self.reward not in ("spatial", "vanilla") and not re.fullmatch(r".+\.py:\w+", self.reward):
            raise ValueError(
                f"reward: expected spatial, vanilla or path/to/file.py:name, got {self.reward!r}"
            )
        _ = self.gpus and read_gpus(self.gpus)  # raises if it cannot be read
        return self

    @property
    def scoring(self) -> dict:
        """Options of scoring.spatial."""
        terms = "format", "count", "accuracy", "spatial", "relation"
        options = "box_frame", "gate", "box_credit", "need_label", "judge_answers"
        weights = Weights(**{term: getattr(self, f"weight_{term}") for term in terms})
        return {"weights": weights} | {name: getattr(self, name) for name in options}

    @property
    def need_scene(self) -> bool:
        return self.reward == "spatial"


# ---- rollout -----------------------------------------------------------------------------------------------
@dataclass
class Rollout:
    """One completion of one row, and what the step finds out: it travels, its prompt's images do not."""

    row: int  # of the data
    prompt_length: int  # tokens, with the images'
    completion_ids: list[int]  # (T,), with the end token where it came
    sampler_logps: list[float]  # (T,), of the distribution that was sampled from
    text: str  # without special tokens
    finished: bool  # False: cut at max_completion_length
    score: SimpleNamespace | None = None  # its terms, of scoring.load_reward
    correct: bool = False  # the answer that evaluation would read is right, whatever the reward says
    advantage: float = 0.0
    logp_old: torch.Tensor | None = None  # (T,), on the process that trains on it: of the policy that sampled
    logp_ref: torch.Tensor | None = None  # (T,), likewise: of the start

    def __len__(self):
        return self.prompt_length + len(self.completion_ids)


def request_seed(*path: int) -> int:
    """A seed for one request from (run seed, step, row): independent of batch, rank and resumption."""
    return int(np.random.SeedSequence(path).generate_state(1)[0])


def sample_everywhere(
    accelerator, sampler, prompt_of: PromptCache, rows, n, temperature, seeds, measure: Callable
) -> list[list]:
    """n Rollouts of each row, in the order of rows, known to every process in the end. Collective.

    Every engine, of `sampler.processes` processes, takes its share of the rows, and measures what it has
    sampled: `measure(rollout)` is what travels.
    """
    engines = accelerator.num_processes // sampler.processes
    mine = range(accelerator.process_index // sampler.processes, len(rows), engines)
    prompt_of.ahead(rows[k] for k in mine)
    prompts = [prompt_of(rows[k]) for k in mine]
    groups = sampler.generate([rows[k] for k in mine], prompts, n, temperature, [seeds[k] for k in mine])
    parts = None
    if accelerator.process_index % sampler.processes == 0:  # processes of one engine hold the same
        parts = [[measure(rollout) for rollout in group] for group in groups]
    parts = gather([parts])
    parts = [part for part in parts if part is not None]
    return [parts[k % engines][k // engines] for k in range(len(rows))]  # undoes the dealing above


# ---- reward and advantage ----------------------------------------------------------------------------------
def reward_matrix(groups: list[list[Rollout]]) -> torch.Tensor:
    return torch.tensor([[r.score.reward for r in group] for group in groups], dtype=torch.float64)  # (P, G)


def group_advantages(rewards: torch.Tensor, eps: float = 1e-4) -> torch.Tensor:
    """Centre and scale each prompt's rewards within its own group (GRPO, arXiv:2402.03300, section 4.1.2).

    Args: rewards (P, G) float; eps: groups with a smaller (unbiased) standard deviation get no advantage.
    Returns: (P, G) float; rows sum to 0; a row of equal rewards is exactly 0.
    Raises: ValueError if G < 2 or a reward is not finite.

    >>> group_advantages(torch.tensor([[0.0, 1.0], [0.3, 0.3]])).tolist()
    [[-0.7071..., 0.7071...], [0.0, 0.0]]
    """
    if rewards.ndim != 2 or rewards.shape[1] < 2:
        raise ValueError(f"rewards: expected (P, G) with G >= 2, got {tuple(rewards.shape)}")
    if not torch.isfinite(rewards).all():
        raise ValueError("rewards: expected finite values")
    centred = rewards - rewards.mean(1, keepdim=True)
    std = rewards.std(1, keepdim=True)  # (P, 1)
    return torch.where(std < eps, torch.zeros_like(centred), centred / (std + 1e-6))


def replace_dead(groups, rows: list[int], roll_out, n_rows: int, step: int, cfg: GRPOConfig):
    """Roll out other rows in place of groups of equal rewards, in `resample_dead_groups` rounds at most.

    Returns: (groups, how many were replaced). The spare rows are a function of (seed, step, round).
    """
    groups, used, replaced = list(groups), set(rows), 0
    for attempt in range(cfg.resample_dead_groups):
        dead = (group_advantages(reward_matrix(groups)) == 0).all(1).nonzero()[:, 0].tolist()
        spare = batch_at(request_seed(cfg.seed, step, attempt), 0, n_rows, n_rows)
        spare = [row for row in spare if row not in used][: len(dead)]
        if not spare:
            break
        for k, group in zip(dead, roll_out(spare, step), strict=False):  # fewer spare rows than dead groups
            groups[k] = group
        used, replaced = used | set(spare), replaced + len(spare)
    return groups, replaced


# ---- loss --------------------------------------------------------------------------------------------------
def policy_loss(logp, logp_old, advantages, mask, *, clip_low=0.2, clip_high=0.3, dual_clip=3.0, weight=None):
    """PPO's clipped surrogate, asymmetric (DAPO, arXiv:2503.14476) and dual-clipped (arXiv:1912.09729).

    Args: logp, logp_old, advantages, mask: one shape, one entry a token; weight: importance weight of each,
        without gradient. Returns: (loss summed over the mask, {statistic: sum over the mask}); divide by the
        token count of the whole update, over all micro-batches and ranks.
    """
    ratio = torch.exp((logp - logp_old).clamp(-20, 20))
    unclipped = -advantages * ratio
    clipped = -advantages * ratio.clamp(1 - clip_low, 1 + clip_high)
    loss = torch.maximum(unclipped, clipped)
    bounded = torch.where(advantages < 0, torch.minimum(loss, -advantages * dual_clip), loss)
    weighted = bounded if weight is None else bounded * weight
    with torch.no_grad():
        stats = {
            "clip_high": (advantages > 0) & (ratio > 1 + clip_high),
            "clip_low": (advantages < 0) & (ratio < 1 - clip_low),
            "clip_dual": bounded < loss,
        }
        stats = {name: (hit * mask).sum() for name, hit in stats.items()}
    return (weighted * mask).sum(), stats


def kl_loss(logp, logp_ref, logp_old, mask):
    """KL(policy || reference), k3 estimator (http://joschu.net/blog/kl-approx.html), summed over the mask.

    The samples come from the old policy, so each term is weighted by the ratio, and the gradient flows
    through it: without, k3's gradient is that of another divergence. Returns: (loss, KL), both summed.
    """
    log_ratio = (logp_ref - logp).clamp(-20, 20)
    k3 = torch.exp(log_ratio) - log_ratio - 1
    ratio = torch.exp((logp - logp_old).clamp(-20, 20))
    return (ratio * k3 * mask).sum(), (k3.detach() * mask).sum()


def batch_loss(batch: list[Rollout], logp: torch.Tensor, cfg: GRPOConfig) -> tuple[torch.Tensor, dict]:
    """The loss of a micro-batch, summed over its completion tokens, and sums for UpdateStats.

    Args: batch: B rollouts (B may be 0); logp (C,): log-probs of their tokens, one rollout after the other.
    A rollout without logp_old was sampled by the policy as it stands: its own log-probs serve.
    """

    def per_token(values) -> torch.Tensor:  # one tensor or list a rollout -> (C,); the first makes C = 0 work
        pieces = [torch.as_tensor(v, dtype=logp.dtype, device=logp.device) for v in values]
        return torch.cat([logp.new_empty(0), *pieces])

    fresh = all(r.logp_old is None for r in batch)
    logp_old = logp.detach() if fresh else per_token(r.logp_old for r in batch)
    sampled = per_token(r.sampler_logps for r in batch)
    advantage = per_token([r.advantage] * len(r.completion_ids) for r in batch)
    mask = torch.ones_like(logp)  # nothing is padded
    weight = torch.exp((logp_old - sampled).clamp(-20, 20)).clamp(max=cfg.is_cap) if cfg.is_cap else None
    clips = {"clip_low": cfg.clip_low, "clip_high": cfg.clip_high, "dual_clip": cfg.dual_clip}
    loss, sums = policy_loss(logp, logp_old, advantage, mask, **clips, weight=weight)
    if any(r.logp_ref is not None for r in batch):
        kl, sums["kl"] = kl_loss(logp, per_token(r.logp_ref for r in batch), logp_old, mask)
        loss = loss + cfg.kl_coef * kl
    mismatch = (logp_old - sampled).abs()
    sums |= {
        "loss": loss.detach(),
        "mismatch": mismatch.sum(),
        "mismatch_max": max(mismatch.tolist(), default=0.0),
        "capped": (weight >= cfg.is_cap).sum() if cfg.is_cap else 0,
    }
    return loss, sums


# ---- update ------------------------------------------------------------------------------------------------
# Four ways of counting meet here:
#   row      a line of the data set; prompt_of(row) is its prompt. Neighbours with one row share the prompt.
#   k        a rollout of the step, 0 .. N-1: its place in `rollouts`, the same list on every process.
#   share    the k's that one process trains on in one update: plans[update][process]. Every process knows all
#            shares, so that all count the same tokens and yield the same number of micro-batches.
#   token    a place in a packed row (packing.py), which holds prompts as well. What comes out of the head,
#            (C,), are completion tokens only, rollout by rollout in the order of the micro-batch's k's.
@dataclass(frozen=True)
class Learner:
    """What accelerate has prepared, and how a row of the data becomes a prompt."""

    accelerator: Any
    policy: Any  # fp32 masters
    optimizer: Any
    reference: Any  # for the KL: the frozen start, or the policy, to be run in adapters_off; None without KL
    prompt_of: PromptCache

    @property
    def base(self):
        """The policy without accelerate's wrapping: its config and its way of counting positions."""
        return self.accelerator.unwrap_model(self.policy)


def plan_updates(rollouts: list[Rollout], cfg: GRPOConfig, processes: int) -> list[list[list[int]]]:
    """For each update, for each process: its share."""
    groups = [list(range(k, k + cfg.group_size)) for k in range(0, len(rollouts), cfg.group_size)]
    tokens = [rollouts[g[0]].prompt_length + sum(len(rollouts[k].completion_ids) for k in g) for g in groups]
    size = len(groups) // cfg.updates_per_step
    firsts = range(0, len(groups), size)
    return [balance(groups[i : i + size], tokens[i : i + size], processes) for i in firsts]


def packed_batches(learner: Learner, rollouts: list[Rollout], shares: list[list[int]], cfg: GRPOConfig):
    """Yield (k's, packed row) for the micro-batches of this process's share, within the token budget.

    Every process yields equally often, at the end an empty batch: sharded layers are gathered by all or none.
    """
    rank, device = learner.accelerator.process_index, learner.accelerator.device
    lengths = [(r.row, r.prompt_length, len(r.completion_ids)) for r in rollouts]
    # micro_batches counts within a share: split[process] holds places in shares[process], not k's.
    split = [micro_batches([lengths[k] for k in share], cfg.max_tokens_per_micro_batch) for share in shares]
    batches = [[shares[rank][place] for place in places] for places in split[rank]]
    batches += [[]] * (max(map(len, split)) - len(batches))
    rows_of = [dict.fromkeys(rollouts[k].row for k in batch) for batch in batches]  # each once, in order
    for i, batch in enumerate(batches):
        for rows in rows_of[i : i + 3]:  # of the next two as well, while this one is computed
            learner.prompt_of.ahead(rows)
        # A row that was drawn twice in a step makes two groups; neighbours, they are packed as one.
        by_row = itertools.groupby(batch, key=lambda k: rollouts[k].row)
        prompts = [(learner.prompt_of(row), [rollouts[k].completion_ids for k in ks]) for row, ks in by_row]
        packed = pack(prompts, learner.base)
        yield batch, {name: v.to(device) if torch.is_tensor(v) else v for name, v in packed.items()}


@torch.no_grad()
def rollout_logps(learner: Learner, model, rollouts, plans, cfg: GRPOConfig) -> dict[int, torch.Tensor]:
    """Log-probs under a model of the rollouts that this process will train on: {k: (T,)}. Collective."""
    logps = {}
    for shares in plans:
        for batch, packed in packed_batches(learner, rollouts, shares, cfg):
            pieces = token_logps(model, packed)[0].split([len(rollouts[k].completion_ids) for k in batch])
            logps |= dict(zip(batch, pieces, strict=True)) if batch else {}  # split([]) gives one empty piece
    return logps


def learning_rate_at(step: int, cfg: GRPOConfig) -> float:
    """Linear warm-up to learning_rate, then constant or in a straight line to final_learning_rate."""
    if step < cfg.warmup_steps:
        return cfg.learning_rate * (step + 1) / cfg.warmup_steps
    final = cfg.learning_rate if cfg.final_learning_rate is None else cfg.final_learning_rate
    share = (step - cfg.warmup_steps) / max(1, cfg.steps - cfg.warmup_steps)
    return cfg.learning_rate + (final - cfg.learning_rate) * share


def update(
    learner: Learner, rollouts: list[Rollout], shares: list[list[int]], cfg: GRPOConfig, lr: float
) -> UpdateStats:
    """One optimizer step on the rollouts of all shares. Collective. Returns: what this process has seen."""
    accelerator, policy, optimizer = learner.accelerator, learner.policy, learner.optimizer
    # One denominator for the whole update: a mean of means would weigh a token by the company it is in. FSDP
    # averages the gradients of the processes, hence times their number.
    n_tokens = sum(len(rollouts[k].completion_ids) for share in shares for k in share)
    scale = accelerator.num_processes / n_tokens
    stats = UpdateStats()
    for ks, packed in packed_batches(learner, rollouts, shares, cfg):
        batch = [rollouts[k] for k in ks]
        logp, entropy = token_logps(policy, packed)  # (C,), (C,)
        loss, sums = batch_loss(batch, logp, cfg)
        accelerator.backward(loss * scale)
        n, trained = len(logp), sum(map(len, batch))
        stats.add(**sums, entropy=entropy.sum(), tokens=n, trained=trained)
    stats.grad_norm = float(accelerator.clip_grad_norm_(policy.parameters(), cfg.max_grad_norm))
    stats.skipped = not math.isfinite(stats.grad_norm)
    for group in optimizer.param_groups:
        group["lr"] = lr
    if not stats.skipped:  # one bad batch must not end in NaN weights
        optimizer.step()
    optimizer.zero_grad()
    return stats


# ---- held out ----------------------------------------------------------------------------------------------
def held_out(accelerator, sampler, val, cfg: GRPOConfig) -> dict:
    """Greedy answers to the held-out rows, graded and summed up as `evaluate.py` does: {"val_...": value}."""

    scored = make_scorer(val, cfg)

    def graded(r: Rollout) -> dict:
        reason = "stop" if r.finished else "length"
        record = grade(val[r.row], r.text, finish_reason=reason, box_frame=cfg.box_frame)
        return record | {"finish_reason": reason, "score": scored(r).score}

    prompt_of = PromptCache(lambda i: sampler.encode(val[i]), cfg.image_threads)
    records = []
    chunk = max(cfg.prompts_per_step, 64)  # prompts in memory at the same time
    for start in range(0, len(val), chunk):
        rows = list(range(start, min(start + chunk, len(val))))
        seeds = [0] * len(rows)
        groups = sample_everywhere(accelerator, sampler, prompt_of, rows, 1, 0.0, seeds, graded)
        records += [record for (record,) in groups]
    summary = summarise(records) | means([record["score"] for record in records])
    return {f"val_{k}": summary[k] for k in HELD_OUT if k in summary}


# ---- samplers ----------------------------------------------------------------------------------------------
class VLLMSampler:
    """vLLM in the training processes, on their devices; `sync` copies the policy's weights into it."""

    def __init__(
        self, cfg: GRPOConfig, encoder: PromptEncoder, forbidden_ids: list[int], images_per_prompt: int
    ):
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # the engine lives here, not in a child
        on_gpu = torch.cuda.is_available()
        # On a GPU its warnings are wanted: that weights were not loaded is one of them.
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING" if on_gpu else "ERROR")
        if not on_gpu:
            os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", str(math.ceil(cfg.vllm_memory)))
            if cfg.tensor_parallel > 1:
                remove_stale_shared_memory()
        launch_alone()  # external_launcher reads what a launcher sets
        self.tokenizer, self.processes = encoder.processor.tokenizer, cfg.tensor_parallel
        self.encode = encoder.for_engine  # it computes the pixel values itself
        self.token_bias = {i: FORBIDDEN_BIAS for i in forbidden_ids}
        self.max_tokens, self.sleep_level = cfg.max_completion_length, cfg.sleep_level if on_gpu else 0
        limits = {"max_num_seqs": cfg.vllm_max_seqs, "max_num_batched_tokens": cfg.vllm_max_batched_tokens}
        on_device = {
            "dtype": "bfloat16",
            "gpu_memory_utilization": cfg.vllm_memory,
            "enable_sleep_mode": bool(cfg.sleep_level),
            "hf_overrides": {"head_dtype": "float32"},  # logits, as in the trainer's head
        }
        rng = torch.get_rng_state()  # LLM(seed=...) seeds every generator of the process
        self.llm = start_vllm(
            cfg.model,
            max_model_len=cfg.max_prompt_length + cfg.max_completion_length,
            images=images_per_prompt,
            min_pixels=cfg.min_pixels,
            max_pixels=cfg.max_pixels,
            distributed_executor_backend="external_launcher",
            tensor_parallel_size=cfg.tensor_parallel,
            seed=0,
            logprobs_mode="processed_logprobs",  # after bias and temperature: of what was sampled from
            disable_log_stats=True,
            mm_processor_cache_gb=0,  # of 4 GiB of images: rows come once an epoch
            **(on_device if on_gpu else {}),
            **{name: value for name, value in limits.items() if value},
        )
        torch.set_rng_state(rng)
        self.asleep = False

    def sync(self, model):
        """Copy the policy's parameters into the engine and drop everything computed with the old ones.

        Raises: RuntimeError if the engine then holds other values.
        """
        if self.asleep:
            self.llm.wake_up(tags=["weights"])
        # With tensor parallelism each process holds parts of some weights and the whole of others.
        vllm_reload(self.llm, whole_weights(model), check=self.processes == 1)
        self.llm.llm_engine.reset_encoder_cache()  # stale image features cost about two nats
        self.llm.reset_prefix_cache()
        if self.asleep:
            self.llm.wake_up(tags=["kv_cache"])
            self.asleep = False

    def sleep(self):
        """Give the GPU's memory to the update, until the next `sync`."""
        if self.sleep_level:
            self.llm.sleep(level=self.sleep_level)
            self.asleep = True

    def generate(self, rows: list[int], prompts: list[Prompt], n: int, temperature: float, seeds: list[int]):
        """n Rollouts of each prompt, as a list a prompt. Temperature 0 is greedy."""
        from vllm import SamplingParams

        same = {"n": n, "temperature": temperature, "max_tokens": self.max_tokens, "detokenize": False}
        same |= {"logprobs": 0, "flat_logprobs": True, "logit_bias": self.token_bias}  # 0: the token's own
        params = [SamplingParams(seed=seed, **same) for seed in seeds]
        requests = zip(range(len(rows)), prompts, params, strict=True)
        groups = [[] for _ in rows]
        for k, prompt, output in vllm_generate(self.llm, requests, at_once=None):
            for o in output.outputs:
                ids, logps = list(o.token_ids), o.logprobs.logprobs
                assert o.logprobs.token_ids == ids, f"row {prompt.sample.id}: log-probs of other tokens"
                text = self.tokenizer.decode(ids, skip_special_tokens=True)
                finished = o.finish_reason == "stop"
                groups[k].append(Rollout(rows[k], len(prompt.ids), ids, logps, text, finished))
        return groups

    def close(self):
        import gc

        del self.llm
        gc.collect()


class HFSampler:
    """The same calls on transformers' `generate`: slow, for machines without vLLM."""

    processes = 1  # that share an engine

    def __init__(self, cfg: GRPOConfig, encoder: PromptEncoder, forbidden_ids: list[int]):
        self.cfg, self.tokenizer, self.forbidden_ids = cfg, encoder.processor.tokenizer, forbidden_ids
        self.encode, self.model = encoder, None

    @torch.no_grad()
    def sync(self, model):
        """Alone, sample from the policy itself; of a sharded one, keep a whole copy on every process."""
        if not hasattr(next(model.parameters()), "full_tensor"):
            self.model = model
            return
        if self.model is None:
            dtype = torch.bfloat16 if model.device.type == "cuda" else torch.float32
            self.model = load_model(self.cfg, self.forbidden_ids, dtype).to(model.device)
        held = self.model.state_dict()
        for name, weight in whole_weights(model):
            held[name].copy_(weight)

    def generate(self, rows: list[int], prompts: list[Prompt], n: int, temperature: float, seeds: list[int]):
        """n Rollouts of each prompt. One prompt at a time: no padding, and its own seed."""
        how = {"max_new_tokens": self.cfg.max_completion_length, "temperature": temperature}
        how |= {"token_bias": {i: FORBIDDEN_BIAS for i in self.forbidden_ids}, "with_logps": True}
        was_training, groups = self.model.training, []
        self.model.eval()
        for row, prompt, seed in zip(rows, prompts, seeds, strict=True):
            with torch.random.fork_rng():
                torch.manual_seed(seed)
                generated = hf_generate(self.model, self.tokenizer, [prompt] * n, **how)
            texts = [self.tokenizer.decode(g.ids, skip_special_tokens=True) for g in generated]
            groups.append(
                [
                    Rollout(row, len(prompt.ids), g.ids, g.logps, text, g.finished)
                    for g, text in zip(generated, texts, strict=True)
                ]
            )
        self.model.train(was_training)
        return groups

    def sleep(self):
        pass

    def close(self):
        self.model = None


# ---- models ------------------------------------------------------------------------------------------------
def load_model(cfg: GRPOConfig, forbidden_ids: list[int], dtype: torch.dtype):
    """The start of the run, with `use_logprob_head`: the policy, or the KL reference."""
    from transformers import AutoModelForImageTextToText

    model = AutoModelForImageTextToText.from_pretrained(cfg.model, dtype=dtype)
    use_packed_attention(model)
    use_logprob_head(model, forbidden_ids, cfg.temperature, cfg.logit_chunk)
    return model


def make_learner(accelerator, cfg: GRPOConfig, forbidden_ids: list[int], prompt_of: PromptCache) -> Learner:
    """The policy with fp32 masters, its optimizer and, with a KL, the reference: loaded, then sharded."""
    from accelerate.utils.fsdp_utils import fsdp2_prepare_model

    of_frozen = torch.bfloat16 if accelerator.device.type == "cuda" else torch.float32
    # What is trained is float32: bf16 masters would round a step of 1e-6 away.
    policy = load_model(cfg, forbidden_ids, of_frozen if cfg.lora_rank else torch.float32)
    if cfg.gradient_checkpointing:
        policy.gradient_checkpointing_enable({"use_reentrant": False})
    if cfg.freeze_vision:
        policy.model.visual.requires_grad_(False)
    if cfg.lora_rank:
        add_adapters(policy, cfg.lora_rank, cfg.lora_alpha, cfg.lora_vision)
    trained = [p for p in policy.parameters() if p.requires_grad]
    accelerator.print(
        f"{sum(p.numel() for p in policy.parameters()):,} parameters, "
        f"{sum(p.numel() for p in trained):,} of them trained"
    )
    groups = [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": cfg.weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},  # norms and biases
    ]
    betas, fused = (0.9, cfg.adam_beta2), accelerator.device.type == "cuda"  # unfused: one more copy of all
    optimizer = torch.optim.AdamW(groups, lr=cfg.learning_rate, betas=betas, fused=fused)
    del trained, groups  # they would hold on to the whole parameters
    policy, optimizer = accelerator.prepare(policy.train(), optimizer)  # train(): or nothing is checkpointed
    reference = policy if cfg.kl_coef else None
    if cfg.kl_coef and not cfg.lora_rank:
        reference = load_model(cfg, forbidden_ids, of_frozen).eval().requires_grad_(False)
        if accelerator.is_fsdp2:  # accelerate prepares one model only
            reference = fsdp2_prepare_model(accelerator, reference)
    return Learner(accelerator, policy, optimizer, reference, prompt_of)


# ---- main --------------------------------------------------------------------------------------------------
PREEMPTED = 75  # exit status after SIGTERM: state saved, run me again
FREE_TO_CHANGE = frozenset(  # keys that a continued run may change: they do not change what it computes
    "out resume keep_last keep_best save_every samples_every tracker vllm_memory vllm_max_seqs "
    "vllm_max_batched_tokens tensor_parallel sleep_level max_tokens_per_micro_batch logit_chunk "
    "gradient_checkpointing max_skipped val_data val_split val_limit val_every timeout_min image_threads "
    "image_cache_gb gpus max_bad_rows skip_bad_rows skip_long_prompts".split()  # bounds: the same rows pass
)


def main():
    cfg = GRPOConfig.parse_args()
    if cfg.dry_run:
        raise SystemExit(dry_run(cfg) if os.environ.get("RANK", "0") == "0" else 0)
    try:
        train(cfg)
    except (CheckpointError, DiskFull, RewardError) as error:
        raise SystemExit(f"error: {error}") from None


def start(cfg: GRPOConfig):
    """The processes, and the record of the run: the accelerator. Ends the program where it cannot run."""
    from transformers import AutoConfig, AutoModelForImageTextToText

    out = Path(cfg.out)
    if why := lacking_tracker(cfg.tracker):
        raise SystemExit(f"error: {why}")
    with plain_errors():
        model_config = AutoConfig.from_pretrained(cfg.model)
        check_family(cfg.model, model_config)
    kind = AutoModelForImageTextToText._model_mapping[type(model_config)]
    log_with = None if cfg.tracker == "none" else cfg.tracker
    with plain_errors():
        accelerator = make_accelerator(
            sorted(kind._no_split_modules), cfg.timeout_min, project_dir=cfg.out, log_with=log_with
        )
    if (world := accelerator.num_processes) % cfg.tensor_parallel:
        raise SystemExit(f"tensor_parallel {cfg.tensor_parallel}: expected a divisor of {world} processes")
    # A falling learning rate depends on the number of steps, a constant one does not.
    refuse_another_run(cfg, out, FREE_TO_CHANGE | ({"steps"} if cfg.final_learning_rate is None else set()))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        write_run_record(cfg, out)
    return accelerator


def load_rows(cfg: GRPOConfig, encoder: PromptEncoder, accelerator):
    """(training rows, held-out rows), all checked; says what is used and what is not."""
    limits = dict(prompt_length=encoder.length, max_prompt_length=cfg.max_prompt_length)
    with plain_errors():
        loaded = {"train": load_samples(**cfg.source(cfg.data, cfg.split), **limits)}
        if cfg.val_every and cfg.val_split:
            source = cfg.source(cfg.val_data or cfg.data, cfg.val_split)
            apart = dict(limit=cfg.val_limit, apart_from=loaded["train"])
            loaded["held out"] = load_samples(**source, **limits, **apart)
    if accelerator.is_main_process:
        print(report_rows(loaded, Path(cfg.out, "bad_rows.txt")), flush=True)
        if (n := loaded["train"].open_answers) and cfg.reward == "spatial" and not cfg.judge_answers:
            print(
                f"{n} open answers are right as equal texts only; judge_answers=true reads them as evaluation"
            )
    return loaded["train"], loaded.get("held out", [])


def train(cfg: GRPOConfig):
    from transformers import AutoProcessor

    out, started, accelerator = Path(cfg.out), time.time(), start(cfg)
    rank, world, say = accelerator.process_index, accelerator.num_processes, accelerator.print
    with plain_errors():
        processor = AutoProcessor.from_pretrained(cfg.model)
        budget = cfg.min_pixels, cfg.max_pixels
        encoder = PromptEncoder(processor, cfg.template, *budget, cfg.box_frame)
        make_scorer([], cfg)  # a reward function that is not there ends the run here
    data, val = load_rows(cfg, encoder, accelerator)
    refuse_other_rows(accelerator, out, data.fingerprint())
    say(arithmetic(cfg, world, len(data)))
    # Light prompts to sample from, and those to train on with the same images, where they are here. A pixel
    # takes 3 bytes in an image and 12 or 24 in its values, so the smaller cache gets a fifth.
    cache = cfg.image_cache_gb * 2**30
    light = PromptCache(lambda row: encoder.for_engine(data[row]), cfg.image_threads, cache / 5)
    prompt_of = PromptCache(
        lambda row: encoder.with_pixels(light.kept.get(row) or encoder.for_engine(data[row])),
        cfg.image_threads,
        cache * 4 / 5,
    )

    torch.manual_seed(cfg.seed)
    forbidden = processor.tokenizer.convert_tokens_to_ids(["<|image_pad|>", "<|video_pad|>"])
    with in_turn(accelerator):
        learner = make_learner(accelerator, cfg, forbidden, prompt_of)
    # Before the engine takes its share of the GPU: Adam's moments are made here, and now there is room.
    longer = " or more steps" if cfg.final_learning_rate is None else ""
    first = resume(accelerator, learner.policy, learner.optimizer, out, cfg.resume, cfg.steps, longer)
    start_tracker(accelerator, cfg, "grpo", first)
    if cfg.sampler == "vllm":
        sampler = VLLMSampler(cfg, encoder, forbidden, max(s.max_images for s in (data, val or data)))
    else:
        sampler = HFSampler(cfg, encoder, forbidden)
    sampler.sync(learner.base)
    stop = Stop()

    def log(m: dict):
        if accelerator.is_main_process:
            append(out / "metrics.jsonl", json.dumps(m) + "\n")
        say(step_line(m, cfg.steps, time.time() - started, m["step"] - first))
        if cfg.tracker != "none":
            accelerator.log({k: v for k, v in m.items() if isinstance(v, (int, float))}, step=m["step"])

    def save_state(step: int, m: dict):
        scores = {k: v for k, v in m.items() if k.startswith("val_")}
        models = learner.policy, learner.optimizer, processor
        save(accelerator, *models, out, step, scores, cfg.keep_last, cfg.keep_best)

    scored = make_scorer(data, cfg)

    def roll_out(rows: list[int], step: int) -> list[list[Rollout]]:
        before = [rows[:k].count(row) for k, row in enumerate(rows)]  # across two epochs one may come twice
        seeds = [
            request_seed(cfg.seed, step, row, *[n] * (n > 0)) for row, n in zip(rows, before, strict=True)
        ]
        shown = light if cfg.sampler == "vllm" else prompt_of
        return sample_everywhere(
            accelerator, sampler, shown, rows, cfg.group_size, cfg.temperature, seeds, scored
        )

    if first == 0 and val:
        log({"step": 0} | held_out(accelerator, sampler, val, cfg))
    done, m = first, {}
    skipped, stopped_by = 0, 0  # updates in a row without a finite gradient; signal
    for step in range(first, cfg.steps):
        # draw prompts, sample completions, score them
        t0 = time.time()
        rows = batch_at(cfg.seed, step, cfg.prompts_per_step, len(data))
        groups = roll_out(rows, step)  # P lists of G
        groups, replaced = replace_dead(groups, rows, roll_out, len(data), step, cfg)
        rollouts = [r for group in groups for r in group]  # N
        advantages = group_advantages(reward_matrix(groups))  # (P, G)
        for r, advantage in zip(rollouts, advantages.flatten().tolist(), strict=True):
            r.advantage = advantage
        sampler.sleep()
        t1 = time.time()
        if stopped_by := stop.agreed():  # safe: the weights are still those of the step's start
            break

        # log-probs of the policy that sampled and of the start, then the updates
        plans = plan_updates(rollouts, cfg, world)
        t2 = time.time()
        if cfg.updates_per_step > 1:  # a single update starts where the policy still stands
            for k, logp in rollout_logps(learner, learner.policy, rollouts, plans, cfg).items():
                rollouts[k].logp_old = logp
        if learner.reference:
            with adapters_off(learner.reference):
                for k, logp in rollout_logps(learner, learner.reference, rollouts, plans, cfg).items():
                    rollouts[k].logp_ref = logp
        t3 = time.time()
        lr, quiet = learning_rate_at(step, cfg), None if rank == 0 else True
        bar = tqdm(plans, desc="updates", disable=quiet, leave=False)
        updates = [update(learner, rollouts, shares, cfg, lr) for shares in bar]
        t4 = time.time()
        sampler.sync(learner.base)
        t5 = time.time()

        # measure, evaluate, save
        done = step + 1
        m = {"step": done, "lr": lr} | step_metrics(groups, gather([updates]))
        m |= {"replaced": replaced, "gen_s": t1 - t0, "logp_s": t3 - t2, "update_s": t4 - t3}
        m |= {"sync_s": t5 - t4, "mem_gb": mem_gb(), "gen_tokens_per_s": m["tokens"] / m["gen_s"]}
        m["update_tokens_per_s"] = m.pop("trained") / m["update_s"]
        if val and (done % cfg.val_every == 0 or done == cfg.steps):
            m |= held_out(accelerator, sampler, val, cfg)
        if cfg.samples_every and (done % cfg.samples_every == 0 or done == 1) and accelerator.is_main_process:
            saved = save_samples(out / "samples" / f"step-{done:05d}", groups, data, encoder)
            log_samples(accelerator, cfg.tracker, done, saved)
        log(m)
        check_mismatch(m, on_gpu=accelerator.device.type == "cuda")
        light.clear()
        prompt_of.clear()
        return_freed_memory()
        for one in updates:
            skipped = skipped + 1 if one.skipped else 0
        stopped_by = stop.agreed()
        if done % cfg.save_every == 0 or done == cfg.steps or stopped_by or skipped >= cfg.max_skipped:
            save_state(done, m)
        if skipped >= cfg.max_skipped:
            raise SystemExit(
                f"step {done}: the last {skipped} updates had no finite gradient; {out} holds "
                "the state before them: lower learning_rate, or look at the samples"
            )
        if stopped_by:
            break
    if stopped_by:
        saved = any(gather([(out / f"checkpoint-{done}").exists()]))
        if done and not saved:  # after no step there is nothing to lose
            save_state(done, m)
        again = ["accelerate", "launch", *sys.argv] if launched() else sys.orig_argv
        say(f"stopped after step {done}; continue with: {shlex.join(again)}")
    sampler.close()  # the process group goes with it, so nothing collective may follow
    end_tracker(accelerator)
    if stopped_by == signal.SIGTERM:
        raise SystemExit(PREEMPTED)


if __name__ == "__main__":
    main()
    leave()
