"""The algorithm: advantages, losses and log-probs by hand and against plain implementations, and a bandit."""

import math

import numpy as np
import pytest
import torch

from data import PromptEncoder, Sequenced, load_samples, pack, use_packed_attention
from train_grpo import (
    FORBIDDEN_BIAS,
    GRPOConfig,
    group_advantages,
    kl_loss,
    learning_rate_at,
    policy_loss,
    request_seed,
    token_logps,
    use_logprob_head,
)


# ---- advantages ----
def test_group_advantages_by_hand():
    # mean 0.5, unbiased std sqrt((0.25 * 2) / 1) = 0.70711: +-0.5 / 0.70711; 0, 0, 3: mean 1, std sqrt(3)
    got = group_advantages(torch.tensor([[0.0, 1.0]], dtype=torch.float64))
    np.testing.assert_allclose(got, [[-0.70711, 0.70711]], atol=1e-5)
    got = group_advantages(torch.tensor([[0.0, 0.0, 3.0]], dtype=torch.float64))
    np.testing.assert_allclose(got, [[-0.57735, -0.57735, 1.15470]], atol=1e-5)


def test_equal_rewards_give_exactly_zero_even_with_float_noise():
    noise = torch.tensor([[0.3, 0.3 + 1e-7, 0.3 - 1e-7, 0.1 + 0.2]], dtype=torch.float64)
    assert group_advantages(noise).tolist() == [[0.0] * 4]
    assert group_advantages(torch.full((2, 3), 0.7)).tolist() == [[0.0] * 3] * 2


def test_advantages_are_per_group_and_invariant_to_reward_shift_and_scale():
    rewards = torch.rand(5, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    base = group_advantages(rewards)
    np.testing.assert_allclose(base.sum(1), 0, atol=1e-12)
    np.testing.assert_allclose(group_advantages(rewards * 3 + 7), base, atol=1e-4)
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
    (1.5, -2.0, 3.0, 3.0, None),  # a bad token that got likely is pushed down unclipped
    (4.0, -2.0, 6.0, 0.0, "clip_dual"),  # until the dual clip: 2 * 3
])  # fmt: skip
def test_clipping_by_hand(ratio, advantage, loss, gradient, hit):
    got_loss, got_gradient, stats = one_token(ratio, advantage)
    assert got_loss == pytest.approx(loss)
    assert got_gradient == pytest.approx(gradient)
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
        got, _ = policy_loss(*map(torch.tensor, (logp, old, advantage, mask)), clip_low=0.1, clip_high=0.4,
                             dual_clip=2.0, weight=torch.tensor(weight))
        want = numpy_policy_loss(logp, old, advantage, mask, 0.1, 0.4, 2.0, weight)
        assert got.item() == pytest.approx(want)


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
    assert loss.item() == pytest.approx(0.148721, abs=1e-6) and kl.item() == pytest.approx(0.148721, abs=1e-6)
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
    np.testing.assert_allclose(got, exact, atol=1e-12)


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
    assert logits.softmax(-1)[2] > 0.9


# ---- log-probs of the real model ----
@pytest.fixture(scope="module")
def tiny(tiny_base, tiny_data):
    from transformers import AutoModelForImageTextToText, AutoProcessor

    processor = AutoProcessor.from_pretrained(tiny_base)
    encode = PromptEncoder(processor, "spatial_thinker", 784, 802816)
    samples = load_samples(str(tiny_data))
    model = AutoModelForImageTextToText.from_pretrained(
        tiny_base, dtype=torch.float32, attn_implementation=use_packed_attention())
    rng = np.random.default_rng(0)
    sequences = [Sequenced(encode(samples[i]), rng.integers(300, 600, 5 + 9 * i).tolist()) for i in range(4)]
    return model, processor, sequences


def plain_logps(model_folder, sequence, forbidden, temperature):
    """One sequence, transformers' ordinary forward and log_softmax."""
    from transformers import AutoModelForImageTextToText

    model = AutoModelForImageTextToText.from_pretrained(
        model_folder, dtype=torch.float32, attn_implementation="eager")
    ids = torch.tensor([sequence.prompt.ids + sequence.completion_ids])
    with torch.no_grad():
        logits = model(input_ids=ids, attention_mask=torch.ones_like(ids),
                       pixel_values=sequence.prompt.pixel_values,
                       image_grid_thw=sequence.prompt.image_grid_thw,
                       mm_token_type_ids=(ids == model.config.image_token_id).int()).logits[0]
    logits[:, forbidden] += FORBIDDEN_BIAS
    logps = (logits / temperature).log_softmax(-1)[len(sequence.prompt.ids) - 1 : -1]
    entropy = -(logps.exp() * logps).sum(-1)
    return logps.gather(1, torch.tensor(sequence.completion_ids)[:, None])[:, 0], entropy


@pytest.mark.parametrize("chunk", [7, 1024])
def test_packed_chunked_logps_equal_plain_ones(tiny, tiny_base, chunk):
    model, processor, sequences = tiny
    forbidden = [model.config.image_token_id, model.config.video_token_id]
    use_logprob_head(model, forbidden, 0.7, chunk)
    with torch.no_grad():
        logp, entropy = token_logps(model, pack(sequences, model, model.config.image_token_id))
    want = [plain_logps(tiny_base, s, forbidden, 0.7) for s in sequences]
    np.testing.assert_allclose(logp, torch.cat([w[0] for w in want]), atol=1e-5)
    np.testing.assert_allclose(entropy, torch.cat([w[1] for w in want]), atol=1e-5)


def test_gradients_do_not_depend_on_packing_or_chunk(tiny):
    model, _, sequences = tiny
    gradients = []
    for chunk, groups in ((1024, [[0, 1, 2, 3]]), (5, [[3], [0, 2], [1]])):
        use_logprob_head(model, [], 1.0, chunk)
        model.zero_grad()
        for group in groups:
            packed = pack([sequences[i] for i in group], model, model.config.image_token_id)
            logp, _ = token_logps(model, packed)
            logp.sum().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    error = (gradients[0] - gradients[1]).norm() / gradients[0].norm()
    assert error < 1e-5
    assert gradients[0].norm() > 0


def test_the_image_reaches_the_logps(tiny):
    """Another image, same text: other log-probs. A batch that drops or mixes up images would not see it."""
    model, _, sequences = tiny
    use_logprob_head(model, [], 1.0, 1024)
    import dataclasses

    a, b = sequences[2], sequences[3]
    swapped = Sequenced(dataclasses.replace(a.prompt, pixel_values=b.prompt.pixel_values), a.completion_ids)
    with torch.no_grad():
        one, _ = token_logps(model, pack([b, a], model, model.config.image_token_id))
        two, _ = token_logps(model, pack([b, swapped], model, model.config.image_token_id))
    n = len(b.completion_ids)
    assert torch.equal(one[:n], two[:n])
    assert (one[n:] - two[n:]).abs().max() > 1e-4


# ---- config ----
@pytest.mark.parametrize("override, message", [
    ("prompts_per_step=10", "prompts_per_step 10 is not a multiple of updates_per_step 4"),
    ("group_size=1", "group_size"),
    ("min_pixels=9000000", "min_pixels 9000000 > max_pixels"),
    ("weight_accuracy=0.9", "weights: expected"),
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
    assert rates(warmup_steps=2, final_learning_rate=0) == pytest.approx([0.25, 0.5, 0.5, 0.375, 0.25, 0.125])
    assert rates(final_learning_rate=0.2) == pytest.approx([0.5, 0.45, 0.4, 0.35, 0.3, 0.25])
