"""Tables from files: whole sets of shards, broken lines, and paths that start at the file."""

import json
import os

import pytest
from datasets import Dataset

from tables import read_table, shards


@pytest.mark.parametrize("held, read", [
    (["train.parquet", "train_old.parquet", "training.parquet", "val.parquet"], ["train.parquet"]),
    (["train-00001-of-00002.parquet", "train-00000-of-00002.parquet", "train_old-00000-of-00001.parquet"],
     ["train-00000-of-00002.parquet", "train-00001-of-00002.parquet"]),
    (["train-old-00000-of-00001.parquet", "data/train-00000-of-00001-0123456789abcdef.parquet"],
     ["data/train-00000-of-00001-0123456789abcdef.parquet"]),
    ([f"train-{i}.parquet" for i in (10, 2)], ["train-2.parquet", "train-10.parquet"]),
    (["train-00000-of-00003.parquet", "train-00002-of-00003.parquet"], r"expected 3 shards .* missing \[1\]"),
    (["train-00001-of-00002.parquet"], r"expected 2 shards .* missing \[0\]"),
    (["train-00000-of-00001.parquet", "train-00000-of-00002.parquet"], "expected one set of files"),
    (["train.parquet", "train-00000-of-00001.parquet"], "expected one set of files"),
    (["training.parquet", "train.parquet.old"], r"expected train.parquet .* got \['train.parquet.old'"),
])  # fmt: skip
def test_a_split_is_all_of_its_shards_and_nothing_else(held, read, tmp_path):
    for name in held:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    if isinstance(read, list):
        assert [str(p.relative_to(tmp_path)) for p in shards(tmp_path, "train")] == read
        return
    with pytest.raises(ValueError, match=read):
        shards(tmp_path, "train")


def test_paths_start_at_the_folder_of_the_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "set" / "data").mkdir(parents=True)
    held = ["a.png", {"path": "a.png"}, {"bytes": None, "path": "a.png"}]
    (tmp_path / "set" / "rows.jsonl").write_text("".join(json.dumps({"images": v}) + "\n" for v in held))
    for row in read_table("set/rows.jsonl", "train", None, ["images"]):
        assert row["images"] == {"bytes": None, "path": "set/a.png"}
    Dataset.from_list([{"images": "a.png"}]).to_parquet("set/data/train.parquet")
    for source in ("set", "set/data", "set/data/train.parquet"):
        row = read_table(source, "train", None, ["images"])[0]
        assert os.path.normpath(row["images"]["path"]) == "set/data/a.png"


def test_json_rows_are_read_one_by_one(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text('{"a": 1}\n\n{"a": "text", "b": null}\n{"a":\n[1]')
    table = read_table(str(path), "train", None, [])
    assert (len(table), table.column_names, table[1]) == (4, ["a", "b"], {"a": "text", "b": None})
    for row, line in ((2, 4), (3, 5)):
        with pytest.raises(ValueError, match=f"x.jsonl, line {line}: expected"):
            table[row]
    (tmp_path / "x.json").write_text(json.dumps([{"a": 1}, 7], indent=1))
    table = read_table(str(tmp_path / "x.json"), "train", None, [])
    assert table[0] == {"a": 1}
    with pytest.raises(ValueError, match="x.json, record 1: expected a JSON object, got '7'"):
        table[1]


@pytest.mark.parametrize("name", ["x.jsonl", "x.json", "x.parquet", "x.tsv"])
def test_empty_files_and_pipes_are_named(name, tmp_path):
    (tmp_path / name).touch()
    with pytest.raises(ValueError, match=name):
        read_table(str(tmp_path / name), "train", None, [])
    os.mkfifo(tmp_path / f"pipe-{name}")
    with pytest.raises(ValueError, match="expected a regular file"):
        read_table(str(tmp_path / f"pipe-{name}"), "train", None, [])
