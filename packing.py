"""Packed rows: what lies in one, who attends to whom, and the log-probs of its completion tokens.

    packed = pack([(prompt, [completion_ids, ...]), ...], model)
    logp, entropy = token_logps(model, packed)  # (C,), (C,): all completion tokens, in order

A micro-batch is one row without padding. A prompt with its images is run once for all its completions, each
of which sees the prompt and itself, exactly what it would see alone: with 750 prompt and 400 completion
tokens and eight completions a prompt, 43 % of the tokens are left. Log-probs come from a head that never
holds the logits of more than `logit_chunk` tokens.

Three places count differently, and a mistake between them is silent:
  row position      0 .. T-1, where a token lies in the packed row; segments and `predicted_at` are these;
  text position     0 .. L-1 from the beginning of the token's own prompt: what the causal order means;
  rope position     three numbers (time, height, width): equal for text, the patch's place for an image.
"""

import functools
import inspect
import itertools
import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from data import Prompt


@dataclass(frozen=True)
class Family:
    """What is not to be read from a model's config, its class and its processor."""

    name: str  # of its published models
    box_frame: str  # that its authors trained it on


# Model types that a packed row is known to get right, and how they differ. What stands in comments is read
# elsewhere: patch and merge size from the processor, the rest from the config, by the model's own class with
# its `get_rope_index`, its vision tower, its names of decoder layers and vision blocks.
FAMILIES = {
    # image tokens of 28 x 28 pixels; each patch sees its whole image; M-RoPE in three sections of a head
    "qwen2_vl": Family("Qwen2-VL", "per_mille"),
    # 28 x 28; most layers of the tower see windows of 112 x 112 only, bounded by what the tower hands down
    "qwen2_5_vl": Family("Qwen2.5-VL", "pixel"),
    # 32 x 32; M-RoPE interleaved; features of several of the tower's layers are added to the first decoder
    # layers' outputs at the image tokens (deepstack); heads may be wider than hidden_size / heads
    "qwen3_vl": Family("Qwen3-VL", "per_mille"),
}
FORBIDDEN_BIAS = -100.0  # on the logits of image and video tokens: a sampled one would break the next forward


def check_family(model: str, config) -> Family:
    """Raises: ValueError if the trainers do not know this kind of model; `config`: of transformers."""
    if config.model_type not in FAMILIES:
        *others, last = FAMILIES
        raise ValueError(
            f"{model}: expected a model of type {', '.join(others)} or {last}, got {config.model_type!r}, "
            "which cannot be trained here; evaluate.py can still ask it, by --provider hf or vllm, or by "
            "--provider openai and a server such as `vllm serve`"
        )
    return FAMILIES[config.model_type]


# ---- who computes what -------------------------------------------------------------------------------------
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
    # In the order of sampling again, so that neighbours still share their prompt in `micro_batches`.
    return [sorted(share) for share in shares]


def micro_batches(sequences: list[tuple[object, int, int]], max_tokens: int) -> list[list[int]]:
    """Indices of sequences, in order, in groups of at most max_tokens (one that is longer stands alone).

    Args: sequences: (key of the prompt, its tokens, the completion's tokens). Neighbours with the same key
        share the prompt, which then counts once a group: `pack` runs it once.

    >>> micro_batches([("a", 5, 2), ("a", 5, 2), ("b", 5, 1), ("c", 5, 1)], 15)
    [[0, 1, 2], [3]]
    """
    groups, used, last = [], math.inf, None  # inf: the first sequence opens the first group
    for i, (key, prompt, completion) in enumerate(sequences):
        cost = completion if groups and key == last else prompt + completion
        if used + cost > max_tokens:
            groups.append([])
            used, cost = 0, prompt + completion  # a group that is cut in two pays for its prompt twice
        groups[-1].append(i)
        used, last = used + cost, key
    return groups


# ---- the row -----------------------------------------------------------------------------------------------
def blank_prompt(config) -> Prompt:
    """One image token of a grey patch, and nothing to learn from it."""
    v = config.vision_config
    patches = v.spatial_merge_size**2  # of one image token
    pixels = torch.zeros(patches, v.in_channels * v.temporal_patch_size * v.patch_size**2)
    grid = torch.tensor([[1, v.spatial_merge_size, v.spatial_merge_size]])
    ids = [config.vision_start_token_id, config.image_token_id, config.vision_end_token_id]
    return Prompt(None, [], [], ids, pixels, grid)


def pack(prompts: list[tuple[Prompt, list[list[int]]]], model) -> dict:
    """Lay prompts, each followed by its completions, end to end in one row, as a batch for the model.

    Returns: input_ids (1, T), position_ids (4, 1, T), pixel_values, image_grid_thw; segments: (start, end,
        start of the prompt, its end) in row positions, of every prompt (the last two 0) and completion;
        target_ids (C,), all completion tokens, completion by completion, and predicted_at (C,), the row
        position whose hidden state predicts each. Row 0 of position_ids holds text positions, rows 1-3 the
        rope's.
    """
    # FSDP gathers the vision tower's weights when it is called, by all processes or none. A process whose
    # prompts have no image, or that has no prompt at all, calls it for a blank one, or the others hang.
    if all(prompt.pixel_values is None for prompt, _ in prompts):
        prompts = [*prompts, (blank_prompt(model.config), [])]
    ids, positions, segments, targets, predicted_at = [], [], [], [], []
    for prompt, completions in prompts:
        prompt_ids, first, length = torch.tensor([prompt.ids]), len(ids), len(prompt.ids)
        is_image = (prompt_ids == model.config.image_token_id).int()
        rope, _ = model.model.get_rope_index(prompt_ids, is_image, prompt.image_grid_thw)  # (3, 1, L)
        positions.append(torch.cat([torch.arange(length).view(1, 1, -1), rope]))  # (4, 1, L)
        ids += prompt.ids
        segments.append((first, len(ids), 0, 0))
        for completion in completions:
            start, steps = len(ids), torch.arange(len(completion))
            # An image of 3 x 3 tokens takes nine text positions but only three rope positions, so the rope of
            # a completion goes on from the prompt's largest one, in all three dimensions alike. Every
            # completion of the group starts there again: none lies behind another, though it does in the row.
            rope_steps = (steps + rope.max() + 1).expand(3, 1, -1)
            positions.append(torch.cat([(steps + length).view(1, 1, -1), rope_steps]))
            ids += completion
            targets += completion
            segments.append((start, len(ids), first, first + length))
            # A token is predicted by the one before it. Before a completion's first token that is the
            # prompt's last one, which lies next to it in the row for the first completion only.
            predicted_at += [first + length - 1, *range(start, len(ids) - 1)]
    with_images = [prompt for prompt, _ in prompts if prompt.pixel_values is not None]
    return {
        "segments": tuple(segments),  # a tuple: `varlen_layout` remembers it by its value
        "input_ids": torch.tensor([ids]),  # (1, T)
        "position_ids": torch.cat(positions, dim=2),  # (4, 1, T)
        "target_ids": torch.tensor(targets, dtype=torch.long),  # (C,)
        "predicted_at": torch.tensor(predicted_at, dtype=torch.long),  # (C,)
        # The model puts features in the place of image tokens in this very order, prompt by prompt.
        "pixel_values": torch.cat([p.pixel_values for p in with_images]),
        "image_grid_thw": torch.cat([p.image_grid_thw for p in with_images]),
    }


# ---- attention ---------------------------------------------------------------------------------------------
def use_packed_attention(model, text: str = "packed"):
    """Let a loaded model attend by the functions below.

    Args: text: "packed" for rows of `pack` and prompts of one length, "sdpa" for prompts that are padded.
    """
    from transformers import AttentionInterface

    # cuDNN's attention makes a plan for every shape that it meets, and here nearly every shape is a new one.
    torch.backends.cuda.enable_cudnn_sdp(False)
    # For a name of ours transformers builds no mask: the segments, which forward hands down, say it all.
    AttentionInterface.register("packed", packed_attention)
    # The vision tower hands its bounds down to a name with "flash" in it; others it calls window by window.
    # `from_pretrained` would look for a package of that name, hence here.
    AttentionInterface.register("packed_flash", vision_attention)
    model.config.text_config._attn_implementation = text
    model.config.vision_config._attn_implementation = "packed_flash"


def packed_attention(module, query, key, value, attention_mask, scaling=None, segments=None, **kwargs):
    """Causal attention within the segments of a packed row, so that no T x T mask is ever built.

    Args: query (1, H, T, D), key and value (1, H_kv, T, D); segments: from `pack`, which the model's forward
        hands down; without them (generation) plain SDPA.
    Returns: ((1, T, H, D), None), transformers' convention.
    """
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    if segments is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    if has_varlen(value):
        return varlen(query, key, value, varlen_layout(segments, query.device), scaling, causal=True), None
    return by_segment(query, key, value, segments, scaling, causal=True), None


def vision_attention(
    module, query, key, value, attention_mask, *, cu_seq_lens_q, max_length_q, scaling, **kwargs
):
    """Attention of the vision tower: a patch sees its whole image, or in most layers its whole window.

    Args: query, key and value (1, H, T, D) of the patches of all images; cu_seq_lens_q (segments + 1,) int32,
        bounds of the images or windows among them; max_length_q: patches of the largest.
    Returns: ((1, T, H, D), None).
    """
    if has_varlen(value):
        layout = None, cu_seq_lens_q, cu_seq_lens_q, max_length_q, max_length_q
        return varlen(query, key, value, layout, scaling, causal=False), None
    segments = [(start, end, 0, 0) for start, end in itertools.pairwise(cu_seq_lens_q.tolist())]
    return by_segment(query, key, value, segments, scaling, causal=False), None


def by_segment(query, key, value, segments, scaling, causal):
    """One call of SDPA a segment: for CPUs, float32, and GPUs without `varlen_kernel`."""
    pieces = []
    for start, end, prompt_start, prompt_end in segments:
        q, k, v = (x[:, :, start:end] for x in (query, key, value))
        if prompt_end == prompt_start:  # a prompt or an image, which sees itself alone
            attended = F.scaled_dot_product_attention(
                q, k, v, is_causal=causal, scale=scaling, enable_gqa=True
            )
            pieces.append(attended)
            continue
        # The prompt's keys lie elsewhere in the row, perhaps behind other completions: they are fetched.
        k = torch.cat([key[:, :, prompt_start:prompt_end], k], dim=2)
        v = torch.cat([value[:, :, prompt_start:prompt_end], v], dim=2)
        sees = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device)
        # is_causal would align the triangle at the first key. Token t sees the prompt and t + 1 tokens of its
        # own.
        sees = sees.tril(prompt_end - prompt_start)
        # A mask and grouped heads together would leave a GPU the slow kernel: repeat them instead.
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
        pieces.append(F.scaled_dot_product_attention(q, k, v, sees, scale=scaling))
    return torch.cat(pieces, dim=2).transpose(1, 2)  # segments cover the row in order


def varlen(query, key, value, layout, scaling, causal):
    """The same in one call of `varlen_kernel`, whose causal mask is aligned at the last keys.

    Args: layout: as `varlen_layout` returns it; None for the positions of the keys: they lie as the queries.
    """
    seen_at, *bounds = layout
    # Under autocast rope leaves queries and keys in float32, which the kernels do not take.
    q, k, v = (x[0].transpose(0, 1).to(value.dtype) for x in (query, key, value))  # (T, H, D)
    if seen_at is not None:
        k, v = (x.index_select(0, seen_at) for x in (k, v))  # (keys of all segments, H_kv, D)
    return varlen_kernel()(q, k, v, *bounds, scale=scaling, causal=causal)[None]


@functools.lru_cache(2)  # the layers of a forward pass share it; gradient checkpointing asks once more
def varlen_layout(segments, device):
    """The segments as `varlen_kernel` takes them: each a sequence of queries with the keys that it sees.

    Returns: row positions of the keys, segment by segment, the prompt's before the completion's own, so that
        a mask aligned at the end lets token t see the prompt and t + 1 of its own; bounds of the segments
        among the queries and among these keys, each (segments + 1,) int32; the most queries and keys of a
        segment.

    >>> at, query_bounds, key_bounds, *most = varlen_layout(((0, 3, 0, 0), (3, 4, 0, 3), (4, 6, 0, 3)), "cpu")
    >>> at.tolist(), query_bounds.tolist(), key_bounds.tolist(), most
    ([0, 1, 2, 0, 1, 2, 3, 0, 1, 2, 4, 5], [0, 3, 4, 6], [0, 3, 7, 12], [3, 5])
    """
    n_queries = [end - start for start, end, *_ in segments]
    n_keys = [end - start + prompt_end - prompt_start for start, end, prompt_start, prompt_end in segments]
    seen_at = np.concatenate([np.r_[a:b, start:end] for start, end, a, b in segments])
    bounds = [torch.tensor([0, *np.cumsum(n)], dtype=torch.int32, device=device) for n in (n_queries, n_keys)]
    return torch.from_numpy(seen_at).to(device), *bounds, max(n_queries), max(n_keys)


def half_on_gpu(x: torch.Tensor) -> bool:
    return x.is_cuda and x.dtype in (torch.bfloat16, torch.float16)


def has_varlen(x: torch.Tensor) -> bool:
    """Whether `varlen_kernel` takes such tensors: half precision, on an Ampere GPU or a later one."""
    return half_on_gpu(x) and torch.cuda.get_device_capability(x.device) >= (8, 0) and bool(varlen_kernel())


@functools.cache
def varlen_kernel():
    """Attention of segments laid end to end: flash-attn's where it imports, else torch's own, else None.

    Returns: f(q, k, v, query bounds, key bounds, most queries, most keys, scale=, causal=), which takes
        (T, H, D), (T_k, H_kv, D) twice, and the rest as in `varlen_layout`, and gives (T, H, D).
    """
    try:
        from flash_attn import flash_attn_varlen_func
    except ImportError:  # not installed, or built for another torch
        pass
    else:
        return lambda *row, scale, causal: flash_attn_varlen_func(*row, softmax_scale=scale, causal=causal)
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    if "enable_gqa" not in inspect.signature(varlen_attn).parameters:  # its first form: no scale, equal heads
        return None
    return lambda *row, scale, causal: varlen_attn(
        *row, scale=scale, window_size=(-1, 0 if causal else -1), enable_gqa=True
    )


# ---- log-probs ---------------------------------------------------------------------------------------------
class ChunkedLogProbs(torch.autograd.Function):
    """log p(target) and entropy under softmax((h W^T + bias) / temperature), `chunk` tokens at a time.

    The logits of a 152k vocabulary take 0.6 MB a token; here those of at most `chunk` tokens exist at a time,
    in two copies, in the backward pass as well, which computes them again. Logits and the weight's gradient
    are float32 on a GPU too, where the factors are bf16: rounded to bf16, a logit of 20 is off by up to 0.06,
    and log-probs of nearly equal policies differ by as much.
    """

    @staticmethod
    def forward(ctx, hidden, weight, targets, bias, temperature, chunk):  # (C, D), (V, D), (C,), (V,)
        ctx.save_for_backward(hidden, weight, targets, bias)
        ctx.temperature, ctx.chunk, pieces = temperature, chunk, []
        for h, t in zip(hidden.split(chunk), targets.split(chunk), strict=True):
            logits = ChunkedLogProbs.logits(h, weight, bias, temperature)  # (chunk, V) float32
            logits.sub_(logits.amax(-1, keepdim=True))  # exp cannot overflow
            p = logits.exp()  # not yet divided by its sum
            norm = p.sum(-1)  # (chunk,)
            logp = logits.gather(1, t[:, None])[:, 0] - norm.log()
            # -sum p/norm (logits - log norm) = log norm - sum p logits / norm. bmm, since (p * logits) would
            # be a third copy of the logits.
            entropy = norm.log() - torch.bmm(p[:, None], logits[..., None])[:, 0, 0] / norm
            pieces.append(torch.stack([logp, entropy]))
        return torch.cat(pieces, dim=1)  # (2, C)

    @staticmethod
    def backward(ctx, grad):  # (2, C); the entropy is measured, not trained on
        hidden, weight, targets, bias = ctx.saved_tensors
        grad_hidden, grad_weight = [], None
        if ctx.needs_input_grad[1]:  # not beside adapters
            grad_weight = torch.zeros_like(weight, dtype=torch.float32)
        # d logp / d logits = (1[target] - p) / temperature: the bias is a constant, the temperature a factor.
        pieces = (x.split(ctx.chunk) for x in (hidden, targets, grad[0] / ctx.temperature))
        for h, t, g in zip(*pieces, strict=True):
            logits = ChunkedLogProbs.logits(h, weight, bias, ctx.temperature)
            p = logits.sub_(logits.amax(-1, keepdim=True)).exp_()
            d = p.mul_((-g / p.sum(-1))[:, None])  # g (1[target] - p), first its second half
            d.scatter_add_(1, t[:, None], g[:, None].to(d.dtype))  # and its first, in place
            d = d.to(weight.dtype)
            grad_hidden.append(d @ weight)
            if grad_weight is None:
                continue
            # Into the sum at once, without a second (V, D).
            if half_on_gpu(d):
                torch.addmm(grad_weight, d.T, h, out_dtype=torch.float32, out=grad_weight)
            else:
                grad_weight.addmm_(d.T.float(), h.float())
        if grad_weight is not None:
            grad_weight = grad_weight.to(weight.dtype)
        return torch.cat(grad_hidden), grad_weight, None, None, None, None

    @staticmethod
    def logits(hidden, weight, bias, temperature):
        if half_on_gpu(hidden):  # without a float32 copy of the weight
            logits = torch.mm(hidden, weight.T, out_dtype=torch.float32)
        else:  # a CPU trains in float32 anyway
            logits = F.linear(hidden, weight).float()
        return logits.add_(bias).div_(temperature)  # (chunk, V)


def logit_chunk(vocabulary: int) -> int:
    """Tokens whose logits exist at a time: a power of two, whose two copies fit 1/32 of the GPU's memory.

    At least 64, since each chunk reads and writes the weight's whole gradient; 256 on a CPU.
    """
    if not torch.cuda.is_available():
        return 256
    fit = torch.cuda.get_device_properties().total_memory // 32 // (2 * 4 * vocabulary)  # 4 bytes a logit
    return max(64, 2 ** (fit.bit_length() - 1))


def use_logprob_head(model, forbidden_ids: list[int], temperature: float, chunk: int | None):
    """Let `model.lm_head` return log-probs and entropies (1, C, 2) while `lm_head.targets` is set.

    They are of the tokens `targets`, each predicted by the hidden state at `predicted_at`, at the sampler's
    temperature and with its FORBIDDEN_BIAS. Without targets (generation) the head is the usual one.

    Args: chunk: tokens whose logits exist at a time; None: as `logit_chunk` chooses.
    """
    # The head stays the module that the model's forward calls, once: under FSDP its weight is gathered and
    # its gradient reduced there and nowhere else. A second call, or a use of the weight outside, would see a
    # shard. What it needs beside the hidden states cannot come through forward, so it waits on the module.
    head = model.lm_head
    bias = torch.zeros(head.weight.shape[0])  # (V,); the shape of the whole, which sharding keeps
    bias[forbidden_ids] = FORBIDDEN_BIAS
    chunk = chunk or logit_chunk(len(bias))

    def forward(hidden):
        if head.targets is None:
            return F.linear(hidden, head.weight)
        # Completions share the end of their prompt. index_select sums its gradients up in order; the indexing
        # of transformers' logits_to_keep does not, and a resumed run would differ in the last bits.
        hidden = hidden[0].index_select(0, head.predicted_at)  # (C, D)
        out = ChunkedLogProbs.apply(
            hidden, head.weight, head.targets, bias.to(hidden.device), temperature, chunk
        )  # (2, C)
        return out.T[None]

    head.targets = None
    head.forward = forward


def token_logps(model, packed: dict) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probs and entropies (nats) of a packed row's completion tokens: (C,), (C,), sequence by sequence.

    One function for policy, old policy and reference; at the sampler's temperature, with its token biases.
    `packed` comes from `pack`; `model` went through `use_logprob_head`.
    """
    inputs = dict(packed)
    head = getattr(model, "module", model).lm_head  # accelerate may wrap a model
    head.targets, head.predicted_at = inputs.pop("target_ids"), inputs.pop("predicted_at")  # (C,), (C,)
    try:
        out = model(**inputs, use_cache=False).logits[0]  # (C, 2)
    finally:
        head.targets = None  # the next caller may be `generate`
    return out[:, 0], out[:, 1].detach()
