"""The algorithm: advantages, losses and updates by hand and against plain implementations, and a bandit."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from bounds import U64, gradient_bound, rounding
from models import distance, load_plain, plain_logits
from pictures import noise

import train_grpo
from data import PromptCache, PromptEncoder, load_samples
from packing import FAMILIES, FORBIDDEN_BIAS, check_family, pack, token_logps
from rewards import Score
from train_grpo import (
    GRPOConfig,
    Rollout,
    batch_loss,
    group_advantages,
    kl_loss,
    learning_rate_at,
    make_learner,
    make_scorer,
    packed_batches,
    plan_updates,
    policy_loss,
    replace_dead,
    request_seed,
    rollout_logps,
    update,
)


# ---- advantages ----
def test_group_advantages_by_hand():
    # mean 0.5, unbiased std sqrt((0.25 * 2) / 1) = 0.70711: +-0.5 / 0.70711; 0, 0, 3: mean 1, std sqrt(3)
    got = group_advantages(torch.tensor([[0.0, 1.0]], dtype=torch.float64))
    np.testing.assert_allclose(got, [[-0.70711, 0.70711]], atol=1e-5)  # five digits, and the 1e-6 beside std
    got = group_advantages(torch.tensor([[0.0, 0.0, 3.0]], dtype=torch.float64))
    np.testing.assert_allclose(got, [[-0.57735, -0.57735, 1.15470]], atol=1e-5)


def test_equal_rewards_give_exactly_zero_even_with_float_noise():
    noise = torch.tensor([[0.3, 0.3 + 1e-7, 0.3 - 1e-7, 0.1 + 0.2]], dtype=torch.float64)
    assert group_advantages(noise).tolist() == [[0.0] * 4]
    assert group_advantages(torch.full((2, 3), 0.7)).tolist() == [[0.0] * 3] * 2


def test_advantages_are_per_group_and_invariant_to_reward_shift_and_scale():
    rewards = torch.rand(5, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    base = group_advantages(rewards)
    np.testing.assert_allclose(base.sum(1), 0, atol=rounding(8, 8, u=U64), rtol=0)
    # Exact but for the 1e-6 beside std: at std 0.1 or more, advantages of up to 3 move by less than 3e-5.
    assert rewards.std(1).min() > 0.1
    np.testing.assert_allclose(group_advantages(rewards * 3 + 7), base, atol=3e-5)
    changed = rewards.clone()
    changed[0] = torch.rand(8)
    assert torch.equal(group_advantages(changed)[1:], base[1:])


@pytest.mark.parametrize("rewards", [torch.zeros(3), torch.zeros(3, 1), torch.tensor([[1.0, math.nan]])])
def test_bad_rewards_are_refused(rewards):
    with pytest.raises(ValueError, match="rewards: expected"):
        group_advantages(rewards)


# ---- policy loss ----
def one_token(ratio, advantage, **kwargs):
    """(loss, gradient with respect to logp, statistics) of a single token."""
    logp = torch.tensor([math.log(ratio)], dtype=torch.float64, requires_grad=True)
    old, one = torch.zeros(1, dtype=torch.float64), torch.ones(1, dtype=torch.float64)
    loss, stats = policy_loss(logp, old, one * advantage, one, **kwargs)
    loss.backward()
    return loss.item(), logp.grad.item(), {k: int(v) for k, v in stats.items()}


@pytest.mark.parametrize("ratio, advantage, loss, gradient, hit", [
    (1.0, 2.0, -2.0, -2.0, None),  # on policy: the plain policy gradient
    (1.5, 2.0, -2.6, 0.0, "clip_high"),  # 1.5 > 1 + 0.3: -2 * 1.3, flat
    (1.25, 2.0, -2.5, -2.5, None),  # inside the wider upper side
    (0.5, 2.0, -1.0, -1.0, None),  # a good token that got unlikely is pulled back unclipped
    (0.5, -2.0, 1.6, 0.0, "clip_low"),  # 0.5 < 1 - 0.2: 2 * 0.8, flat
    (0.75, -2.0, 1.6, 0.0, "clip_low"),  # the lower side is the narrower one
    (1.5, -2.0, 3.0, 3.0, None),  # a bad token that got likely is pushed down unclipped
    (4.0, -2.0, 6.0, 0.0, "clip_dual"),  # until the dual clip: 2 * 3
])  # fmt: skip
def test_clipping_by_hand(ratio, advantage, loss, gradient, hit):
    got_loss, got_gradient, stats = one_token(ratio, advantage)
    near = {"rel": rounding(8, u=U64), "abs": 0}  # exp of a logarithm and a few products
    assert got_loss == pytest.approx(loss, **near) and got_gradient == pytest.approx(gradient, **near)
    assert [k for k, v in stats.items() if v] == ([hit] if hit else [])


def numpy_policy_loss(logp, old, advantage, mask, low, high, dual, weight):
    """Straight-line reference, one token at a time."""
    total = 0.0
    for p, o, a, m, w in zip(logp, old, advantage, mask, weight, strict=True):
        ratio = np.exp(np.clip(p - o, -20, 20))
        value = min(ratio * a, np.clip(ratio, 1 - low, 1 + high) * a)
        if a < 0:
            value = max(value, dual * a)
        total -= value * w * m
    return total


def test_policy_loss_equals_the_reference_on_random_tokens():
    rng = np.random.default_rng(0)
    for _ in range(20):
        logp, old, advantage = rng.normal(0, 1.5, (3, 50))
        mask, weight = rng.integers(0, 2, 50).astype(float), rng.uniform(0, 2, 50)
        got, _ = policy_loss(
            *map(torch.tensor, (logp, old, advantage, mask)),
            clip_low=0.1,
            clip_high=0.4,
            dual_clip=2.0,
            weight=torch.tensor(weight),
        )
        want = numpy_policy_loss(logp, old, advantage, mask, 0.1, 0.4, 2.0, weight)
        # 50 terms of both signs: relative to their sizes (dual clip, weight, advantage: 2 x 2 x 5 at most),
        # not to what is left of the sum
        assert got.item() == pytest.approx(want, abs=50 * 20 * rounding(50, u=U64))


def test_masked_tokens_get_exactly_zero_gradient_and_extreme_ratios_stay_finite():
    logp = torch.tensor([-1.0, -2.0, 500.0, -500.0], requires_grad=True)
    advantages, mask = torch.tensor([1.0, 1.0, -1.0, 1.0]), torch.tensor([1.0, 0.0, 1.0, 1.0])
    loss, _ = policy_loss(logp, torch.zeros(4), advantages, mask)
    loss.backward()
    assert torch.isfinite(loss) and torch.isfinite(logp.grad).all()
    assert logp.grad[1] == 0 and logp.grad[0] != 0


# ---- KL ----
def test_kl_by_hand():
    # log ratio ref/policy = 0.5: k3 = e^0.5 - 0.5 - 1 = 0.148721
    same = torch.tensor([-1.0], dtype=torch.float64)
    loss, kl = kl_loss(same, same + 0.5, same, torch.ones(1))
    assert loss.item() == kl.item() == pytest.approx(0.148721, abs=1e-6)  # six digits
    assert kl_loss(same, same, same, torch.ones(1))[0].item() == 0


def test_kl_gradient_is_that_of_the_exact_kl():
    """Expected gradient over a categorical policy, against autograd on the closed form."""
    logits = torch.tensor([0.3, -0.7, 1.1, 0.0], dtype=torch.float64, requires_grad=True)
    reference = torch.tensor([-0.2, 0.9, 0.1, 0.4], dtype=torch.float64).log_softmax(-1)
    logp = logits.log_softmax(-1)
    (exact,) = torch.autograd.grad((logp.exp() * (logp - reference)).sum(), logits)
    logp = logits.log_softmax(-1)
    old = logp.detach()
    # every token once, weighted by its probability: the expectation over samples of the old policy
    loss, _ = kl_loss(logp, reference, old, old.exp())
    (got,) = torch.autograd.grad(loss, logits)
    np.testing.assert_allclose(got, exact, atol=rounding(4, 4, 4, u=U64), rtol=0)


# ---- learning ----
def test_a_bandit_learns():
    """Four arms, one of them right: catches a wrong sign anywhere between reward and step."""
    torch.manual_seed(0)
    logits = torch.zeros(4, requires_grad=True)
    optimizer = torch.optim.Adam([logits], lr=0.1)
    for _ in range(60):
        arms = torch.distributions.Categorical(logits=logits.detach()).sample((4, 8))  # (P, G)
        advantages = group_advantages((arms == 2).double()).flatten()
        logp = logits.log_softmax(-1)[arms.flatten()]
        loss, _ = policy_loss(logp, logp.detach(), advantages, torch.ones(32))
        optimizer.zero_grad()
        (loss / 32).backward()
        optimizer.step()
    # 60 Adam steps of 0.1 move a logit by up to 6; against three others at 0, a lead of 4 is 0.95. Chance:
    # 0.25.
    assert logits.softmax(-1)[2] > 0.9


# ---- the loss of a micro-batch ----
def rollout(row=0, prompt_length=5, ids=(1, 2, 3), logps=None, text="", **known):
    ids = list(ids)
    return Rollout(row, prompt_length, ids, logps or [-1.0] * len(ids), text, True, **known)


def test_batch_loss_by_hand():
    """One token each: policy loss 2.6 or 1.6 (the table above), weight, KL, cap and mismatch."""
    cfg = GRPOConfig(kl_coef=0.1, is_cap=2.0)
    # ratio 1.5, advantage 2: -2.6. Old -1.0, sampler -1.5: weight e^0.5 = 1.648721.
    # Reference 0.5 above the policy: ratio (e^0.5 - 0.5 - 1) = 1.5 * 0.148721.
    logp = torch.tensor([-1.0 + math.log(1.5)], dtype=torch.float64)
    known = {"advantage": 2.0, "logp_old": torch.tensor([-1.0]), "logp_ref": logp.float() + 0.5}
    loss, sums = batch_loss([rollout(ids=[7], logps=[-1.5], **known)], logp, cfg)
    want = -2.6 * 1.648721 + 0.1 * 1.5 * 0.148721
    assert loss.item() == pytest.approx(want, abs=1e-5)  # six digits, times 2.6
    got = {name: float(value) for name, value in sums.items()}
    assert got == pytest.approx(
        {"loss": want, "kl": 0.148721, "clip_low": 0, "clip_high": 1, "clip_dual": 0}
        | {"mismatch": 0.5, "mismatch_max": 0.5, "capped": 0},
        abs=1e-5,
    )
    # Sampler 1.5 below: weight e^1.5 = 4.48, cut to 2. No reference: no KL.
    loss, sums = batch_loss([rollout(ids=[7], logps=[-2.5], **known | {"logp_ref": None})], logp, cfg)
    assert (
        loss.item() == pytest.approx(-2.6 * 2, abs=1e-5) and float(sums["capped"]) == 1 and "kl" not in sums
    )
    # A cap of 0 turns the weight off.
    off = GRPOConfig(kl_coef=0.1, is_cap=0)
    loss, sums = batch_loss([rollout(ids=[7], logps=[-2.5], **known | {"logp_ref": None})], logp, off)
    assert loss.item() == pytest.approx(-2.6, abs=1e-5) and sums["capped"] == 0


def test_a_rollout_without_old_log_probs_is_on_policy():
    """Its ratio is 1, its gradient -advantage a token; of no rollouts the loss is 0, with a gradient of 0."""
    cfg = GRPOConfig(kl_coef=0, is_cap=0)
    logp = torch.tensor([-1.0, -2.0, -3.0], requires_grad=True)
    loss, _ = batch_loss([rollout(ids=[1], advantage=2.0), rollout(ids=[1, 2], advantage=-0.5)], logp, cfg)
    loss.backward()
    assert loss.item() == -2.0 + 2 * 0.5 and logp.grad.tolist() == [-2.0, 0.5, 0.5]
    nothing = torch.zeros(0, requires_grad=True)
    loss, sums = batch_loss([], nothing, cfg)
    loss.backward()
    assert loss.item() == 0 and nothing.grad.shape == (0,) and sums["mismatch_max"] == 0


# ---- who trains on what ----
def test_plan_updates_by_hand():
    """Four groups of two, two updates, two processes: tokens 5 + 1 + 2, ... of a group, its prompt once."""
    lengths = [(1, 2), (9, 9), (4, 4), (3, 5)]
    rollouts = [rollout(row, 5, range(n)) for row, pair in enumerate(lengths) for n in pair]
    cfg = GRPOConfig(prompts_per_step=4, group_size=2, updates_per_step=2)
    # first update: groups of 8 and 23 tokens; second: 13 and 13, the first of equals to the first process
    assert plan_updates(rollouts, cfg, 2) == [[[2, 3], [0, 1]], [[4, 5], [6, 7]]]
    assert plan_updates(rollouts, cfg, 1) == [[[0, 1, 2, 3]], [[4, 5, 6, 7]]]
    assert plan_updates(rollouts, cfg, 3)[0] == [[2, 3], [0, 1], []]
    assert plan_updates(rollouts[:4], cfg, 2) == [[[0, 1], []], [[2, 3], []]]
    # the prompt counts: 40 + 4 is more than 5 + 20, so the first group goes to the first process
    long = [*(rollout(0, 40, range(2)) for _ in range(2)), *(rollout(1, 5, range(10)) for _ in range(2))]
    assert plan_updates(long, GRPOConfig(prompts_per_step=2, group_size=2, updates_per_step=1), 2) == [
        [[0, 1], [2, 3]]
    ]


def test_dead_groups_are_replaced_by_rows_that_were_not_drawn():
    def group(row, *rewards):
        return [rollout(row, score=Score(reward=x)) for x in rewards]

    cfg = GRPOConfig(prompts_per_step=4, group_size=2, updates_per_step=1, resample_dead_groups=2)
    asked = []

    def roll_out(rows, step):
        asked.append(list(rows))
        return [group(row, 0.0, 1.0 if len(asked) == 2 else 0.0) for row in rows]

    groups = [group(0, 0.1, 0.9), group(1, 0.5, 0.5), group(2, 0.0, 1.0), group(3, 0.2, 0.2)]
    got, replaced = replace_dead(groups, [0, 1, 2, 3], roll_out, 10, 7, cfg)
    assert [len(rows) for rows in asked] == [2, 2] and replaced == 4
    drawn = asked[0] + asked[1]
    assert len(set(drawn)) == 4 and set(drawn) <= set(range(4, 10))  # none of the step's own, none twice
    assert [g[0].row for g in got] == [0, asked[1][0], 2, asked[1][1]]  # in the places of the dead ones
    assert got[0] is groups[0] and groups[1][0].row == 1  # the list handed in is left alone
    first = asked.copy()
    asked.clear()
    replace_dead(groups, [0, 1, 2, 3], roll_out, 10, 7, cfg)
    assert asked == first  # a function of (seed, step, round)

    asked.clear()
    got, replaced = replace_dead(groups, [0, 1, 2, 3], roll_out, 5, 7, cfg)  # one row is left for two groups
    assert asked == [[4]] and replaced == 1 and [g[0].row for g in got] == [0, 4, 2, 3]
    mixed = [[rollout(0, score=Score(reward=x)) for x in (0.0, 0.5, 1.0)]]  # one advantage is 0: alive
    assert replace_dead(mixed, [0], None, 10, 7, cfg) == (mixed, 0)
    off = GRPOConfig(prompts_per_step=4, updates_per_step=1)
    assert replace_dead(groups, [0, 1, 2, 3], None, 10, 7, off) == (groups, 0)


def score_of(text, data, **settings):
    return vars(make_scorer(data, GRPOConfig(**settings))(rollout(text=text)).score)


def test_the_reward_is_the_configured_one(tiny_data):
    data = load_samples(str(tiny_data))
    scene, _, answer = data[0].ground_truth.partition("\n")
    honest = f"<observe>o</observe>{scene}<think>t</think>{answer}"
    near = {"abs": 1e-5}  # the 1e-7 in CIoU's denominators over a box of 0.14^2, times the weight 0.2
    assert score_of(honest, data)["reward"] == pytest.approx(1, **near)
    assert score_of(honest, data, weight_accuracy=0.25)["reward"] == pytest.approx(0.75, **near)
    vanilla = score_of(f"<think>t</think>{answer}", data, reward="vanilla")
    assert vanilla == {"reward": 1, "format": 1, "accuracy": 1, "reason": None}
    wrong = honest.replace(answer, "<answer>(Z) none</answer>")
    assert score_of(wrong, data)["reward"] == pytest.approx(0.3, **near)
    assert score_of(wrong, data, gate=False)["reward"] == pytest.approx(0.5, **near)


# ---- the update, against the formula of the README ----
@pytest.fixture(scope="module")
def tiny(tiny_base, tiny_data):
    """Folder of the model, prompts and completions: images of three sizes, two in one prompt, none in one."""
    from transformers import AutoProcessor

    encoder = PromptEncoder(AutoProcessor.from_pretrained(tiny_base), "spatial_thinker", 784, 802816)
    samples, rng = load_samples(str(tiny_data)), np.random.default_rng(0)
    kinds = [samples[0].encoded_images, (), (noise(140, 56),), (noise(28, 84), noise(84, 84))]
    prompts = [encoder(dataclasses.replace(samples[i], encoded_images=k)) for i, k in enumerate(kinds)]
    completions = [[rng.integers(300, 600, n).tolist() for n in (1, 3 + 7 * i, 20)] for i in range(4)]
    return tiny_base, prompts, completions


FORBIDDEN = [5, 6]
LONGEST = 160  # tokens of a sequence, at most


def make(tiny, **settings):
    """(Learner on one process, its config, the gradients that an update will leave here)."""
    from accelerate import Accelerator

    folder, prompts, _ = tiny
    defaults = {"model": str(folder), "gradient_checkpointing": False, "group_size": 3, "prompts_per_step": 4}
    cfg = GRPOConfig(**defaults | {"updates_per_step": 1, "temperature": 0.8} | settings)
    accelerator, gradients = Accelerator(cpu=True), {}
    learner = make_learner(accelerator, cfg, FORBIDDEN, PromptCache(prompts.__getitem__, 1))
    clip = accelerator.clip_grad_norm_

    def keep_and_clip(parameters, norm):
        named = learner.policy.named_parameters()
        gradients.update({n: p.grad.clone() for n, p in named if p.grad is not None})
        return clip(parameters, norm)

    accelerator.clip_grad_norm_ = keep_and_clip
    return learner, cfg, gradients


def perturbed_rollouts(tiny, order=(0, 1, 2, 3)):
    """Rollouts whose old, reference and sampler log-probs lie so far apart that every clip and cap bites."""
    learner, cfg, _ = make(tiny, kl_coef=0)
    _, prompts, completions = tiny
    rng = np.random.default_rng(5)
    known = {}
    for row, of_row in enumerate(completions):
        for i, ids in enumerate(of_row):
            with torch.no_grad():
                logp, _ = token_logps(learner.policy, pack([(prompts[row], [ids])], learner.base))
            # ratios e^-1.5 to e^1.5: below 0.8, above 1.3, above 3; weights e^-1 to e^1.5: above 2
            old = logp - torch.tensor(rng.uniform(-1.5, 1.5, len(ids)), dtype=torch.float32)
            known[row, i] = {
                "sampler_logps": (old - torch.tensor(rng.uniform(-1, 1.5, len(ids)))).tolist(),
                "logp_old": old,
                "logp_ref": logp + torch.tensor(rng.uniform(-1, 1, len(ids)), dtype=torch.float32),
                "advantage": float(rng.choice([-1, 1]) * rng.uniform(0.3, 1.5)),
            }
    return [
        Rollout(row, len(prompts[row].ids), ids, text="", finished=True, **known[row, i])
        for row in order
        for i, ids in enumerate(completions[row])
    ]


def readme_gradient(tiny, rollouts, cfg):
    """The README's formula, a sequence at a time, on transformers' own attention, by autograd alone."""
    folder, prompts, _ = tiny
    model = load_plain(folder)
    total, n_tokens = 0.0, sum(len(r.completion_ids) for r in rollouts)
    for r in rollouts:
        logits = plain_logits(model, prompts[r.row], r.completion_ids)
        bias = torch.zeros(logits.shape[-1])
        bias[FORBIDDEN] = FORBIDDEN_BIAS
        logp = ((logits + bias) / cfg.temperature).log_softmax(-1)
        logp = logp.gather(1, torch.tensor(r.completion_ids)[:, None])[:, 0]
        for t in range(len(logp)):
            ratio = torch.exp(logp[t] - r.logp_old[t])
            clipped = torch.clamp(ratio, 0.8, 1.3)
            policy = -torch.minimum(ratio * r.advantage, clipped * r.advantage)
            if r.advantage < 0:
                policy = torch.clamp(policy, max=3 * abs(r.advantage))
            weight = min(math.exp(float(r.logp_old[t]) - r.sampler_logps[t]), 2.0)
            d = r.logp_ref[t] - logp[t]
            kl = ratio * (torch.exp(d) - d - 1)
            total = total + weight * policy + 0.01 * kl
    loss = total / n_tokens
    loss.backward()
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}, loss.item()


def test_the_gradient_of_an_update_is_that_of_the_formula(tiny):
    rollouts = perturbed_rollouts(tiny)
    learner, cfg, gradients = make(tiny)  # the shipped defaults: 0.2, 0.3, 3, 0.01, 2
    before = {n: p.detach().clone() for n, p in learner.policy.named_parameters()}
    stats = update(learner, rollouts, [list(range(len(rollouts)))], cfg, lr=1e-3)
    want, loss = readme_gradient(tiny, rollouts, cfg)
    assert min(stats.clip_low, stats.clip_high, stats.clip_dual, stats.capped) >= 3  # every bound bites
    bound = gradient_bound(learner.base.config, LONGEST)
    assert distance(gradients, want) < bound < 1e-4
    # A mean over tokens, each of size up to 9, whose log-probs err as a forward pass does.
    assert stats.loss / stats.tokens == pytest.approx(loss, abs=9 * bound)
    assert stats.tokens == sum(len(r.completion_ids) for r in rollouts)
    assert stats.trained == sum(len(r) for r in rollouts)
    # The first step of AdamW, written out: m / sqrt(v) is the sign of the clipped gradient, up to eps.
    norm = sum(float(g.double().square().sum()) for g in want.values()) ** 0.5
    assert stats.grad_norm == pytest.approx(norm, rel=bound)
    assert norm > cfg.max_grad_norm  # so that clipping is seen
    for name, p in learner.policy.named_parameters():
        g = gradients[name] * (cfg.max_grad_norm / (stats.grad_norm + 1e-6))
        decay = cfg.weight_decay if p.ndim >= 2 else 0.0
        moved = before[name] * (1 - 1e-3 * decay) - 1e-3 * g / (g.abs() + 1e-8)
        # m and v go through (1 - beta) and back; 1e-3 times that, beside the rounding of the weight itself
        near = {"atol": 1e-3 * rounding(8), "rtol": rounding(1)}
        # Where |g| is not far above the 1e-8 its rounding decides: such entries may lie anywhere within 1e-3.
        clear = g.abs() > 1e-6
        np.testing.assert_allclose(p.detach()[clear], moved[clear], **near, err_msg=name)
        assert (p.detach() - before[name] * (1 - 1e-3 * decay)).abs().max() <= 1.001e-3, name


def test_an_update_depends_neither_on_micro_batches_nor_on_order(tiny):
    """One denominator: the tokens of the whole update."""
    rollouts = perturbed_rollouts(tiny)
    learner, cfg, want = make(tiny)
    sums = update(learner, rollouts, [list(range(len(rollouts)))], cfg, 1e-3)
    bound = gradient_bound(learner.base.config, LONGEST)
    variants = [{"max_tokens_per_micro_batch": 150}, {"max_tokens_per_micro_batch": 1}, {"logit_chunk": 3}]
    for settings, order in [*((v, (0, 1, 2, 3)) for v in variants), ({}, (3, 1, 0, 2))]:
        learner, cfg, got = make(tiny, **settings)
        moved = perturbed_rollouts(tiny, order)
        other = update(learner, moved, [list(range(len(moved)))], cfg, 1e-3)
        assert distance(got, want) < bound, (settings, order)
        assert other.loss == pytest.approx(sums.loss, abs=9 * sums.tokens * bound)  # tokens of size up to 9
        counts = [(s.tokens, s.clip_low, s.clip_high, s.clip_dual, s.capped) for s in (sums, other)]
        assert counts[0] == counts[1]


def test_a_gradient_that_is_not_finite_moves_nothing(tiny, monkeypatch):
    learner, cfg, _ = make(tiny, kl_coef=0)
    before = [p.detach().clone() for p in learner.policy.parameters()]
    monkeypatch.setattr(train_grpo, "policy_loss", lambda logp, *_, **__: (logp.sum() * math.inf, {}))
    stats = update(learner, perturbed_rollouts(tiny)[:3], [[0, 1, 2]], cfg, 1e-3)
    assert stats.skipped and not math.isfinite(stats.grad_norm)
    assert all(torch.equal(a, b) for a, b in zip(before, learner.policy.parameters(), strict=True))


def test_log_probs_before_the_update_are_those_of_the_models(tiny):
    """{k: (T,)} of the rollouts of this process, under the policy and under a reference that differs."""
    learner, cfg, _ = make(tiny, max_tokens_per_micro_batch=150)
    with torch.no_grad():
        for p in learner.reference.parameters():
            p.mul_(1.02)
    rollouts = perturbed_rollouts(tiny)
    shares = [[k for k in range(len(rollouts)) if k % 3 != 1]]
    got = rollout_logps(learner, learner.policy, rollouts, [shares], cfg)
    assert sorted(got) == shares[0]
    other = rollout_logps(learner, learner.reference, rollouts, [shares], cfg)
    bound = gradient_bound(learner.base.config, LONGEST)
    for k, logp in got.items():
        ids = rollouts[k].completion_ids
        with torch.no_grad():
            prompt = learner.prompt_of(rollouts[k].row)
            want, _ = token_logps(learner.policy, pack([(prompt, [ids])], learner.base))
        np.testing.assert_allclose(logp, want, atol=bound, rtol=0)
        assert (other[k] - want).abs().max() > 10 * bound


def test_log_probs_and_update_make_every_prompt_once(tiny):
    learner, cfg, _ = make(tiny, max_tokens_per_micro_batch=150)
    learner.prompt_of.max_bytes = math.inf
    rollouts = perturbed_rollouts(tiny)
    shares = [[k for k in range(len(rollouts)) if rollouts[k].row != 2]]
    for model in (learner.policy, learner.reference):
        rollout_logps(learner, model, rollouts, [shares], cfg)
    update(learner, rollouts, shares, cfg, 0.0)
    assert learner.prompt_of.made == 3 and sorted(learner.prompt_of.kept) == [0, 1, 3]


def test_the_prompts_of_two_micro_batches_are_made_ahead(tiny):
    learner, cfg, _ = make(tiny, kl_coef=0, max_tokens_per_micro_batch=1)
    learner.prompt_of.max_bytes = math.inf
    batches = packed_batches(learner, perturbed_rollouts(tiny), [[0, 3, 4, 6, 9]], cfg)  # rows 0 1 1 2 3
    seen = []
    for ks, _ in batches:
        seen.append((ks, learner.prompt_of.made, sorted(learner.prompt_of.begun)))
    assert seen == [([0], 1, [1]), ([3], 2, [2]), ([4], 2, [2, 3]), ([6], 3, [3]), ([9], 4, [])]


def test_every_process_yields_as_many_batches_as_the_fullest(tiny):
    learner, cfg, _ = make(tiny, kl_coef=0, max_tokens_per_micro_batch=1)
    rollouts = perturbed_rollouts(tiny)
    shares = [[0, 1], [3, 4, 5, 6]]  # this process is the first of two
    batches = [ks for ks, _ in packed_batches(learner, rollouts, shares, cfg)]
    assert batches == [[0], [1], [], []]
    packed = [packed for _, packed in packed_batches(learner, rollouts, shares, cfg)]
    assert packed[1]["target_ids"].tolist() == rollouts[1].completion_ids
    assert packed[2]["target_ids"].tolist() == []


def test_gradient_checkpointing_recomputes_every_layer(tiny):
    """It is silently off in a model that is not in training mode, which is how from_pretrained leaves it."""
    learner, _, _ = make(tiny, kl_coef=0, gradient_checkpointing=True)
    policy, calls = learner.policy, []
    for layer in (policy.model.language_model.layers[1].mlp, policy.model.visual.blocks[1].mlp):
        layer.register_forward_pre_hook(lambda module, inputs: calls.append(module))
    logp, _ = token_logps(policy, pack([(tiny[1][0], tiny[2][0])], policy))
    logp.sum().backward()
    assert len(calls) == 4  # each forward, and again backward


def test_state_is_loaded_before_the_engine_takes_its_memory(tiny_base, tiny_data, tmp_path, monkeypatch):
    """Loading a checkpoint makes Adam's moments, twice the weights: beside a full engine they do not fit."""
    order = []

    class Engine:
        def __init__(self, *args):
            order.append("engine")
            raise KeyboardInterrupt

    monkeypatch.setattr(train_grpo, "resume", lambda *args: order.append("resume") or 0)
    monkeypatch.setattr(train_grpo, "VLLMSampler", Engine)
    known = {"model": str(tiny_base), "data": str(tiny_data), "out": str(tmp_path), "tracker": "none"}
    cfg = GRPOConfig(**known, template="spatial_thinker", min_pixels=784, kl_coef=0, val_every=0)
    with pytest.raises(KeyboardInterrupt):
        train_grpo.train(cfg)
    assert order == ["resume", "engine"]


@pytest.mark.parametrize("family, message", [
    ("qwen3_vl_moe", "expected a model of type qwen2_vl, qwen2_5_vl or qwen3_vl, got 'qwen3_vl_moe', which "
                     "cannot be trained here; evaluate.py can still ask it, by --provider hf or vllm"),
    ("llava", "got 'llava', which cannot be trained here"),
    *((known, None) for known in FAMILIES),
])  # fmt: skip
def test_a_model_of_another_family_is_refused_before_it_is_loaded(family, message, tiny_base):
    from transformers import AutoConfig

    config = AutoConfig.for_model(family)
    if message is None:
        assert check_family("some/model", config) is FAMILIES[family]
        return
    with pytest.raises(ValueError, match=message):
        check_family("some/model", config)


# ---- config ----
@pytest.mark.parametrize("override, message", [
    ("prompts_per_step=10", "prompts_per_step 10 is not a multiple of updates_per_step 4"),
    ("group_size=1", "group_size"),
    ("min_pixels=9000000", "min_pixels 9000000 > max_pixels"),
    ("weight_accuracy=0.9", "weights: expected"),
    ("weight_relation=0.1", "weights: expected"),
    ("reward=dense", "reward: expected spatial, vanilla or path/to/file.py:name, got 'dense'"),
    ("reward=mine.py", "reward: expected spatial, vanilla or path/to/file.py:name, got 'mine.py'"),
    ("box_credit=iou", "box_credit"),
    ("learnig_rate=1", "did you mean 'learning_rate'"),
])  # fmt: skip
def test_bad_config_is_refused(override, message):
    with pytest.raises(ValueError, match=message):
        GRPOConfig.load([override])


def test_request_seeds_are_stable_and_distinct():
    assert request_seed(0, 3, 5) == request_seed(0, 3, 5)
    seeds = {request_seed(r, s, i) for r in range(3) for s in range(20) for i in range(50)}
    assert len(seeds) == 3 * 20 * 50


# ---- schedule ----
def test_learning_rate_by_hand():
    def rates(**settings):
        cfg = GRPOConfig(learning_rate=0.5, steps=6, **settings)
        return [learning_rate_at(step, cfg) for step in range(6)]

    assert rates() == [0.5] * 6
    assert rates(warmup_steps=2) == [0.25] + [0.5] * 5
    assert rates(warmup_steps=2, final_learning_rate=0) == [0.25, 0.5, 0.5, 0.375, 0.25, 0.125]  # powers of 2
    near = {"rel": rounding(3, u=U64), "abs": 0}
    assert rates(final_learning_rate=0.2) == pytest.approx([0.5, 0.45, 0.4, 0.35, 0.3, 0.25], **near)
