"""Run by torchrun: real updates on real FSDP2 shards, written down whole for test_sharding.py to compare.

    torchrun --nproc_per_node 2 tests/ranks.py MODEL DATA OUT [KEY=VALUE of GRPOConfig ...]

Writes OUT/result.pt and a checkpoint.
"""

import dataclasses
import random
import resource
import sys
from pathlib import Path

import torch
from pictures import noise

sys.path.insert(0, str(Path(__file__).parent.parent))
from checkpoint import CheckpointError, load, save  # noqa: E402
from data import PromptCache, PromptEncoder, load_samples  # noqa: E402
from distributed import leave, make_accelerator, whole_weights  # noqa: E402
from lora import adapters_off  # noqa: E402
from train_grpo import GRPOConfig, Rollout, make_learner, plan_updates, rollout_logps, update  # noqa: E402


def make_rollouts(encoder, samples, group_size):
    """Prompts with one image of different sizes, two images, none; completions of 1 to 40 tokens."""
    images = [(noise(84, 84, 0),), (noise(140, 56, 1),), (), (noise(28, 56, 2), noise(84, 28, 3)), (), ()]
    prompts = [encoder(dataclasses.replace(samples[i], encoded_images=some)) for i, some in enumerate(images)]
    rng, rollouts = random.Random(0), []
    for row, prompt in enumerate(prompts):
        for _ in range(group_size):
            ids = [rng.randrange(300, 600) for _ in range(rng.randrange(1, 41))]
            logps = [-6 - rng.random() for _ in ids]
            rollouts.append(Rollout(row, len(prompt.ids), ids, logps, "", True))
    return rollouts, PromptCache(prompts.__getitem__, 1)


def whole(tensor):
    tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return tensor.detach().clone()


def try_to_save(attempt):
    """The message of an attempt on a disk where no file grows beyond 100 kB."""
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        attempt()
    except CheckpointError as error:
        return str(error)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))


def main(model, data, out, *overrides):
    from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

    cfg = GRPOConfig(
        model=model,
        out=out,
        group_size=4,
        prompts_per_step=6,
        updates_per_step=2,
        max_tokens_per_micro_batch=300,
        logit_chunk=16,
        tracker="none",
        **dict(pair.split("=") for pair in overrides),
    )
    kind = AutoModelForImageTextToText._model_mapping[type(AutoConfig.from_pretrained(model))]
    accelerator = make_accelerator(sorted(kind._no_split_modules))
    processor = AutoProcessor.from_pretrained(model)
    samples = load_samples(data)
    rollouts, prompt_of = make_rollouts(PromptEncoder(processor, "spatial_thinker", 784, 802816), samples, 4)
    torch.manual_seed(0)
    learner = make_learner(accelerator, cfg, [5, 6], prompt_of)
    policy, optimizer = learner.policy, learner.optimizer
    start = dict(whole_weights(policy))
    trained = {n: p for n, p in policy.named_parameters() if p.requires_grad}
    with torch.no_grad():  # a start that is not the reference, so that there is a KL
        for name, p in trained.items():
            p.mul_(1.01).add_(0.01 if ".lora_B." in name else 0)
    gradients, clip = [], accelerator.clip_grad_norm_

    def clip_and_keep(parameters, norm):
        parameters = list(parameters)
        gradients.append({n: whole(p.grad) for n, p in trained.items()})
        return clip(parameters, norm)

    accelerator.clip_grad_norm_ = clip_and_keep
    rng = random.Random(1)
    for r in rollouts:
        r.advantage = rng.uniform(-1, 1)
    plans = plan_updates(rollouts, cfg, accelerator.num_processes)
    one_group = [list(range(4))] + [[]] * (accelerator.num_processes - 1)  # the others have nothing to do
    for k, logp in rollout_logps(learner, policy, rollouts, plans, cfg).items():
        rollouts[k].logp_old = logp + 0.1  # as if the policy had moved
    with adapters_off(learner.reference):
        for k, logp in rollout_logps(learner, learner.reference, rollouts, plans, cfg).items():
            rollouts[k].logp_ref = logp
    fresh = [dataclasses.replace(r, logp_old=None, logp_ref=None) for r in rollouts]
    keep = {"weights": [], "norms": [], "sums": []}
    for number, shares in enumerate([*plans, one_group]):
        stats = update(learner, rollouts if number < 2 else fresh, shares, cfg, 1e-3)
        keep["weights"].append({n: whole(p) for n, p in trained.items()})
        keep["norms"].append(stats.grad_norm)
        totals = torch.tensor([stats.loss, stats.kl, float(stats.tokens)], dtype=torch.float64)
        keep["sums"].append(accelerator.reduce(totals, "sum").tolist())
        if number == 1:  # what one world size wrote, the other reads
            save(accelerator, policy, optimizer, processor, Path(out), 2, {}, keep_last=1)
    # Continue from the checkpoint of this world size and of the other one, if that is there.
    keep["continued"] = []
    other = Path(out).with_name(f"world-{3 - accelerator.num_processes}")
    for folder in [Path(out), other] if other.exists() else [Path(out)]:
        load(accelerator, policy, optimizer, folder / "checkpoint-2")
        update(learner, fresh, one_group, cfg, 1e-3)
        keep["continued"].append({n: whole(p) for n, p in trained.items()})
    keep["full_disk"] = try_to_save(
        lambda: save(accelerator, policy, optimizer, processor, Path(out), 3, {}, keep_last=1)
    )
    keep["files"] = sorted(p.name for p in Path(out).iterdir())
    keep |= {"gradients": gradients, "start": start, "published": dict(whole_weights(policy))}
    if accelerator.is_main_process:
        torch.save(keep, Path(out) / "result.pt")
    accelerator.wait_for_everyone()


if __name__ == "__main__":
    main(*sys.argv[1:])
    leave()
