"""merge.py: names, casts, refusals, and that the copy computes what the trainer's weights compute."""

import json
import os
import pickle
import shutil
import signal
from types import SimpleNamespace

import pytest
import torch
from models import seal
from programs import limited
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from merge import SHARDS, digest, find_checkpoint, main, merge, verify

WEIGHTS = "model.safetensors"
EMBED, NORM = "model.language_model.embed_tokens.weight", "model.language_model.norm.weight"


def save_checkpoint(base, folder):
    """A checkpoint of an untrained model, written by the trainer's own function."""
    from accelerate import Accelerator
    from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

    from checkpoint import save

    config = AutoConfig.from_pretrained(base)
    torch.manual_seed(7)
    model = AutoModelForImageTextToText.from_config(config, dtype=torch.float32)
    model.generation_config.eos_token_id = 5
    (folder.parent / "config.yaml").write_text("learning_rate: 1.0e-06\n")
    optimizer = torch.optim.AdamW(model.parameters())
    save(
        Accelerator(cpu=True),
        model,
        optimizer,
        AutoProcessor.from_pretrained(base),
        folder.parent,
        int(folder.name.split("-")[1]),
        {"val_reward": 0.5123, "n": None},
        keep_last=1,
    )
    return model


@pytest.fixture(scope="module")
def run(tiny_base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    return SimpleNamespace(folder=folder, checkpoint=folder / "checkpoint-7",
                           model=save_checkpoint(tiny_base, folder / "checkpoint-7"))  # fmt: skip


@pytest.fixture
def broken(run, tmp_path):
    """A copy of the checkpoint to damage."""
    return shutil.copytree(run.checkpoint, tmp_path / "checkpoint-7")


def names_and_dtypes(folder):
    with safe_open(folder / WEIGHTS, "pt") as file:
        return {key: file.get_tensor(key).dtype for key in file.keys()}  # noqa: SIM118


def test_default_output_is_beside_the_checkpoint_and_verified(run, capsys):
    out = merge(run.folder)  # the run's folder stands for its last checkpoint
    assert out == run.folder / "checkpoint-7-merged"
    assert "verified: max |logit difference| = 0\n" in capsys.readouterr().out
    assert set(names_and_dtypes(out).values()) == {torch.bfloat16}
    config = json.loads((out / "config.json").read_text())
    assert config["dtype"] == "bfloat16"
    assert json.loads((out / "generation_config.json").read_text())["eos_token_id"] == 5
    for name in ("chat_template.jinja", "tokenizer.json", "processor_config.json"):
        assert (out / name).read_bytes() == (run.checkpoint / "hf" / name).read_bytes()
    card = (out / "README.md").read_text()
    assert "after step 7" in card and "| val_reward | 0.5123 |" in card and "learning_rate: 1.0e-06" in card
    assert find_checkpoint(run.folder) == run.checkpoint  # the export is not taken for a checkpoint
    assert [p.name for p in run.folder.iterdir() if p.name.startswith(".")] == []


# As the Hub has them: in the first two the language model stands at the top, in the last below a name.
PUBLISHED = {
    "qwen2_vl": ("model.", "visual.", "merger.mlp.0.weight", "Qwen2-VL"),
    "qwen2_5_vl": ("model.", "visual.", "merger.mlp.0.weight", "Qwen2.5-VL"),
    "qwen3_vl": ("model.language_model.", "model.visual.", "deepstack_merger_list.1.norm.weight", "Qwen3-VL"),
}


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("model_type", PUBLISHED)
def test_float32_export_has_the_published_names_and_the_very_weights(family, tmp_path, model_type, tied):
    from transformers import AutoModelForImageTextToText

    text, tower, of_its_own, title = PUBLISHED[model_type]
    model = save_checkpoint(family(model_type, tied), tmp_path / "checkpoint-1")
    out = merge(tmp_path / "checkpoint-1", tmp_path / "out", "float32", max_shard_size="5GB")
    names = names_and_dtypes(out)
    assert set(names.values()) == {torch.float32}
    parts = "embed_tokens.weight", "norm.weight", "layers.0.self_attn.q_proj.weight"
    assert {text + part for part in parts} <= names.keys()
    parts = "patch_embed.proj.weight", "blocks.0.attn.qkv.weight", of_its_own
    assert {tower + part for part in parts} <= names.keys()
    rest = {name for name in names if not name.startswith((text, tower))}
    assert rest == (set() if tied else {"lm_head.weight"})
    starts = {name.split(".")[1] for name in names if name.startswith("model.")}
    nested = {"language_model", "visual"}
    assert starts == nested if model_type == "qwen3_vl" else not starts & nested
    assert (out / "README.md").read_text().count(f"{title} weights in float32") == 1
    copy = AutoModelForImageTextToText.from_pretrained(out, dtype=torch.float32)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), copy.parameters(), strict=True))
    assert (copy.lm_head.weight is copy.model.language_model.embed_tokens.weight) == tied


def test_small_shards_load_too(run, tmp_path):
    out = merge(run.checkpoint, tmp_path / "out", max_shard_size="2MB")
    assert len(list(out.glob("model-*.safetensors"))) >= 3
    assert (out / "model.safetensors.index.json").exists()


# ---- killed, on a full disk, tampered with ----
@pytest.mark.parametrize("moment", ["shutil.copy2", "verify", "config.os.replace"])
def test_a_killed_merge_succeeds_when_started_again(run, tmp_path, moment, monkeypatch):
    """A process of its own, killed where it calls a function: afterwards nothing temporary is left."""
    out = tmp_path / "out"
    if (child := os.fork()) == 0:
        torch.set_num_threads(1)  # a fork has no other threads to wait for
        monkeypatch.setattr(f"merge.{moment}" if "." not in moment else moment,
                            lambda *_: os.kill(os.getpid(), signal.SIGKILL))  # fmt: skip
        try:
            merge(run.checkpoint, out)
        finally:
            os._exit(0)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    assert [p.name for p in tmp_path.iterdir()] == [f".out.{child}"]
    (tmp_path / f".out.{os.getppid()}").mkdir()  # of one that is still at work
    written = [merge(run.checkpoint, out).stat().st_mtime_ns for _ in range(2)]  # killed behind its rename
    assert sorted(p.name for p in tmp_path.iterdir()) == [f".out.{os.getppid()}", "out"]
    assert written[0] == written[1]
    with pytest.raises(ValueError, match="expected a new or empty folder"):
        merge(run.checkpoint, out, dtype="float32")


@pytest.mark.parametrize("limit", [0, 2_000, 100_000])
def test_a_full_disk_leaves_nothing_of_a_merge(run, tmp_path, limit):
    with limited(limit), pytest.raises(SystemExit) as end:
        main([str(run.checkpoint), str(tmp_path / "out")])
    assert str(end.value) == (
        f"error: disk full (File too large): {tmp_path}/out was not written; nothing is left of it"
    )
    assert [*tmp_path.iterdir()] == []


def test_a_stranger_s_checkpoint_runs_nothing(broken, tmp_path):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "trap"),)

    file = broken / SHARDS / ".metadata"
    index = pickle.loads(file.read_bytes())
    index.state_dict_metadata[NORM] = 1
    for content, why in (
        (Evil(), "posix.mkdir"),
        ([1, Evil()], "posix.mkdir"),
        (index, "no attribute 'size'"),
    ):
        file.write_bytes(pickle.dumps(content))
        with pytest.raises(ValueError, match=rf"model/\.metadata: expected the index .*{why}"):
            merge(seal(broken), tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint-7"]


@pytest.mark.parametrize("name", ["model/__0_0.distcp", "model/.metadata", "trainer.json", "hf/config.json",
                                  "hf/tokenizer.json"])  # fmt: skip
def test_a_flipped_bit_and_a_link_are_named(broken, tmp_path, name):
    file = broken / name
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    with pytest.raises(ValueError, match=f"{broken}/{name}: not as it was written, by its hash"):
        merge(broken, tmp_path / "out")
    file.rename(tmp_path / "file")
    file.symlink_to(tmp_path / "file")
    with pytest.raises(ValueError, match=f"{broken}/{name}: expected no symbolic link, got one to "):
        merge(broken, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_checkpoint_without_its_optimizer_can_be_merged(broken, tmp_path):
    shutil.rmtree(broken / "optimizer")
    assert (merge(broken, tmp_path / "out") / WEIGHTS).exists()


def test_refuses_to_overwrite(run, tmp_path):
    (tmp_path / "mine.txt").write_text("keep")
    with pytest.raises(ValueError, match="expected a new or empty folder"):
        merge(run.checkpoint, tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["mine.txt"]


def test_truncated_and_missing_files_are_named(broken, tmp_path):
    (file,) = (broken / SHARDS).glob("*.distcp")
    data = file.read_bytes()
    file.write_bytes(data[: len(data) // 2])
    with pytest.raises(ValueError, match=r"model/__0_0\.distcp: truncated: .* ends at byte \d+, got \d+"):
        merge(seal(broken), tmp_path / "out")
    file.unlink()
    with pytest.raises(ValueError, match=r"model/__0_0\.distcp: missing; it holds .*weight"):
        merge(seal(broken), tmp_path / "out")
    (broken / SHARDS / ".metadata").write_bytes(b"\x80")
    with pytest.raises(ValueError, match=r"model/\.metadata: expected the index"):
        merge(seal(broken), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("damage, message", [
    (lambda w: w.pop(NORM), rf"1 missing keys, among them \['{NORM}"),
    (lambda w: w.update(extra=torch.zeros(2)), r"1 unexpected keys, among them \['extra'\]"),
    (lambda w: w.update({NORM: torch.zeros(3)}), rf"{NORM}: expected shape \(192,\), got \(3,\)"),
    (lambda w: w.update({"lm_head.weight": w[EMBED] + 1}), "tied in config.json but differ"),
    (lambda w: w.update({NORM: w[NORM].flip(0) + 0.001}), f"{NORM}: not the weights that were trained"),
    (lambda w: w.update({EMBED: w[EMBED].flip(0), "lm_head.weight": w[EMBED].flip(0)}), "not the weights"),
])  # fmt: skip
def test_wrong_weights_are_named(run, broken, tmp_path, damage, message):
    import torch.distributed.checkpoint as dcp

    weights = {name: tensor.clone() for name, tensor in run.model.state_dict().items()}
    damage(weights)
    shutil.rmtree(broken / SHARDS)
    dcp.save(weights, checkpoint_id=broken / SHARDS, no_dist=True)
    with pytest.raises(ValueError, match=message) as error:
        merge(seal(broken), tmp_path / "out")
    assert str(broken / SHARDS) in str(error.value)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint-7"]


def test_a_changed_weight_in_the_copy_is_found(run, tmp_path):
    out = merge(run.checkpoint, tmp_path / "out", "float32")
    expected = digest(run.model.eval(), out)
    assert verify(expected, out, torch.float32) == 0
    weights = load_file(out / WEIGHTS)
    weights["visual.merger.ln_q.weight"][0] += 1e-6
    save_file(weights, out / WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(ValueError, match="1 weights are not the checkpoint's"):
        verify(expected, out, torch.float32)


def test_a_push_that_fails_says_so_and_keeps_the_folder(run, tmp_path, monkeypatch):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")  # nobody listens there
    with pytest.raises(SystemExit, match="error: .*is whole, but was not pushed to owner/tiny"):
        main([str(run.checkpoint), str(tmp_path / "out"), "--push_to_hub", "owner/tiny"])
    assert (tmp_path / "out" / WEIGHTS).exists()


def test_other_mistakes(run, tmp_path, capsys):
    with pytest.raises(ValueError, match=r"dtype: expected one of .*, got 'int8'"):
        merge(run.checkpoint, tmp_path / "out", "int8")
    with pytest.raises(ValueError, match="expected model/ or checkpoint-N folders"):
        merge(tmp_path)
    (tmp_path / SHARDS).mkdir()
    with pytest.raises(ValueError, match=r"b2sums.txt: expected the hashes of all files"):
        merge(tmp_path, tmp_path / "out")
    with pytest.raises(SystemExit, match="error: .*no such folder"):
        main([str(tmp_path / "nowhere")])
