"""GRPO with the gated spatial reward: rollout (vLLM), reward, group advantage, clipped update, weight sync.

    accelerate launch train_grpo.py configs/7b.yaml              # the paper's run: 4 x 80 GB, about 15 h
    python train_grpo.py configs/tiny.yaml                       # the whole loop on a laptop CPU, minutes
    python train_grpo.py configs/7b.yaml dry_run=true            # what would run, and what is missing

What separates this from GRPO as first published (arXiv:2402.03300), beside the reward:
  - loss: one token mean over all sequences of an update (a mean per sequence favours short right answers and
    long wrong ones), clipped higher than lower (DAPO), dual-clipped for negative advantages;
  - KL to the start: k3 estimator, weighted by the ratio so that its gradient is that of the KL;
  - the sampler's own log-probs enter as a truncated importance weight, since vLLM's arithmetic is its own;
  - a group of (nearly) equal rewards gives exactly zero advantage instead of amplified float noise;
  - a prompt and its images are run once for all completions of its group, exactly (data.pack).
Batch and seeds are functions of (seed, step): a resumed run repeats what an undisturbed one would have done.
"""

import functools
import itertools
import json
import math
import os
import shlex
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
from tqdm import tqdm

from checkpoint import CheckpointError, gather, leave, refuse_another_run, resume, save
from config import Config, opt, plain_errors, write_run_record
from data import Prompt, PromptEncoder, attention_implementation, batch_at, load_samples, micro_batches, pack
from dry_run import arithmetic, dry_run
from grading import grade, summarise
from metrics import HELD_OUT, check_mismatch, mem_gb, save_samples, step_line, step_metrics
from rewards import Score, Weights, score_completion, vanilla_reward

PREEMPTED = 75  # exit status after SIGTERM: state saved, run me again
FREE_TO_CHANGE = frozenset(  # keys that a continued run may change: they do not change what it computes
    "out resume keep_last keep_best save_every samples_every tracker vllm_memory vllm_max_seqs "
    "vllm_max_batched_tokens tensor_parallel sleep_level max_tokens_per_micro_batch logit_chunk "
    "gradient_checkpointing max_skipped val_data val_split val_limit val_every".split()
)
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
        "problem", "prompt; problem: the row's own"
    )
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
    # vLLM: raise vllm_memory until the update runs out (it sleeps meanwhile, so 0.6-0.8 is usual; with
    # sleep_level 0 both must fit); more sequences at once cost KV cache, more batched tokens activations.
    vllm_memory: float = opt(0.6, "share of the GPU's memory for vLLM (on a CPU: GiB of KV cache)", gt=0)
    vllm_max_seqs: int | None = opt(None, "completions sampled at the same time; empty: vLLM's choice", ge=1)
    vllm_max_batched_tokens: int | None = opt(None, "tokens in one engine step; empty: vLLM's choice", ge=1)
    tensor_parallel: int = opt(1, "processes that share one vLLM engine", ge=1)
    sleep_level: Literal[0, 1, 2] = opt(
        2, "vLLM during the update on a GPU: 0 keeps its memory, 1 moves weights to the host, 2 drops them"
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
    max_tokens_per_micro_batch: int = opt(16384, "tokens packed into one forward pass, per process", ge=1)
    logit_chunk: int = opt(256, "tokens whose logits exist at the same time", ge=1)
    gradient_checkpointing: bool = opt(True, "recompute activations: less memory, a third more time")
    # run
    out: str = opt("runs/grpo", "folder of the run")
    seed: int = opt(0, "of batch order and sampling", ge=0)
    save_every: int = opt(5, "steps between checkpoints (and one at the end)", ge=1)
    keep_last: int = opt(2, "checkpoints kept, besides the best", ge=1)
    keep_best: str | None = opt("val_reward", "held-out metric of the checkpoint to keep; empty: none")
    resume: str = opt("auto", "auto: continue a run found in out; never: refuse to; or a checkpoint's folder")
    samples_every: int = opt(5, "steps between saved samples of completions with their images; 0: none", ge=0)
    tracker: Literal["tensorboard", "wandb", "none"] = opt("tensorboard", "besides metrics.jsonl")
    dry_run: bool = opt(False, "print what would run and what is missing, load no model, exit")

    @model_validator(mode="after")
    def _check(self):
        if self.prompts_per_step % self.updates_per_step:
            raise ValueError(
                f"prompts_per_step {self.prompts_per_step} is not a multiple of "
                f"updates_per_step {self.updates_per_step}: prompts would be dropped"
            )
        if self.min_pixels > self.max_pixels:
            raise ValueError(f"min_pixels {self.min_pixels} > max_pixels {self.max_pixels}")
        if self.keep_best not in (None, *(names := [f"val_{k}" for k in HELD_OUT])):
            raise ValueError(f"keep_best: expected one of {names}, got {self.keep_best!r}")
        _ = self.weights
        return self

    @property
    def weights(self) -> Weights:
        return Weights(self.weight_format, self.weight_count, self.weight_accuracy, self.weight_spatial)

    def source(self, data: str, split: str) -> dict:
        """Arguments of load_samples."""
        return dict(
            source=data,
            split=split,
            revision=self.revision,
            columns=self.columns,
            need_scene=self.reward == "spatial",
            skip_bad_rows=self.skip_bad_rows,
        )


# ---- processes ---------------------------------------------------------------------------------------------
def make_accelerator(cfg: GRPOConfig, layers: list[str]):
    """FSDP2 over all processes: fp32 masters sharded, bf16 compute on a GPU, fp32 gradient reduction.

    A single GPU is a mesh of one. A single process on a CPU shards nothing: the copies would cost the tiny
    model half of its speed. `layers`: names of the classes that are gathered one at a time.
    """
    from accelerate import Accelerator, FullyShardedDataParallelPlugin, PartialState
    from accelerate.utils import DistributedType
    from torch.distributed.fsdp import MixedPrecisionPolicy

    on_gpu, threads = torch.cuda.is_available(), torch.get_num_threads()
    if on_gpu:
        launch_alone()
    # accelerate's own bf16 policy would reduce gradients and return log-probs in bf16 as well.
    precision = MixedPrecisionPolicy(torch.bfloat16, torch.float32) if on_gpu else MixedPrecisionPolicy()
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        mixed_precision_policy=precision,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=layers,
        cpu_ram_efficient_loading=False,
    )
    accelerator = Accelerator(
        cpu=not on_gpu,
        mixed_precision="no",
        fsdp_plugin=plugin if on_gpu else None,
        project_dir=cfg.out,
        log_with=None if cfg.tracker == "none" else cfg.tracker,
    )
    torch.set_num_threads(threads)  # accelerate counts physical cores, hence half of them in most containers
    if accelerator.distributed_type == DistributedType.MULTI_CPU:  # accelerate shards on GPUs only; gloo can
        accelerator.state.fsdp_plugin = plugin
        accelerator.state.distributed_type = DistributedType.FSDP
        PartialState._shared_state["distributed_type"] = DistributedType.FSDP
    return accelerator


def launch_alone():
    """What a launcher would have set for a single process."""
    alone = {
        "RANK": 0,
        "WORLD_SIZE": 1,
        "LOCAL_RANK": 0,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": free_port(),
    }
    for name, value in alone.items():
        os.environ.setdefault(name, str(value))


def free_port() -> int:
    import socket

    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def full_weights(model):
    """(name, whole tensor) one at a time; on every process, since a sharded one is gathered by all."""
    # state_dict, not named_parameters: a tied head is listed in it, and would go stale in vLLM otherwise.
    for name, p in model.state_dict().items():
        if hasattr(p, "full_tensor"):
            p = (p.bfloat16() if p.is_cuda else p).full_tensor()  # bf16: what vLLM holds, half the traffic
        yield name, p


# ---- rollout -----------------------------------------------------------------------------------------------
@dataclass
class Rollout:
    """One sampled completion of one row. Light: it travels to all processes, the images do not."""

    row: int  # of the data
    prompt_length: int  # tokens, with the images'
    completion_ids: list[int]  # (T,), with the end token where it came
    sampler_logps: list[float]  # (T,), of the distribution that was sampled from
    text: str  # without special tokens
    finished: bool  # False: cut at max_completion_length
    score: Score | None = None
    advantage: float = 0.0

    def __len__(self):
        return self.prompt_length + len(self.completion_ids)


def request_seed(*path: int) -> int:
    """A seed for one request from (run seed, step, row): independent of batch, rank and resumption."""
    return int(np.random.SeedSequence(path).generate_state(1)[0])


def forget_shared_memory():
    """Remove what an earlier run has left behind.

    On CPUs vLLM shares memory under one name for all runs, and only an orderly exit removes it. Whoever has
    it mapped keeps it.
    """
    if os.environ["LOCAL_RANK"] == "0":
        for left in Path("/dev/shm").glob("*tp:*cpushm*"):
            left.unlink(missing_ok=True)
    torch.distributed.barrier()


class VLLMSampler:
    """vLLM in the training processes, on their devices; `sync` copies the policy's weights into it."""

    def __init__(self, cfg: GRPOConfig, processor, forbidden_ids: list[int], images_per_prompt: int):
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # the engine lives here, not in a child
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        on_gpu = torch.cuda.is_available()
        if not on_gpu:
            os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", str(math.ceil(cfg.vllm_memory)))
            if cfg.tensor_parallel > 1:
                forget_shared_memory()
        launch_alone()  # external_launcher reads it
        from vllm import LLM

        self.tokenizer, self.forbidden_ids = processor.tokenizer, forbidden_ids
        self.max_tokens, self.sleep_level = cfg.max_completion_length, cfg.sleep_level if on_gpu else 0
        length = cfg.max_prompt_length + cfg.max_completion_length
        limits = {"max_num_seqs": cfg.vllm_max_seqs, "max_num_batched_tokens": cfg.vllm_max_batched_tokens}
        limits = {name: value for name, value in limits.items() if value}
        if on_gpu:
            device = {
                "dtype": "bfloat16",
                "gpu_memory_utilization": cfg.vllm_memory,
                "enable_sleep_mode": bool(cfg.sleep_level),
            }
        else:  # a prompt prefilled in two chunks rewinds its generator, which a CPU generator cannot do
            device = {"dtype": "float32", "enforce_eager": True, "enable_chunked_prefill": False}
            limits["max_num_batched_tokens"] = max(limits.get("max_num_batched_tokens", 8192), length)
        rng = torch.get_rng_state()  # LLM(seed=...) seeds every generator of the process
        self.llm = LLM(
            model=cfg.model,
            distributed_executor_backend="external_launcher",
            tensor_parallel_size=cfg.tensor_parallel,
            seed=0,
            logprobs_mode="processed_logprobs",
            max_model_len=length,
            disable_log_stats=True,
            **device,
            **limits,
            limit_mm_per_prompt={"image": images_per_prompt, "video": 0},
            mm_processor_kwargs={"min_pixels": cfg.min_pixels, "max_pixels": cfg.max_pixels},
        )
        torch.set_rng_state(rng)
        self.asleep = False

    def sync(self, model):
        """Copy the policy's parameters into the engine and drop everything computed with the old ones."""
        if self.asleep:
            self.llm.wake_up(tags=["weights"])
        self.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": full_weights(model)})
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

        bias = {i: FORBIDDEN_BIAS for i in self.forbidden_ids}
        requests = [
            {"prompt_token_ids": p.vllm_ids, "multi_modal_data": {"image": p.images}}
            if p.images
            else {"prompt_token_ids": p.vllm_ids}
            for p in prompts
        ]
        params = [
            SamplingParams(
                n=n,
                temperature=temperature,
                seed=seed,
                max_tokens=self.max_tokens,
                logprobs=0,
                flat_logprobs=True,
                logit_bias=bias,
                detokenize=False,
            )
            for seed in seeds
        ]
        outputs = self.llm.generate(requests, params, use_tqdm=False) if requests else []
        groups = []
        for row, prompt, output in zip(rows, prompts, outputs, strict=True):
            assert output.prompt_token_ids == prompt.ids, f"row {prompt.sample.id}: vLLM reads another prompt"
            groups.append([])
            for o in output.outputs:
                ids, logps = list(o.token_ids), o.logprobs.logprobs  # of the sampled tokens alone
                assert o.logprobs.token_ids == ids, f"row {prompt.sample.id}: log-probs of other tokens"
                text = self.tokenizer.decode(ids, skip_special_tokens=True)
                groups[-1].append(Rollout(row, len(prompt.ids), ids, logps, text, o.finish_reason == "stop"))
        return groups

    def close(self):
        import gc

        del self.llm
        gc.collect()


class HFSampler:
    """The same calls on transformers' `generate`: slow, for machines without vLLM."""

    def __init__(self, cfg: GRPOConfig, processor, forbidden_ids: list[int]):
        self.cfg, self.tokenizer, self.forbidden_ids = cfg, processor.tokenizer, forbidden_ids
        self.max_tokens, self.end_ids = cfg.max_completion_length, end_token_ids(processor.tokenizer)
        self.model = None

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
        for name, weight in full_weights(model):
            held[name].copy_(weight)

    @torch.no_grad()
    def generate(self, rows: list[int], prompts: list[Prompt], n: int, temperature: float, seeds: list[int]):
        was_training = self.model.training
        self.model.eval()
        groups = [
            [Rollout(row, len(prompt.ids), *r) for r in self.one(prompt, n, temperature, seed)]
            for row, prompt, seed in zip(rows, prompts, seeds, strict=True)
        ]
        self.model.train(was_training)
        return groups

    def one(self, prompt: Prompt, n: int, temperature: float, seed: int) -> list[tuple]:
        """n of (completion ids, log-probs, text, finished). One prompt alone: no padding, its own seed."""
        model, device, greedy = self.model, self.model.device, temperature == 0
        ids = torch.tensor([prompt.ids], device=device).repeat(n, 1)
        images = (
            {}
            if prompt.pixel_values is None
            else {
                "pixel_values": prompt.pixel_values.repeat(n, 1).to(device),
                "image_grid_thw": prompt.image_grid_thw.repeat(n, 1).to(device),
            }
        )
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            out = model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                mm_token_type_ids=(ids == model.config.image_token_id).int(),
                **images,
                do_sample=not greedy,
                temperature=None if greedy else temperature,
                top_k=0,
                top_p=1.0,
                repetition_penalty=1.0,  # Qwen2.5-VL's generation config has another
                sequence_bias=[[[i], FORBIDDEN_BIAS] for i in self.forbidden_ids],
                max_new_tokens=self.max_tokens,
                eos_token_id=self.end_ids,
                return_dict_in_generate=True,
                output_scores=True,
            )
        logps = torch.stack(out.scores, 1).float().log_softmax(-1)  # (n, T, V), with bias and temperature
        new = out.sequences[:, len(prompt.ids) :]
        logps = logps.gather(2, new[..., None])[..., 0]  # (n, T)
        rollouts = []
        for ids, row_logps in zip(new.tolist(), logps.tolist(), strict=True):
            end = next((t + 1 for t, i in enumerate(ids) if i in self.end_ids), None)
            text = self.tokenizer.decode(ids[:end], skip_special_tokens=True)
            rollouts.append((ids[:end], row_logps[:end], text, end is not None))
        return rollouts

    def sleep(self):
        pass

    def close(self):
        self.model = None


def end_token_ids(tokenizer) -> list[int]:
    ids = tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
    return sorted({i for i in [*ids, tokenizer.eos_token_id] if i is not None})


def sample_everywhere(accelerator, sampler, encode, rows, n, temperature, seeds, tensor_parallel=1):
    """n Rollouts of each row, in the order of rows, known to every process in the end.

    Every engine, of `tensor_parallel` processes, takes its share of the rows.
    """
    engines = accelerator.num_processes // tensor_parallel
    mine = range(accelerator.process_index // tensor_parallel, len(rows), engines)
    groups = sampler.generate(
        [rows[k] for k in mine], [encode(rows[k]) for k in mine], n, temperature, [seeds[k] for k in mine]
    )
    # Processes of one engine hold the same: the first of them sends.
    parts = gather([groups if accelerator.process_index % tensor_parallel == 0 else None])
    parts = [part for part in parts if part is not None]
    return [parts[k % engines][k // engines] for k in range(len(rows))]


# ---- reward and advantage ----------------------------------------------------------------------------------
def score(text: str, sample, cfg: GRPOConfig) -> Score:
    """The configured reward of a completion. One that was cut off is scored like any other text."""
    if cfg.reward == "vanilla":
        terms = vanilla_reward(text, sample.ground_truth)
        return Score(terms["reward"], terms["format"], 0.0, terms["accuracy"], 0.0)
    return score_completion(text, sample.ground_truth, sample.size, weights=cfg.weights)


def rewards_of(groups: list[list[Rollout]]) -> torch.Tensor:
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


# ---- log-probs ---------------------------------------------------------------------------------------------
class ChunkedLogProbs(torch.autograd.Function):
    """log p(target) and entropy under softmax((h W^T + bias) / temperature), `chunk` tokens at a time.

    The logits of a 152k vocabulary take 0.6 MB a token; here those of at most `chunk` tokens exist at a time,
    in two copies, in the backward pass as well, which computes them again. The weight's gradient is summed up
    in float32.
    """

    @staticmethod
    def forward(ctx, hidden, weight, targets, bias, temperature, chunk):  # (N, D), (V, D), (N,), (V,)
        ctx.save_for_backward(hidden, weight, targets, bias)
        ctx.temperature, ctx.chunk, pieces = temperature, chunk, []
        for h, t in zip(hidden.split(chunk), targets.split(chunk), strict=True):
            logits = ChunkedLogProbs.logits(h, weight, bias, temperature)
            logits.sub_(logits.amax(-1, keepdim=True))
            p = logits.exp()
            norm = p.sum(-1)  # (chunk,)
            logp = logits.gather(1, t[:, None])[:, 0] - norm.log()
            entropy = norm.log() - torch.bmm(p[:, None], logits[..., None])[:, 0, 0] / norm
            pieces.append(torch.stack([logp, entropy]))
        return torch.cat(pieces, dim=1)  # (2, N)

    @staticmethod
    def backward(ctx, grad):  # (2, N); the entropy is measured, not trained on
        hidden, weight, targets, bias = ctx.saved_tensors
        grad_hidden, grad_weight = [], torch.zeros_like(weight, dtype=torch.float32)
        pieces = (x.split(ctx.chunk) for x in (hidden, targets, grad[0] / ctx.temperature))
        for h, t, g in zip(*pieces, strict=True):
            logits = ChunkedLogProbs.logits(h, weight, bias, ctx.temperature)
            p = logits.sub_(logits.amax(-1, keepdim=True)).exp_()
            d = p.mul_((-g / p.sum(-1))[:, None])  # g (1[target] - p), first its second half
            d.scatter_add_(1, t[:, None], g[:, None].to(d.dtype))
            d = d.to(weight.dtype)
            grad_hidden.append(d @ weight)
            if d.dtype == grad_weight.dtype:
                grad_weight.addmm_(d.T, h)  # without a second (V, D)
            else:
                grad_weight += d.T @ h
        return torch.cat(grad_hidden), grad_weight.to(weight.dtype), None, None, None, None

    @staticmethod
    def logits(hidden, weight, bias, temperature):
        return F.linear(hidden, weight).float().add_(bias).div_(temperature)  # (chunk, V)


def use_logprob_head(model, forbidden_ids: list[int], temperature: float, chunk: int):
    """Let `model.lm_head` return log-probs and entropies (1, N, 2) while `lm_head.targets` is set.

    They are of the tokens `targets`, each predicted by the hidden state at `predicted_at`. The head stays
    the module that forward calls, once: under FSDP its weight is gathered, its gradient reduced, as usual.
    """
    head = model.lm_head
    bias = torch.zeros(head.weight.shape[0])  # (V,)
    bias[forbidden_ids] = FORBIDDEN_BIAS

    def forward(hidden):
        if head.targets is None:
            return F.linear(hidden, head.weight)
        # Completions share the end of their prompt. index_select sums its gradients up in order; the indexing
        # of transformers' logits_to_keep does not, and a resumed run would differ in the last bits.
        hidden = hidden[0].index_select(0, head.predicted_at)  # (N, D)
        out = ChunkedLogProbs.apply(
            hidden, head.weight, head.targets, bias.to(hidden.device), temperature, chunk
        )  # (2, N)
        return out.T[None]

    head.targets = None
    head.forward = forward


def token_logps(model, batch: dict) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probs and entropies (nats) of a packed batch's completion tokens: (N,), (N,), sequence by sequence.

    One function for policy, old policy and reference; at the sampler's temperature, with its token biases.
    `batch` comes from data.pack; `model` went through `use_logprob_head`.
    """
    inputs = dict(batch)
    head = getattr(model, "module", model).lm_head
    head.targets, head.predicted_at = inputs.pop("target_ids"), inputs.pop("predicted_at")  # (N,), (N,)
    try:
        out = model(**inputs, use_cache=False).logits[0]  # (N, 2)
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


# ---- update ------------------------------------------------------------------------------------------------
def balance(groups: list[list[int]], tokens: list[int], processes: int) -> list[list[int]]:
    """Deal groups out, the largest first, each to the process with the fewest tokens so far.

    Whole groups, since they share their prompt. Returns: each process's members of groups, in order.

    >>> balance([[0, 1], [2, 3], [4, 5]], [2, 4, 6], 2)
    [[4, 5], [0, 1, 2, 3]]
    """
    shares, load = [[] for _ in range(processes)], [0] * processes
    for size, group in sorted(zip(tokens, groups, strict=True), key=lambda pair: -pair[0]):
        least = load.index(min(load))
        shares[least] += group
        load[least] += size
    return [sorted(share) for share in shares]


def plan_updates(rollouts: list[Rollout], cfg: GRPOConfig, processes: int) -> list[list[list[int]]]:
    """For each update, for each process: indices of the rollouts it trains on."""
    groups = [list(range(k, k + cfg.group_size)) for k in range(0, len(rollouts), cfg.group_size)]
    tokens = [rollouts[g[0]].prompt_length + sum(len(rollouts[k].completion_ids) for k in g) for g in groups]
    size = len(groups) // cfg.updates_per_step
    return [
        balance(groups[k : k + size], tokens[k : k + size], processes) for k in range(0, len(groups), size)
    ]


def packed_batches(rollouts: list[Rollout], shares: list[list[int]], rank: int, encode, model, cfg, device):
    """Yield (indices into rollouts, packed batch) of this process's share, within the token budget.

    Every process yields equally often, at the end an empty batch: sharded layers are gathered by all or none.
    """
    split = [
        micro_batches(
            [(rollouts[k].row, rollouts[k].prompt_length, len(rollouts[k].completion_ids)) for k in share],
            cfg.max_tokens_per_micro_batch,
        )
        for share in shares
    ]
    batches = [[shares[rank][i] for i in group] for group in split[rank]]
    batches += [[]] * (max(map(len, split)) - len(batches))
    for batch in batches:
        by_row = itertools.groupby(batch, key=lambda k: rollouts[k].row)
        packed = pack([(encode(row), [rollouts[k].completion_ids for k in ks]) for row, ks in by_row], model)
        yield batch, {name: v.to(device) if torch.is_tensor(v) else v for name, v in packed.items()}


@torch.no_grad()
def rollout_logps(model, rollouts, plans, rank, encode, base, cfg, device) -> dict[int, torch.Tensor]:
    """Log-probs under a model of the rollouts that this process will train on: {index: (T,)}."""
    logps = {}
    for shares in plans:
        for batch, packed in packed_batches(rollouts, shares, rank, encode, base, cfg, device):
            pieces = token_logps(model, packed)[0].split([len(rollouts[k].completion_ids) for k in batch])
            logps |= dict(zip(batch, pieces, strict=True)) if batch else {}
    return logps


def learning_rate_at(step: int, cfg: GRPOConfig) -> float:
    """Linear warm-up to learning_rate, then constant or in a straight line to final_learning_rate."""
    if step < cfg.warmup_steps:
        return cfg.learning_rate * (step + 1) / cfg.warmup_steps
    final = cfg.learning_rate if cfg.final_learning_rate is None else cfg.final_learning_rate
    share = (step - cfg.warmup_steps) / max(1, cfg.steps - cfg.warmup_steps)
    return cfg.learning_rate + (final - cfg.learning_rate) * share


def update(
    accelerator, policy, optimizer, rollouts, shares, encode, advantages, logps_old, logps_ref, cfg, lr
) -> Counter:
    """One optimizer step on the rollouts of all shares. Returns sums over the tokens of this process.

    advantages: one a rollout; logps_old, logps_ref: of this process's share, by index; logps_old None: the
    policy is still the one that sampled, and its own log-probs serve.
    """
    rank, device, base = accelerator.process_index, accelerator.device, accelerator.unwrap_model(policy)
    # One denominator for the whole update over all processes, whose gradients FSDP averages.
    n_tokens = sum(len(rollouts[k].completion_ids) for share in shares for k in share)
    scale = accelerator.num_processes / n_tokens
    sums = Counter(mismatch_max=0.0)
    for batch, packed in packed_batches(rollouts, shares, rank, encode, base, cfg, device):
        lengths = [len(rollouts[k].completion_ids) for k in batch]
        logp, entropy = token_logps(policy, packed)  # (N,), (N,)
        logp_old = logp.detach() if logps_old is None else gathered(logps_old, batch, logp)
        sampled = torch.tensor([x for k in batch for x in rollouts[k].sampler_logps], device=device)
        advantage = torch.tensor(
            np.repeat([advantages[k] for k in batch], lengths), dtype=logp.dtype, device=device
        )  # (N,)
        mask = torch.ones_like(logp)
        weight = torch.exp((logp_old - sampled).clamp(-20, 20)).clamp(max=cfg.is_cap) if cfg.is_cap else None
        loss, stats = policy_loss(
            logp,
            logp_old,
            advantage,
            mask,
            clip_low=cfg.clip_low,
            clip_high=cfg.clip_high,
            dual_clip=cfg.dual_clip,
            weight=weight,
        )
        if logps_ref is not None:
            kl, stats["kl"] = kl_loss(logp, gathered(logps_ref, batch, logp), logp_old, mask)
            loss = loss + cfg.kl_coef * kl
        accelerator.backward(loss * scale)
        mismatch = (logp_old - sampled).abs()
        stats |= {
            "loss": loss.detach(),
            "entropy": entropy.sum(),
            "mismatch": mismatch.sum(),
            "capped": (weight >= cfg.is_cap).sum() if cfg.is_cap else 0,
            "tokens": sum(lengths),
            "trained": sum(len(rollouts[k]) for k in batch),
        }
        sums.update({name: float(value) for name, value in stats.items()})
        sums["mismatch_max"] = max([sums["mismatch_max"], *mismatch.tolist()])
    grad_norm = float(accelerator.clip_grad_norm_(policy.parameters(), cfg.max_grad_norm))
    for group in optimizer.param_groups:
        group["lr"] = lr
    if math.isfinite(grad_norm):  # one bad batch must not end in NaN weights
        optimizer.step()
    sums["grad_norm"], sums["skipped"] = grad_norm, not math.isfinite(grad_norm)
    optimizer.zero_grad()
    return sums


def gathered(logps: dict, batch: list[int], like: torch.Tensor) -> torch.Tensor:
    return torch.cat([logps[k] for k in batch]) if batch else like.detach()  # (N,)


# ---- held out ----------------------------------------------------------------------------------------------
def held_out(accelerator, sampler, encode, val, cfg: GRPOConfig) -> dict:
    """Greedy answers to the held-out rows, graded and summed up as `evaluate.py` does: {"val_...": value}."""
    records = []
    chunk = max(cfg.prompts_per_step, 64)  # prompts encoded at the same time
    for start in range(0, len(val), chunk):
        rows = list(range(start, min(start + chunk, len(val))))
        groups = sample_everywhere(
            accelerator, sampler, lambda i: encode(val[i]), rows, 1, 0.0, [0] * len(rows), cfg.tensor_parallel
        )
        records += [
            grade(val[r.row], r.text) | {"finish_reason": "stop" if r.finished else "length"}
            for (r,) in groups
        ]
    summary = summarise(records)
    return {f"val_{k}": summary[k] for k in HELD_OUT if k in summary}


# ---- main --------------------------------------------------------------------------------------------------
def load_model(cfg: GRPOConfig, forbidden_ids: list[int], dtype: torch.dtype):
    """The start of the run, with `use_logprob_head`: the policy, or the KL reference."""
    from transformers import AutoModelForImageTextToText

    model = AutoModelForImageTextToText.from_pretrained(
        cfg.model, dtype=dtype, attn_implementation=attention_implementation()
    )
    use_logprob_head(model, forbidden_ids, cfg.temperature, cfg.logit_chunk)
    return model


def make_policy(accelerator, cfg: GRPOConfig, forbidden_ids: list[int]):
    """(policy with fp32 masters, its optimizer, reference or None without KL), all sharded."""
    from accelerate.utils.fsdp_utils import fsdp2_prepare_model

    policy = load_model(cfg, forbidden_ids, torch.float32)  # bf16 masters would round a step of 1e-6 away
    if cfg.gradient_checkpointing:
        policy.gradient_checkpointing_enable({"use_reentrant": False})
    if cfg.freeze_vision:
        policy.model.visual.requires_grad_(False)
    trained = [p for p in policy.parameters() if p.requires_grad]
    accelerator.print(
        f"{sum(p.numel() for p in policy.parameters()):,} parameters, "
        f"{sum(p.numel() for p in trained):,} of them trained"
    )
    groups = [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": cfg.weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]  # norms and biases: none
    optimizer = torch.optim.AdamW(groups, lr=cfg.learning_rate, betas=(0.9, cfg.adam_beta2))
    del trained, groups  # they would hold on to the whole parameters
    policy, optimizer = accelerator.prepare(policy.train(), optimizer)  # train(): or nothing is checkpointed
    if not cfg.kl_coef:
        return policy, optimizer, None
    dtype = torch.bfloat16 if accelerator.device.type == "cuda" else torch.float32
    reference = load_model(cfg, forbidden_ids, dtype).eval().requires_grad_(False)
    if accelerator.is_fsdp2:  # accelerate prepares one model only
        reference = fsdp2_prepare_model(accelerator, reference)
    return policy, optimizer, reference


class Stop:
    """Ctrl-C and SIGTERM ask for a stop at the next safe point; a second Ctrl-C ends the process at once."""

    def __init__(self):
        self.signal = 0
        signal.signal(signal.SIGINT, self.ask)
        signal.signal(signal.SIGTERM, self.ask)

    def ask(self, number, frame):
        self.signal = number
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def agreed(self) -> int:
        """The signal that any process got, or 0. Collective."""
        return max(gather([self.signal]))


def replace_dead(groups, rows: list[int], roll_out, n_rows: int, step: int, cfg: GRPOConfig):
    """Roll out other rows in place of groups of equal rewards, in `resample_dead_groups` rounds at most.

    Returns: (groups, how many were replaced). The spare rows are a function of (seed, step, round).
    """
    groups, used, replaced = list(groups), set(rows), 0
    for attempt in range(cfg.resample_dead_groups):
        dead = (group_advantages(rewards_of(groups)) == 0).all(1).nonzero()[:, 0].tolist()
        spare = batch_at(request_seed(cfg.seed, step, attempt), 0, n_rows, n_rows)
        spare = [row for row in spare if row not in used][: len(dead)]
        if not spare:
            break
        for k, group in zip(dead, roll_out(spare, step), strict=False):  # fewer spare rows than dead groups
            groups[k] = group
        used, replaced = used | set(spare), replaced + len(spare)
    return groups, replaced


def main():
    cfg = GRPOConfig.parse_args()
    if cfg.dry_run:
        raise SystemExit(dry_run(cfg) if os.environ.get("RANK", "0") == "0" else 0)
    try:
        train(cfg)
    except CheckpointError as error:
        raise SystemExit(f"error: {error}") from None


def train(cfg: GRPOConfig):
    from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

    out, started = Path(cfg.out), time.time()
    with plain_errors():
        model_config = AutoConfig.from_pretrained(cfg.model)
    kind = AutoModelForImageTextToText._model_mapping[type(model_config)]
    accelerator = make_accelerator(cfg, sorted(kind._no_split_modules))
    rank, world, device = accelerator.process_index, accelerator.num_processes, accelerator.device
    say = accelerator.print
    if world % cfg.tensor_parallel:
        raise SystemExit(f"tensor_parallel {cfg.tensor_parallel}: expected a divisor of {world} processes")
    # A falling learning rate depends on the number of steps, a constant one does not.
    refuse_another_run(cfg, out, FREE_TO_CHANGE | ({"steps"} if cfg.final_learning_rate is None else set()))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        write_run_record(cfg, out)

    # data
    processor = AutoProcessor.from_pretrained(cfg.model)
    encode = PromptEncoder(processor, cfg.template, cfg.min_pixels, cfg.max_pixels)
    lengths = dict(
        prompt_length=encode.length,
        max_prompt_length=cfg.max_prompt_length,
        skip_long_prompts=cfg.skip_long_prompts,
    )
    with plain_errors():
        data = load_samples(**cfg.source(cfg.data, cfg.split), **lengths)
        val = (
            load_samples(
                **cfg.source(cfg.val_data or cfg.data, cfg.val_split), **lengths, limit=cfg.val_limit
            )
            if cfg.val_every
            else []
        )
    encode_row = functools.lru_cache(cfg.prompts_per_step)(lambda row: encode(data[row]))
    say(arithmetic(cfg, world, len(data)))
    for name, samples in (("train", data), ("val", val)) if val else (("train", data),):
        say(
            f"{name}: {len(samples)} rows, {samples.clipped} with a gold box clipped to the image, "
            f"{len(samples.skipped)} left out" + "".join(f"\n  {message}" for message in samples.skipped)
        )

    # models
    torch.manual_seed(cfg.seed)
    forbidden = processor.tokenizer.convert_tokens_to_ids(["<|image_pad|>", "<|video_pad|>"])
    policy, optimizer, reference = make_policy(accelerator, cfg, forbidden)
    base = accelerator.unwrap_model(policy)
    if cfg.tracker != "none":
        settings = {k: v if isinstance(v, (int, float)) else str(v) for k, v in cfg.model_dump().items()}
        accelerator.init_trackers("grpo", config=settings)
    sampler = (
        VLLMSampler(cfg, processor, forbidden, max(s.max_images for s in (data, val or data)))
        if cfg.sampler == "vllm"
        else HFSampler(cfg, processor, forbidden)
    )
    first = resume(accelerator, policy, optimizer, out, cfg.resume)
    sampler.sync(base)
    stop = Stop()

    def log(m: dict):
        if accelerator.is_main_process:
            with open(out / "metrics.jsonl", "a") as f:
                f.write(json.dumps(m) + "\n")
        say(step_line(m, cfg.steps, time.time() - started, m["step"] - first))
        if cfg.tracker != "none":
            accelerator.log({k: v for k, v in m.items() if isinstance(v, (int, float))}, step=m["step"])

    def save_state(step: int, m: dict):
        scores = {k: v for k, v in m.items() if k.startswith("val_")}
        save(accelerator, policy, optimizer, processor, out, step, scores, cfg.keep_last, cfg.keep_best)

    def roll_out(rows: list[int], step: int) -> list[list[Rollout]]:
        before = [rows[:k].count(row) for k, row in enumerate(rows)]  # across two epochs one may come twice
        seeds = [
            request_seed(cfg.seed, step, row, *[n] * (n > 0)) for row, n in zip(rows, before, strict=True)
        ]
        groups = sample_everywhere(
            accelerator,
            sampler,
            encode_row,
            rows,
            cfg.group_size,
            cfg.temperature,
            seeds,
            cfg.tensor_parallel,
        )
        for rollout in (r for group in groups for r in group):
            rollout.score = score(rollout.text, data[rollout.row], cfg)
        return groups

    if first == 0 and val:
        log({"step": 0} | held_out(accelerator, sampler, encode, val, cfg))
    done, m = first, {}
    skipped, stopped_by = 0, 0  # updates in a row without a finite gradient; signal
    for step in range(first, cfg.steps):
        # draw prompts, sample completions, score them
        t0 = time.time()
        rows = batch_at(cfg.seed, step, cfg.prompts_per_step, len(data))
        groups = roll_out(rows, step)  # P lists of G
        groups, replaced = replace_dead(groups, rows, roll_out, len(data), step, cfg)
        advantages = group_advantages(rewards_of(groups))  # (P, G)
        sampler.sleep()
        t1 = time.time()
        if stopped_by := stop.agreed():  # safe: the weights are still those of the step's start
            break

        # log-probs of the policy that sampled and of the start, then the updates
        rollouts = [r for group in groups for r in group]  # N
        plans = plan_updates(rollouts, cfg, world)  # of each update, of each process: indices into rollouts
        mine = (rollouts, plans, rank, encode_row, base, cfg, device)
        t2 = time.time()
        # A single update starts where the policy still stands: its own forward pass gives the old log-probs.
        logps_old = rollout_logps(policy, *mine) if cfg.updates_per_step > 1 else None
        logps_ref = rollout_logps(reference, *mine) if reference else None
        t3 = time.time()
        sums = [
            update(
                accelerator,
                policy,
                optimizer,
                rollouts,
                shares,
                encode_row,
                advantages.flatten().tolist(),
                logps_old,
                logps_ref,
                cfg,
                learning_rate_at(step, cfg),
            )
            for shares in tqdm(plans, desc="updates", disable=None if rank == 0 else True, leave=False)
        ]
        t4 = time.time()
        sampler.sync(base)
        t5 = time.time()

        # measure, evaluate, save
        done = step + 1
        m = (
            {"step": done, "lr": learning_rate_at(step, cfg)}
            | step_metrics(rollouts, advantages, sums)
            | {
                "replaced": replaced,
                "gen_s": t1 - t0,
                "logp_s": t3 - t2,
                "update_s": t4 - t3,
                "sync_s": t5 - t4,
                "mem_gb": mem_gb(),
            }
        )
        m |= {
            "gen_tokens_per_s": m["tokens"] / m["gen_s"],
            "update_tokens_per_s": m.pop("trained") / m["update_s"],
        }
        check_mismatch(m, on_gpu=device.type == "cuda")
        if val and (done % cfg.val_every == 0 or done == cfg.steps):
            m |= held_out(accelerator, sampler, encode, val, cfg)
        if cfg.samples_every and (done % cfg.samples_every == 0 or done == 1) and accelerator.is_main_process:
            save_samples(out / "samples" / f"step-{done:05d}", groups, data, encode_row)
        log(m)
        for one in sums:
            skipped = skipped + 1 if one["skipped"] else 0
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
        again = ["accelerate", "launch", *sys.argv] if "TORCHELASTIC_RUN_ID" in os.environ else sys.orig_argv
        say(f"stopped after step {done}; continue with: {shlex.join(again)}")
    sampler.close()  # the process group goes with it, so nothing collective may follow
    if cfg.tracker != "none":
        accelerator.end_training()
    if stopped_by == signal.SIGTERM:
        raise SystemExit(PREEMPTED)


if __name__ == "__main__":
    main()
    leave()
