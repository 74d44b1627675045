"""dry_run.py: its figures against parameter counts, torch's memory tracker and sums by hand; its advice."""

import os
import shutil
import subprocess
import sys
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from programs import run_script, settings

from dry_run import (
    CARDS,
    CONTEXT,
    GIB,
    USABLE,
    Cards,
    Row,
    advice,
    backward_bytes,
    checkpoint_bytes,
    dry_run,
    find_cards,
    host_bytes,
    lacking_here,
    largest_row,
    logit_rows,
    memory_table,
    misfits,
    phases,
    published_config,
    read_gpus,
    remedies,
    sizes,
    step_seconds,
    vllm_needs,
)
from train_grpo import GRPOConfig

REPO = Path(__file__).parents[1]
H100 = int(79.2 * GIB)
FOUR = Cards(4, 4, H100, ("H100",))


@cache
def qwen(name: str):
    return sizes(published_config(f"Qwen2.5-VL-{name}"))


def shipped(name: str, *overrides):
    return GRPOConfig.load([str(REPO / "configs" / f"{name}.yaml"), *overrides])


def total(parts: dict) -> float:
    return sum(parts.values()) / GIB


# ---- counts ----
def test_published_configs_have_the_published_number_of_parameters():
    assert qwen("3B").parameters == 3_754_622_976 and qwen("7B").parameters == 8_292_166_656
    assert qwen("3B").tied and not qwen("7B").tied
    for m in (qwen("3B"), qwen("7B")):
        text = m.layers * m.layer + m.tail + m.embedding * (not m.tied)
        assert text + m.vision == m.parameters
    assert published_config("some/other-2B") is None


@pytest.mark.parametrize("name, parameters, tied", [
    ("Qwen2-VL-2B", 2_208_985_600, True), ("Qwen2-VL-7B", 8_291_375_616, False),
    ("Qwen3-VL-2B", 2_127_532_032, True), ("Qwen3-VL-4B", 4_437_815_808, True),
    ("Qwen3-VL-8B", 8_767_123_696, False),
])  # fmt: skip
def test_other_families_have_the_published_number_of_parameters(name, parameters, tied):
    m = sizes(published_config(f"Qwen/{name}-Instruct"))
    assert (m.parameters, m.tied) == (parameters, tied)


def test_widths_of_qwen3_by_hand():
    """32 heads of 128 on a hidden width of 2560; 8 of keys; cells of 32 x 32; a tower of 1024 and 4096."""
    m = sizes(published_config("Qwen3-VL-4B"))
    assert (m.query, m.kv, m.normed, m.cell) == (4096, 1024, 5120, 1024)
    assert (m.vision_hidden, m.vision_intermediate, m.patch) == (1024, 4096, 3 * 2 * 16**2)
    m = sizes(published_config("Qwen2-VL-7B"))
    assert (m.query, m.kv, m.normed, m.cell, m.vision_hidden, m.vision_intermediate) == (
        3584, 512, 0, 784, 1280, 5120,
    )  # fmt: skip


def test_adapters_are_counted_on_every_linear_layer():
    m, d, i = qwen("7B"), 3584, 18944
    assert m.per_rank == 28 * (2 * (d + d) + 2 * (d + 512) + 3 * (d + i))


def test_the_tiny_models_own_config_is_read(tiny_start):
    from transformers import AutoConfig, AutoModelForImageTextToText

    m, model = (
        sizes(AutoConfig.from_pretrained(tiny_start)),
        AutoModelForImageTextToText.from_pretrained(tiny_start),
    )
    assert m.parameters == sum(p.numel() for p in model.parameters())


# ---- against torch's tracker ----
@pytest.mark.slow
@pytest.mark.parametrize(
    "asked",
    [
        "models=7B tokens=4096 logit_chunk=4096 layers=1",  # the head decides
        "models=3B,7B,Qwen3-VL-4B tokens=16384 logit_chunk=1024 layers=2",  # a layer's backward pass does
    ],
)
def test_the_trainers_memory_is_what_torch_counts(asked):
    """Within 15 % at full widths; benchmarks/memory.py has all layers.

    A fake process group needs a process of its own.
    """
    command = [sys.executable, "benchmarks/memory.py", *asked.split()]
    out = subprocess.run(command, cwd=REPO, capture_output=True, text=True, check=True).stdout
    ratios = [float(line.split(":")[1]) for line in out.splitlines() if "dry_run / tracker" in line]
    assert len(ratios) == asked.count("B") and ratios == pytest.approx([1] * len(ratios), abs=0.15), out


def test_memory_grows_with_depth_as_the_tracker_has_it():
    """A further layer: its shard and gradient, and the input that is kept for recomputation."""
    m, row, cfg = qwen("7B"), Row(16384, 12800, 0), GRPOConfig()
    deeper = replace(m, layers=m.layers + 1)
    more = sum(backward_bytes(cfg, deeper, row, 256, 4).values()) - sum(
        backward_bytes(cfg, m, row, 256, 4).values()
    )
    assert more == 16384 * 3584 * 2


# ---- phases ----
def test_phases_of_7b_by_hand():
    """8.29e9 parameters on four cards: 7.72 GiB a float32 shard; vLLM takes half of 79.2."""
    cfg, m, shard = shipped("7b"), qwen("7B"), qwen("7B").parameters / GIB
    table = {name: total(parts) for name, parts in phases(cfg, m, 4, H100).items()}
    fixed = shard + CONTEXT / GIB  # fp32 weights and the bf16 reference: 4 / 4 and 2 / 4 bytes a parameter
    assert table["resume"] == pytest.approx(fixed + 3 * shard + shard / 2)
    tail = 2 * m.tail / GIB
    assert table["rollout"] == pytest.approx(fixed + 2 * shard + shard / 2 + tail + 39.6, abs=1e-6)
    assert table["optimizer step"] == pytest.approx(fixed + 3 * shard + shard / 2 + tail)
    assert table["save"] - table["rollout"] == pytest.approx(16 * 2**24 / GIB)  # sums, a part at a time
    assert table["update"] > table["optimizer step"] and table["load"] < table["resume"]


def test_an_engine_that_does_not_sleep_stays_in_the_update():
    awake, asleep = (phases(shipped("7b", f"sleep_level={k}"), qwen("7B"), 4, H100)["update"] for k in (0, 1))
    assert total(awake) - total(asleep) == pytest.approx(39.6)


def test_without_kl_no_reference_and_frozen_vision_no_moments():
    m = qwen("3B")
    plain, no_kl, frozen = (
        phases(shipped("3b", *more), m, 4, H100)["optimizer step"]
        for more in ([], ["kl_coef=0"], ["freeze_vision=true"])
    )
    assert total(plain) - total(no_kl) == pytest.approx((2 * m.parameters / 4 + 2 * m.tail) / GIB)
    assert total(plain) - total(frozen) == pytest.approx(12 * m.vision / 4 / GIB)


def test_lora_holds_bf16_weights_and_the_adapters_state_only():
    cfg, m = shipped("3b", "lora_rank=16"), qwen("3B")
    parts = phases(cfg, m, 1, H100)["optimizer step"]
    adapters = 16 * m.per_rank
    assert parts["weights"] == 2 * m.parameters + 4 * adapters
    assert parts["gradients"] == 4 * adapters and parts["Adam"] == 8 * adapters and "reference" not in parts
    assert checkpoint_bytes(cfg, m) == 12 * adapters


def test_recomputation_and_the_micro_batch_are_what_the_update_pays_for():
    m = qwen("7B")
    row = largest_row(shipped("7b"), m)
    kept, again = (
        sum(backward_bytes(shipped("7b", f"gradient_checkpointing={x}"), m, row, 256, 4).values())
        for x in ("false", "true")
    )
    assert kept > 5 * again
    small, large = (
        total(phases(shipped("7b", f"max_tokens_per_micro_batch={n}"), m, 4, H100)["update"])
        for n in (16384, 32768)
    )
    assert small < large < 2 * small


def test_the_largest_row_holds_the_largest_image_and_no_cut_sequence():
    row = largest_row(shipped("7b", "max_tokens_per_micro_batch=4096"), qwen("7B"))
    prompt = 2048**2 // 28**2 + 400
    assert row == Row(prompt + 2048, 2048, 4 * (2048**2 // 28**2))


def test_open_logit_chunks_take_a_thirty_second_of_the_memory():
    m = qwen("7B")
    chunk = logit_rows(GRPOConfig.model_construct(logit_chunk=None), m, H100)
    assert chunk == 2048  # 2.3 GiB of the 2.475 that there are; 4096 would take 4.6
    assert 8 * m.vocabulary * chunk <= H100 / 32 < 16 * m.vocabulary * chunk


# ---- what fits ----
@pytest.mark.parametrize("name", ["7b", "3b", "7b_vanilla", "3b_vanilla", "qwen3vl_4b"])
def test_the_shipped_configs_fit_four_cards_of_80_gb(name):
    cfg = shipped(name)
    assert not misfits(cfg, sizes(published_config(cfg.model)), FOUR)
    assert cfg.vllm_max_seqs == cfg.prompts_per_step * cfg.group_size // 4


@pytest.mark.parametrize("world, gb", [(1, 80), (1, 24), (2, 40)])
@pytest.mark.parametrize("name", ["3b", "7b"])
def test_advice_fits_when_it_is_pasted(name, world, gb):
    m, (world, memory) = qwen(name.upper()), read_gpus(f"{world}x{gb}GB")
    cards = Cards(world, world, memory, ())
    assert misfits(shipped(name), m, cards)
    found = remedies(shipped(name), m, cards)
    for overrides in found:
        pasted = shipped(name, *(f"{key}={value}" for key, value in overrides.items()))
        assert not misfits(pasted, m, cards)
    said, wrong = advice(shipped(name), m, cards)
    assert wrong and all(f"{k}={v}" in said for o in found for k, v in o.items())
    assert bool(found) == ((name, world, gb) != ("7b", 1, 24))  # its bf16 weights alone take 15.4 GiB, twice


def test_one_card_of_80_gb_trains_all_of_3b_with_named_overrides():
    cards = Cards(1, 1, H100, ())
    found = remedies(shipped("3b"), qwen("3B"), cards)
    assert {"vllm_memory", "max_tokens_per_micro_batch"} in [set(o) for o in found]
    assert {"lora_rank": 16} in found


def test_an_engine_too_small_for_its_weights_is_named():
    (line,) = misfits(shipped("7b", "vllm_memory=0.2"), qwen("7B"), FOUR)
    fixed, per_token = vllm_needs(shipped("7b"), qwen("7B"), H100)
    assert per_token == 2 * 2 * 28 * 512  # keys and values, bf16
    assert f"{(fixed + 8192 * per_token) / GIB:.1f} GiB" in line and "vllm_memory" in line


def test_the_table_marks_the_phase_that_decides():
    cfg, m = shipped("7b"), qwen("7B")
    sums = {name: total(parts) for name, parts in phases(cfg, m, 4, H100).items()}
    (marked,) = [line for line in memory_table(cfg, m, FOUR).splitlines() if line.startswith("*")]
    top = max(sums, key=sums.get)
    assert top in marked and f"{sums[top]:.1f}" in marked and sums[top] < USABLE * 79.2


# ---- host, disk, time ----
def test_host_memory_and_checkpoints_by_hand():
    cfg, m = shipped("7b"), qwen("7B")
    host = {name: size / GIB for name, size in host_bytes(cfg, m, FOUR).items()}
    n = m.parameters / GIB
    assert host == pytest.approx(
        {
            "processes": 16,
            "one whole model while loading": 4 * n,
            "images at most": 32,
            "sleeping engines": 8 * n,
        }
    )
    assert checkpoint_bytes(cfg, m) / 1e9 == pytest.approx(99.5, abs=0.05)


def test_hours_are_of_the_order_of_a_model_made_by_hand():
    """7B on H100: 2.23M tokens of 2 x 7.07e9 operations on 4 x 0.4 x 989e12 a second are 20 s a forward pass.

    Four of them, head and vision tower on top, make the update; the two passes for log-probs half of it.
    """
    seconds = step_seconds(shipped("7b"), qwen("7B"), FOUR, *CARDS["H100"][1:])
    tokens = 512 * (480 + 400 + 8 * 450)  # images of 640 x 480 are below min_pixels: 334 tokens, at 512 x 512
    body = 4 * 2 * tokens * 6.53e9 / (4 * 0.4 * 989e12)
    assert body < seconds["update"] < 1.25 * body
    assert seconds["log-probs"] == pytest.approx(seconds["update"] / 2)
    once = step_seconds(shipped("7b", "updates_per_step=1"), qwen("7B"), FOUR, *CARDS["H100"][1:])
    assert once["log-probs"] == pytest.approx(seconds["log-probs"] / 2)


# ---- the command ----
@pytest.mark.parametrize("text", ["4*80GB", "0x80GB", "4x80", "x80GB", "4x80GBs", "8xX", "xH100"])
def test_cards_that_cannot_be_read_are_one_line(text):
    with pytest.raises(ValueError, match=r"gpus: expected cards x memory, as 4x80GB, or .*got '") as caught:
        GRPOConfig(gpus=text)
    assert "\n" not in str(caught.value.errors()[0]["msg"])


def test_a_card_is_also_known_by_its_name():
    assert read_gpus("8xH100") == read_gpus("8x80GB") and read_gpus("1xRTX 4090") == read_gpus("1x24GB")


def test_the_cards_of_this_machine_are_read(monkeypatch):
    """The smallest memory counts; a launcher says how many processes there are, and how many of them here."""
    memories = [SimpleNamespace(total_memory=k * GIB) for k in (79, 78)]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda i: memories[i])
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda i: "NVIDIA A100-SXM4-80GB")
    for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    assert find_cards(shipped("3b")) == Cards(2, 2, 78 * GIB, ("A100",))
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert find_cards(shipped("3b")) == Cards(4, 2, 78 * GIB, ("A100",))
    assert find_cards(shipped("3b", "gpus=16x24GB")) == Cards(16, 8, int(23.76 * GIB), ("RTX 4090", "A10"))


def test_too_little_host_memory_and_disk_are_missing(monkeypatch, tmp_path):
    cfg, usage = shipped("7b", f"out={tmp_path}/none/yet"), SimpleNamespace(free=10 * 10**9)
    monkeypatch.setattr(os, "sysconf", lambda name: 2**12 if name == "SC_PAGE_SIZE" else 2**23)  # 32 GiB
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage)
    host, disk = lacking_here(cfg, qwen("7B"), FOUR)
    assert host == "host memory: 32 GiB of 141" and disk == f"disk: 10 GB free at {tmp_path}, of 398"


def test_dry_run_says_what_is_missing_without_network_or_gpu():
    asked = "train_grpo.py", "configs/7b.yaml", "dry_run=true"
    done = run_script(*asked, status=1, HF_HUB_OFFLINE="1", CUDA_VISIBLE_DEVICES="")
    assert "Traceback" not in done.stderr
    assert "512 prompts x 8 = 4096 sequences a step, 4 updates of 1024, 75 steps" in done.stdout
    assert "missing: data: OX-PIXL/STVQA-7K" in done.stdout
    assert "missing: model: Qwen/Qwen2.5-VL-7B-Instruct" in done.stdout
    assert "missing: GPU" in done.stdout and "8.29B parameters" in done.stdout


def test_dry_run_for_cards_elsewhere(tiny_data, tmp_path, capsys):
    """All of it but the model is here, or need not be."""
    asked = f"model={tmp_path}/Qwen2.5-VL-7B-Instruct", f"data={tiny_data}", "gpus=4x80GB"
    assert dry_run(shipped("7b", *asked)) == 1
    out = capsys.readouterr().out
    (missing,) = [line for line in out.splitlines() if line.startswith("missing: ")]
    assert missing.startswith("missing: model: ") and "every phase fits" in out
    assert "4 process(es)" in out and "time on H100" in out and "computed, not measured" in out
    assert "note: " not in out
    asked = f"model={tmp_path}/Qwen3-VL-4B", f"data={tiny_data}", "gpus=4x80GB", "box_frame=pixel"
    assert dry_run(shipped("qwen3vl_4b", *asked)) == 1
    assert "note: Qwen3-VL was made with box_frame=per_mille, here it is pixel" in capsys.readouterr().out


def test_dry_run_of_the_tiny_config_finds_everything(tiny_data, tmp_path):
    asked = "train_grpo.py", "configs/tiny.yaml", "dry_run=true"
    done = run_script(*asked, *settings(data=tiny_data, out=tmp_path / "x"))
    assert "nothing is missing" in done.stdout and not (tmp_path / "x").exists()
