"""merge.py: names, casts, refusals, and that the copy computes what the trainer's weights compute."""

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from merge import SHARDS, WEIGHTS, find_checkpoint, main, merge, verify

EMBED, NORM = "model.language_model.embed_tokens.weight", "model.language_model.norm.weight"


def save_checkpoint(base, folder, tied=True):
    """A checkpoint as the trainer writes it: accelerate's save_state beside hf/ and trainer.json."""
    from accelerate import Accelerator
    from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

    config = AutoConfig.from_pretrained(base)
    config.tie_word_embeddings = config.text_config.tie_word_embeddings = tied
    torch.manual_seed(7)
    model = AutoModelForImageTextToText.from_config(config, dtype=torch.float32)
    accelerator = Accelerator(cpu=True)
    accelerator.prepare(model)
    accelerator.save_state(str(folder))
    config.save_pretrained(folder / "hf")
    model.generation_config.eos_token_id = 5
    model.generation_config.save_pretrained(folder / "hf")
    AutoProcessor.from_pretrained(base).save_pretrained(folder / "hf")
    (folder / "trainer.json").write_text(json.dumps({"step": 7, "scores": {"val_reward": 0.5123, "n": None}}))
    (folder.parent / "config.yaml").write_text("learning_rate: 1.0e-06\n")
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


@pytest.mark.parametrize("tied", [True, False])
def test_float32_export_has_the_published_names_and_the_very_weights(tiny_base, tmp_path, tied):
    from transformers import AutoModelForImageTextToText

    model = save_checkpoint(tiny_base, tmp_path / "checkpoint-1", tied)
    out = merge(tmp_path / "checkpoint-1", tmp_path / "out", "float32", max_shard_size="5GB")
    names = names_and_dtypes(out)
    assert set(names.values()) == {torch.float32}
    assert {"model.embed_tokens.weight", "model.norm.weight", "model.layers.0.self_attn.q_proj.weight",
            "visual.patch_embed.proj.weight", "visual.blocks.0.attn.qkv.weight",
            "visual.merger.mlp.0.weight"} <= names.keys()  # fmt: skip
    assert {name.split(".")[0] for name in names} == {"model", "visual"} | (set() if tied else {"lm_head"})
    assert not any(name.startswith(("model.language_model.", "model.visual.")) for name in names)
    copy = AutoModelForImageTextToText.from_pretrained(out, dtype=torch.float32)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), copy.parameters(), strict=True))
    assert (copy.lm_head.weight is copy.model.language_model.embed_tokens.weight) == tied


def test_small_shards_load_too(run, tmp_path):
    out = merge(run.checkpoint, tmp_path / "out", max_shard_size="2MB")
    assert len(list(out.glob("model-*.safetensors"))) >= 3
    assert (out / "model.safetensors.index.json").exists()


def test_sharded_checkpoint_gives_the_same_export(run, tmp_path):
    import torch.distributed.checkpoint as dcp

    sharded = tmp_path / "checkpoint-7"
    shutil.copytree(run.checkpoint / "hf", sharded / "hf")
    dcp.save({"model": run.model.state_dict()}, checkpoint_id=sharded / SHARDS, no_dist=True)
    ours = load_file(merge(sharded, tmp_path / "out", "float32") / WEIGHTS)
    theirs = load_file(merge(run.checkpoint, tmp_path / "single", "float32") / WEIGHTS)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_refuses_to_overwrite(run, tmp_path):
    (tmp_path / "mine.txt").write_text("keep")
    with pytest.raises(ValueError, match="expected a new or empty folder"):
        merge(run.checkpoint, tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["mine.txt"]


def test_truncated_file_is_named(broken, tmp_path):
    data = (broken / WEIGHTS).read_bytes()
    (broken / WEIGHTS).write_bytes(data[: len(data) // 2])
    with pytest.raises(ValueError, match=r"checkpoint-7/model\.safetensors: expected a whole"):
        merge(broken, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda w: w.pop(NORM), rf"1 missing keys, among them \['{NORM}"),
        (lambda w: w.update(extra=torch.zeros(2)), r"1 unexpected keys, among them \['extra'\]"),
        (lambda w: w.update({NORM: torch.zeros(3)}), rf"{NORM}: expected shape \(192,\), got \(3,\)"),
        (lambda w: w.update({"lm_head.weight": w[EMBED] + 1}), "tied in config.json but differ"),
    ],
)
def test_wrong_weights_are_named(broken, tmp_path, damage, message):
    weights = load_file(broken / WEIGHTS)
    damage(weights)
    save_file(weights, broken / WEIGHTS)
    with pytest.raises(ValueError, match=message) as error:
        merge(broken, tmp_path / "out")
    assert str(broken / WEIGHTS) in str(error.value)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint-7"]


def test_a_changed_weight_in_the_copy_is_found(run, tmp_path):
    out = merge(run.checkpoint, tmp_path / "out", "float32")
    weights = load_file(out / WEIGHTS)
    weights["visual.merger.ln_q.weight"][0] += 1e-6
    save_file(weights, out / WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(ValueError, match="1 weights are not the checkpoint's"):
        verify(run.model.eval(), out)


def test_other_mistakes(run, tmp_path, capsys):
    with pytest.raises(ValueError, match=r"dtype: expected one of .*, got 'int8'"):
        merge(run.checkpoint, tmp_path / "out", "int8")
    with pytest.raises(ValueError, match="expected model.safetensors, pytorch_model_fsdp_0/ or checkpoint-N"):
        merge(tmp_path)
    (tmp_path / WEIGHTS).touch()
    with pytest.raises(ValueError, match=r"expected hf/config\.json"):
        merge(tmp_path, tmp_path / "out")
    with pytest.raises(SystemExit, match="error: .*no such folder"):
        main([str(tmp_path / "nowhere")])
