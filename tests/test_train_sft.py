"""The supervised trainer: schedule and loss against plain ones; real runs, killed, resumed and merged."""

import math
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from bounds import U64, gradient_bound, logp_bound, rounding
from models import load_plain, plain_logits
from programs import REPO, metrics, run_script, settings, start_script, wait_until

import synthesize
import train_sft
from config import DataConfig
from data import PromptEncoder, load_samples
from merge import merge
from packing import pack, use_packed_attention
from train_grpo import GRPOConfig
from train_sft import SFTConfig, build_model, completion_loss_sum, parameter_groups, schedule, train

pytestmark = pytest.mark.slow
LONGEST = 200  # tokens of a sequence, at most


@pytest.fixture(scope="module")
def warm(tmp_path_factory):
    """What `make warm-start` leaves, in small: the data and the run."""
    folder = tmp_path_factory.mktemp("warm")
    sizes = "n_careful=48 n_mixed=32 n_train=8 n_val=8".split()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["synthesize.py", f"out={folder / 'data'}", "worked=true", *sizes])
        synthesize.main()
    run_script(*command(folder))
    return folder


def paths(warm):
    """The paths of the config, below `warm`."""
    config = SFTConfig.load([str(REPO / "configs" / "tiny_sft.yaml")])
    return {
        key: getattr(config, key).replace("runs/warm", str(warm))
        for key in ("model", "data", "val_data", "out")
    }


def command(warm, **overrides):
    """12 updates of 8 on the worked examples, from the untrained model."""
    small = dict(epochs=1.2, batch_size=8, log_every=1, val_every=6, save_every=2)
    return ["train_sft.py", "configs/tiny_sft.yaml", *settings(**paths(warm) | small | overrides)]


def load(folder, dtype=torch.float32):
    from transformers import AutoModelForImageTextToText

    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=dtype)
    use_packed_attention(model)
    return model


def worked_sequences(folder, parquet, n):
    """The first n rows as the trainer packs them: prompt, completion, end of turn."""
    from transformers import AutoProcessor

    processor = AutoProcessor.from_pretrained(folder)
    encoder, tokenizer = PromptEncoder(processor, "spatial_thinker", 784, 802816), processor.tokenizer
    end = tokenizer.eos_token_id
    assert end == tokenizer.convert_tokens_to_ids("<|im_end|>")  # where the chat template ends a turn
    samples = load_samples(str(parquet), need_scene=False)[:n]
    return [(encoder(s), [*tokenizer(s.completion)["input_ids"], end]) for s in samples]


def packed(sequences, model):
    return pack([(prompt, [ids]) for prompt, ids in sequences], model)


# ---- schedule ----
def test_learning_rate_by_hand():
    # 10 updates, 2 of warm-up: 1/2, 2/2, then (1 + cos(pi * k / 8)) / 2 for k = 0..7
    got = [schedule(step, 10, warmup=0.2) for step in range(10)]
    assert got[:3] == [0.5, 1, 1]
    assert got[6] == pytest.approx(0.5, rel=rounding(3, u=U64), abs=0)  # k = 4: cos(pi / 2) = 0
    assert got[9] == pytest.approx(0.0380602, abs=1e-7)  # seven digits; k = 7: cos(7 pi / 8) = -0.9238795
    assert got[1:] == sorted(got[1:], reverse=True)
    assert schedule(10, 10, warmup=0.2) == pytest.approx(0, abs=rounding(3, u=U64))


def test_learning_rate_without_warm_up_and_of_a_single_update():
    assert schedule(0, 4, warmup=0) == 1
    assert schedule(0, 1, warmup=0.9) == 1  # all of it is warm-up


def peaks(model, cfg):
    """{parameter: its peak learning rate} and the set of decayed parameters."""
    names = {p: name for name, p in model.named_parameters()}
    groups = parameter_groups(model, cfg)
    return (
        {names[p]: g["peak"] for g in groups for p in g["params"]},
        {names[p] for g in groups if g["weight_decay"] for p in g["params"]},
    )


@pytest.mark.parametrize("vision, towers", [(None, {0.5}), (0.125, {0.125}), (0, set())])
def test_the_vision_tower_may_have_a_learning_rate_of_its_own(warm, vision, towers):
    cfg = SFTConfig(
        model=str(warm / "data" / "base_model"),
        lora_rank=0,
        learning_rate=0.5,
        vision_learning_rate=vision,
        weight_decay=0.1,
    )
    model = build_model(cfg)
    peak, decayed = peaks(model, cfg)
    assert {rate for name, rate in peak.items() if ".visual." in name} == towers
    assert {rate for name, rate in peak.items() if ".visual." not in name} == {0.5}
    assert set(peak) == {name for name, p in model.named_parameters() if towers or ".visual." not in name}
    assert decayed == {name for name, p in model.named_parameters() if name in peak and p.ndim > 1}


@pytest.mark.parametrize("vision, towers", [(None, {True, False}), (0, {False})])
def test_adapters_follow_the_learning_rate_of_the_vision_tower(warm, vision, towers):
    cfg = SFTConfig(model=str(warm / "data" / "base_model"), lora_rank=2, vision_learning_rate=vision)
    trained = {name for name, p in build_model(cfg).named_parameters() if p.requires_grad}
    assert {".visual." in name for name in trained} == towers and all(".lora_" in name for name in trained)


# ---- loss ----
@pytest.fixture(scope="module")
def tiny(warm):
    base = warm / "data" / "base_model"
    return load(base), worked_sequences(base, warm / "data" / "worked.parquet", 51)[45:]  # both stages


def plain_loss(model, sequence):
    """One sequence, an ordinary forward: (summed cross entropy of the completion, tokens predicted right)."""
    prompt, completion_ids = sequence
    with torch.no_grad():
        logits, labels = plain_logits(model, prompt, completion_ids), torch.tensor(completion_ids)
    return F.cross_entropy(logits, labels, reduction="sum").item(), int((logits.argmax(-1) == labels).sum())


def test_packed_loss_equals_plain_cross_entropy(tiny, warm):
    model, sequences = tiny
    eager = load_plain(warm / "data" / "base_model")
    want = np.sum([plain_loss(eager, s) for s in sequences], axis=0)
    with torch.no_grad():
        loss, right = completion_loss_sum(model, packed(sequences, model))
    n = sum(len(ids) for _, ids in sequences)
    assert loss.item() / n == pytest.approx(want[0] / n, abs=logp_bound(model.config, LONGEST))
    assert abs(int(right) - want[1]) <= 1  # a tie of two logits may fall either way
    # Untrained logits have a standard deviation below 1, which adds less than half of its square.
    uniform = math.log(model.config.text_config.vocab_size)
    assert loss.item() / n == pytest.approx(uniform, abs=0.5)


def test_loss_and_gradient_do_not_depend_on_packing(tiny):
    model, sequences = tiny
    losses, gradients = [], []
    for groups in ([[0, 1, 2, 3, 4, 5]], [[5], [0, 2, 3], [1, 4]]):
        model.zero_grad()
        losses.append(0)
        for group in groups:
            batch = packed([sequences[i] for i in group], model)
            loss, _ = completion_loss_sum(model, batch)
            loss.backward()
            losses[-1] += loss.item()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    n = sum(len(ids) for _, ids in sequences)
    assert losses[0] / n == pytest.approx(losses[1] / n, abs=logp_bound(model.config, LONGEST))
    assert gradients[0].norm() > 0
    gap = (gradients[0] - gradients[1]).norm() / gradients[0].norm()
    assert gap < gradient_bound(model.config, LONGEST)


def test_only_completion_tokens_get_a_loss(tiny):
    """What flows back into the head is softmax - one-hot of the completions, nothing of other tokens."""
    model, sequences = tiny
    seen = []
    hook = model.lm_head.register_forward_hook(lambda module, inputs, output: seen.append(output))
    loss, _ = completion_loss_sum(model, packed(sequences, model))
    hook.remove()
    (gradient,) = torch.autograd.grad(loss, seen[0])  # (1, C, V)
    labels = torch.tensor([i for _, ids in sequences for i in ids])
    want = seen[0][0].detach().softmax(-1) - F.one_hot(labels, seen[0].shape[-1])
    np.testing.assert_allclose(gradient[0], want, atol=rounding(want.shape[-1]), rtol=0)  # softmax's sum


# ---- runs ----
def test_the_loss_falls_and_final_is_the_trained_model(warm):
    out = Path(paths(warm)["out"])
    lines = metrics(out)
    assert [m["step"] for m in lines] == list(range(1, 13))
    assert [m["step"] for m in lines if "val_loss" in m] == [6, 12]
    assert np.mean([m["loss"] for m in lines[-4:]]) < lines[0]["loss"] - 1
    assert all(m["grad_norm"] > 0 for m in lines)
    assert (out / "config.yaml").exists() and (out / "run.json").exists()
    assert [p.name for p in out.glob("checkpoint-*")] == ["checkpoint-12"]

    model = load(out / "final")
    sequences = worked_sequences(out / "final", warm / "data" / "worked_val.parquet", 8)
    with torch.no_grad():
        loss, right = completion_loss_sum(model, packed(sequences, model))
    n = sum(len(ids) for _, ids in sequences)
    # On disk in bf16: every weight is off by up to 2^-9, a logit by about as much, and so is the loss (1 % is
    # five times that); of some 500 tokens those change sides whose two best logits lie so close.
    assert loss.item() / n == pytest.approx(lines[-1]["val_loss"], rel=0.01)
    assert right.item() / n == pytest.approx(lines[-1]["val_token_accuracy"], abs=0.02)


def test_a_killed_run_continues_as_if_nothing_had_happened(warm, tmp_path):
    out = tmp_path / "killed"
    arguments = command(warm, out=out)
    process = start_script(*arguments)
    # the second checkpoint stands, and an update after it will be lost
    wait_until(lambda: len(metrics(out)) >= 5, process, every=0.002)
    process.kill()
    process.wait(60)
    assert 5 <= len(metrics(out)) < 12 and not (out / "final").exists()
    run_script(*arguments)
    undisturbed = Path(paths(warm)["out"])
    assert metrics(out) == metrics(undisturbed)
    want, got = (load(folder / "final").state_dict() for folder in (undisturbed, out))
    assert all(torch.equal(want[k], got[k]) for k in want)
    reader = pytest.importorskip("tensorboard.backend.event_processing.plugin_event_accumulator")
    events = reader.EventAccumulator(str(out / "sft"), {"tensors": 0}).Reload()
    assert [e.step for e in events.Tensors("loss")] == list(range(1, 13))


def test_it_takes_the_data_keys_and_trackers_of_train_grpo():
    ours, theirs, shared = (c.model_fields for c in (SFTConfig, GRPOConfig, DataConfig))
    assert {"val_data", "columns", "skip_bad_rows", "max_prompt_length", "tracker"} < set(shared)
    for key, field in shared.items():
        assert ours[key].default == theirs[key].default == field.default, key
    assert SFTConfig(target="scene_answer").need_scene and not SFTConfig(target="answer").need_scene


@pytest.mark.parametrize("blank", [None, "", " \n"])
def test_a_row_without_a_target_is_refused_at_load(warm, tmp_path, blank, monkeypatch):
    from datasets import load_dataset

    data = load_dataset("parquet", data_files=paths(warm)["data"], split="train").select(range(6))
    row_id = data["image_id"][4]
    texts = [blank if i == 4 else text for i, text in enumerate(data["completion"])]
    data.remove_columns("completion").add_column("completion", texts).to_parquet(tmp_path / "train.parquet")
    settings = paths(warm) | {"data": str(tmp_path / "train.parquet"), "out": str(tmp_path / "run")}
    settings |= dict(target="completion", template="spatial_thinker", min_pixels=784, val_every=0)
    monkeypatch.setattr(train_sft, "build_model", lambda cfg: pytest.fail("the model is built"))
    with pytest.raises(SystemExit, match=rf"row {row_id}.*#4.*column completion: expected text to imitate"):
        train(SFTConfig(**settings))
    assert SFTConfig(**settings).template == "spatial_thinker"


def test_the_makefile_makes_the_warm_start_with_the_config(warm):
    makefile = (REPO / "Makefile").read_text()
    recipe = re.search(r"^warm-start:.*\n((?:\t.*\n)+)", makefile, flags=re.M)[1]
    assert "synthesize.py out=runs/warm/data worked=true" in recipe
    assert "synthesize.py source=measured worked=true out=runs/measured/data" in recipe
    measured = "configs/measured_sft.yaml model=runs/warm/sft/final"
    assert re.findall(r"train_sft.py (.*)", recipe) == ["configs/tiny_sft.yaml", measured]
    config = SFTConfig.load([str(REPO / "configs" / "tiny_sft.yaml")])
    for path in (config.model, config.data, config.val_data):  # what the first command has written
        assert Path(path.replace("runs/warm", str(warm))).exists()
    config = SFTConfig.load([str(REPO / "configs" / "measured_sft.yaml")])
    assert (config.data, config.val_data) == tuple(
        f"runs/measured/data/{n}.parquet" for n in ("worked", "worked_val")
    )


def test_lora_trains_linear_layers_only_and_is_merged(warm, tmp_path):
    out = tmp_path / "lora"
    small = dict(lora_rank=4, target="answer", template="no_reasoning", epochs=0.2, weight_decay=0)
    run_script(*command(warm, out=out, learning_rate=1e-2, gradient_checkpointing="true", **small))
    assert [m["step"] for m in metrics(out)] == [1, 2]
    start, end = load(warm / "data" / "base_model", torch.bfloat16), load(out / "final", torch.bfloat16)
    linear = {
        f"{name}.weight"
        for name, module in start.named_modules()
        if isinstance(module, torch.nn.Linear) and name != "lm_head"
    }
    before, after = start.state_dict(), end.state_dict()
    assert set(before) == set(after)
    assert {name for name in before if not torch.equal(before[name], after[name])} == linear
    # merge.py makes the same of the last checkpoint, which holds the adapters alone.
    merged = load(merge(out, tmp_path / "merged"), torch.bfloat16).state_dict()
    assert all(torch.equal(merged[name], after[name]) for name in after)
    (shard,) = (out / "checkpoint-2" / "model").glob("*.distcp")
    assert shard.stat().st_size < (out / "final" / "model.safetensors").stat().st_size / 5
