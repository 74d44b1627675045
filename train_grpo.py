"""GRPO with the gated spatial reward: rollout (vLLM), reward, group advantage, clipped update, weight sync.

    accelerate launch train_grpo.py configs/7b.yaml              # the paper's run: 4 x 80 GB, about 15 h
    python train_grpo.py configs/tiny.yaml                       # the whole loop on a laptop CPU, minutes
    python train_grpo.py configs/7b.yaml dry_run=true            # what would run, and what is missing

What separates this from GRPO as first published (arXiv:2402.03300), beside the reward:
  - loss: one token mean over all sequences of an update (a mean per sequence favours short right answers and
    long wrong ones), clipped higher than lower (DAPO), dual-clipped for negative advantages;
  - KL to the start: k3 estimator, weighted by the ratio so that its gradient is that of the KL;
  - the sampler's own log-probs enter as a truncated importance weight, since vLLM's arithmetic is its own;
  - a group of (nearly) equal rewards gives exactly zero advantage instead of amplified float noise.
Batch and seeds are functions of (seed, step): a resumed run repeats what an undisturbed one would have done.
"""

import json
import math
import os
import re
import shlex
import shutil
import signal
import sys
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import model_validator
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

from config import Config, opt, to_yaml, write_run_record
from data import (
    Prompt,
    PromptEncoder,
    Sequenced,
    batch_at,
    load_samples,
    micro_batches,
    pack,
    use_packed_attention,
)
from evaluate import grade, summarise
from rewards import Score, Weights, score_completion, vanilla_reward

FORBIDDEN_BIAS = -100.0  # on the logits of image and video tokens: a sampled one would break the next forward


class GRPOConfig(Config):
    # data
    data: str = opt("OX-PIXL/STVQA-7K", "Hub id, .parquet or .jsonl file, parquet or save_to_disk folder")
    split: str = opt("train", "split to train on")
    revision: str | None = opt(None, "Hub revision of the data")
    columns: dict[str, str] = opt({}, "column names that differ from STVQA-7K's: {ours: yours}")
    val_data: str | None = opt(None, "held-out data; empty: same as data")
    val_split: str = opt("val", "held-out split")
    val_limit: int = opt(256, "held-out rows used, the first ones", ge=1)
    val_every: int = opt(5, "steps between held-out evaluations (greedy); 0: none", ge=0)
    skip_bad_rows: bool = opt(False, "leave out and list rows that fail the checks")
    skip_long_prompts: bool = opt(False, "leave out and list rows with too long a prompt")
    template: Literal["spatial_thinker", "reasoning", "no_reasoning", "problem"] = opt(
        "problem", "prompt; problem: the row's own")
    min_pixels: int = opt(512 * 512, "images are scaled into [min_pixels, max_pixels]", ge=784)
    max_pixels: int = opt(2048 * 2048, "images are scaled into [min_pixels, max_pixels]", ge=784)
    max_prompt_length: int = opt(6144, "longest prompt, tokens with the image's", ge=1)
    # reward
    reward: Literal["spatial", "vanilla"] = opt("spatial", "dense and gated, or accuracy + format")
    weight_format: float = opt(0.1, "reward weight", ge=0, le=1)
    weight_count: float = opt(0.2, "reward weight", ge=0, le=1)
    weight_accuracy: float = opt(0.5, "reward weight", ge=0, le=1)
    weight_spatial: float = opt(0.2, "reward weight", ge=0, le=1)
    # rollout
    model: str = opt("Qwen/Qwen2.5-VL-7B-Instruct", "Hub id or folder of the start (and of the KL reference)")
    sampler: Literal["vllm", "hf"] = opt("vllm", "vLLM in this process, or transformers' generate")
    prompts_per_step: int = opt(512, "P: prompts drawn a step, over all processes", ge=1)
    group_size: int = opt(8, "G: completions a prompt", ge=2)
    temperature: float = opt(1.0, "of the rollouts", gt=0)
    max_completion_length: int = opt(2048, "tokens; what has not ended by then is cut", ge=1)
    vllm_memory: float = opt(0.6, "share of the GPU's memory for vLLM (on a CPU: GiB of KV cache)", gt=0)
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
    freeze_vision: bool = opt(False, "train the language model only")
    max_tokens_per_micro_batch: int = opt(16384, "tokens packed into one forward pass, per process", ge=1)
    logit_chunk: int = opt(1024, "tokens whose logits exist at the same time", ge=1)
    gradient_checkpointing: bool = opt(True, "recompute activations: less memory, a third more time")
    # run
    out: str = opt("runs/grpo", "folder of the run")
    seed: int = opt(0, "of batch order and sampling", ge=0)
    save_every: int = opt(5, "steps between checkpoints (and one at the end)", ge=1)
    keep_last: int = opt(2, "checkpoints kept", ge=1)
    resume: Literal["auto", "never"] = opt("auto", "continue a run found in out; never: refuse to")
    samples_every: int = opt(5, "steps between saved samples of completions with their images; 0: none", ge=0)
    tracker: Literal["tensorboard", "wandb", "none"] = opt("tensorboard", "besides metrics.jsonl")
    dry_run: bool = opt(False, "print what would run and what is missing, load no model, exit")

    @model_validator(mode="after")
    def _check(self):
        if self.prompts_per_step % self.updates_per_step:
            raise ValueError(f"prompts_per_step {self.prompts_per_step} is not a multiple of "
                             f"updates_per_step {self.updates_per_step}: prompts would be dropped")
        if self.min_pixels > self.max_pixels:
            raise ValueError(f"min_pixels {self.min_pixels} > max_pixels {self.max_pixels}")
        _ = self.weights
        return self

    @property
    def weights(self) -> Weights:
        return Weights(self.weight_format, self.weight_count, self.weight_accuracy, self.weight_spatial)


# ---- rollout -----------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Rollout:
    """One sampled completion of one prompt."""

    prompt: Prompt
    completion_ids: list[int]  # (T,), with the end token where it came
    sampler_logps: list[float]  # (T,), of the distribution that was sampled from
    text: str  # without special tokens
    finished: bool  # False: cut at max_completion_length

    @property
    def sequence(self) -> Sequenced:
        return Sequenced(self.prompt, self.completion_ids)


def request_seed(*path: int) -> int:
    """A seed for one request from (run seed, step, prompt): independent of batch, rank and resumption."""
    return int(np.random.SeedSequence(path).generate_state(1)[0])


class VLLMSampler:
    """vLLM in this process, on this process's device; `sync` copies the policy's weights into it."""

    def __init__(self, cfg: GRPOConfig, processor, forbidden_ids: list[int], images_per_prompt: int):
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # the engine lives here, not in a child
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        on_gpu = torch.cuda.is_available()
        if not on_gpu:
            os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", str(math.ceil(cfg.vllm_memory)))
        for name, value in {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0, "MASTER_ADDR": "127.0.0.1",
                            "MASTER_PORT": free_port()}.items():
            os.environ.setdefault(name, str(value))  # external_launcher reads what a launcher would have set
        from vllm import LLM

        self.tokenizer, self.forbidden_ids = processor.tokenizer, forbidden_ids
        self.max_tokens = cfg.max_completion_length
        length = cfg.max_prompt_length + cfg.max_completion_length
        if on_gpu:
            device = {"dtype": "bfloat16", "gpu_memory_utilization": cfg.vllm_memory,
                      "enable_sleep_mode": True}
        else:  # a prompt prefilled in two chunks rewinds its generator, which a CPU generator cannot do
            device = {"dtype": "float32", "enforce_eager": True, "enable_chunked_prefill": False,
                      "max_num_batched_tokens": max(8192, length)}
        rng = torch.get_rng_state()  # LLM(seed=...) seeds every generator of the process
        self.llm = LLM(
            model=cfg.model, distributed_executor_backend="external_launcher", tensor_parallel_size=1, seed=0,
            logprobs_mode="processed_logprobs", max_model_len=length, disable_log_stats=True, **device,
            limit_mm_per_prompt={"image": images_per_prompt, "video": 0},
            mm_processor_kwargs={"min_pixels": cfg.min_pixels, "max_pixels": cfg.max_pixels})
        torch.set_rng_state(rng)
        self.asleep = False

    def sync(self, model):
        """Copy the policy's parameters into the engine and drop everything computed with the old ones."""
        if self.asleep:
            self.llm.wake_up(tags=["weights"])
        # state_dict, not named_parameters: a tied head is listed in it, and would go stale otherwise.
        weights = iter(model.state_dict().items())
        self.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": weights})
        self.llm.llm_engine.reset_encoder_cache()  # stale image features cost about two nats
        self.llm.reset_prefix_cache()
        if self.asleep:
            self.llm.wake_up(tags=["kv_cache"])
            self.asleep = False

    def sleep(self):
        """Give the GPU's memory to the update, until the next `sync`."""
        if torch.cuda.is_available():
            self.llm.sleep(level=2)  # 2: the weights are dropped too, sync brings the new ones
            self.asleep = True

    def generate(self, prompts: list[Prompt], n: int, temperature: float, seeds: list[int]):
        """n completions of each prompt, as a list of n Rollouts a prompt. Temperature 0 is greedy."""
        from vllm import SamplingParams

        bias = {i: FORBIDDEN_BIAS for i in self.forbidden_ids}
        requests = [{"prompt_token_ids": p.vllm_ids, "multi_modal_data": {"image": p.images}} if p.images else
                    {"prompt_token_ids": p.vllm_ids} for p in prompts]
        params = [SamplingParams(n=n, temperature=temperature, seed=seed, max_tokens=self.max_tokens,
                                 logprobs=0, logit_bias=bias, detokenize=False) for seed in seeds]
        rollouts = []
        for prompt, output in zip(prompts, self.llm.generate(requests, params, use_tqdm=False), strict=True):
            assert output.prompt_token_ids == prompt.ids, f"row {prompt.sample.id}: vLLM reads another prompt"
            rollouts.append([])
            for o in output.outputs:
                ids = list(o.token_ids)
                logps = [step[i].logprob for step, i in zip(o.logprobs, ids, strict=True)]
                text = self.tokenizer.decode(ids, skip_special_tokens=True)
                rollouts[-1].append(Rollout(prompt, ids, logps, text, o.finish_reason == "stop"))
        return rollouts

    def close(self):
        import gc

        del self.llm
        gc.collect()


class HFSampler:
    """The same calls on transformers' `generate`: slow, for machines without vLLM."""

    def __init__(self, cfg: GRPOConfig, processor, forbidden_ids: list[int]):
        self.tokenizer, self.forbidden_ids = processor.tokenizer, forbidden_ids
        self.max_tokens, self.end_ids = cfg.max_completion_length, end_token_ids(processor.tokenizer)
        self.model = None

    def sync(self, model):
        self.model = model  # it samples from the policy itself

    @torch.no_grad()
    def generate(self, prompts: list[Prompt], n: int, temperature: float, seeds: list[int]):
        model, device = self.model, self.model.device
        greedy, was_training = temperature == 0, model.training
        model.eval()
        rollouts = []
        for prompt, seed in zip(prompts, seeds, strict=True):  # one at a time: no padding, a seed of its own
            ids = torch.tensor([prompt.ids], device=device).repeat(n, 1)
            images = {} if prompt.pixel_values is None else {
                "pixel_values": prompt.pixel_values.repeat(n, 1).to(device),
                "image_grid_thw": prompt.image_grid_thw.repeat(n, 1).to(device)}
            with torch.random.fork_rng():
                torch.manual_seed(seed)
                out = model.generate(
                    input_ids=ids, attention_mask=torch.ones_like(ids),
                    mm_token_type_ids=(ids == model.config.image_token_id).int(), **images,
                    do_sample=not greedy, temperature=None if greedy else temperature, top_k=0, top_p=1.0,
                    sequence_bias=[[[i], FORBIDDEN_BIAS] for i in self.forbidden_ids],
                    max_new_tokens=self.max_tokens, eos_token_id=self.end_ids, return_dict_in_generate=True,
                    output_scores=True)
            logps = torch.stack(out.scores, 1).float().log_softmax(-1)  # (n, T, V), with bias and temperature
            new = out.sequences[:, len(prompt.ids):]
            logps = logps.gather(2, new[..., None])[..., 0]  # (n, T)
            rollouts.append([])
            for row, row_logps in zip(new.tolist(), logps.tolist(), strict=True):
                end = next((t + 1 for t, i in enumerate(row) if i in self.end_ids), None)
                text = self.tokenizer.decode(row[:end], skip_special_tokens=True)
                rollouts[-1].append(Rollout(prompt, row[:end], row_logps[:end], text, end is not None))
        model.train(was_training)
        return rollouts

    def sleep(self):
        pass

    def close(self):
        self.model = None


def end_token_ids(tokenizer) -> list[int]:
    ids = tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
    return sorted({i for i in [*ids, tokenizer.eos_token_id] if i is not None})


def free_port() -> int:
    import socket

    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


# ---- reward and advantage ----------------------------------------------------------------------------------
def score(rollout: Rollout, cfg: GRPOConfig) -> Score:
    """The configured reward of one rollout. A completion that was cut off is scored like any other text."""
    sample = rollout.prompt.sample
    if cfg.reward == "vanilla":
        terms = vanilla_reward(rollout.text, sample.ground_truth)
        return Score(terms["reward"], terms["format"], 0.0, terms["accuracy"], 0.0)
    return score_completion(rollout.text, sample.ground_truth, sample.size, weights=cfg.weights)


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


# ---- log-probs ---------------------------------------------------------------------------------------------
def use_logprob_head(model, forbidden_ids: list[int], temperature: float, chunk: int):
    """Let `model.lm_head` return log-probs and entropies, chunk by chunk, while `lm_head.targets` is set.

    The logits of a 152k vocabulary take 0.6 MB a token; here those of at most `chunk` tokens exist at a time,
    also in the backward pass, which recomputes them. The head stays the module that forward calls, once:
    under FSDP its weight is gathered, and its gradient reduced, like any other.
    """
    head = model.lm_head
    bias = torch.zeros(head.weight.shape[0])  # (V,)
    bias[forbidden_ids] = FORBIDDEN_BIAS

    def logp_and_entropy(hidden, targets):
        logits = F.linear(hidden, head.weight).float()  # (chunk, V)
        logits = logits + bias.to(logits.device)
        logps = (logits / temperature).log_softmax(-1)
        with torch.no_grad():
            entropy = -(logps.exp() * logps).sum(-1)
        return torch.stack([logps.gather(1, targets[:, None])[:, 0], entropy], -1)  # (chunk, 2)

    def forward(hidden):
        if head.targets is None:
            return F.linear(hidden, head.weight)
        pieces = zip(hidden[0].split(chunk), head.targets.split(chunk), strict=True)
        pieces = [checkpoint(logp_and_entropy, h, t, use_reentrant=False) for h, t in pieces]
        return torch.cat(pieces)[None]  # (1, N, 2)

    head.targets = None
    head.forward = forward


def token_logps(model, batch: dict) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probs and entropies (nats) of a packed batch's completion tokens: (N,), (N,), sequence by sequence.

    One function for policy, old policy and reference; at the sampler's temperature, with its token biases.
    `batch` comes from data.pack; `model` went through `use_logprob_head`.
    """
    inputs = dict(batch)
    at = inputs.pop("target_positions")  # (N,)
    head = getattr(model, "module", model).lm_head
    head.targets = batch["input_ids"][0, at]
    try:
        # The token at position t is predicted by the hidden state at t - 1.
        out = model(**inputs, use_cache=False, logits_to_keep=at - 1).logits[0]  # (N, 2)
    finally:
        head.targets = None
    return out[:, 0], out[:, 1].detach()


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
        stats = {"clip_high": (advantages > 0) & (ratio > 1 + clip_high),
                 "clip_low": (advantages < 0) & (ratio < 1 - clip_low),
                 "clip_dual": bounded < loss}
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


# ---- update ------------------------------------------------------------------------------------------------
def packed_batches(rollouts: list[Rollout], model, cfg: GRPOConfig, device):
    """Yield (indices into rollouts, packed batch on the device) within the token budget."""
    sequences = [r.sequence for r in rollouts]
    for group in micro_batches([len(s) for s in sequences], cfg.max_tokens_per_micro_batch):
        batch = pack([sequences[i] for i in group], model, model.config.image_token_id)
        yield group, {k: v.to(device) if torch.is_tensor(v) else v for k, v in batch.items()}


@torch.no_grad()
def rollout_logps(model, base, rollouts: list[Rollout], cfg: GRPOConfig, device) -> list[torch.Tensor]:
    """Log-probs of every rollout under a model: N tensors (T,)."""
    logps = []
    for group, batch in packed_batches(rollouts, base, cfg, device):
        logps += token_logps(model, batch)[0].split([len(rollouts[i].completion_ids) for i in group])
    return logps


def learning_rate_at(step: int, cfg: GRPOConfig) -> float:
    """Linear warm-up to learning_rate, then constant or in a straight line to final_learning_rate."""
    if step < cfg.warmup_steps:
        return cfg.learning_rate * (step + 1) / cfg.warmup_steps
    final = cfg.learning_rate if cfg.final_learning_rate is None else cfg.final_learning_rate
    share = (step - cfg.warmup_steps) / max(1, cfg.steps - cfg.warmup_steps)
    return cfg.learning_rate + (final - cfg.learning_rate) * share


def update(accelerator, policy, optimizer, rollouts, advantages, logps_old, logps_ref, cfg, lr) -> Counter:
    """One optimizer step on these rollouts: lists of N. Returns sums over the tokens of this process.

    logps_old None: the policy is still the one that sampled, and its own log-probs serve.
    """
    device, base = accelerator.device, accelerator.unwrap_model(policy)
    n_tokens = torch.tensor(float(sum(len(r.completion_ids) for r in rollouts)), device=device)
    # One denominator for the whole update over all ranks; the factor undoes the mean of data parallelism.
    scale = accelerator.num_processes / accelerator.reduce(n_tokens, "sum")
    sums = Counter()
    for group, batch in packed_batches(rollouts, base, cfg, device):
        lengths = torch.tensor([len(rollouts[i].completion_ids) for i in group], device=device)
        logp, entropy = token_logps(policy, batch)  # (N,), (N,)
        logp_old = torch.cat([logps_old[i] for i in group]) if logps_old else logp.detach()
        sampled = torch.tensor([x for i in group for x in rollouts[i].sampler_logps], device=device)
        advantage = torch.tensor([advantages[i] for i in group], device=device)
        advantage = advantage.repeat_interleave(lengths)  # (N,)
        mask = torch.ones_like(logp)
        weight = torch.exp((logp_old - sampled).clamp(-20, 20)).clamp(max=cfg.is_cap) if cfg.is_cap else None
        loss, stats = policy_loss(logp, logp_old, advantage, mask, clip_low=cfg.clip_low,
                                  clip_high=cfg.clip_high, dual_clip=cfg.dual_clip, weight=weight)
        if logps_ref:
            kl, stats["kl"] = kl_loss(logp, torch.cat([logps_ref[i] for i in group]), logp_old, mask)
            loss = loss + cfg.kl_coef * kl
        accelerator.backward(loss * scale)
        mismatch = (logp_old - sampled).abs()
        stats |= {"loss": loss.detach(), "entropy": entropy.sum(), "mismatch": mismatch.sum(),
                  "tokens": lengths.sum(), "packed": batch["input_ids"].numel()}
        sums.update({name: float(value) for name, value in stats.items()})
        sums["mismatch_max"] = max(sums["mismatch_max"], float(mismatch.max()))
    grad_norm = float(accelerator.clip_grad_norm_(policy.parameters(), cfg.max_grad_norm))
    for group in optimizer.param_groups:
        group["lr"] = lr
    if math.isfinite(grad_norm):
        optimizer.step()
        sums["grad_norm"] = grad_norm
    else:
        sums["skipped"] = 1  # one bad batch must not end in NaN weights
    optimizer.zero_grad()
    return sums


# ---- checkpoints -------------------------------------------------------------------------------------------
def checkpoints(out: Path) -> list[Path]:
    """Whole checkpoints of a run, oldest first."""
    found = [p for p in out.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", p.name)]
    return sorted(found, key=lambda p: int(p.name.split("-")[1]))


def save_checkpoint(accelerator, policy, processor, out: Path, step: int, scores: dict, keep_last: int):
    """Model, optimizer, RNG state and what `merge.py` needs, under a temporary name until all is written."""
    tmp, final = out / f"checkpoint-{step}.tmp", out / f"checkpoint-{step}"
    if accelerator.is_main_process:
        shutil.rmtree(tmp, ignore_errors=True)
    accelerator.wait_for_everyone()
    accelerator.save_state(str(tmp))
    accelerator.wait_for_everyone()  # every rank writes a part
    if accelerator.is_main_process:
        model = accelerator.unwrap_model(policy)
        model.config.save_pretrained(tmp / "hf")
        model.generation_config.save_pretrained(tmp / "hf")
        processor.save_pretrained(tmp / "hf")
        (tmp / "trainer.json").write_text(json.dumps({"step": step, "scores": scores}))
        shutil.rmtree(final, ignore_errors=True)
        os.replace(tmp, final)
        for old in checkpoints(out)[:-keep_last]:
            shutil.rmtree(old)
    accelerator.wait_for_everyone()


def resume(accelerator, out: Path) -> int:
    """Load the last checkpoint, cut off the metrics of steps that were lost; returns the finished steps."""
    found = checkpoints(out)
    step = 0
    if found:
        accelerator.load_state(str(found[-1]))
        step = json.loads((found[-1] / "trainer.json").read_text())["step"]
    metrics = out / "metrics.jsonl"
    if accelerator.is_main_process and metrics.exists():
        lines = [line for line in metrics.read_text().splitlines(keepends=True)
                 if line.endswith("\n") and found and json.loads(line)["step"] <= step]
        tmp = metrics.with_suffix(".tmp")
        tmp.write_text("".join(lines))
        os.replace(tmp, metrics)
    accelerator.wait_for_everyone()
    return step


# ---- metrics -----------------------------------------------------------------------------------------------
def step_line(m: dict, cfg: GRPOConfig, elapsed_s: float, done: int) -> str:
    """The terminal's line for one step."""
    parts = [f"step {m['step']}/{cfg.steps}"]
    if "reward" in m:
        parts += [f"reward {m['reward']:.3f}", f"fmt {m['format']:.2f} cnt {m['count']:.2f} "
                  f"acc {m['accuracy']:.2f} spa {m['spatial']:.2f}",
                  f"dead {m['dead']:.0%} cut {m['cut']:.0%}", f"len {m['length']:.0f}",
                  f"kl {m['kl']:.4f}", f"gnorm {m['grad_norm']:.2f}", f"mis {m['mismatch_max']:.0e}",
                  f"gen {m['gen_s']:.1f}s upd {m['update_s']:.1f}s", f"{m['mem_gb']:.1f}GB",
                  f"eta {(cfg.steps - m['step']) * elapsed_s / max(done, 1) / 3600:.2f}h"]
    if "val_accuracy" in m:
        shown = [k for k in ("reward", "accuracy", "mean_iou", "format") if f"val_{k}" in m]
        parts.append("held out: " + " ".join(f"{k} {m[f'val_{k}']:.3f}" for k in shown))
    return " | ".join(parts)


def step_metrics(groups, group_scores, advantages, sums: list[Counter]) -> dict:
    """Means over the step's completions and updates, of all processes. The README defines each."""
    from accelerate.utils import gather_object

    rows = gather_object([vars(s) | {"length": len(r.completion_ids), "cut": not r.finished}
                          for group, row in zip(groups, group_scores, strict=True)
                          for r, s in zip(group, row, strict=True)])
    dead = gather_object([not any(row) for row in advantages.tolist()])
    updates = gather_object(sums)
    total = Counter()
    for one in updates:
        total.update(one)

    def mean(key):
        return float(np.mean([row[key] for row in rows]))

    return {
        **{key: mean(key) for key in ("reward", "format", "count", "accuracy", "spatial")},
        "reward_std": float(np.std([row["reward"] for row in rows])),
        "mean_iou": float(np.mean([iou for row in rows for *_, iou, _ in row["matches"]] or [0.0])),
        "rejected": dict(Counter(row["reason"] for row in rows if row["reason"])),
        "dead": float(np.mean(dead)), "cut": mean("cut"), "length": mean("length"),
        **{key: total[key] / total["tokens"] for key in ("loss", "kl", "entropy")},
        **{key: total[key] / total["tokens"] for key in ("clip_low", "clip_high", "clip_dual")},
        "mismatch_mean": total["mismatch"] / total["tokens"],
        "mismatch_max": max(one["mismatch_max"] for one in updates),
        "grad_norm": total["grad_norm"] / len(updates), "skipped": total["skipped"],
        "tokens": total["tokens"], "packed": total["packed"],
    }


def mem_gb() -> float:
    """Peak memory of this process so far: on the GPU where there is one."""
    import resource

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def save_samples(folder: Path, groups: list[list[Rollout]], scores: list[list[Score]], n: int = 4):
    """The first n prompts of a step: their image, all completions and what each earned."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for group, group_scores in list(zip(groups, scores, strict=True))[:n]:
        sample = group[0].prompt.sample
        name = re.sub(r"[^\w.-]", "_", sample.id)[:80]
        for k, image in enumerate(group[0].prompt.images):
            image.save(folder / f"{name}_{k}.png")
        for r, s in zip(group, group_scores, strict=True):
            line = {"id": sample.id, "question": sample.question, "gold": sample.ground_truth, "text": r.text}
            lines.append(json.dumps(line | {"finished": r.finished} | vars(s)) + "\n")
    (folder / "completions.jsonl").write_text("".join(lines))


def held_out(sampler, encode, val, cfg: GRPOConfig, accelerator) -> dict:
    """Greedy answers to the held-out rows, graded and summed up as `evaluate.py` does: {"val_...": value}."""
    from accelerate.utils import gather_object

    records = []
    mine = range(accelerator.process_index, len(val), accelerator.num_processes)
    chunk = max(cfg.prompts_per_step, 64)  # prompts encoded at the same time
    for start in range(0, len(mine), chunk):
        prompts = [encode(val[i]) for i in mine[start:start + chunk]]
        for (rollout,) in sampler.generate(prompts, 1, 0.0, [0] * len(prompts)):
            records.append(grade(rollout.prompt.sample, rollout.text)
                           | {"finish_reason": "stop" if rollout.finished else "length"})
    summary = summarise(gather_object(records))
    shown = ("reward", "format", "count", "spatial", "accuracy", "mean_iou", "recall50")
    return {f"val_{k}": summary[k] for k in shown if k in summary}


# ---- dry run -----------------------------------------------------------------------------------------------
def arithmetic(cfg: GRPOConfig, world: int, n_samples: int | None = None) -> str:
    """What the config amounts to, in one line."""
    sequences = cfg.prompts_per_step * cfg.group_size
    text = (f"{cfg.prompts_per_step} prompts x {cfg.group_size} = {sequences} sequences a step, "
            f"{cfg.updates_per_step} updates of {sequences // cfg.updates_per_step}, {cfg.steps} steps, "
            f"{world} process(es)")
    epochs = cfg.steps * cfg.prompts_per_step / n_samples if n_samples else 0
    return text + (f", {epochs:.2f} epochs of {n_samples}" if epochs else "")


def count_parameters(model: str) -> float | None:
    """Parameters of a model from its config alone (no weights); None if the config is out of reach."""
    from transformers import AutoConfig, AutoModelForImageTextToText

    try:
        config = AutoConfig.from_pretrained(model)
    except (OSError, ValueError):
        return None
    with torch.device("meta"):
        return float(sum(p.numel() for p in AutoModelForImageTextToText.from_config(config).parameters()))


def dry_run(cfg: GRPOConfig) -> int:
    """Print the resolved config, its arithmetic, memory and what is missing; returns the exit status."""
    import importlib.util

    world = int(os.environ.get("WORLD_SIZE", max(1, torch.cuda.device_count())))
    print(to_yaml(cfg))
    missing = []
    try:
        samples = load_samples(**data_arguments(cfg, cfg.data, cfg.split))
        print(f"data: {len(samples)} rows of {cfg.data} ({cfg.split}) pass the checks, "
              f"{len(samples.skipped)} are left out")
        print(arithmetic(cfg, world, len(samples)))
    except (OSError, ValueError, RuntimeError) as error:  # the Hub client's errors derive from these
        why = f"{type(error).__name__}: {error}".splitlines()[0]
        missing.append(f"data: {cfg.data} ({cfg.split}) is not readable here: {why}")
        print(arithmetic(cfg, world))
    n = count_parameters(cfg.model)
    if n is None:
        missing.append(f"model: {cfg.model} is no folder here, not in the cache, and the Hub does not answer")
        size = re.search(r"(\d+(?:\.\d+)?)B\b", cfg.model)
        n = {"3": 3.75e9, "7": 8.29e9}.get(size[1], float(size[1]) * 1e9) if size else None
    if n:
        gib = n / 2**30
        head = cfg.logit_chunk * 152064 * 4 * 3 / 2**30
        print(f"memory per process at {n / 1e9:.2f}B parameters: fp32 weights, gradients and Adam "
              f"{16 * gib:.1f} GiB, reference {2 * gib * (cfg.kl_coef > 0):.1f} GiB, vLLM's bf16 weights "
              f"{2 * gib:.1f} GiB, logits {head:.1f} GiB; activations and KV cache come on top")
    if cfg.sampler == "vllm" and importlib.util.find_spec("vllm") is None:
        missing.append("vllm: not installed (pip install -r requirements.txt, or sampler=hf)")
    if not torch.cuda.is_available() and n and n > 1e9:
        missing.append("GPU: none found; this model needs some")
    print("\n".join(f"missing: {m}" for m in missing) if missing else "nothing is missing")
    return 1 if missing else 0


# ---- main --------------------------------------------------------------------------------------------------
def data_arguments(cfg: GRPOConfig, source: str, split: str) -> dict:
    return dict(source=source, split=split, revision=cfg.revision, columns=cfg.columns,
                need_scene=cfg.reward == "spatial", skip_bad_rows=cfg.skip_bad_rows)


def build_models(cfg: GRPOConfig, forbidden_ids: list[int]):
    """(policy in fp32, reference in bf16 on a GPU or fp32 on a CPU, or None without KL), heads prepared."""
    import importlib.util

    from transformers import AutoModelForImageTextToText

    on_gpu = torch.cuda.is_available()
    attention = "flash_attention_2" if importlib.util.find_spec("flash_attn") else use_packed_attention()
    if on_gpu and attention != "flash_attention_2":
        print("flash-attn is not installed: attention runs on PyTorch's SDPA, sequence by sequence")

    def load(dtype):
        model = AutoModelForImageTextToText.from_pretrained(
            cfg.model, dtype=dtype, attn_implementation=attention)
        use_logprob_head(model, forbidden_ids, cfg.temperature, cfg.logit_chunk)
        return model

    policy = load(torch.float32)  # masters: at a step of 1e-6 bf16 weights would round the update away
    if cfg.gradient_checkpointing:
        policy.gradient_checkpointing_enable({"use_reentrant": False})
    if cfg.freeze_vision:
        policy.model.visual.requires_grad_(False)
    if not cfg.kl_coef:
        return policy, None
    return policy, load(torch.bfloat16 if on_gpu else torch.float32).eval().requires_grad_(False)


def main():
    cfg = GRPOConfig.parse_args()
    if cfg.dry_run:
        raise SystemExit(dry_run(cfg))
    from accelerate import Accelerator
    from accelerate.utils import gather_object
    from transformers import AutoProcessor

    out = Path(cfg.out)
    accelerator = Accelerator(mixed_precision="bf16" if torch.cuda.is_available() else "no", project_dir=out,
                              log_with=None if cfg.tracker == "none" else cfg.tracker)
    rank, world, say = accelerator.process_index, accelerator.num_processes, accelerator.print
    if cfg.prompts_per_step % (world * cfg.updates_per_step):
        raise SystemExit(f"prompts_per_step {cfg.prompts_per_step}: expected a multiple of processes x "
                         f"updates_per_step = {world} x {cfg.updates_per_step}")
    if cfg.resume == "never" and (out / "metrics.jsonl").exists():
        raise SystemExit(f"{out} holds a run already: remove it, choose another out, or set resume=auto")
    if accelerator.is_main_process:
        write_run_record(cfg, out)
    accelerator.wait_for_everyone()

    # data
    processor = AutoProcessor.from_pretrained(cfg.model)
    encode = PromptEncoder(processor, cfg.template, cfg.min_pixels, cfg.max_pixels)
    lengths = dict(prompt_length=encode.length, max_prompt_length=cfg.max_prompt_length,
                   skip_long_prompts=cfg.skip_long_prompts)
    train = load_samples(**data_arguments(cfg, cfg.data, cfg.split), **lengths)
    val = load_samples(**data_arguments(cfg, cfg.val_data or cfg.data, cfg.val_split), **lengths,
                       limit=cfg.val_limit) if cfg.val_every else []
    say(arithmetic(cfg, world, len(train)))
    for name, samples in (("train", train), ("val", val)) if val else (("train", train),):
        say(f"{name}: {len(samples)} rows, {samples.clipped} with a gold box clipped to the image, "
            f"{len(samples.skipped)} left out" + "".join(f"\n  {message}" for message in samples.skipped))

    # models
    torch.manual_seed(cfg.seed)
    tokens = processor.tokenizer.convert_tokens_to_ids(["<|image_pad|>", "<|video_pad|>"])
    policy, reference = build_models(cfg, tokens)
    trained = [p for p in policy.parameters() if p.requires_grad]
    groups = [{"params": [p for p in trained if p.ndim >= 2], "weight_decay": cfg.weight_decay},
              {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0}]  # norms and biases: none
    optimizer = torch.optim.AdamW(groups, lr=cfg.learning_rate, betas=(0.9, cfg.adam_beta2))
    say(f"{sum(p.numel() for p in policy.parameters()):,} parameters, "
        f"{sum(p.numel() for p in trained):,} of them trained")
    policy, optimizer = accelerator.prepare(policy, optimizer)
    reference = reference.to(accelerator.device) if reference else None
    base = accelerator.unwrap_model(policy)
    first = resume(accelerator, out)
    if cfg.tracker != "none":
        settings = {k: v if isinstance(v, (int, float)) else str(v) for k, v in cfg.model_dump().items()}
        accelerator.init_trackers("grpo", config=settings)
    sampler = (VLLMSampler(cfg, processor, tokens, max(s.max_images for s in (train, val or train)))
               if cfg.sampler == "vllm" else HFSampler(cfg, processor, tokens))
    sampler.sync(base)

    stop = []  # Ctrl-C asks for a stop at the end of the step; a second one ends the process at once

    def on_ctrl_c(*_):
        stop.append(1)
        signal.signal(signal.SIGINT, signal.default_int_handler)

    signal.signal(signal.SIGINT, on_ctrl_c)

    def log(m: dict):
        if accelerator.is_main_process:
            with open(out / "metrics.jsonl", "a") as f:
                f.write(json.dumps(m) + "\n")
        say(step_line(m, cfg, time.time() - started, m["step"] - first))
        if cfg.tracker != "none":
            accelerator.log({k: v for k, v in m.items() if isinstance(v, (int, float))}, step=m["step"])

    started = time.time()
    if first == 0 and val:
        log({"step": 0} | held_out(sampler, encode, val, cfg, accelerator))
    scores = {}
    for step in range(first, cfg.steps):
        # draw prompts, sample completions, score them
        t0 = time.time()
        drawn = batch_at(cfg.seed, step, cfg.prompts_per_step, len(train))[rank::world]
        prompts = [encode(train[i]) for i in drawn]
        seeds = [request_seed(cfg.seed, step, i) for i in drawn]
        groups = sampler.generate(prompts, cfg.group_size, cfg.temperature, seeds)  # P lists of G
        sampler.sleep()
        t1 = time.time()
        group_scores = [[score(r, cfg) for r in group] for group in groups]
        rewards = [[s.reward for s in row] for row in group_scores]
        advantages = group_advantages(torch.tensor(rewards, dtype=torch.float64))  # (P, G)

        # log-probs of the policy that sampled and of the start, then the updates
        rollouts = [r for group in groups for r in group]  # N
        flat_advantages = advantages.flatten().tolist()
        device = accelerator.device
        t2 = time.time()
        # A single update starts where the policy still stands: its own forward pass gives the old log-probs.
        logps_old = rollout_logps(policy, base, rollouts, cfg, device) if cfg.updates_per_step > 1 else None
        logps_ref = rollout_logps(reference, base, rollouts, cfg, device) if reference else None
        t3 = time.time()
        lr = learning_rate_at(step, cfg)
        size, sums = len(rollouts) // cfg.updates_per_step, []
        for start in tqdm(range(0, len(rollouts), size), desc="updates", disable=None, leave=False):
            part = slice(start, start + size)
            sums.append(update(accelerator, policy, optimizer, rollouts[part], flat_advantages[part],
                               logps_old and logps_old[part], logps_ref and logps_ref[part], cfg, lr))
        t4 = time.time()
        sampler.sync(base)
        t5 = time.time()

        # measure, evaluate, save
        m = {"step": step + 1, "lr": lr} | step_metrics(groups, group_scores, advantages, sums) | {
            "gen_s": t1 - t0, "logp_s": t3 - t2, "update_s": t4 - t3, "sync_s": t5 - t4, "mem_gb": mem_gb()}
        m |= {"gen_tokens_per_s": m["tokens"] / m["gen_s"],
              "update_tokens_per_s": m.pop("packed") / m["update_s"]}
        check_mismatch(m, on_gpu=device.type == "cuda")
        done, stopping = step + 1, any(gather_object([bool(stop)]))
        if val and (done % cfg.val_every == 0 or done == cfg.steps):
            m |= held_out(sampler, encode, val, cfg, accelerator)
            scores = {k: v for k, v in m.items() if k.startswith("val_")}
        if cfg.samples_every and (done % cfg.samples_every == 0 or done == 1) and accelerator.is_main_process:
            save_samples(out / "samples" / f"step-{done:05d}", groups, group_scores)
        log(m)
        if done % cfg.save_every == 0 or done == cfg.steps or stopping:
            save_checkpoint(accelerator, policy, processor, out, done, scores, cfg.keep_last)
        if stopping:
            say(f"stopped after step {done}; continue with: {shlex.join(sys.orig_argv)}")
            break
    sampler.close()  # before end_training, which would find vLLM's process group gone
    if cfg.tracker != "none":
        accelerator.end_training()


def check_mismatch(m: dict, on_gpu: bool):
    """Trainer and sampler must hold the same model: in float32 they agree to 1e-4 nats a token, in bf16 less.

    Raises: RuntimeError where the difference can only be a bug: stale weights, another prompt or image.
    """
    limit, value = (0.5, m["mismatch_mean"]) if on_gpu else (1e-2, m["mismatch_max"])
    if value > limit:
        raise RuntimeError(f"step {m['step']}: trainer and sampler differ by {value:.2g} nats a token, "
                           f"expected at most {limit}: the sampler holds other weights or another prompt")


if __name__ == "__main__":
    main()
