"""The plain way to run the tiny model, to compare with, and distances of what comes out."""

import torch


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
