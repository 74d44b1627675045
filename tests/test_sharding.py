"""Two processes with FSDP2 shards compute what one computes, and read each other's checkpoints."""

import math

import pytest
import torch
from bounds import gradient_bound
from models import distance
from programs import run_script, settings
from transformers import AutoConfig

pytestmark = pytest.mark.slow
LONGEST = 200  # tokens of a sequence, at most


WORLDS = {  # family, tied, adapters
    "tied": ("qwen2_5_vl", True, False),
    "untied": ("qwen2_vl", False, False),
    "qwen3": ("qwen3_vl", False, False),
    "lora": ("qwen3_vl", True, True),
}


@pytest.fixture(scope="module", params=WORLDS)
def worlds(request, family, tiny_data, tmp_path_factory):
    """The same updates by one process, which shards nothing, and by two: {1: results, 2: results}."""
    model_type, tied, adapters = WORLDS[request.param]
    model, folder = family(model_type, tied), tmp_path_factory.mktemp("worlds")
    lora = settings(lora_rank=4, lora_alpha=8, lora_vision="true") if adapters else []
    for n in (1, 2):
        run_script("tests/ranks.py", model, tiny_data, folder / f"world-{n}", *lora, processes=n)
    results = {n: torch.load(folder / f"world-{n}" / "result.pt") for n in (1, 2)}
    # Relative, for gradients: what the packing into other micro-batches and the sum over processes do.
    return results | {"bound": gradient_bound(AutoConfig.from_pretrained(model), LONGEST)}


def test_gradients_and_weights_are_those_of_one_process(worlds):
    """Uneven lengths, text-only prompts alone on a process, and (third update) a process without any work."""
    one, two, bound = worlds[1], worlds[2], worlds["bound"]
    for k in range(3):
        assert distance(one["gradients"][k], two["gradients"][k]) < bound
        assert one["norms"][k] == pytest.approx(two["norms"][k], rel=bound)
        # AdamW divides a gradient by its own size: where that is as small as the rounding of the gradient, a
        # weight may move the other way. Each of the k + 1 steps moves a weight by 1e-3 at most, and few do
        # so.
        assert distance(one["weights"][k], two["weights"][k]) < (k + 1) * bound
        (loss, kl, tokens), (loss_2, kl_2, tokens_2) = one["sums"][k], two["sums"][k]
        assert tokens == tokens_2
        # A sum of `tokens` terms of both signs, |advantage| x ratio x weight <= 1 x e^0.1 x 2 each.
        assert loss == pytest.approx(loss_2, abs=2.3 * tokens * bound)
        # k3 is a square near its zero: its slope is |e^d - 1|, about sqrt(2 k3), over all tokens at most
        # sqrt(2 kl tokens) (Cauchy-Schwarz).
        assert kl == pytest.approx(kl_2, abs=math.sqrt(2 * kl * tokens) * bound)
    assert min(one["norms"]) > 0 and one["sums"][0][1] > 0  # there was something to compare
    for name, g in two["gradients"][0].items():  # every layer of both towers learns
        assert g.abs().max() > 0, name


def test_a_checkpoint_continues_exactly_and_across_world_sizes(worlds):
    for n in (1, 2):
        for name, p in worlds[n]["weights"][2].items():
            assert torch.equal(p, worlds[n]["continued"][0][name]), name
    assert distance(worlds[1]["weights"][2], worlds[2]["continued"][1]) < 3 * worlds["bound"]


def test_published_weights_are_whole_and_hold_the_adapters(worlds):
    for world in (worlds[1], worlds[2]):
        published, trained = world["published"], world["continued"][-1]
        for name, p in trained.items():
            if ".lora_" not in name:
                assert torch.equal(published[name], p), name
            elif ".lora_A." in name:
                b, weight = trained[name.replace("lora_A", "lora_B")], name.replace("lora_A.default.", "")
                assert torch.equal(published[weight], world["start"][weight] + 8 / 4 * (b @ p)), weight
        assert published.keys() == world["start"].keys()


def test_a_full_disk_is_named_and_leaves_the_last_checkpoint(worlds):
    for n in (1, 2):
        message = worlds[n]["full_disk"]
        assert "checkpoint-3 could not be written (process" in message
        assert message.endswith("checkpoint-2 is whole")
        assert "checkpoint-2" in worlds[n]["files"]
        assert not [name for name in worlds[n]["files"] if name.startswith("checkpoint-3")]


def test_supervised_training_of_uneven_work_on_two_processes(tiny_base, tiny_data, tmp_path):
    """One process has more micro-batches than the other; a hang is a timeout here."""
    small = settings(
        model=tiny_base,
        data=tiny_data,
        out=tmp_path / "sft",
        target="scene_answer",
        template="spatial_thinker",
        lora_rank=0,
        epochs=0.25,
        batch_size=3,
        val_limit=3,
        val_every=1,
        max_tokens_per_micro_batch=200,
        min_pixels=784,
        log_every=1,
    )
    run_script("train_sft.py", *small, processes=2)
    assert (tmp_path / "sft" / "final" / "model.safetensors").exists()
