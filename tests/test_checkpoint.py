"""Checkpoints: what is kept, continued and refused. Shards: test_sharding.py; kills: end to end."""

import json
import math
import os
import pickle
import re
import subprocess

import pytest
import torch
from bounds import U64, rounding
from models import seal
from programs import limited, metrics, run_script, settings

from checkpoint import (
    SUMS,
    CheckpointError,
    checkpoints,
    files_of,
    fingerprint,
    refuse_another_run,
    resume,
    rotate,
    row_sums,
    save,
)
from train_grpo import FREE_TO_CHANGE, GRPOConfig


class Parts:
    """Just enough of a model and its processor to be saved: a linear layer and empty configs."""

    def __init__(self):
        from accelerate import Accelerator
        from transformers import GenerationConfig, PretrainedConfig

        torch.manual_seed(0)
        self.accelerator, self.model = Accelerator(cpu=True), torch.nn.Linear(3, 2)
        self.model.config = self.processor = PretrainedConfig()
        self.model.generation_config = GenerationConfig()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.1)

    def step(self):
        self.model(torch.ones(1, 3)).sum().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def save(self, out, step, **kwargs):
        save(
            self.accelerator,
            self.model,
            self.optimizer,
            self.processor,
            out,
            step,
            **({"scores": {}, "keep_last": 9} | kwargs),
        )

    def resume(self, out, how="auto", *steps):
        return resume(self.accelerator, self.model, self.optimizer, out, how, *steps)


def names(out):
    return [p.name for p in checkpoints(out)]


def test_continued_exactly(tmp_path):
    a, b = Parts(), Parts()
    a.step()
    a.save(tmp_path, 1)
    a.step()
    torch.nn.init.zeros_(b.model.weight)
    assert b.resume(tmp_path) == 1
    b.step()
    assert torch.equal(a.model.weight, b.model.weight) and torch.equal(a.model.bias, b.model.bias)


@pytest.mark.parametrize(
    "saved, steps, says",
    [
        (0, [2], ""),
        (2, [3], "continuing from OUT/checkpoint-2\n"),
        (2, [2], "OUT holds a run that is finished at step 2: choose another out\n"),
        (
            2,
            [1, " or more steps"],
            "OUT holds a run that is finished at step 2: choose another out or more steps\n",
        ),
    ],
)
def test_where_a_run_goes_on_is_said(saved, steps, says, tmp_path, capsys):
    parts = Parts()
    if saved:
        parts.save(tmp_path, saved)
    capsys.readouterr()
    assert parts.resume(tmp_path, "auto", *steps) == saved
    assert capsys.readouterr().out == says.replace("OUT", str(tmp_path))


def test_the_last_ones_and_the_best_are_kept(tmp_path):
    parts = Parts()
    for step, score in enumerate((0.1, 0.9, 0.3, None, 0.2), start=1):
        scores = {} if score is None else {"val_reward": score}
        parts.save(tmp_path, step, scores=scores, keep_last=2, best="val_reward")
    assert names(tmp_path) == ["checkpoint-2", "checkpoint-4", "checkpoint-5"]
    rotate(tmp_path, 1, None)
    assert names(tmp_path) == ["checkpoint-5"]


def test_half_a_checkpoint_is_not_one(tmp_path):
    parts = Parts()
    parts.save(tmp_path, 3)
    for left in ("checkpoint-4.tmp", "checkpoint-2.old"):
        (tmp_path / left).mkdir()
    assert names(tmp_path) == ["checkpoint-3"] and parts.resume(tmp_path) == 3
    parts.save(tmp_path, 3)  # once more
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint-3"]


def test_metrics_of_lost_steps_are_cut_off(tmp_path):
    parts, metrics = Parts(), tmp_path / "metrics.jsonl"
    lines = [json.dumps({"step": i}) + "\n" for i in range(6)]
    parts.save(tmp_path, 3)
    metrics.write_text("".join(lines) + '{"step": 6, "re')
    assert parts.resume(tmp_path) == 3
    assert metrics.read_text() == "".join(lines[:4])
    assert parts.resume(tmp_path, "never") == 0 and metrics.read_text() == ""


# ---- damaged, tampered with, full of links -----------------------------------------------------------------
class Evil:
    """Makes a folder where it is unpickled."""

    def __init__(self, folder):
        self.folder = str(folder)

    def __reduce__(self):
        return os.mkdir, (self.folder,)


@pytest.fixture
def broken(tmp_path):
    """A checkpoint to damage, of a model that can read it."""
    parts = Parts()
    parts.step()
    parts.save(tmp_path / "run", 1, scores={"val_reward": 0.5})
    return tmp_path / "run" / "checkpoint-1"


def refusal(checkpoint) -> str:
    """The one line that a damaged checkpoint is refused with, after its folder's name."""
    with pytest.raises(CheckpointError) as error:
        Parts().resume(checkpoint.parent)
    assert "\n" not in str(error.value) and len(str(error.value)) < 400
    return str(error.value).removeprefix(f"{checkpoint}").removeprefix("/")


def flip(file):
    data = bytearray(file.read_bytes())
    data[-20] ^= 1
    file.write_bytes(data)


@pytest.mark.parametrize("name", [
    "model/__0_0.distcp", "model/.metadata", "optimizer/__0_0.distcp", "optimizer/.metadata", "rng-0.json",
    "trainer.json", "hf/config.json", "b2sums.txt",
])  # fmt: skip
def test_a_flipped_bit_a_lost_file_and_a_link_are_named(broken, tmp_path, name):
    file = broken / name
    whole = file.read_bytes()
    flip(file)
    changed = "trainer.json" if name == SUMS else name  # the hash of the last file differs, or the file
    assert refusal(broken) == f"{changed}: not as it was written, by its hash in b2sums.txt"
    file.unlink()
    assert refusal(broken).startswith(f"{name}: {'expected the hashes' if name == SUMS else 'missing'}")
    (tmp_path / "same").write_bytes(whole)
    file.symlink_to(tmp_path / "same")
    assert refusal(broken) == f"{name}: expected no symbolic link, got one to {tmp_path}/same"


def make_folder_a_link(checkpoint):
    (checkpoint / "model").rename(checkpoint.parent / "elsewhere")
    (checkpoint / "model").symlink_to("../elsewhere")


def make_checkpoint_a_link(checkpoint):
    checkpoint.rename(checkpoint.with_name("elsewhere"))
    checkpoint.symlink_to("elsewhere")


def set_record(**changes):
    def change(checkpoint):
        file = checkpoint / "trainer.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))
        seal(checkpoint)

    return change


def put(name, data):
    def change(checkpoint):
        (checkpoint / name).write_bytes(data)
        seal(checkpoint)

    return change


def cut(checkpoint):
    file = checkpoint / "model" / "__0_0.distcp"
    file.write_bytes(file.read_bytes()[:100])
    seal(checkpoint)


def other_weights(checkpoint):
    import torch.distributed.checkpoint as dcp

    weights = {"weight": torch.ones(2, 3), "bias": torch.tensor([1.0, float("nan")])}
    dcp.save(weights, checkpoint_id=checkpoint / "model", no_dist=True)
    seal(checkpoint)


def places_elsewhere(checkpoint):
    file = checkpoint / "model" / ".metadata"
    index = pickle.loads(file.read_bytes())
    for place in index.storage_data.values():
        place.relative_path = "../optimizer/__0_0.distcp"
    put("model/.metadata", pickle.dumps(index))(checkpoint)


SUM, HUGE = [1.0, 1.0, 1.0], b"[" * 100_000


@pytest.mark.parametrize("damage, message", [
    (make_folder_a_link, "model: expected no symbolic link, got one to ../elsewhere"),
    (make_checkpoint_a_link, ": expected no symbolic link, got one to elsewhere"),
    (lambda c: os.mkfifo(c / "hf" / "pipe"), "hf/pipe: expected a file or a folder, got a pipe"),
    (lambda c: (c / "hf" / "tokenizer.json").write_text("{}"), "hf/tokenizer.json: not a file of this"),
    (lambda c: (c / SUMS).write_text(""), "b2sums.txt: expected the hashes of all files, got 0"),
    (lambda c: (c / SUMS).write_bytes(bytes(range(256))), "b2sums.txt: expected the hashes of all files"),
    (put("trainer.json", b"{}"), "trainer.json: expected a checkpoint's record"),
    (put("trainer.json", b"[1]"), "trainer.json: expected a checkpoint's record"),
    (put("trainer.json", HUGE), "trainer.json: expected a checkpoint's record"),
    (put("trainer.json", b"\xff"), "trainer.json: expected a checkpoint's record"),
    (set_record(step="1"), "trainer.json: .*step '1'"),
    (set_record(scores=None), "trainer.json: .*scores None"),
    (set_record(fingerprint={"weight": SUM, "bias": [1.0, math.nan, 1.0]}), "trainer.json: .*bias.*nan"),
    (set_record(fingerprint={"weight": SUM, "bias": [1.0, math.inf, 1.0]}), "trainer.json: .*bias.*inf"),
    (set_record(fingerprint={"weight": "sum"}), "trainer.json: .*weights of weight: expected finite sums"),
    (set_record(fingerprint={"weight": SUM, "bias": SUM}), "model: not the weights that were trained: w"),
    (set_record(adapters={"rank": 4}), "trainer.json: .*base_fingerprint"),
    (other_weights, "model: not the weights that were trained: weight and 1 more"),
    (put("rng-0.json", b"{}"), "rng-0.json: expected random states"),
    (put("rng-0.json", b'{"python": [3, [1], null]}'), "rng-0.json: expected random states"),
    (put("rng-0.json", HUGE), "rng-0.json: expected random states"),
    (put("model/.metadata", b"\x80"), "model/.metadata: expected the index of a checkpoint"),
    (put("model/.metadata", pickle.dumps({"a": 1})), "model/.metadata: expected the index .*a dict"),
    (put("optimizer/.metadata", b""), "optimizer/.metadata: expected the index of a checkpoint"),
    (places_elsewhere, r"model/.metadata: .*a place in \.\./optimizer/__0_0.distcp"),
    (cut, "model: expected this model's state"),
])  # fmt: skip
def test_damage_is_named(broken, damage, message):
    damage(broken)
    assert re.match(message, refusal(broken)), refusal(broken)


def test_no_pickle_of_a_stranger_is_executed(broken, tmp_path):
    import torch.distributed.checkpoint as dcp

    for part in ("model", "optimizer"):
        file, trap = broken / part / ".metadata", tmp_path / f"trap-{part}"
        before = file.read_bytes()
        index = pickle.loads(before)
        index.planner_data = Evil(trap)
        put(f"{part}/.metadata", pickle.dumps(index))(broken)
        assert refusal(broken).startswith(f"{part}/.metadata: expected the index") and not trap.exists()
        assert "posix.mkdir, which has no place in one" in refusal(broken)
        dcp.FileSystemReader(broken / part).read_metadata()  # torch's own runs it
        assert trap.exists()
        put(f"{part}/.metadata", before)(broken)
    parts, trap = Parts(), tmp_path / "trap"  # a learning rate that is a class
    parts.step()
    parts.optimizer.param_groups[0]["lr"] = Evil(trap)
    parts.save(tmp_path / "other", 1)
    line = refusal(tmp_path / "other" / "checkpoint-1")
    assert line.startswith("optimizer: expected this model's state, got ")
    assert line.endswith("a class for param_groups.0.lr, which is not run")
    assert not trap.exists()


def test_a_checkpoint_of_an_older_version_continues_and_its_random_states_are_not_read(
    broken, tmp_path, capsys
):
    (broken / SUMS).unlink()
    (broken / "rng-0.json").unlink()
    (broken / "rng-0.pt").write_bytes(pickle.dumps(Evil(tmp_path / "trap")))
    assert Parts().resume(broken.parent) == 1
    assert "has random states as a pickle, of an older version" in capsys.readouterr().out
    assert not (tmp_path / "trap").exists()
    other_weights(broken)
    (broken / SUMS).unlink()
    assert refusal(broken).startswith("model: not the weights that were trained")


def test_hashes_are_those_of_b2sum(broken):
    assert subprocess.run(["b2sum", "-c", "--quiet", SUMS], cwd=broken).returncode == 0
    listed = {line.split("  ")[1] for line in (broken / SUMS).read_text().splitlines()}
    assert listed == {n for n in files_of(broken) if n != SUMS} and "hf/config.json" in listed


def test_nothing_is_deleted_or_written_through_a_link(tmp_path):
    parts, out, precious = Parts(), tmp_path / "run", tmp_path / "precious"
    out.mkdir()
    (precious / "model").mkdir(parents=True)
    (precious / "model" / "mine").write_text("keep")
    for name in ("checkpoint-1", "checkpoint-2.old", "checkpoint-2.tmp", "checkpoint-3"):
        (out / name).symlink_to(precious)
    for step in (2, 3, 4):  # removes leftovers, replaces the link of its own step, drops old ones
        parts.save(out, step, keep_last=1)
    assert (precious / "model" / "mine").read_text() == "keep" and len(list(precious.rglob("*"))) == 2
    assert sorted(p.name for p in out.iterdir()) == ["checkpoint-1", "checkpoint-4"]
    (out / "checkpoint-4" / "model" / "link").symlink_to(precious)
    parts.save(out, 5, keep_last=1)
    assert (precious / "model" / "mine").exists() and names(out) == ["checkpoint-1", "checkpoint-5"]


def test_weights_that_are_not_finite_do_not_displace_those_that_are(broken):
    parts = Parts()
    with torch.no_grad():
        parts.model.bias[1] = float("nan")
    with pytest.raises(
        CheckpointError, match=r"checkpoint-2 could not .*weights of bias.*checkpoint-1 is whole"
    ):
        parts.save(broken.parent, 2, keep_last=1)
    assert [p.name for p in broken.parent.iterdir()] == ["checkpoint-1"]
    assert Parts().resume(broken.parent) == 1


def test_a_full_disk_is_named_at_any_file(broken):
    sizes = {name: (broken / name).stat().st_size for name in files_of(broken)}
    for limit in sorted({0, *sizes.values()})[:-1]:
        with limited(limit), pytest.raises(CheckpointError, match="disk full .*checkpoint-1 is whole"):
            Parts().save(broken.parent, 2)
        assert [p.name for p in broken.parent.iterdir()] == ["checkpoint-1"]


def test_other_mistakes(tmp_path):
    with pytest.raises(CheckpointError, match="resume=elsewhere: expected auto, never or a checkpoint"):
        Parts().resume(tmp_path / "new", "elsewhere")
    Parts().save(tmp_path, 1)
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\nnull\n')
    with pytest.raises(CheckpointError, match="metrics.jsonl: expected a line of JSON a step"):
        Parts().resume(tmp_path)
    (tmp_path / "run.json").write_text("[")
    with pytest.raises(CheckpointError, match="run.json: expected the record of a run"):
        refuse_another_run(GRPOConfig(), tmp_path, FREE_TO_CHANGE)


def test_fingerprint_by_hand():
    # rows 4 and 5: sum 1 - 2 + 3 + 4 = 6, magnitudes 3 and 7, 4 * 3 + 5 * 7 = 47
    assert row_sums(torch.tensor([[1.0, -2.0], [3.0, 4.0]]), first=4).tolist() == [6, 10, 47]
    assert row_sums(torch.zeros(0, 5)).tolist() == [0, 0, 0]  # a process may hold no row of a small parameter
    parts = Parts()
    sums = fingerprint(parts.accelerator, parts.model)
    assert sums.keys() == {"weight", "bias"}
    total = parts.model.bias.double().sum().item()
    assert sums["bias"][0] == pytest.approx(total, abs=rounding(2, u=U64))
    swapped = Parts()
    with torch.no_grad():
        swapped.model.weight.copy_(swapped.model.weight.flip(0))
    assert fingerprint(parts.accelerator, swapped.model)["weight"] != sums["weight"]


def test_another_config_is_refused_by_its_keys(tmp_path):
    cfg = GRPOConfig(out=str(tmp_path))
    (tmp_path / "run.json").write_text(json.dumps({"config": cfg.model_dump(mode="json")}))
    changed = GRPOConfig(out="elsewhere", learning_rate=2e-6, clip_low=0.1, save_every=7)
    refuse_another_run(changed, tmp_path, FREE_TO_CHANGE)  # nothing to continue yet
    Parts().save(tmp_path, 1)
    refuse_another_run(GRPOConfig(out="elsewhere", save_every=7), tmp_path, FREE_TO_CHANGE)
    with pytest.raises(CheckpointError, match="another config") as error:
        refuse_another_run(changed, tmp_path, FREE_TO_CHANGE)
    assert str(error.value).splitlines()[1:] == [
        "  learning_rate: 1e-06 there, 2e-06 here",
        "  clip_low: 0.2 there, 0.1 here",
    ]
    with pytest.raises(CheckpointError, match="holds a run already"):
        refuse_another_run(GRPOConfig(resume="never"), tmp_path, FREE_TO_CHANGE)
    with pytest.raises(CheckpointError, match="holds a run already"):  # somebody else's
        refuse_another_run(GRPOConfig(resume="elsewhere/checkpoint-1"), tmp_path, FREE_TO_CHANGE)
    assert FREE_TO_CHANGE <= set(GRPOConfig.model_fields)


def test_a_run_from_elsewhere_continues_itself(tmp_path):
    """resume=PATH starts from PATH once; the same command again goes on from its own last checkpoint."""
    parts, start, out = Parts(), tmp_path / "start", tmp_path / "out"
    parts.save(start, 2)
    path = str(start / "checkpoint-2")
    refuse_another_run(GRPOConfig(resume=path), out, FREE_TO_CHANGE)
    assert parts.resume(out, path) == 2
    parts.save(out, 3)
    (out / "run.json").write_text(json.dumps({"config": GRPOConfig(resume=path).model_dump(mode="json")}))
    refuse_another_run(GRPOConfig(resume=path), out, FREE_TO_CHANGE)
    assert parts.resume(out, path) == 3


@pytest.mark.slow
def test_a_continued_run_needs_no_more_memory_than_a_fresh_one(tiny_base, tiny_data, tmp_path):
    """Peaks of real processes, of a model whose weights, gradients and moments are nearly all they hold."""
    from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

    config = AutoConfig.from_pretrained(tiny_base)
    wide = dict(hidden_size=960, num_attention_heads=30, intermediate_size=4096)  # 60M parameters
    for name, value in wide.items():
        setattr(config.text_config, name, value)
    config.vision_config.out_hidden_size = config.text_config.hidden_size
    model = AutoModelForImageTextToText.from_config(config, dtype=torch.float32)
    weights_gb = sum(p.numel() for p in model.parameters()) * 4 / 2**30
    model.save_pretrained(tmp_path / "model")
    AutoProcessor.from_pretrained(tiny_base).save_pretrained(tmp_path / "model")
    del model

    def peak_gb(out, **overrides):
        small = dict(model=tmp_path / "model", data=tiny_data, out=out, sampler="hf", val_every=0)
        small |= dict(prompts_per_step=2, group_size=2, updates_per_step=1, max_completion_length=8)
        small |= dict(tracker="none", samples_every=0, save_every=9)
        run_script("train_grpo.py", "configs/tiny.yaml", *settings(**small | overrides))
        return metrics(out, timings=True)[-1]["mem_gb"]  # before the last checkpoint is written

    fresh = peak_gb(tmp_path / "fresh", steps=1)
    continued = peak_gb(tmp_path / "continued", steps=2, resume=tmp_path / "fresh" / "checkpoint-1")
    # Both hold weights, gradients and two moments in an update, the continued one already when it loads:
    # zero gradients make the moments, and are gone when files are read, one tensor (6 % of the weights) at a
    # time. There is room for no copy of the moments: beside what is loaded it would be 5 x weights_gb.
    assert weights_gb > 0.2 and fresh > 4 * weights_gb
    assert continued - fresh < weights_gb / 2
