"""Adapters: what is trained, that their gradient is the dense one's, checkpoints, merging, in vLLM.

Shards of adapters: test_sharding.py. Those of the supervised trainer: test_train_sft.py.
"""

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from bounds import gradient_bound, rounding
from models import distance, seal
from programs import metrics, run_script, settings
from safetensors.torch import load_file, save_file

from checkpoint import CheckpointError, load, read_record, save
from data import PromptEncoder, load_samples
from distributed import whole_weights
from lora import adapted_layers, adapters_off, add_adapters, merge_adapters
from merge import main, merge
from packing import pack, token_logps
from train_grpo import GRPOConfig, make_learner

LONGEST = 160  # tokens of a sequence, at most


@pytest.fixture(scope="module")
def example(tiny_base, tiny_data):
    """Folder of the untrained model, its processor, a prompt with an image and two completions."""
    from transformers import AutoProcessor

    processor = AutoProcessor.from_pretrained(tiny_base)
    prompt = PromptEncoder(processor, "spatial_thinker", 784, 802816)(load_samples(str(tiny_data))[0])
    rng = torch.Generator().manual_seed(0)
    completions = [torch.randint(300, 600, (n,), generator=rng).tolist() for n in (7, 12)]
    return SimpleNamespace(folder=tiny_base, processor=processor, prompt=prompt, completions=completions)


def make(example, **overrides):
    """A Learner on one process, the same at every call."""
    from accelerate import Accelerator

    torch.manual_seed(0)
    cfg = GRPOConfig(model=str(example.folder), **{"lora_rank": 4, "lora_alpha": 6} | overrides)
    return make_learner(Accelerator(cpu=True), cfg, [5, 6], lambda row: example.prompt)


def logps(example, model):
    return token_logps(model, pack([(example.prompt, example.completions)], model))[0]


def fill(policy, seed=0):
    """Adapters as after some training."""
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in policy.parameters():
            if p.requires_grad:
                p.copy_(torch.randn(p.shape, generator=rng) * 0.05)


def step(example, learner, target):
    (logps(example, learner.policy) * target).sum().backward()
    learner.optimizer.step()
    learner.optimizer.zero_grad()


def merged_by_hand(policy, scale):
    """{published name: W + scale B A} of an unsharded policy."""
    state = policy.state_dict()
    weights = {n.replace(".base_layer", ""): p for n, p in state.items() if ".lora_" not in n}
    for name in [n for n in state if n.endswith(".lora_A.default.weight")]:
        a, b = state[name], state[name.replace("lora_A", "lora_B")]
        weight = name.replace("lora_A.default.", "")
        weights[weight] = weights[weight] + scale * (b @ a)
    return weights


# ---- layers ----
@pytest.mark.parametrize("vision", [False, True])
def test_adapters_sit_on_every_linear_layer_but_the_head_and_nothing_else_is_trained(example, vision):
    from transformers import AutoModelForImageTextToText

    model = AutoModelForImageTextToText.from_pretrained(example.folder, dtype=torch.bfloat16)
    linear = {name for name, layer in model.named_modules() if isinstance(layer, torch.nn.Linear)}
    expected = {n for n in linear if n != "lm_head" and (vision or not n.startswith("model.visual."))}
    kinds = {name.split(".")[-1] for name in expected if "language_model" in name}
    assert kinds == {f"{x}_proj" for x in ("q", "k", "v", "o", "gate", "up", "down")}
    add_adapters(model, 4, 8, vision)
    assert set(adapted_layers(model)) == expected
    for name, p in model.named_parameters():  # float32 masters on frozen bf16 weights
        assert (p.requires_grad, p.dtype) == (
            (True, torch.float32) if ".lora_" in name else (False, torch.bfloat16)
        )


def test_without_adapters_the_policy_is_the_start_bit_for_bit(example):
    dense, learner = make(example, lora_rank=0), make(example)
    assert learner.reference is learner.policy  # no second copy
    with torch.no_grad():
        start = logps(example, dense.reference)
        assert torch.equal(logps(example, learner.policy), start)  # B is zero
        fill(learner.policy)
        with adapters_off(learner.reference):
            assert torch.equal(logps(example, learner.reference), start)
        moved = logps(example, learner.policy)
        assert (moved - start).abs().max() > 0.01
        with adapters_off(dense.reference):  # a model without any
            assert torch.equal(logps(example, dense.reference), start)


def test_the_gradient_of_full_rank_adapters_is_that_of_the_weights(example):
    """y = W x + s B A x with B = 0 has grad_B = s G A^T, so grad_B A = s G where A^T A = 1; G = grad_W."""
    dense = make(example, lora_rank=0, kl_coef=0)
    width = max(layer.in_features for layer in dense.policy.modules() if isinstance(layer, torch.nn.Linear))
    full = make(example, lora_rank=width, lora_alpha=3 * width, kl_coef=0)
    layers = adapted_layers(full.policy)
    for layer in layers.values():
        torch.nn.init.orthogonal_(layer.lora_A["default"].weight)  # (rank, in), rank >= in: A^T A = 1
    for learner in (dense, full):
        logps(example, learner.policy).sum().backward()
    got = {
        n: layer.lora_B["default"].weight.grad @ layer.lora_A["default"].weight for n, layer in layers.items()
    }
    want = {n: 3 * dense.policy.get_submodule(n).weight.grad for n in layers}
    bound = gradient_bound(full.base.config, LONGEST)
    assert len(got) == 7 * full.base.config.text_config.num_hidden_layers
    assert distance(got, want) < bound < 1e-4
    for name in got:  # every layer, not only the large ones
        assert distance({0: got[name]}, {0: want[name]}) < 100 * bound, name


def test_gradient_checkpointing_reaches_adapters_below_frozen_weights(example):
    gradients = []
    for checkpointing in (False, True):
        policy = make(example, kl_coef=0, gradient_checkpointing=checkpointing).policy
        fill(policy)
        logps(example, policy).sum().backward()
        gradients.append({n: p.grad for n, p in policy.named_parameters() if p.requires_grad})
    assert all(g.abs().max() > 0 for g in gradients[0].values())
    assert all(torch.equal(gradients[0][n], gradients[1][n]) for n in gradients[0])


def test_published_weights_are_w_plus_scaled_b_a_and_compute_the_same(example):
    dense, learner = make(example, lora_rank=0), make(example, lora_vision=True)
    fill(learner.policy)
    published, by_hand = dict(whole_weights(learner.policy)), merged_by_hand(learner.policy, 6 / 4)
    assert published.keys() == dense.policy.state_dict().keys() == by_hand.keys()
    assert all(torch.equal(published[name], by_hand[name]) for name in published)
    dense.policy.load_state_dict(published)
    config = learner.base.config
    lengths = [config.text_config.hidden_size, config.text_config.intermediate_size, LONGEST] * 20
    with torch.no_grad():
        want = logps(example, learner.policy)
        merge_adapters(learner.base)
        assert not adapted_layers(learner.base)
        # W x + s B A x against (W + s B A) x: other roundings of a chain of sums
        for model in (dense.policy, learner.base):
            torch.testing.assert_close(logps(example, model), want, atol=10 * rounding(*lengths), rtol=0)


# ---- checkpoints ----
def test_a_checkpoint_holds_adapters_only_and_continues_exactly(example, tmp_path):
    import torch.distributed.checkpoint as dcp

    a, b = make(example), make(example)
    fill(b.policy, 1)
    step(example, a, 1.0)
    save(a.accelerator, a.policy, a.optimizer, example.processor, tmp_path, 1, {}, keep_last=1)
    step(example, a, -1.0)
    assert load(b.accelerator, b.policy, b.optimizer, tmp_path / "checkpoint-1") == 1
    step(example, b, -1.0)
    assert all(torch.equal(p, q) for p, q in zip(a.policy.parameters(), b.policy.parameters(), strict=True))
    trained = {n for n, p in a.policy.named_parameters() if p.requires_grad}
    held = dcp.FileSystemReader(tmp_path / "checkpoint-1" / "model").read_metadata().state_dict_metadata
    moments = (
        dcp.FileSystemReader(tmp_path / "checkpoint-1" / "optimizer").read_metadata().state_dict_metadata
    )
    assert set(held) == trained
    assert {key.removeprefix("state.").removesuffix(".exp_avg") for key in moments if "exp_avg" in key
            and "sq" not in key} == trained  # fmt: skip
    record = read_record(tmp_path / "checkpoint-1")
    assert set(record["fingerprint"]) == trained
    adapters = record["adapters"]
    assert (adapters["rank"], adapters["alpha"], adapters["base_dtype"]) == (4, 6, "float32")
    assert adapters["base"] == str(example.folder)


@pytest.fixture(scope="module")
def run(example, tmp_path_factory):
    """A checkpoint of some trained adapters, and the learner."""
    folder, learner = tmp_path_factory.mktemp("lora"), make(example)
    fill(learner.policy)
    parts = learner.accelerator, learner.policy, learner.optimizer, example.processor
    save(*parts, folder, 3, {"val_reward": 0.5}, keep_last=1)
    return SimpleNamespace(folder=folder, checkpoint=folder / "checkpoint-3", learner=learner)


@pytest.fixture(scope="module")
def other_model(example, tmp_path_factory):
    """The same model with one weight of another value."""
    folder = shutil.copytree(example.folder, tmp_path_factory.mktemp("other") / "model")
    weights = load_file(folder / "model.safetensors")
    name = next(n for n in weights if n.endswith("layers.0.mlp.up_proj.weight"))
    weights[name] = weights[name].flip(0)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("overrides, message", [
    ({"lora_rank": 0}, r"expected all parameters \(lora_rank=0\), got adapters \(lora_rank\)"),
    ({"lora_rank": 8}, "lora_rank: expected 8, got 4"),
    ({"lora_alpha": 7}, "lora_alpha: expected 7, got 6"),
])  # fmt: skip
def test_adapters_of_another_kind_are_not_continued(example, run, overrides, message):
    learner = make(example, kl_coef=0, **overrides)
    with pytest.raises(CheckpointError, match=f"checkpoint-3: {message}"):
        load(learner.accelerator, learner.policy, learner.optimizer, run.checkpoint)


def test_a_checkpoint_of_all_parameters_is_not_taken_for_adapters(example, tmp_path):
    dense, learner = make(example, lora_rank=0, kl_coef=0), make(example)
    save(dense.accelerator, dense.policy, dense.optimizer, example.processor, tmp_path, 1, {}, keep_last=1)
    with pytest.raises(CheckpointError, match="expected adapters .*, got all parameters .*older version"):
        load(learner.accelerator, learner.policy, learner.optimizer, tmp_path / "checkpoint-1")


def test_another_base_is_not_continued(example, run, other_model):
    learner = make(SimpleNamespace(**vars(example) | {"folder": other_model}))
    message = (
        rf"adapters for {example.folder}; {other_model} has other weights \(.*up_proj.weight and 0 more\)"
    )
    with pytest.raises(CheckpointError, match=message):
        load(learner.accelerator, learner.policy, learner.optimizer, run.checkpoint)


# ---- merge.py ----
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_merged_weights_are_the_base_plus_the_adapters_bit_for_bit(run, tmp_path, dtype, capsys):
    from transformers import AutoModelForImageTextToText

    out = merge(run.folder, tmp_path / "out", dtype)
    assert "verified: max |logit difference| = 0\n" in capsys.readouterr().out
    got = AutoModelForImageTextToText.from_pretrained(out, dtype="auto").state_dict()
    want = merged_by_hand(run.learner.policy, 6 / 4)
    assert got.keys() == want.keys()
    for name, weight in want.items():
        assert torch.equal(got[name], weight.to(getattr(torch, dtype))), name


def test_a_base_out_of_reach_or_of_other_weights_is_named(example, run, other_model, tmp_path):
    checkpoint = shutil.copytree(run.checkpoint, tmp_path / "checkpoint-3")
    record = json.loads((checkpoint / "trainer.json").read_text())
    record["adapters"]["base"] = str(tmp_path / "gone")
    (checkpoint / "trainer.json").write_text(json.dumps(record))
    seal(checkpoint)
    holds = f"checkpoint-3: holds adapters for {tmp_path / 'gone'}; "
    with pytest.raises(ValueError, match=f"{holds}.*gone is not to be had .*: name its folder by --base"):
        merge(checkpoint, tmp_path / "out")
    with pytest.raises(ValueError, match=rf"{holds}.*has other weights \(.*up_proj.weight and 0 more\)"):
        merge(checkpoint, tmp_path / "out", base=str(other_model))
    assert not (tmp_path / "out").exists()
    main([str(checkpoint), str(tmp_path / "out"), "--base", str(example.folder)])
    assert (tmp_path / "out" / "config.json").exists()


def test_damaged_and_missing_adapters_are_named(run, tmp_path):
    import torch.distributed.checkpoint as dcp

    weights = {n: p.clone() for n, p in run.learner.policy.state_dict().items() if ".lora_" in n}
    name = next(n for n in weights if "lora_B" in n)
    for changed, message in (
        (weights | {name: weights[name].flip(0)}, f"{name}: not the weights that were trained"),
        ({n: w for n, w in weights.items() if n != name}, rf"1 missing keys, among them \['{name}"),
        (
            {"base_model.model.x.lora_A.default.weight": weights[name]},
            "adapters in the form of an older version",
        ),
    ):
        checkpoint = shutil.copytree(run.checkpoint, tmp_path / "run" / "checkpoint-3")
        shutil.rmtree(checkpoint / "model")
        dcp.save(changed, checkpoint_id=checkpoint / "model", no_dist=True)
        with pytest.raises(ValueError, match=message):
            merge(seal(checkpoint), tmp_path / "out")
        shutil.rmtree(checkpoint)


# ---- config, end to end ----
@pytest.mark.parametrize("overrides", [{}, {"lora_rank": 4, "freeze_vision": True}])
def test_vision_adapters_need_adapters_and_a_tower_that_trains(overrides):
    with pytest.raises(ValueError, match="lora_vision: expected lora_rank above 0 and no freeze_vision"):
        GRPOConfig(lora_vision=True, **overrides)


@pytest.mark.slow
def test_the_sampler_holds_the_merged_policy_after_every_sync(tiny_data, tmp_path):
    """vLLM, float32: log-probs agree after updates that move them, and the KL is to the start."""
    small = dict(steps=4, val_every=0, prompts_per_step=4, group_size=4, updates_per_step=1, save_every=4)
    small |= dict(lora_rank=16, lora_vision=True, kl_coef=0.01, learning_rate=3e-4)
    small |= dict(tracker="none", samples_every=0, data=tiny_data, out=tmp_path)
    run_script("train_grpo.py", "configs/tiny.yaml", *settings(**small))
    lines = metrics(tmp_path)
    # What float32 agrees to in trainer and vLLM, as with all parameters (test_train_end_to_end.py).
    assert max(m["mismatch_max"] for m in lines) <= 1e-4
    # With one update a step the policy that sampled is the one that is trained: another reference is seen.
    assert lines[0]["kl"] == 0 and all(m["kl"] > 1e-3 for m in lines[2:])
    assert all(m["grad_norm"] > 0 and not m["skipped"] for m in lines)
    merge(tmp_path, tmp_path / "merged")
