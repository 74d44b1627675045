"""Supervised fine-tuning: the paper's baseline (LoRA on question-answer pairs), the tiny model's warm start.

    accelerate launch train_sft.py configs/3b_sft.yaml       # the baseline: LoRA rank 8, 3 epochs
    python train_sft.py configs/tiny_sft.yaml                # the warm start shipped in assets/tiny, on a CPU

The loss is the token mean over the completions of one update; prompts are masked. Sequences are packed
without padding. Writes `<out>/final`, a folder that `from_pretrained` and vLLM load, and
`<out>/metrics.jsonl`. A killed run continues from its last checkpoint as if nothing had happened.
"""

import json
import math
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F

from checkpoint import CheckpointError, refuse_another_run, refuse_other_rows, resume, save
from config import DataConfig, DiskFull, append, opt, plain_errors, write_run_record, write_whole
from data import COLUMNS, POINTING, PromptEncoder, batch_at, load_samples, report_rows
from distributed import gather, leave, refuse_lone_processes, refuse_other_sharding
from lora import add_adapters, merge_adapters
from metrics import end_tracker, lacking_tracker, start_tracker
from packing import check_family, micro_batches, pack, use_packed_attention
from rewards import in_per_mille

FREE_TO_CHANGE = frozenset(  # keys that a continued run may change: they do not change what it computes
    "out resume save_every log_every val_every val_data val_split val_limit max_tokens_per_micro_batch "
    "gradient_checkpointing max_bad_rows skip_bad_rows skip_long_prompts image_threads tracker".split()
)


class SFTConfig(DataConfig):
    target: Literal["answer", "scene_answer", "completion"] = opt("answer", "column to imitate")
    shuffle: bool = opt(True, "a new permutation every epoch; false: file order, for a curriculum")
    # model
    model: str = opt("Qwen/Qwen2.5-VL-3B-Instruct", "Hub id or folder", path=True)
    lora_rank: int = opt(8, "LoRA rank on every linear layer; 0 trains all parameters", ge=0)
    lora_alpha: int = opt(16, "LoRA scale = lora_alpha / lora_rank", ge=1)
    # optimisation
    epochs: float = opt(3, "passes over the data", gt=0)
    batch_size: int = opt(32, "sequences per update, over all processes", ge=1)
    max_tokens_per_micro_batch: int = opt(4096, "tokens packed into one forward pass, per process", ge=1)
    learning_rate: float = opt(1e-4, "peak AdamW step size", gt=0)
    vision_learning_rate: float | None = opt(
        None, "the same for the vision tower; empty: learning_rate; 0 freezes it", ge=0
    )
    warmup: float = opt(0.1, "share of the updates with a rising learning rate", ge=0, lt=1)
    weight_decay: float = opt(0.0, "AdamW weight decay", ge=0)
    adam_beta2: float = opt(0.999, "AdamW second moment decay", gt=0, lt=1)
    max_grad_norm: float = opt(1.0, "gradient clipping", gt=0)
    gradient_checkpointing: bool = opt(True, "recompute activations: less memory, a third more time")
    # run
    out: str = opt("runs/sft", "folder of the run", path=True)
    seed: int = opt(0, "batch order and LoRA initialisation")
    log_every: int = opt(10, "updates between two metric lines", ge=1)
    val_every: int = opt(200, "updates between two validation losses; 0: none", ge=0)
    save_every: int = opt(200, "updates between two checkpoints", ge=1)
    resume: str = opt(
        "auto", "auto: continue a run found in out; never: refuse to; or a checkpoint's folder", path=True
    )

    @property
    def need_scene(self) -> bool:
        return self.target == "scene_answer"


def schedule(step, steps, warmup):
    """Share of the peak learning rate: linear warm-up, then a cosine to zero one update after the last."""
    warmup = round(warmup * steps)
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def parameter_groups(model, cfg):
    """AdamW's groups, {matrix or not} x {vision tower or not}; frozen and untrained parameters left out."""
    groups = {}
    for name, p in model.named_parameters():
        if p.requires_grad:
            vision = cfg.vision_learning_rate is not None and ".visual." in name
            peak = cfg.vision_learning_rate if vision else cfg.learning_rate
            decay = cfg.weight_decay if p.ndim >= 2 else 0.0
            group = groups.setdefault((peak, decay), {"params": [], "peak": peak, "weight_decay": decay})
            group["params"].append(p)
    return list(groups.values())


def completion_loss_sum(model, batch):
    """Summed negative log-likelihood of the packed completion tokens (nats), number predicted right."""
    batch = dict(batch)
    labels, at = batch.pop("target_ids"), batch.pop("predicted_at")  # (C,), (C,)
    # Only positions that predict a completion token go through the head: at 152k entries it is the largest.
    logits = model(**batch, use_cache=False, logits_to_keep=at).logits[0]  # (C, V)
    return F.cross_entropy(logits.float(), labels, reduction="sum"), (logits.argmax(-1) == labels).sum()


def build_model(cfg):
    from transformers import AutoModelForImageTextToText

    # fp32 masters: at small learning rates bf16 weights would round the update away.
    model = AutoModelForImageTextToText.from_pretrained(cfg.model, dtype=torch.float32)
    use_packed_attention(model)
    if cfg.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    if cfg.vision_learning_rate == 0:
        model.model.visual.requires_grad_(False)
    if cfg.lora_rank:
        add_adapters(model, cfg.lora_rank, cfg.lora_alpha, vision=cfg.vision_learning_rate != 0)
    return model


def main():
    try:
        train(SFTConfig.parse_args())
    except (CheckpointError, DiskFull) as error:
        raise SystemExit(f"error: {error}") from None


def target_of(sample, cfg: SFTConfig) -> str:
    """The text to imitate. Raises: ValueError without one, or in a frame that the prompt does not state."""
    text = getattr(sample, {"scene_answer": "ground_truth"}.get(cfg.target, cfg.target))
    if not isinstance(text, str) or not text.strip():
        column = cfg.columns.get(cfg.target, COLUMNS[cfg.target])
        raise ValueError(f"column {column}: expected text to imitate, got {text!r}")
    if sample.kind in POINTING and cfg.target != "completion":
        raise ValueError(f"expected target=completion where the answer is a {sample.kind}, got {cfg.target}")
    in_frame = cfg.target == "scene_answer" and cfg.box_frame == "per_mille"
    return in_per_mille(text, sample.size) if in_frame else text


def train(cfg: SFTConfig):
    from accelerate import Accelerator
    from transformers import AutoConfig, AutoProcessor

    with plain_errors():
        refuse_other_sharding()
        refuse_lone_processes()
    if why := lacking_tracker(cfg.tracker):
        raise SystemExit(f"error: {why}")
    on_gpu = torch.cuda.is_available()
    log_with = None if cfg.tracker == "none" else cfg.tracker
    precision = "bf16" if on_gpu else "no"
    accelerator = Accelerator(
        cpu=not on_gpu, mixed_precision=precision, project_dir=cfg.out, log_with=log_with
    )
    out = Path(cfg.out)
    refuse_another_run(cfg, out, FREE_TO_CHANGE)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        write_run_record(cfg, out)

    # ---- data ----
    with plain_errors():
        check_family(cfg.model, AutoConfig.from_pretrained(cfg.model))
        processor = AutoProcessor.from_pretrained(cfg.model)
        if processor.tokenizer.eos_token_id is None:
            raise ValueError(f"{cfg.model}: expected a tokenizer with an eos_token, got none")
        how = cfg.min_pixels, cfg.max_pixels, cfg.box_frame
        encoder = PromptEncoder(processor, cfg.template, *how)

    def length(sample) -> int:  # at load, so that no row without a target stops the run halfway
        target_of(sample, cfg)
        return encoder.length(sample)

    limits = dict(prompt_length=length, max_prompt_length=cfg.max_prompt_length)
    with plain_errors():
        loaded = {"train": load_samples(**cfg.source(cfg.data, cfg.split), **limits)}
        if cfg.val_every and cfg.val_split:
            source = cfg.source(cfg.val_data or cfg.data, cfg.val_split)
            apart = dict(limit=cfg.val_limit, apart_from=loaded["train"])
            loaded["held out"] = load_samples(**source, **limits, **apart)
    refuse_other_rows(accelerator, out, loaded["train"].fingerprint())
    if accelerator.is_main_process:
        print(report_rows(loaded, out / "bad_rows.txt"), flush=True)
    samples, val = loaded["train"], loaded.get("held out", [])

    def sequence(sample):
        # The sampler ends a reply at this token, so a completion has to end with it.
        ids = processor.tokenizer(target_of(sample, cfg))["input_ids"]
        return encoder(sample), [*ids, processor.tokenizer.eos_token_id]

    pool = ThreadPoolExecutor(cfg.image_threads)

    # ---- model ----
    torch.manual_seed(cfg.seed)
    model = build_model(cfg)
    betas, fused = (0.9, cfg.adam_beta2), accelerator.device.type == "cuda"
    optimizer = torch.optim.AdamW(
        parameter_groups(model, cfg), lr=cfg.learning_rate, betas=betas, fused=fused
    )
    n_trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    model, optimizer = accelerator.prepare(model, optimizer)
    base = accelerator.unwrap_model(model)

    steps = max(1, round(cfg.epochs * len(samples) / cfg.batch_size))
    first = resume(accelerator, model, optimizer, out, cfg.resume, steps)
    start_tracker(accelerator, cfg, "sft", first)
    rank, world = accelerator.process_index, accelerator.num_processes
    accelerator.print(
        f"{len(samples)} samples, {steps} updates of {cfg.batch_size}, from update {first}; "
        f"{n_trained:,} trained parameters"
    )

    def packed(sequences):
        lengths = [(i, len(prompt.ids), len(ids)) for i, (prompt, ids) in enumerate(sequences)]
        groups = micro_batches(lengths, cfg.max_tokens_per_micro_batch)
        groups += [[]] * (max(gather([len(groups)])) - len(groups))  # every process runs equally often
        for group in groups:
            batch = pack([(prompt, [ids]) for prompt, ids in (sequences[i] for i in group)], base)
            yield {k: v.to(accelerator.device) if torch.is_tensor(v) else v for k, v in batch.items()}

    @torch.no_grad()
    def validate():
        """Token-mean loss and share of tokens predicted right, over all processes."""
        model.eval()
        total = torch.zeros(3, device=accelerator.device)
        for batch in packed(list(pool.map(sequence, val[rank::world]))):
            n = len(batch["target_ids"])
            loss, right = completion_loss_sum(model, batch)
            total += torch.stack([loss, right.float(), torch.tensor(float(n), device=loss.device)])
        model.train()
        loss, right, n = accelerator.reduce(total, "sum").tolist()
        return {"val_loss": loss / n, "val_token_accuracy": right / n}

    def begin(step) -> list:
        """The sequences of this process's share of an update, as they are prepared in threads."""
        first_row = step * cfg.batch_size
        order = (
            batch_at(cfg.seed, step, cfg.batch_size, len(samples))
            if cfg.shuffle
            else [i % len(samples) for i in range(first_row, first_row + cfg.batch_size)]
        )
        return [pool.submit(sequence, samples[i]) for i in order[rank::world]]

    # ---- train ----
    started, tokens_seen = time.time(), 0
    model.train()
    begun = begin(first) if first < steps else []
    for step in range(first, steps):
        sequences = [one.result() for one in begun]
        begun = begin(step + 1) if step + 1 < steps else []  # while this update is computed
        n_tokens = float(sum(len(ids) for _, ids in sequences))
        n_tokens = torch.tensor(n_tokens, device=accelerator.device)
        n_tokens = accelerator.reduce(n_tokens, "sum")  # one denominator for the whole update
        total = torch.zeros(2, device=accelerator.device)
        for batch in packed(sequences):
            loss, right = completion_loss_sum(model, batch)
            accelerator.backward(loss * world / n_tokens)
            total += torch.stack([loss.detach(), right.float()])
        grad_norm = accelerator.clip_grad_norm_(model.parameters(), cfg.max_grad_norm)
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * schedule(step, steps, cfg.warmup)
        optimizer.step()
        optimizer.zero_grad()
        tokens_seen += sum(len(prompt.ids) + len(ids) for prompt, ids in sequences) * world

        done = step + 1
        validating = bool(val) and (done % cfg.val_every == 0 or done == steps)
        if done % cfg.log_every == 0 or done == steps or validating:
            loss, right = (accelerator.reduce(total, "sum") / n_tokens).tolist()
            seconds = time.time() - started
            line = {
                "step": done,
                "loss": loss,
                "token_accuracy": right,
                "grad_norm": float(grad_norm),
                "lr": cfg.learning_rate * schedule(step, steps, cfg.warmup),
                "tokens_per_s": tokens_seen / seconds,
                "seconds": seconds,
            }
            if validating:
                line |= validate()
            if accelerator.is_main_process:
                numbers = " | ".join(f"{k} {v:.4g}" for k, v in line.items() if k != "step")
                print(f"update {done}/{steps} | {numbers}", flush=True)
                append(out / "metrics.jsonl", json.dumps(line) + "\n")
            accelerator.log(line, step=done)
        if done % cfg.save_every == 0 or done == steps:
            save(accelerator, model, optimizer, processor, out, done, {}, keep_last=1)

    # ---- save ----
    if accelerator.is_main_process:
        merge_adapters(base)
        with write_whole(out / "final") as tmp:
            base.to(torch.bfloat16).save_pretrained(tmp)
            processor.save_pretrained(tmp)
        print(f"wrote {out / 'final'}")
    end_tracker(accelerator)


if __name__ == "__main__":
    main()
    leave()
