"""Packed rows: who is packed with whom, what attends to what, and log-probs equal to every sequence alone."""

import dataclasses
import inspect
import random
import sys
import types

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from bounds import gradient_bound, logp_bound, rounding
from models import load_plain, plain_logits
from pictures import noise

import packing
from data import Prompt, PromptEncoder, load_samples
from packing import (
    FORBIDDEN_BIAS,
    ChunkedLogProbs,
    balance,
    blank_prompt,
    logit_chunk,
    micro_batches,
    pack,
    packed_attention,
    token_logps,
    use_logprob_head,
    use_packed_attention,
    varlen,
    varlen_kernel,
    varlen_layout,
)

LONGEST = 160  # tokens: no sequence here is longer


# ---- who computes what ----
def test_micro_batches_count_a_shared_prompt_once():
    same = [("a", 10, 5)] * 4
    assert micro_batches(same, 30) == [[0, 1, 2, 3]]
    assert micro_batches(same, 29) == [[0, 1, 2], [3]]
    assert micro_batches(same, 20) == [[0, 1], [2, 3]]
    assert micro_batches(same, 3) == [[0], [1], [2], [3]]  # longer than the budget: alone
    assert micro_batches([("a", 10, 5), ("b", 10, 5), ("a", 10, 5)], 30) == [[0, 1], [2]]
    assert micro_batches([], 30) == []


def test_a_group_that_is_cut_in_two_pays_for_its_prompt_twice():
    # 10 + 5 + 5 = 20 fills the first; the third opens another with its prompt, 15, and only 5 more fit
    assert micro_batches([("a", 10, 5)] * 5, 20) == [[0, 1], [2, 3], [4]]
    assert micro_batches([("a", 10, 5), ("a", 10, 5), ("a", 10, 1), ("b", 3, 1)], 20) == [[0, 1], [2, 3]]


@pytest.mark.parametrize("processes", [1, 2, 3, 8])
def test_balance_deals_every_group_once_and_evenly(processes):
    """The greedy rule's guarantee: the fullest process has at most the mean plus one group (Graham, 1969)."""
    rng = random.Random(processes)
    for _ in range(20):
        tokens = [rng.randrange(1, 1000) for _ in range(rng.randrange(0, 30))]
        groups = [[3 * i, 3 * i + 1, 3 * i + 2] for i in range(len(tokens))]
        shares = balance(groups, tokens, processes)
        assert len(shares) == processes
        assert sorted(k for share in shares for k in share) == list(range(3 * len(tokens)))
        assert all(share == sorted(share) for share in shares)
        loads = [sum(tokens[k // 3] for k in share[::3]) for share in shares]
        assert max(loads) <= sum(tokens) / processes + max(tokens, default=0)


def test_balance_by_hand():
    # largest first: 9 to the first process, 8 to the second, 7 to the second (8 < 9), 2 to the first
    assert balance([[0], [1], [2], [3]], [7, 9, 2, 8], 2) == [[1, 2], [0, 3]]


# ---- the kernels of GPUs, by their documentation ----
def attend_by_definition(q, k, v, query_bounds, key_bounds, most_queries, most_keys, scale, causal):
    """What both kernels document: segments apart, the causal mask aligned at their last keys."""
    assert query_bounds.dtype == key_bounds.dtype == torch.int32 and q.dtype == k.dtype == v.dtype
    assert (most_queries, most_keys) == (max(np.diff(query_bounds)), max(np.diff(key_bounds)))
    assert type(most_queries) is type(most_keys) is int and query_bounds[-1] == len(q)
    pieces = []
    for i in range(len(query_bounds) - 1):
        qi = q[query_bounds[i] : query_bounds[i + 1]].transpose(0, 1)  # (H, queries, D)
        ki, vi = (x[key_bounds[i] : key_bounds[i + 1]].transpose(0, 1) for x in (k, v))
        ki, vi = (x.repeat_interleave(len(qi) // len(x), dim=0) for x in (ki, vi))
        n, m = qi.shape[1], ki.shape[1]
        sees = torch.ones(n, m, dtype=torch.bool).tril(m - n if causal else m)
        scores = (qi @ ki.transpose(1, 2) * scale).masked_fill(~sees, -torch.inf)
        pieces.append((scores.softmax(-1) @ vi).transpose(0, 1))
    return torch.cat(pieces)


@pytest.fixture(params=["torch", "flash_attn"])
def on_gpu(request, monkeypatch):
    """As if on a GPU, with one kernel: a stand-in that computes what the kernel's documentation says."""
    from torch.nn.attention import varlen as module

    used = set()
    real = inspect.signature(module.varlen_attn)  # of the installed torch

    def varlen_attn(*args, **kwargs):
        used.add("torch")
        real.bind(*args, **kwargs)
        assert kwargs.keys() == {"scale", "window_size", "enable_gqa"} and kwargs["enable_gqa"]
        causal = {(-1, 0): True, (-1, -1): False}[kwargs["window_size"]]
        return attend_by_definition(*args, kwargs["scale"], causal)

    def flash_attn_varlen_func(*args, softmax_scale, causal):
        used.add("flash_attn")
        return attend_by_definition(*args, softmax_scale, causal)

    varlen_attn.__signature__ = real
    monkeypatch.setattr(module, "varlen_attn", varlen_attn)
    flash_attn = types.SimpleNamespace(flash_attn_varlen_func=flash_attn_varlen_func)
    monkeypatch.setitem(sys.modules, "flash_attn", flash_attn if request.param == "flash_attn" else None)
    monkeypatch.setattr(packing, "has_varlen", lambda x: True)
    varlen_kernel.cache_clear()
    yield
    varlen_kernel.cache_clear()
    assert used == {request.param}  # or the test has compared the CPU's path with itself


# ---- log-probs of the real model ----
@pytest.fixture(scope="module")
def tiny(tiny_base, tiny_data):
    """Model, and prompts with completions: images of three sizes, two in one prompt, none in another."""
    from transformers import AutoModelForImageTextToText, AutoProcessor

    processor = AutoProcessor.from_pretrained(tiny_base)
    encoder = PromptEncoder(processor, "spatial_thinker", 784, 802816)
    samples = load_samples(str(tiny_data))
    model = AutoModelForImageTextToText.from_pretrained(tiny_base, dtype=torch.float32)
    use_packed_attention(model)
    rng = np.random.default_rng(0)
    image, wide, tall = (noise(*size) for size in ((84, 84), (140, 56), (28, 84)))
    kinds = [samples[0].encoded_images, (), (wide,), (tall, image), samples[1].encoded_images]
    prompts = [encoder(dataclasses.replace(samples[i], encoded_images=k)) for i, k in enumerate(kinds)]
    return model, [
        (p, [rng.integers(300, 600, n).tolist() for n in (1, 5 + 9 * i, 30)[: 1 + i % 3]])
        for i, p in enumerate(prompts)
    ]


def plain_logps(model_folder, prompt, completion, forbidden, temperature):
    """(log-probs, entropies, gradients of their sum) of one sequence alone, by log_softmax and autograd."""
    assert len(prompt.ids) + len(completion) <= LONGEST
    model = load_plain(model_folder)
    logits = plain_logits(model, prompt, completion)
    bias = torch.zeros(logits.shape[-1])
    bias[forbidden] = FORBIDDEN_BIAS
    logps = ((logits + bias) / temperature).log_softmax(-1)
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
    near = {"atol": logp_bound(model.config, LONGEST), "rtol": 0}
    np.testing.assert_allclose(logp.detach(), torch.cat([w[0] for w in want]), **near)
    np.testing.assert_allclose(entropy, torch.cat([w[1] for w in want]), **near)
    bound = gradient_bound(model.config, sum(map(len, logp.split(1))))
    whole = sum(float(p.grad.square().sum()) for p in model.parameters()) ** 0.5
    for k, (name, p) in enumerate(model.named_parameters()):
        alone = sum(w[2][k] for w in want if w[2][k] is not None)  # text alone: no gradient of the tower
        # Relative to the parameter's own gradient, or where that is next to nothing (the bias of keys, which
        # softmax does not feel) to that of all.
        assert (p.grad - alone).norm() <= bound * (alone.norm() + 1e-3 * whole), name


# ---- every family ----
@pytest.fixture(scope="module")
def of_family(family, tiny_data):
    """of_family(type, tied): (its folder, model, prompts with completions: two images, none, one)."""
    from functools import cache

    from transformers import AutoModelForImageTextToText, AutoProcessor

    @cache
    def load(model_type, tied):
        folder = family(model_type, tied)
        encoder = PromptEncoder(AutoProcessor.from_pretrained(folder), "spatial_thinker", 784, 802816)
        sample, rng = load_samples(str(tiny_data), limit=1)[0], np.random.default_rng(0)
        kinds = [(noise(64, 160), noise(128, 128)), (), (noise(96, 32),)]
        prompts = [encoder(dataclasses.replace(sample, encoded_images=k)) for k in kinds]
        model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
        use_packed_attention(model)
        use_logprob_head(model, [], 1.0, 16)
        return folder, model, [(p, [rng.integers(300, 600, n).tolist() for n in (9, 1, 17)]) for p in prompts]

    return load


def packed_and_alone(folder, model, prompts):
    """(log-probs, gradients) of one packed row, and of every sequence alone in transformers' own model."""
    model.zero_grad()
    logp, _ = token_logps(model, pack(prompts, model))
    plain = load_plain(folder)
    want = []
    for prompt, completions in prompts:
        for ids in completions:
            logps = plain_logits(plain, prompt, ids).log_softmax(-1)
            want.append(logps.gather(1, torch.tensor(ids)[:, None])[:, 0])
    want = torch.cat(want)
    for out in (logp, want):
        out.sum().backward()
    grads = ({name: p.grad for name, p in m.named_parameters()} for m in (model, plain))
    return logp.detach(), want.detach(), *grads


@pytest.mark.parametrize("model_type, tied", [("qwen2_vl", True), ("qwen2_vl", False),
                                              ("qwen3_vl", True), ("qwen3_vl", False)])  # fmt: skip
def test_packing_is_exact_for_the_other_families(of_family, model_type, tied):
    """Positions, images, deepstack: log-probs and every parameter's gradient of sequences alone."""
    folder, model, prompts = of_family(model_type, tied)
    assert (model.lm_head.weight is model.model.language_model.embed_tokens.weight) == tied
    got, want, got_grads, want_grads = packed_and_alone(folder, model, prompts)
    np.testing.assert_allclose(got, want, atol=logp_bound(model.config, LONGEST), rtol=0)
    assert want.std() > 0.3  # a model that says the same of everything would prove nothing
    bound, whole = gradient_bound(model.config, len(got)), sum(g.square().sum() for g in want_grads.values())
    for name, g in want_grads.items():
        assert (got_grads[name] - g).norm() <= bound * (g.norm() + 1e-3 * whole.sqrt()), name
        # Every part of the tower is used: softmax does not feel the bias of keys alone.
        assert g.norm() > 0.01 or name.endswith("k_proj.bias"), name


@pytest.mark.parametrize("model_type", ["qwen2_vl", "qwen3_vl"])
def test_other_families_on_the_kernels_of_gpus(of_family, model_type, on_gpu):
    got, want, *_ = packed_and_alone(*of_family(model_type, True))
    near = logp_bound(of_family(model_type, True)[1].config, LONGEST)
    np.testing.assert_allclose(got, want, atol=near, rtol=0)


def test_deepstack_features_go_to_the_images_they_are_of(of_family):
    """Other features of one tower layer for one prompt's image: its completions change, no others."""
    _, model, prompts = of_family("qwen3_vl", True)
    with torch.no_grad():
        before, _ = token_logps(model, pack(prompts, model))
        hook = model.model.visual.deepstack_merger_list[1].register_forward_hook(
            lambda module, inputs, out: out + (torch.arange(len(out)) >= 10 + 16)[:, None] * 0.5
        )
        changed, _ = token_logps(model, pack(prompts, model))
        hook.remove()
    n = 27  # completion tokens of each prompt; the first has 10 + 16 image tokens, the last one 3
    assert torch.equal(changed[: 2 * n], before[: 2 * n])
    assert (changed[2 * n :] - before[2 * n :]).abs().min() > 2 * logp_bound(model.config, LONGEST)


@pytest.mark.parametrize("model_type, cells", [("qwen2_vl", (3, 3)), ("qwen3_vl", (3, 2))])
def test_rope_positions_of_other_families_by_hand(of_family, tiny_data, model_type, cells):
    """Text, an image of so many rows and columns, text; then the completion, from the largest on."""
    folder, model, _ = of_family(model_type, True)
    rows, columns = cells
    ids = [10, 11, *[model.config.image_token_id] * (rows * columns), 12]
    grid = torch.tensor([[1, 2 * rows, 2 * columns]])
    v = model.config.vision_config
    pixels = torch.zeros(4 * rows * columns, 3 * 2 * v.patch_size**2)
    packed = pack([(Prompt(None, [], [], ids, pixels, grid), [[20, 21], [22]])], model)
    n = rows * columns
    time, height, width = packed["position_ids"][1:, 0].tolist()
    assert time == [0, 1, *[2] * n, 5, 6, 7, 6]  # the image takes max(rows, columns) = 3 positions: 2, 3, 4
    assert height == [0, 1, *[2 + i // columns for i in range(n)], 5, 6, 7, 6]
    assert width == [0, 1, *[2 + i % columns for i in range(n)], 5, 6, 7, 6]
    assert packed["position_ids"][0, 0].tolist() == [*range(n + 3), n + 3, n + 4, n + 3]


# ---- packing changes nothing ----
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
    assert error < gradient_bound(model.config, LONGEST)
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


def test_the_row_by_hand(tiny):
    """A prompt of text alone, two completions: places, targets and positions counted on fingers."""
    model, prompts = tiny
    prompt = dataclasses.replace(prompts[1][0], ids=[10, 11, 12], pixel_values=None, image_grid_thw=None)
    packed = pack([(prompt, [[20, 21], [30]])], model)
    assert packed["input_ids"][0, :6].tolist() == [10, 11, 12, 20, 21, 30]
    assert packed["segments"][:3] == ((0, 3, 0, 0), (3, 5, 0, 3), (5, 6, 0, 3))
    assert packed["target_ids"].tolist() == [20, 21, 30]
    assert packed["predicted_at"].tolist() == [2, 3, 2]  # the prompt's end predicts both beginnings
    for dimension in packed["position_ids"][:, 0, :6].tolist():  # no image: text and rope count alike
        assert dimension == [0, 1, 2, 3, 4, 3]
    # text alone: a blank image follows, which nothing is learnt from
    assert packed["segments"][3] == (6, 9, 0, 0) and len(packed["pixel_values"]) == 4
    assert packed["input_ids"][0, 6:].tolist() == blank_prompt(model.config).ids


def test_rope_goes_on_from_the_prompts_largest_position(tiny):
    """An image of 3 x 3 tokens takes 3 rope positions: the completion's are 6 behind its text positions."""
    model, prompts = tiny
    prompt, completions = prompts[0]
    position_ids = pack([(prompt, completions)], model)["position_ids"][:, 0]
    n = len(prompt.ids)
    assert prompt.ids.count(model.config.image_token_id) == 9
    assert position_ids[0, n:].tolist() == [n + t for t in range(len(completions[0]))]
    for dimension in position_ids[1:]:
        assert dimension[n:].tolist() == [n - 6 + t for t in range(len(completions[0]))]


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
    assert (one[n:] - two[n:]).abs().max() > 2 * logp_bound(model.config, LONGEST)  # more than rounding


def test_the_head_alone_in_float64():
    """Log-probs, entropy and both gradients against autograd: bias, temperature, a last chunk of two."""
    g = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(*shape, generator=g, dtype=torch.float64) for shape in ((8, 5), (11, 5)))
    targets, bias = torch.randint(0, 11, (8,), generator=g), torch.randn(11, generator=g)
    upstream = torch.randn(8, generator=g, dtype=torch.float64)
    got_in, want_in = ([x.clone().requires_grad_() for x in (hidden, weight)] for _ in range(2))
    out = ChunkedLogProbs.apply(*got_in, targets, bias, 0.6, 3)
    (out[0] * upstream).sum().backward()
    want = F.log_softmax((want_in[0] @ want_in[1].T + bias) / 0.6, dim=-1)
    logp = want.gather(1, targets[:, None])[:, 0]
    (logp * upstream).sum().backward()
    near = {"atol": rounding(5, 11, 8), "rtol": 0}  # logits, their sum and the weight's gradient are float32
    np.testing.assert_allclose(out[0].detach(), logp.detach(), **near)
    np.testing.assert_allclose(out[1].detach(), -(want.exp() * want).sum(-1).detach(), **near)
    for got, plain in zip(got_in, want_in, strict=True):
        np.testing.assert_allclose(got.grad, plain.grad, **near)


def test_in_bfloat16_the_weights_gradient_is_summed_in_float32():
    """512 chunks that each add 1/512 of a sum: in bf16, which has 8 bits, the later ones would be lost."""
    n = 512
    hidden = torch.ones(n, 2, dtype=torch.bfloat16, requires_grad=True)
    weight = torch.zeros(3, 2, dtype=torch.bfloat16, requires_grad=True)
    out = ChunkedLogProbs.apply(hidden, weight, torch.zeros(n, dtype=torch.long), torch.zeros(3), 1.0, 1)
    out[0].sum().backward()
    # p = 1/3 each: n (1 - 1/3) of the target's row, -n / 3 of the rest; in bf16 1/3 is off by 2^-9
    want = torch.tensor([[2 * n / 3] * 2, [-n / 3] * 2, [-n / 3] * 2])
    np.testing.assert_allclose(weight.grad.float(), want, rtol=2.0**-8)
    assert weight.grad.dtype == hidden.grad.dtype == torch.bfloat16


@pytest.fixture
def mixed_products(monkeypatch):
    """As if on a GPU: `mm` and `addmm` with an out_dtype, which CPUs lack, computed as documented."""
    library = torch.library.Library("aten", "IMPL")
    library.impl("mm.dtype", lambda a, b, dtype: a.to(dtype) @ b.to(dtype), "CPU")

    def addmm(start, a, b, dtype, *, out, beta=1, alpha=1):
        assert start.dtype == out.dtype == dtype and a.dtype == b.dtype == torch.bfloat16
        return out.copy_(beta * start + alpha * (a.to(dtype) @ b.to(dtype)))

    library.impl("addmm.dtype_out", addmm, "CPU")
    monkeypatch.setattr(packing, "half_on_gpu", lambda x: x.dtype == torch.bfloat16)
    yield
    library._destroy()


def test_on_a_gpu_logits_of_bfloat16_factors_are_float32(mixed_products):
    """Log-probs are those of the bf16 numbers in float64, not ones of rounded logits; gradients likewise."""
    g = torch.Generator().manual_seed(3)
    n, width, vocabulary = 40, 64, 500
    hidden, weight = (torch.randn(rows, width, generator=g).bfloat16() for rows in (n, vocabulary))
    targets, bias = torch.randint(0, vocabulary, (n,), generator=g), torch.zeros(vocabulary)
    got_in = [x.clone().requires_grad_() for x in (hidden, weight)]
    logp, _ = ChunkedLogProbs.apply(*got_in, targets, bias, 1.0, 16)
    logp.sum().backward()
    want_in = [x.double().requires_grad_() for x in (hidden, weight)]
    logits = want_in[0] @ want_in[1].T
    want = logits.log_softmax(-1).gather(1, targets[:, None])[:, 0]
    want.sum().backward()
    largest = float(logits.detach().abs().max())  # what rounding is relative to
    np.testing.assert_allclose(
        logp.detach(), want.detach(), atol=largest * rounding(width, vocabulary), rtol=0
    )
    rounded = (logits.detach().bfloat16().double()).log_softmax(-1).gather(1, targets[:, None])[:, 0]
    assert (rounded - want).abs().max() > 0.02  # a bound that means something: bf16 logits are off by this
    for got, plain in zip(got_in, want_in, strict=True):  # d and the results are rounded to bf16 themselves
        assert (got.grad.double() - plain.grad).norm() < 2 * 2.0**-8 * plain.grad.norm()


def test_the_installed_torch_takes_the_mixed_products(monkeypatch):
    """The head's calls on tensors without values: torch's own checks of dtypes, shapes and arguments."""
    monkeypatch.setattr(packing, "half_on_gpu", lambda x: x.dtype == torch.bfloat16)
    hidden, weight = (
        torch.empty(n, 8, dtype=torch.bfloat16, device="meta", requires_grad=True) for n in (7, 11)
    )
    targets, bias = (torch.empty(n, dtype=t, device="meta") for n, t in ((7, torch.long), (11, torch.float)))
    out = ChunkedLogProbs.apply(hidden, weight, targets, bias, 1.0, 3)
    out[0].sum().backward()
    assert out.dtype == torch.float32 and weight.grad.dtype == torch.bfloat16


@pytest.mark.parametrize(
    "gib, vocabulary, want",
    # 80 GiB / 32 / (8 bytes x 152,064) = 2207, below it 2048; 24 GiB: 662, 512; 1 GiB: 27, at least 64
    [(80, 152064, 2048), (24, 152064, 512), (1, 152064, 64), (None, 152064, 256), (None, 500, 256)],
)
def test_the_chunk_of_logits_by_hand(monkeypatch, gib, vocabulary, want):
    if gib:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        card = types.SimpleNamespace(total_memory=gib * 2**30)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda: card)
    assert logit_chunk(vocabulary) == want


# ---- attention ----
SEGMENTS = ((0, 5, 0, 0), (5, 9, 0, 5), (9, 10, 0, 5), (10, 13, 0, 0), (13, 19, 10, 13))  # two prompts


def attention_inputs():
    g = torch.Generator().manual_seed(1)
    query = torch.randn(1, 4, 19, 8, generator=g)  # (1, H, T, D)
    return query, *(torch.randn(1, 2, 19, 8, generator=g) for _ in range(2))  # (1, H_kv, T, D)


def dense_attention(query, key, value):
    """The definition: one T x T mask, every token sees its prompt and its own segment up to itself."""
    sees = torch.zeros(19, 19, dtype=torch.bool)
    for start, end, prompt_start, prompt_end in SEGMENTS:
        for t in range(start, end):
            sees[t, prompt_start:prompt_end] = True
            sees[t, start : t + 1] = True
    key, value = (x.repeat_interleave(2, dim=1) for x in (key, value))
    scores = (query @ key.transpose(2, 3) * 0.3).masked_fill(~sees, -torch.inf)
    return (scores.softmax(-1) @ value).transpose(1, 2)


def test_packed_attention_equals_a_dense_mask():
    query, key, value = attention_inputs()
    got, _ = packed_attention(None, query, key, value, None, scaling=0.3, segments=SEGMENTS)
    np.testing.assert_allclose(got, dense_attention(query, key, value), atol=rounding(8, 19), rtol=0)


def test_the_kernel_of_a_gpu_equals_a_dense_mask(on_gpu):
    inputs, plain = ([x.requires_grad_() for x in attention_inputs()] for _ in range(2))
    got, _ = packed_attention(None, *inputs, None, scaling=0.3, segments=SEGMENTS)
    want = dense_attention(*plain)
    np.testing.assert_allclose(got.detach(), want.detach(), atol=rounding(8, 19), rtol=0)
    for out in (got, want):
        out.backward(torch.linspace(-1, 1, out.numel()).view(out.shape))
    for a, b in zip(inputs, plain, strict=True):
        np.testing.assert_allclose(a.grad, b.grad, atol=rounding(8, 19, 19), rtol=0)


def test_float32_queries_of_autocast_meet_half_precision_values(on_gpu):
    query, key, value = attention_inputs()
    half = [x.bfloat16() for x in (query, key, value)]
    got, _ = packed_attention(None, query, key, half[2], None, scaling=0.3, segments=SEGMENTS)
    want, _ = packed_attention(None, *half, None, scaling=0.3, segments=SEGMENTS)
    assert got.dtype == torch.bfloat16 and torch.equal(got, want)


def relative(got: list, want: list, floor: float) -> float:
    """The largest distance of two tensors, relative to the wanted one's norm or to `floor`."""
    return max(float((a - b).norm() / (b.norm() + floor)) for a, b in zip(got, want, strict=True))


def test_the_vision_tower_equals_transformers_own(tiny, tiny_base):
    assert_tower_equals_transformers_own(tiny[0], load_plain(tiny_base))


def test_the_vision_tower_on_the_kernels_of_gpus(tiny, tiny_base, on_gpu):
    assert_tower_equals_transformers_own(tiny[0], load_plain(tiny_base))


def assert_tower_equals_transformers_own(model, plain):
    """Features and gradients: windows that an image's edge cuts off, whole images, both kinds of layer."""
    config = model.config
    assert 0 < len(config.vision_config.fullatt_block_indexes) < config.vision_config.depth
    assert config.vision_config._attn_implementation == "packed_flash"
    grid = torch.tensor([[1, 12, 18], [1, 2, 2], [1, 8, 8]])  # patches; a window is 8 x 8 of them
    pixels = torch.randn(12 * 18 + 4 + 64, 1176, generator=torch.Generator().manual_seed(2))
    out = []
    for tower in (model.model.visual, plain.model.visual):
        tower.zero_grad()
        features = tower(pixels, grid_thw=grid).pooler_output
        features.backward(torch.linspace(-1, 1, features.numel()).view(features.shape))
        out.append(([features.detach()], [p.grad for p in tower.parameters()]))
    (got, got_grads), (want, want_grads) = out
    bound = gradient_bound(config, len(pixels))
    assert relative(got, want, 0) < bound
    # The bias of keys, which softmax does not feel, has next to no gradient: relative to that of all.
    whole = sum(float(g.square().sum()) for g in want_grads) ** 0.5
    assert relative(got_grads, want_grads, 1e-3 * whole) < bound


def test_the_model_on_the_kernels_of_gpus(tiny, on_gpu):
    """Log-probs and gradients of packed rows: the same as on a CPU, to rounding."""
    model, prompts = tiny
    use_logprob_head(model, [], 0.7, 1024)
    out = []
    for _ in range(2):
        model.zero_grad()
        logp, _ = token_logps(model, pack(prompts, model))
        logp.sum().backward()
        out.append((logp.detach(), [p.grad for p in model.parameters()]))
        packing.has_varlen = lambda x: False  # monkeypatch puts the real one back
    (got, got_grads), (want, want_grads) = out
    np.testing.assert_allclose(got, want, atol=logp_bound(model.config, LONGEST), rtol=0)
    whole = sum(float(g.square().sum()) for g in want_grads) ** 0.5
    assert relative(got_grads, want_grads, 1e-3 * whole) < gradient_bound(model.config, len(got))


def test_a_torch_with_the_first_form_of_the_kernel_has_none(monkeypatch):
    """That form has no scale and wants as many heads of keys as of queries."""

    def varlen_attn(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, is_causal=False, return_aux=None):
        pass

    monkeypatch.setitem(sys.modules, "flash_attn", None)
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", varlen_attn)
    varlen_kernel.cache_clear()
    assert varlen_kernel() is None
    varlen_kernel.cache_clear()


@pytest.mark.parametrize("causal", [True, False])
def test_the_installed_torch_takes_the_call(causal, monkeypatch):
    """Its real operator on tensors without values, which asks for a call and shapes that it knows."""
    monkeypatch.setitem(sys.modules, "flash_attn", None)
    varlen_kernel.cache_clear()
    inputs = [x.to("meta", torch.bfloat16).requires_grad_() for x in attention_inputs()]
    layout = varlen_layout(SEGMENTS, torch.device("meta"))
    out = varlen(*inputs, layout, 0.3, causal)
    assert out.shape == (1, 19, 4, 8) and out.dtype == torch.bfloat16
    out.sum().backward()
    assert [x.grad.shape for x in inputs] == [x.shape for x in inputs]
    varlen_kernel.cache_clear()


def test_varlen_layout_by_hand():
    at, query_bounds, key_bounds, most_queries, most_keys = varlen_layout(SEGMENTS, torch.device("cpu"))
    own = [[0, 1, 2, 3, 4], [5, 6, 7, 8], [9], [10, 11, 12], [13, 14, 15, 16, 17, 18]]
    prompts = [[], own[0], own[0], [], own[3]]
    assert at.tolist() == [x for p, o in zip(prompts, own, strict=True) for x in p + o]
    assert query_bounds.tolist() == [0, 5, 9, 10, 13, 19] and key_bounds.tolist() == [0, 5, 14, 20, 23, 32]
    assert (most_queries, most_keys) == (6, 9) and query_bounds.dtype == key_bounds.dtype == torch.int32
