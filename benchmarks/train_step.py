"""One GRPO step of this trainer and of TRL's GRPOTrainer, side by side: speed and memory.

    python benchmarks/train_step.py           (10 minutes on two cores; TRL is in requirements-cpu.txt)

Both train the same randomly initialised Qwen2.5-VL in float32 with AdamW, without KL and without gradient
checkpointing, on the same 16 prompts x 8 completions (2 x 8 at the large vocabulary), in micro-batches of 8
sequences, or of as many tokens as 8 of the longest have. `update` trains on given completions of 16 to 128
tokens; `step` samples 96 tokens each first: TRL with `generate` (its vLLM mode does not start here), this
trainer with vLLM and with `generate`.
Tokens are those of prompts and completions without padding; memory is the growth of the process meanwhile.
`scaling` is an update's speed as its micro-batch grows. Every cell runs in a process of its own; ratios hold,
single figures vary with the machine.
"""

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

REPO = Path(__file__).parents[1]
sys.path.insert(0, str(REPO))

SIZES = {  # name: text width, layers, vocabulary, prompts
    "2.5M, vocabulary 700": (192, 4, None, 16),
    "43M, vocabulary 152k": (256, 4, 152064, 2),
}
GROUP, SHORTEST, LONGEST, SAMPLED = 8, 16, 128, 96
WARM, TIMED = 1, 2  # rounds


# ---- the common ground ----
def build(folder, width, layers, vocabulary, prompts):
    """Model, processor and rows of one size; the tokenizer stays the tiny one."""
    import torch
    from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

    from stvqa import write_parquet
    from tiny import build_base_model, rows

    build_base_model(folder, seed=0)
    if vocabulary:
        config = AutoConfig.from_pretrained(folder)
        text = config.text_config
        text.hidden_size, text.num_hidden_layers, text.vocab_size = width, layers, vocabulary
        text.intermediate_size, config.vision_config.out_hidden_size = 3 * width, width
        text.num_attention_heads, text.num_key_value_heads = width // 32, width // 128
        torch.manual_seed(0)
        processor = AutoProcessor.from_pretrained(folder)
        AutoModelForImageTextToText.from_config(config, dtype=torch.float32).save_pretrained(folder)
        processor.save_pretrained(folder)
    write_parquet(Path(folder) / "train.parquet", rows(prompts, 0, "train", set()))


def given_completions(prompts):
    rng = random.Random(0)
    return [
        [rng.randrange(300, 600) for _ in range(rng.randint(SHORTEST, LONGEST))]
        for _ in range(prompts * GROUP)
    ]


class Memory(threading.Thread):
    """Growth of this process's resident memory, bytes, over its context."""

    def run(self):
        while not self.done.wait(0.002):
            self.peak = max(self.peak, self.now())

    def now(self):
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")

    def __enter__(self):
        self.done, self.start_bytes = threading.Event(), self.now()
        self.peak = self.start_bytes
        self.start()
        return self

    def __exit__(self, *_):
        self.done.set()
        self.join()
        self.growth = max(self.peak, self.now()) - self.start_bytes


# ---- ours ----
def ours(folder, sampler, budget=None, rounds=WARM + TIMED, lengths=None):
    """Timings of `rounds` steps; sampler "given": updates on the given completions alone."""
    from transformers import AutoProcessor

    from data import PromptCache, PromptEncoder, load_samples
    from distributed import make_accelerator
    from train_grpo import (
        GRPOConfig,
        HFSampler,
        Rollout,
        VLLMSampler,
        make_learner,
        plan_updates,
        sample_everywhere,
        update,
    )

    samples = load_samples(str(folder))
    n_prompts = len(samples)
    cfg = GRPOConfig(
        model=str(folder),
        data=str(folder),
        template="spatial_thinker",
        min_pixels=784,
        max_prompt_length=128,
        max_completion_length=SAMPLED,
        prompts_per_step=n_prompts,
        group_size=GROUP,
        updates_per_step=1,
        kl_coef=0,
        learning_rate=1e-6,
        gradient_checkpointing=False,
        vllm_memory=1,
        tracker="none",
        out=f"{folder}/out",
        max_tokens_per_micro_batch=budget or 8 * (50 + LONGEST),
    )
    accelerator = make_accelerator(["Qwen2_5_VLDecoderLayer", "Qwen2_5_VLVisionBlock"])
    processor = AutoProcessor.from_pretrained(folder)
    encoder = PromptEncoder(processor, cfg.template, 784, cfg.max_pixels)
    prompts = [encoder(s) for s in samples]
    prompt_of = PromptCache(prompts.__getitem__, 1)
    pads = processor.tokenizer.convert_tokens_to_ids(["<|image_pad|>", "<|video_pad|>"])
    learner = make_learner(accelerator, cfg, pads, prompt_of)
    if sampler != "given":
        sampler = VLLMSampler(cfg, encoder, pads, 1) if sampler == "vllm" else HFSampler(cfg, encoder, pads)
        sampler.sync(learner.base)
    given = given_completions(n_prompts) if lengths is None else [[400] * n for n in lengths]
    results = []
    with Memory() as memory:
        for _ in range(rounds):
            t0 = time.perf_counter()
            if sampler == "given":
                rollouts = [
                    Rollout(k * n_prompts // len(given), 0, ids, [-6.5] * len(ids), "", True)
                    for k, ids in enumerate(given)
                ]
                for r in rollouts:
                    r.prompt_length = len(prompts[r.row].ids)
            else:
                rows = [*range(n_prompts)]
                groups = sample_everywhere(
                    accelerator, sampler, prompt_of, rows, GROUP, 1.0, rows, lambda r: r
                )
                rollouts = [r for group in groups for r in group]
            t1 = time.perf_counter()
            one_group = cfg.model_copy(update={"group_size": len(rollouts) // n_prompts})
            (shares,) = plan_updates(rollouts, one_group, 1)
            for k, r in enumerate(rollouts):
                r.advantage = (-1.0) ** k
            update(learner, rollouts, shares, cfg, 1e-6)
            t2 = time.perf_counter()
            if sampler != "given":
                sampler.sync(learner.base)
            results.append(
                {
                    "gen_s": t1 - t0,
                    "update_s": t2 - t1,
                    "step_s": time.perf_counter() - t0,
                    "sampled": sum(len(r.completion_ids) for r in rollouts),
                    "tokens": sum(len(r) for r in rollouts),
                }
            )
    return results, memory.growth


# ---- TRL ----
def trl(folder, sampler):
    import torch
    from datasets import Dataset, Features, Image, Value
    from transformers import AutoModelForImageTextToText, AutoProcessor, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    from data import build_prompt_text, load_samples

    def chat(s):
        return [{"role": "user", "content": build_prompt_text("spatial_thinker", s.question, s.size)}]

    samples = load_samples(str(folder))
    rows = [{"prompt": chat(s), "image": s.load_images()[0]} for s in samples]
    message = [{"role": Value("string"), "content": Value("string")}]
    data = Dataset.from_list(rows * (WARM + TIMED), features=Features({"prompt": message, "image": Image()}))
    processor = AutoProcessor.from_pretrained(folder)
    processor.tokenizer.padding_side = "left"
    pads = processor.tokenizer.convert_tokens_to_ids(["<|image_pad|>", "<|video_pad|>"])
    arguments = GRPOConfig(  # a sampled image token ends TRL's run; this trainer forbids them anyway
        output_dir=f"{folder}/trl",
        generation_kwargs={"suppress_tokens": pads},
        per_device_train_batch_size=8,
        gradient_accumulation_steps=len(samples),
        num_generations=GROUP,
        max_completion_length=SAMPLED if sampler != "given" else LONGEST,
        beta=0.0,
        max_steps=WARM + TIMED,
        learning_rate=1e-6,
        gradient_checkpointing=False,
        use_cpu=True,
        bf16=False,
        report_to=[],
        save_strategy="no",
        logging_strategy="no",
        shuffle_dataset=False,
        disable_tqdm=True,
    )
    given, results = given_completions(len(samples)), []

    class Timed(GRPOTrainer):
        def _generate_single_turn(self, prompt_ids, *args, **kwargs):
            self.prompt_tokens = sum(len(ids) for ids in prompt_ids)
            if sampler == "given":
                return [list(ids) for ids in given], None
            return super()._generate_single_turn(prompt_ids, *args, **kwargs)

        def _generate_and_score_completions(self, inputs):
            start = time.perf_counter()
            batch = super()._generate_and_score_completions(inputs)
            sampled = int(batch["completion_mask"].sum())
            results.append(
                {
                    "gen_s": time.perf_counter() - start,
                    "sampled": sampled,
                    "tokens": self.prompt_tokens + sampled,
                }
            )
            return batch

    class Clock(TrainerCallback):
        def on_step_begin(self, *args, **kwargs):
            self.start = time.perf_counter()

        def on_step_end(self, *args, **kwargs):
            results[-1]["step_s"] = time.perf_counter() - self.start

    def reward(completions, **_):
        return [float(k % 2) for k in range(len(completions))]

    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    trainer = Timed(
        model=model,
        reward_funcs=reward,
        args=arguments,
        processing_class=processor,
        train_dataset=data,
        callbacks=[Clock()],
    )
    with Memory() as memory:
        trainer.train()
    for one in results:
        one["update_s"] = one["step_s"] - one["gen_s"]
    return results, memory.growth


# ---- the table ----
def cell(folder, system, sampler, *more):
    """Run one system in a process of its own: medians of the timed rounds."""
    command = [sys.executable, __file__, "--cell", str(folder), system, sampler, *map(str, more)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=REPO, timeout=900)
    if done.returncode:
        raise SystemExit(f"{system} {sampler}: {done.stderr[-3000:]}")
    result = json.loads(done.stdout.splitlines()[-1])
    timed = result["rounds"][WARM:]
    median = {key: statistics.median(r[key] for r in timed) for key in timed[0]}
    return median | {"memory": result["memory"]}


def main():
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--cell", nargs="*", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.cell:
        folder, system, sampler, *more = args.cell
        if system == "trl":
            rounds, memory = trl(folder, sampler)
        elif more:  # one micro-batch of so many tokens, in groups of 8 completions of about 200 tokens
            tokens = int(more[0])
            n = 16 * max(1, tokens // (16 * 200))
            rounds, memory = ours(folder, sampler, budget=2 * tokens, lengths=[tokens // n] * n)
        else:
            rounds, memory = ours(folder, sampler)
        print(json.dumps({"rounds": rounds, "memory": memory}))
        return
    with tempfile.TemporaryDirectory() as scratch:
        print(f"{'':24}{'':14}{'rollout tok/s':>14}{'update tok/s':>14}{'step s':>8}{'update GB':>11}")
        for name, size in SIZES.items():
            folder = Path(scratch, str(size[0]))
            build(folder, *size)
            cells = {}
            for label, system, sampler in (
                ("TRL update", "trl", "given"),
                ("our update", "ours", "given"),
                ("TRL generate", "trl", "hf"),
                ("our generate", "ours", "hf"),
                ("our vLLM", "ours", "vllm"),
            ):
                c = cells[label] = cell(folder, system, sampler)
                given = sampler == "given"
                print(
                    f"{name:24}{label:14}{'' if given else round(c['sampled'] / c['gen_s']):>14}"
                    f"{c['tokens'] / c['update_s']:>14.0f}{'' if given else round(c['step_s'], 2):>8}"
                    f"{c['memory'] / 2**30:>11.2f}",
                    flush=True,
                )
            a, b = cells["TRL update"], cells["our update"]
            speed = (b["tokens"] / b["update_s"]) / (a["tokens"] / a["update_s"])
            step = cells["TRL generate"]["step_s"] / cells["our vLLM"]["step_s"]
            print(
                f"  ours / TRL: update {speed:.2f} x the tokens/s, {b['memory'] / a['memory']:.2f} x the "
                f"memory; whole step {step:.1f} x as fast\n"
            )
        print("scaling (2.5M): tokens in the one micro-batch, update tokens/s, memory")
        for tokens in (512, 1024, 2048, 4096, 8192):
            c = cell(Path(scratch, "192"), "ours", "given", tokens)
            print(
                f"  {c['tokens']:>6} {c['tokens'] / c['update_s']:>8.0f}  {c['memory'] / 2**30:.2f} GB",
                flush=True,
            )


if __name__ == "__main__":
    main()
