"""The algorithm: advantages, losses and log-probs by hand and against plain implementations, and a bandit."""

import dataclasses
import io
import math

import numpy as np
import pytest
import torch
from PIL import Image

from data import PromptEncoder, attention_implementation, load_samples, micro_batches, pack
from train_grpo import (
    FORBIDDEN_BIAS,
    GRPOConfig,
    Rollout,
    group_advantages,
    kl_loss,
    learning_rate_at,
    make_policy,
    policy_loss,
    request_seed,
    rollout_logps,
    token_logps,
    update,
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
        got, _ = policy_loss(
            *map(torch.tensor, (logp, old, advantage, mask)),
            clip_low=0.1,
            clip_high=0.4,
            dual_clip=2.0,
            weight=torch.tensor(weight),
        )
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
def noise(width, height):
    pixels = np.random.default_rng(width).integers(0, 255, (height, width, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return {"bytes": file.getvalue(), "path": None}


@pytest.fixture(scope="module")
def tiny(tiny_base, tiny_data):
    """Model, and prompts with completions: images of three sizes, two in one prompt, none in another."""
    from transformers import AutoModelForImageTextToText, AutoProcessor

    processor = AutoProcessor.from_pretrained(tiny_base)
    encode = PromptEncoder(processor, "spatial_thinker", 784, 802816)
    samples = load_samples(str(tiny_data))
    model = AutoModelForImageTextToText.from_pretrained(
        tiny_base, dtype=torch.float32, attn_implementation=attention_implementation()
    )
    rng = np.random.default_rng(0)
    image, wide, tall = (noise(*size) for size in ((84, 84), (140, 56), (28, 84)))
    kinds = [samples[0].encoded_images, (), (wide,), (tall, image), samples[1].encoded_images]
    prompts = [encode(dataclasses.replace(samples[i], encoded_images=k)) for i, k in enumerate(kinds)]
    return model, [
        (p, [rng.integers(300, 600, n).tolist() for n in (1, 5 + 9 * i, 30)[: 1 + i % 3]])
        for i, p in enumerate(prompts)
    ]


def plain_logps(model_folder, prompt, completion, forbidden, temperature):
    """One sequence alone, transformers' ordinary forward and log_softmax."""
    from transformers import AutoModelForImageTextToText

    model = AutoModelForImageTextToText.from_pretrained(
        model_folder, dtype=torch.float32, attn_implementation="eager"
    )
    ids = torch.tensor([prompt.ids + completion])
    logits = model(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        pixel_values=prompt.pixel_values,
        image_grid_thw=prompt.image_grid_thw,
        mm_token_type_ids=(ids == model.config.image_token_id).int(),
    ).logits[0]
    bias = torch.zeros(logits.shape[-1])
    bias[forbidden] = FORBIDDEN_BIAS
    logps = ((logits + bias) / temperature).log_softmax(-1)[len(prompt.ids) - 1 : -1]
    entropy = -(logps.exp() * logps).sum(-1)
    logps = logps.gather(1, torch.tensor(completion)[:, None])[:, 0]
    logps.sum().backward()
    return logps.detach(), entropy.detach(), [p.grad for p in model.parameters()]


@pytest.mark.parametrize("chunk", [7, 1024])
def test_packed_with_shared_prompts_equals_every_sequence_alone(tiny, tiny_base, chunk):
    """Log-probs, entropies and gradients: padding, packing, sharing and chunking change none of them."""
    model, prompts = tiny
    forbidden = [model.config.image_token_id, model.config.video_token_id]
    use_logprob_head(model, forbidden, 0.7, chunk)
    model.zero_grad()
    logp, entropy = token_logps(model, pack(prompts, model))
    logp.sum().backward()
    want = [plain_logps(tiny_base, p, c, forbidden, 0.7) for p, completions in prompts for c in completions]
    np.testing.assert_allclose(logp.detach(), torch.cat([w[0] for w in want]), atol=1e-5)
    np.testing.assert_allclose(entropy, torch.cat([w[1] for w in want]), atol=1e-5)
    for k, (name, p) in enumerate(model.named_parameters()):
        alone = sum(w[2][k] for w in want if w[2][k] is not None)  # text alone: no gradient of the tower
        assert (p.grad - alone).norm() <= 1e-4 * alone.norm() + 1e-7, name


def test_gradients_do_not_depend_on_packing_or_chunk(tiny):
    model, prompts = tiny
    gradients = []
    last, completions = prompts[4]
    split = [
        [prompts[3], (last, completions[:1])],
        [prompts[0]],
        [(last, completions[1:])],
        [prompts[1]],
        [prompts[2]],
        [],
    ]  # one prompt in two batches, text alone, nothing
    for chunk, batches in ((1024, [prompts]), (5, split)):
        use_logprob_head(model, [], 1.0, chunk)
        model.zero_grad()
        for batch in batches:
            logp, _ = token_logps(model, pack(batch, model))
            logp.sum().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    error = (gradients[0] - gradients[1]).norm() / gradients[0].norm()
    assert error < 1e-5
    assert gradients[0].norm() > 0


def test_a_group_shares_its_prompt(tiny):
    model, prompts = tiny
    prompt, completions = prompts[2]
    batch = pack([(prompt, completions)], model)
    assert batch["input_ids"].shape[1] == len(prompt.ids) + sum(map(len, completions))
    assert len(batch["pixel_values"]) == len(prompt.pixel_values)
    # a completion sees the prompt and itself, not the one before it
    starts = [segment[0] for segment in batch["segments"]]
    other = [i + 1 for i in completions[0]]
    use_logprob_head(model, [], 1.0, 1024)
    with torch.no_grad():
        one, _ = token_logps(model, batch)
        two, _ = token_logps(model, pack([(prompt, [other, *completions[1:]])], model))
    n = len(completions[0])
    assert starts == [0, len(prompt.ids), len(prompt.ids) + n, len(prompt.ids) + n + len(completions[1])]
    assert torch.equal(one[n:], two[n:]) and not torch.equal(one[:n], two[:n])


def test_micro_batches_count_a_shared_prompt_once():
    same = [("a", 10, 5)] * 4
    assert micro_batches(same, 30) == [[0, 1, 2, 3]]
    assert micro_batches(same, 20) == [[0, 1], [2, 3]]
    assert micro_batches(same, 3) == [[0], [1], [2], [3]]  # longer than the budget: alone
    assert micro_batches([("a", 10, 5), ("b", 10, 5), ("a", 10, 5)], 30) == [[0, 1], [2]]
    assert micro_batches([], 30) == []


def test_logits_never_exist_for_more_than_a_chunk(tiny):
    """Forward and backward: no tensor with a column for every vocabulary entry has more rows than `chunk`."""
    from torch.utils._python_dispatch import TorchDispatchMode

    model, prompts = tiny
    vocabulary, width = model.lm_head.weight.shape
    rows = set()

    class Spy(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            if torch.is_tensor(out) and out.shape[-1:] == (vocabulary,):
                rows.add(out.numel() // vocabulary)
            return out

    use_logprob_head(model, [], 1.0, 8)
    with Spy():
        logp, _ = token_logps(model, pack(prompts, model))
        logp.sum().backward()
    assert len(logp) > 100
    assert max(rows - {width}) == 8  # (width, vocabulary) is the head itself, transposed


def test_gradient_checkpointing_recomputes_every_layer(tiny, tiny_base):
    """It is silently off in a model that is not in training mode, which is how from_pretrained leaves it."""
    from accelerate import Accelerator

    cfg = GRPOConfig(model=str(tiny_base), kl_coef=0, gradient_checkpointing=True)
    policy, _, _ = make_policy(Accelerator(cpu=True), cfg, [5])
    calls = []
    for layer in (policy.model.language_model.layers[1].mlp, policy.model.visual.blocks[1].mlp):
        layer.register_forward_pre_hook(lambda module, inputs: calls.append(module))
    logp, _ = token_logps(policy, pack(tiny[1][:1], policy))
    logp.sum().backward()
    assert len(calls) == 4  # each forward, and again backward


def test_the_image_reaches_the_logps(tiny):
    """Another image, same text: other log-probs. A batch that drops or mixes up images would not see it."""
    model, prompts = tiny
    use_logprob_head(model, [], 1.0, 1024)
    (a, completions), b = prompts[0], prompts[4]
    swapped = dataclasses.replace(a, pixel_values=b[0].pixel_values)
    with torch.no_grad():
        one, _ = token_logps(model, pack([b, (a, completions)], model))
        two, _ = token_logps(model, pack([b, (swapped, completions)], model))
    n = sum(map(len, b[1]))
    assert torch.equal(one[:n], two[:n])
    assert (one[n:] - two[n:]).abs().max() > 1e-4


# ---- update ----
def one_update(tiny_base, prompts, order=(0, 1, 2, 3, 4), **settings):
    """Gradients and (loss, KL, tokens) of an update on the prompts' groups, laid out in the given order."""
    from accelerate import Accelerator

    cfg = GRPOConfig(model=str(tiny_base), kl_coef=0.1, gradient_checkpointing=False, **settings)
    accelerator, gradients, rng = Accelerator(cpu=True), {}, np.random.default_rng(5)
    policy, optimizer, reference = make_policy(accelerator, cfg, [5])
    with torch.no_grad():
        for p in reference.parameters():
            p.mul_(1.02)
    clip = accelerator.clip_grad_norm_

    def keep_and_clip(parameters, norm):
        gradients.update({n: p.grad.clone() for n, p in policy.named_parameters()})
        return clip(parameters, norm)

    accelerator.clip_grad_norm_ = keep_and_clip
    noise_of = [[(rng.normal(), rng.normal(-6, 0.1, len(c)).tolist()) for c in cs] for _, cs in prompts]
    rollouts, advantages = [], []
    for row in order:
        for completion, (advantage, logps) in zip(prompts[row][1], noise_of[row], strict=True):
            rollouts.append(Rollout(row, len(prompts[row][0].ids), completion, logps, "", True))
            advantages.append(advantage)
    shares, encode = [list(range(len(rollouts)))], lambda row: prompts[row][0]
    before = {n: p.detach().clone() for n, p in policy.named_parameters()}
    logps = [rollout_logps(m, rollouts, [shares], 0, encode, policy, cfg, "cpu") for m in (policy, reference)]
    sums = update(accelerator, policy, optimizer, rollouts, shares, encode, advantages, *logps, cfg, 1e-3)
    moved = any(not torch.equal(before[n], p) for n, p in policy.named_parameters())
    return gradients, sums, moved


def test_an_update_depends_neither_on_micro_batches_nor_on_order(tiny, tiny_base):
    """One denominator: the tokens of the whole update."""
    want, sums, moved = one_update(tiny_base, tiny[1])
    assert moved and sums["kl"] > 0 and sums["grad_norm"] > 0
    assert sums["tokens"] == sum(len(c) for _, cs in tiny[1] for c in cs)
    for variant in (
        {"max_tokens_per_micro_batch": 150},
        {"max_tokens_per_micro_batch": 1},
        {"order": (3, 1, 4, 0, 2)},
        {"logit_chunk": 3},
    ):
        got, other, _ = one_update(tiny_base, tiny[1], **variant)
        gap = sum(float((got[n] - want[n]).square().sum()) for n in want) ** 0.5
        assert gap < 1e-5 * sum(float(g.square().sum()) for g in want.values()) ** 0.5, variant
        assert other["loss"] == pytest.approx(sums["loss"], rel=1e-4, abs=1e-4)


def test_a_gradient_that_is_not_finite_moves_nothing(tiny, tiny_base, monkeypatch):
    import train_grpo

    monkeypatch.setattr(train_grpo, "policy_loss", lambda logp, *_, **__: (logp.sum() * math.inf, {}))
    _, sums, moved = one_update(tiny_base, tiny[1][:1], order=(0,))
    assert sums["skipped"] and not moved


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
