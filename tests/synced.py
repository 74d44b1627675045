"""Run in a process of its own, whose threads vLLM sets: an update of all of a model, synced into the engine.

    python tests/synced.py MODEL DATA OUT

Prints as JSON how far the engine's log-probs are from the packed row's, and what the update has moved.
"""

import dataclasses
import json
import sys
from pathlib import Path

import torch
from pictures import noise

sys.path.insert(0, str(Path(__file__).parent.parent))
from backends import engine_sums, published_names  # noqa: E402
from data import PromptCache, PromptEncoder, load_samples  # noqa: E402
from distributed import make_accelerator  # noqa: E402
from packing import pack, token_logps  # noqa: E402
from train_grpo import GRPOConfig, VLLMSampler, make_learner, update  # noqa: E402

ROWS = range(4)


def main(model, data, out):
    from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

    cfg = GRPOConfig(
        model=model, data=data, out=out, template="spatial_thinker", min_pixels=1024, max_pixels=802816,
        group_size=3, prompts_per_step=4, updates_per_step=1, max_prompt_length=256, max_completion_length=24,
        kl_coef=0, learning_rate=1e-2, tracker="none", vllm_memory=1,
    )  # fmt: skip
    encoder = PromptEncoder(
        AutoProcessor.from_pretrained(model), cfg.template, cfg.min_pixels, cfg.max_pixels
    )
    samples = load_samples(data)
    images = [(noise(128, 128, 0),), (noise(224, 64, 1),), (), (noise(64, 96, 2), noise(96, 32, 3))]
    prompts = [encoder(dataclasses.replace(samples[i], encoded_images=some)) for i, some in enumerate(images)]
    ids = encoder.processor.tokenizer.convert_tokens_to_ids(["<|image_pad|>", "<|video_pad|>"])
    kind = AutoModelForImageTextToText._model_mapping[type(AutoConfig.from_pretrained(model))]
    accelerator = make_accelerator(sorted(kind._no_split_modules))
    learner = make_learner(accelerator, cfg, ids, PromptCache(prompts.__getitem__, 1))
    sampler = VLLMSampler(cfg, encoder, ids, 2)

    @torch.no_grad()
    def log_probs(rollouts):
        """Of all tokens, in one packed row."""
        row = [(p, [r.completion_ids for r in rollouts if r.row == i]) for i, p in enumerate(prompts)]
        return token_logps(learner.policy, pack(row, learner.base))[0]

    def roll_out():
        """Rollouts by the engine, its log-probs and ours of the same tokens."""
        groups = sampler.generate(list(ROWS), prompts, cfg.group_size, 1.0, [7 + i for i in ROWS])
        rollouts = [r for group in groups for r in group]
        return rollouts, torch.tensor([x for r in rollouts for x in r.sampler_logps]), log_probs(rollouts)

    rollouts, engine, old = roll_out()
    results = {"before": (engine - old).abs().max().item()}
    for k, r in enumerate(rollouts):
        r.advantage = 1.0 if k % 3 == 0 else -0.5
    start = {name: p.detach().clone() for name, p in learner.policy.named_parameters()}
    update(learner, rollouts, [list(range(len(rollouts)))], cfg, cfg.learning_rate)
    results["still"] = [n for n, p in learner.policy.named_parameters() if torch.equal(p, start[n])]
    results["moved"] = (log_probs(rollouts) - old).abs().max().item()
    sampler.sync(learner.base)  # raises if the engine then holds other values
    _, engine, row = roll_out()
    results["after"] = (engine - row).abs().max().item()
    held = [name for theirs in engine_sums(sampler.llm) for name in published_names(theirs)]
    results["unknown"] = sorted({*held} - dict(learner.base.named_parameters()).keys())
    print(json.dumps(results))


if __name__ == "__main__":
    main(*sys.argv[1:])
