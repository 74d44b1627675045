"""Low-rank adapters (LoRA, arXiv:2106.09685) for both trainers: added, switched off, merged.

    W x  becomes  W x + scale B (A x),  scale = alpha / rank,  A (rank, in), B (out, rank)

W is frozen; A starts random, B at zero, so the model starts as it was. At the customary alpha of 32 the best
learning rate is about ten times that of all parameters ("LoRA Without Regret", Schulman et al. 2025). The
layers are peft's, put into the model in their place: it stays the class that it was, W is called
`<layer>.base_layer.weight`, A and B `<layer>.lora_A.default.weight` and `<layer>.lora_B.default.weight`.
"""

import contextlib

import torch


def add_adapters(model, rank: int, alpha: float, vision: bool):
    """Freeze the model and put float32 adapters on the linear layers of its language model.

    Args: vision: on those of the vision tower as well. The head gets none: it shares the embedding's weight
        in small models, and packing.py overrides its forward.
    """
    from peft import LoraConfig, inject_adapter_in_model

    layers = [
        name
        for name, layer in model.named_modules()
        if isinstance(layer, torch.nn.Linear)
        and layer is not model.lm_head
        and (vision or ".visual." not in name)
    ]
    inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=alpha, target_modules=layers), model)
    for p in model.parameters():  # peft has frozen all others, and made these of the others' dtype
        if p.requires_grad:
            p.data = p.data.float()


def adapted_layers(model) -> dict:
    """{name: layer with an adapter}; empty for a model without."""
    return {name: layer for name, layer in model.named_modules() if hasattr(layer, "lora_A")}


@contextlib.contextmanager
def adapters_off(model):
    """The model without its adapters, that is, the start. Does nothing to a model that has none."""
    layers = adapted_layers(model).values()
    # peft's own switch would freeze them, and FSDP remembers what is frozen at its first call.
    for layer in layers:
        layer.set_scale("default", 0)
    try:
        yield
    finally:
        for layer in layers:
            layer.set_scale("default", 1)


def merge_adapters(model):
    """Fold the adapters into the weights, in place; the layers are ordinary ones again."""
    for name, layer in adapted_layers(model).items():
        layer.merge()
        model.set_submodule(name, layer.get_base_layer())
