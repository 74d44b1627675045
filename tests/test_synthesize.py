"""The data pipeline as users run it: stages, kills, bad input, what the set holds."""

import json
import shutil
import subprocess
import sys
from collections import Counter

import graph_files
import pyarrow.parquet as pq
import pytest
from models_behind import Model
from programs import REPO, run_script, settings
from servers import KEY, openai_answer, serve, text_of

import synthesize
import tiny
from data import load_samples
from rewards import parse_ground_truth
from scenes import clean
from stvqa import COLUMNS
from tiny import draw_graphs

STAGES = ("graphs.jsonl", "plan.jsonl", "questions.jsonl", "selected.jsonl")
SET = ("train.parquet", "val.parquet", "README.md", "report.html")


def make(out, **keys):
    """synthesize.py in this process. Returns: the set's items. Raises: SystemExit."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["synthesize.py", *settings(out=out, **keys)])
        synthesize.main()
    return items_of(out)


def items_of(out):
    return [json.loads(line) for line in open(out / "selected.jsonl")]


def content(out, names=(*STAGES, *SET)):
    return {name: (out / name).read_bytes() for name in names}


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    out = tmp_path_factory.mktemp("drawn")
    run_script("synthesize.py", *settings(out=out, n_train=200, n_val=40))
    return out


# ---- the set ----
def test_the_measured_set_is_written_at_once(tmp_path, capsys):
    sizes = {"n_train": 12, "n_val": 6, "worked": "true", "source": "measured"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiny, "MEASURED_WORKED", {"worked_val": 3, "worked": 9})
        patch.setattr(sys, "argv", ["synthesize.py", *settings(out=tmp_path, **sizes)])
        synthesize.main()
    said = {"val": 6, "train": 12, "worked_val": 3, "worked": 9}
    scenes = [
        r["images"]["bytes"] for name in said for r in pq.read_table(tmp_path / f"{name}.parquet").to_pylist()
    ]
    assert len(set(scenes)) == len(scenes) == 30
    assert "wrote 6 val, 12 train, 3 worked_val, 9 worked" in capsys.readouterr().out
    samples = load_samples(str(tmp_path / "train.parquet"))
    assert len(samples) == 12 and samples[0].completion.startswith("<observe>")


def test_the_set_has_stvqas_columns_and_can_be_trained_on(drawn):
    for split, n in (("train", 200), ("val", 40)):
        samples = load_samples(str(drawn), split=split)
        assert len(samples) == n
        for sample in samples:
            assert parse_ground_truth(sample.ground_truth)[0] and sample.size == (84, 84)
    row = samples.table[0]
    assert list(row)[: len(COLUMNS)] == list(COLUMNS)
    assert set(row) == {*COLUMNS, *synthesize.PROVENANCE}
    assert row["source"] == "drawn" and row["writer"] == "rules" and row["fact"]


def test_quotas_letters_and_splits(drawn):
    items = items_of(drawn)
    train = [item for item in items if item["split"] == "train"]
    rest = ("size", "instance_location", "distance", "count", "existence")
    assert Counter(item["category"] for item in train) == {"relation": 100} | dict.fromkeys(rest, 20)
    for n in (2, 3, 4):
        letters = [item["letter"] for item in train if len(item["options"]) == n]
        counts = [letters.count(letter) for letter in "ABCD"[:n]]
        assert max(counts) - min(counts) <= 1
    assert not {i["image_group"] for i in train} & {i["image_group"] for i in items if i["split"] == "val"}


def test_gold_scenes_number_each_label_from_one_and_lie_inside(drawn):
    for item in items_of(drawn):
        numbers = {}
        for o in item["objects"]:
            stem, number = o["id"].rsplit(".", 1)
            numbers[stem] = numbers.get(stem, 0) + 1
            assert stem == o["label"].replace(" ", "_") and int(number) == numbers[stem]
            x1, y1, x2, y2 = o["box"]
            assert 0 <= x1 < x2 <= item["width"] and 0 <= y1 < y2 <= item["height"]


def test_the_card_says_what_is_in_it(drawn):
    card = (drawn / "README.md").read_text()
    for line in (
        "- questions: 240",
        "- writer: rules",
        "| relation | 100 | 20 | 120 |",
        "| reach | 0 | 0 | 15 |",  # drawn scenes have none, and the others share its part
        "licence of 240 pictures: CC0-1.0",
    ):
        assert line in card, line


# ---- going on ----
def test_killed_at_many_moments_it_makes_the_same_bytes(drawn, tmp_path):
    keys = settings(out=tmp_path, n_train=200, n_val=40)
    command = [sys.executable, "tests/kill_often.py", "20", "1", *keys]
    done = subprocess.run(command, cwd=REPO, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) >= 5  # it may be faster than it is killed
    assert content(tmp_path) == content(drawn)


@pytest.mark.parametrize("name", STAGES)
@pytest.mark.parametrize("cut", [1, 100])
def test_a_torn_line_is_written_again(drawn, tmp_path, name, cut):
    shutil.copytree(drawn, tmp_path / "out")
    whole = (tmp_path / "out" / name).read_bytes()
    (tmp_path / "out" / name).write_bytes(whole[:-cut])
    make(tmp_path / "out")  # with the settings of the folder
    assert content(tmp_path / "out") == content(drawn)


def test_other_settings_in_the_same_folder_are_refused_and_lose_nothing(drawn):
    before = content(drawn, (*STAGES, *SET, "config.yaml"))
    with pytest.raises(SystemExit, match="was begun with seed=0, now 1"):
        make(drawn, seed=1)
    assert content(drawn, (*STAGES, *SET, "config.yaml")) == before


def test_one_run_at_a_time_in_a_folder(drawn):
    with synthesize.alone(drawn), pytest.raises(SystemExit, match="another run is at work"):
        make(drawn)


def test_the_page_alone_can_be_made_again(drawn, tmp_path):
    shutil.copytree(drawn, tmp_path / "out")
    (tmp_path / "out" / "report.html").unlink()
    make(tmp_path / "out", report="true")
    assert content(tmp_path / "out") == content(drawn)


# ---- with models ----
@pytest.fixture(scope="module")
def asked(tmp_path_factory):
    """A set that models wrote and judged, behind a server that misbehaves: folder, keys, server."""
    graphs = [clean(raw)[0] for raw in draw_graphs(40, seed=0)]
    model = Model(graphs, trouble=("429", "503", "none"))
    with pytest.MonkeyPatch.context() as patch, serve(model.respond) as (url, api):
        patch.setenv("OPENAI_API_KEY", KEY)
        keys = {"limit": 40, "n_train": 12, "n_val": 4, "base_url": f"{url}/v1", "prices": "[1, 2]"}
        keys |= dict.fromkeys(("writer", "blind", "validator"), "openai:m")
        out = tmp_path_factory.mktemp("asked")
        make(out, **keys)
        yield out, keys, api


def records(out, name):
    return [r for r in map(json.loads, open(out / f"{name}.jsonl")) if "key" in r]


def test_only_what_the_votes_allow_is_in_the_set(asked):
    out, _, _ = asked
    items = items_of(out)
    assert 3 <= len(items) <= 16
    for item in items:
        states = [vote["state"] for vote in sorted(item["votes"], key=lambda v: v["vote"])]
        states = [state for state in states if state in ("right", "wrong")]
        assert states.count("right") == 2 and states.count("wrong") <= 1
        blind = [vote["state"] for vote in item["blind"]]
        assert "wrong" in blind or blind.count("right") < 3  # too few could be read: not decided, so it stays
        assert item["writer"] == "openai:m" and item["form"].endswith("/written")
    assert "cost" in (out / "README.md").read_text()


def test_every_reply_is_paid_for_once(asked):
    out, _, api = asked
    seen = [(name, r["key"], r.get("attempt", r.get("vote"))) for name in ("questions", "blind", "votes")
            for r in records(out, name)]  # fmt: skip
    assert len(seen) == len(set(seen))
    before = len(api.bodies)
    make(out)
    assert len(api.bodies) == before  # nothing is asked again


def test_killed_at_many_moments_models_make_the_same_set(asked, tmp_path):
    out, keys, _ = asked
    command = [sys.executable, "tests/kill_often.py", "20", "2", *settings(out=tmp_path, **keys)]
    done = subprocess.run(command, cwd=REPO, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) == 20
    assert content(tmp_path, ("selected.jsonl", *SET)) == content(out, ("selected.jsonl", *SET))


def test_a_spent_budget_ends_it_and_a_larger_one_goes_on(asked, tmp_path):
    out, keys, api = asked
    with pytest.raises(SystemExit, match="budget: .* spent"):
        make(tmp_path, **keys, budget=0.01)
    paid = len(records(tmp_path, "questions"))
    assert paid
    make(tmp_path, budget=100)
    assert content(tmp_path, ("selected.jsonl", *SET)) == content(out, ("selected.jsonl", *SET))


def test_without_a_key_it_ends_with_one_line(tmp_path, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with pytest.raises(SystemExit, match="OPENAI_API_KEY is not set"):
        make(tmp_path, n_train=4, n_val=1, writer="openai:gpt-4o")


# ---- what people say ----
def test_dropped_items_go_and_others_are_kept(drawn, tmp_path, capsys):
    out = tmp_path / "out"
    shutil.copytree(drawn, out)
    keys = [item["key"] for item in items_of(drawn)]
    (out / "review.csv").write_text(
        f"key,decision,note\n{keys[3]},drop,blurred\n{keys[4]},keep,\nnone,drop,\n"
    )
    assert [item["key"] for item in make(out)] != keys
    left = {item["key"] for item in items_of(out)}
    assert keys[3] not in left and keys[4] in left and len(left) >= 238  # existence goes in pairs
    assert "1 keys are not of this set, first none" in capsys.readouterr().out


def test_excluded_images_are_not_asked_about(drawn, tmp_path, capsys):
    images = [item["image_id"] for item in items_of(drawn)][:5]
    (tmp_path / "ids.txt").write_text("\n".join(images))
    items = make(tmp_path / "out", n_train=200, n_val=40, exclude=tmp_path / "ids.txt")
    assert len(items) == 240 and not {item["image_id"] for item in items} & set(images)
    assert "; 5 excluded" in capsys.readouterr().out


# ---- sources with pictures ----
NAMES = {1: "dog", 2: "cup", 3: "bench"}
BOXES = {1: [50, 50, 150, 150], 2: [400, 300, 60, 80], 3: [300, 60, 200, 100]}  # x, y, width, height


@pytest.fixture
def coco(tmp_path):
    """Four pictures of 640 x 480 pixels with a dog, a cup and a bench each."""
    images = [
        {"id": i, "file_name": f"{i}.jpg", "width": 640, "height": 480, "license": 4} for i in range(1, 5)
    ]
    annotations = [
        {"id": 10 * i + c, "image_id": i, "category_id": c, "bbox": BOXES[c], "iscrowd": 0}
        for i in range(1, 5)
        for c in NAMES
    ]
    categories = [{"id": c, "name": name} for c, name in NAMES.items()]
    data = {"images": images, "annotations": annotations, "categories": categories}
    graph_files.save(tmp_path / "coco.json", data)
    graph_files.write_pictures(tmp_path, {f"images/{i}.jpg": (640, 480) for i in range(1, 5)})
    return tmp_path


def test_a_set_from_files_keeps_their_pictures_and_licences(coco):
    items = make(coco / "out", source=f"coco:{coco}/coco.json", images=coco, per_image=6, val_share=0)
    assert {(i["source"], i["licence"]) for i in items} == {("coco", "CC BY 2.0")}
    for sample, item in zip(load_samples(str(coco / "out")), items, strict=True):
        assert sample.encoded_images[0]["bytes"] == open(item["image"], "rb").read()


def test_what_may_have_no_box_is_counted_if_all_votes_agree(tmp_path, monkeypatch):
    """Three dogs and two cups by their boxes; of the cups the third vote says otherwise."""
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    places = [("dog", 40, 40), ("dog", 300, 40), ("dog", 520, 40), ("cup", 40, 320), ("cup", 300, 320)]
    things = [graph_files.thing(n, x, y, 80, 100, name) for n, (name, x, y) in enumerate(places, 1)]
    graph_files.write_vg(tmp_path, {
        "image_data": [{"image_id": 1, "width": 640, "height": 480, "url": "a/1.jpg"}],
        "objects": [{"image_id": 1, "objects": things}], "relationships": [], "attributes": [],
    })  # fmt: skip
    graph_files.write_pictures(tmp_path, {"images/1.jpg": (640, 480)})
    turns = Counter()

    def respond(body, nth):
        text = text_of(body)
        name = "dogs" if "dogs" in text else "cups"
        turns[name] += 1
        number = "3" if name == "dogs" or turns[name] == 3 else "2"
        return 200, openai_answer(next(line for line in text.splitlines() if line.endswith(f" {number}"))), {}

    keys = dict(
        source=f"vg:{tmp_path}", images=tmp_path / "images", shares="{count: 1}", per_image=5, val_share=0
    )
    with serve(respond) as (url, _):
        voted = make(tmp_path / "voted", **keys, validator="openai:m", base_url=f"{url}/v1", concurrency=1)
    assert [(i["form"], i["topic"], i["answer"]) for i in voted] == [("count/voted", "dog", "3")]
    assert turns == {"dogs": 3, "cups": 3}
    with pytest.raises(SystemExit):
        make(tmp_path / "by_rules", **keys)


def test_a_missing_picture_is_named_and_the_others_are_kept(coco, capsys):
    items = make(coco / "out", source=f"coco:{coco}/coco.json", images=coco, per_image=6, val_share=0)
    lost = items[0]["image"]
    shutil.move(lost, coco / "elsewhere.jpg")
    make(coco / "out")
    said = capsys.readouterr().out
    assert f"left out {items[0]['image_id']}" in said and lost in said
    rows = pq.read_metadata(coco / "out" / "train.parquet").num_rows
    assert rows == sum(item["image"] != lost for item in items)


def test_without_any_picture_it_ends_with_one_line_and_keeps_the_questions(coco):
    with pytest.raises(SystemExit, match="images=None: none of .* pictures can be read"):
        make(coco / "out", source=f"coco:{coco}/coco.json", per_image=6)
    assert items_of(coco / "out")
    assert not list((coco / "out").glob("*.parquet"))


# ---- bad input ----
@pytest.mark.parametrize(
    "keys, says",
    [
        ({"source": "vgg:/x"}, "did you mean vg?"),
        ({"source": "vg:/no/such/folder"}, "/no/such/folder"),
        ({"source": "coco:EMPTY"}, "EMPTY"),
        ({"shares": "{relatoin: 0.5}"}, "relatoin"),
        ({"shares": "{relation: 1.5}"}, "parts of 1"),
        ({"out": "/proc/nowhere"}, "/proc/nowhere"),
        ({"exclude": "/no/such/list"}, "/no/such/list"),
        ({"writer": "gpt"}, "expected PROVIDER:MODEL of vllm, hf, openai, anthropic, got gpt"),
        ({"worked": "true", "source": "vg:/x"}, "worked: expected source=drawn"),
        (
            {"source": "measured", "n": "5"},
            "source: measured takes n_train, n_val, out, seed, source, worked alone, got n",
        ),
    ],
)
def test_bad_input_is_one_line(keys, says, tmp_path, capsys):
    empty = tmp_path / "empty.json"
    empty.write_text('{"images": [], "annotations": [], "categories": []}')
    keys = {k: v.replace("EMPTY", str(empty)) for k, v in keys.items()}
    with pytest.raises(SystemExit) as error:
        make(**{"out": tmp_path / "out", "n_train": 8, "n_val": 2} | keys)
    said = f"{error.value}{capsys.readouterr().err}"
    assert says.replace("EMPTY", str(empty)) in said and "Traceback" not in said
    assert (tmp_path / "out").exists() == (keys.get("source") == f"coco:{empty}" or "exclude" in keys)


def test_graphs_that_support_nothing_are_said_so(tmp_path):
    data = graph_files.COCO | {"annotations": []}
    graph_files.save(tmp_path / "coco.json", data)
    with pytest.raises(SystemExit, match="coco.json: expected graphs that support a question, got none"):
        make(tmp_path / "out", source=f"coco:{tmp_path}/coco.json", shares="{relation: 1.0}")
