"""Tiny models of every family, the plain way to run one, to compare with, and distances of what comes out."""

import torch

IDS = "image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id"


def build_tiny(folder, family: str, base, tied: bool = True):
    """Write an untrained model of a family and its processor, with the tokenizer of the tiny one at `base`.

    Weights are random, biases and norms too: what a family adds to a sum has to show. Two towers' layers feed
    Qwen3-VL's deepstack.
    """
    import transformers
    from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

    old, processor = AutoConfig.from_pretrained(base), AutoProcessor.from_pretrained(base)
    text = dict(vocab_size=old.text_config.vocab_size, hidden_size=64, intermediate_size=96)
    text |= dict(num_hidden_layers=3, num_attention_heads=2, num_key_value_heads=1)
    text |= dict(max_position_embeddings=1024, bos_token_id=None, eos_token_id=old.text_config.eos_token_id)
    rope = {"rope_type": "default", "rope_theta": 100.0}
    vision = {
        "qwen2_vl": dict(depth=2, embed_dim=32, hidden_size=64, num_heads=2, mlp_ratio=2),
        "qwen2_5_vl": dict(depth=2, hidden_size=32, intermediate_size=64, num_heads=2, out_hidden_size=64,
                           window_size=112, fullatt_block_indexes=[1]),
        "qwen3_vl": dict(depth=3, hidden_size=32, intermediate_size=64, num_heads=2, out_hidden_size=64,
                         num_position_embeddings=64, deepstack_visual_indexes=[0, 2]),
    }[family]  # fmt: skip
    if family == "qwen3_vl":  # heads wider than hidden_size / heads, as in the 4B
        text |= dict(head_dim=32, num_attention_heads=4, num_key_value_heads=2)
        text |= {"rope_parameters": rope | {"mrope_section": [6, 5, 5], "mrope_interleaved": True}}
    else:
        text |= {"rope_parameters": rope | {"mrope_section": [4, 6, 6]}}
    config = AutoConfig.for_model(
        family, text_config=text, vision_config=vision, tie_word_embeddings=tied,
        **{name: getattr(old, name) for name in IDS},
    )  # fmt: skip
    torch.manual_seed(5)
    model = AutoModelForImageTextToText.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.05)
    model.save_pretrained(folder)
    kind = {"qwen2_vl": "Qwen2VL", "qwen2_5_vl": "Qwen2_5_VL", "qwen3_vl": "Qwen3VL"}[family]
    images, videos = processor.image_processor, processor.video_processor
    if family == "qwen3_vl":
        half = dict(patch_size=16, image_mean=[0.5] * 3, image_std=[0.5] * 3)
        images = transformers.Qwen2VLImageProcessor(min_pixels=1024, max_pixels=1024**2, **half)
        videos = transformers.Qwen3VLVideoProcessor()
    kind = getattr(transformers, f"{kind}Processor")
    kind(images, processor.tokenizer, videos, processor.chat_template).save_pretrained(folder)


def load_plain(folder):
    """The model in float32 on transformers' own eager attention: nothing of ours in it."""
    from transformers import AutoModelForImageTextToText

    load = AutoModelForImageTextToText.from_pretrained
    return load(folder, dtype=torch.float32, attn_implementation="eager")


def plain_logits(model, prompt, completion_ids: list[int]) -> torch.Tensor:
    """Logits (T, V) that predict the completion's tokens: one sequence alone, an ordinary forward."""
    ids = torch.tensor([prompt.ids + completion_ids])
    out = model(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        pixel_values=prompt.pixel_values,
        image_grid_thw=prompt.image_grid_thw,
        mm_token_type_ids=(ids == model.config.image_token_id).int(),
    )
    return out.logits[0, len(prompt.ids) - 1 : -1]


def distance(a: dict, b: dict) -> float:
    """Relative distance of two sets of named tensors, in the norm over all of them."""
    assert a.keys() == b.keys()
    gap = sum(float((a[k] - b[k]).double().square().sum()) for k in a) ** 0.5
    return gap / sum(float(b[k].double().square().sum()) for k in b) ** 0.5


def seal(checkpoint):
    """The checkpoint, with the hashes of its files as they are now."""
    from checkpoint import SUMS, files_of, hashes, write_sums

    write_sums(checkpoint, hashes(checkpoint, [name for name in files_of(checkpoint) if name != SUMS]))
    return checkpoint
