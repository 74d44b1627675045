"""report.py: curves from any metrics, a page that holds what it should and nothing that could run."""

import base64
import hashlib
import json
import re
from html.parser import HTMLParser

import fixtures
import pytest
from PIL import Image

import evaluate
import report
from data import load_samples
from report import choose, draw_curves, draw_scene, main, outcome, pair_up, read_metrics, series, smooth
from results import grade
from testsets import Selection, load_items

HOSTILE = "<script>alert(1)</script><img src=x onerror=alert(2)>\"'</pre></article>$summary &lt;b&gt; \u202e"


@pytest.fixture(scope="module")
def samples(tiny_data):
    return load_samples(str(tiny_data / "val.parquet"), "val")


def write_results(path, samples, reply_to):
    records = []
    for i, s in enumerate(samples):
        reply = reply_to(i, s)
        records.append(
            {
                "id": str(i),
                "row": i,
                "category": s.category,
                "kind": s.kind,
                "finish_reason": "stop",
                "meta": {"item": s.id},
                "reply": reply,
                **grade(s, reply),
            }
        )
    path.write_text("".join(json.dumps(line) + "\n" for line in [{"header": {"config": {}}}, *records]))
    return path


def gold_reply(sample):
    scene, _, answer = sample.ground_truth.partition("\n")
    return f"<observe>o</observe>{scene}<think>t</think>{answer}"


class Reader(HTMLParser):
    """Counts tags, keeps attributes and the visible text."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.attributes, self.text = [], [], ""
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_data(self, data):
        self.text += data


def make_page(tmp_path, tiny_data, before, after, *extra):
    main(["--before", str(before), "--after", str(after), "--data", str(tiny_data / "val.parquet"),
          "--out", str(tmp_path), *extra])  # fmt: skip
    return (tmp_path / "page.html").read_text()


# ---- curves ----
def test_curves_need_only_what_is_there(tmp_path):
    draw_curves([{"step": 1, "reward": 0.5}, {"step": 2, "reward": 0.6}], tmp_path / "one.png")
    metrics = [{"step": 0, "val_reward": 0.4, "val_accuracy": 0.3}]
    metrics += [{"step": i, "reward": i / 9, "accuracy": None, "format": 1.0} for i in range(1, 9)]
    draw_curves(metrics, tmp_path / "many.png")
    one, many = (Image.open(tmp_path / name).size for name in ("one.png", "many.png"))
    assert many[0] > 2 * one[0] and many[0] > 1200  # three panels beside each other
    assert sorted(p.name for p in tmp_path.iterdir()) == ["many.png", "one.png"]
    with pytest.raises(ValueError, match="metrics: expected some of"):
        draw_curves([{"step": 1, "loss": 2.0}], tmp_path / "none.png")


def test_older_metrics_are_read_under_their_present_names(tmp_path):
    """What samples once called accuracy is the reward's term, exact; held-out lines never meant it."""
    lines = [
        {"step": 0, "val_accuracy": 0.2},
        {"step": 1, "accuracy": 0.3, "reward": 0.5, "val_accuracy": 0.4},
        {"step": 2, "accuracy": 0.6, "exact": 0.5, "val_exact": 0.45},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    metrics = read_metrics(tmp_path / "metrics.jsonl")
    assert series(metrics, "exact") == ([1, 2], [0.3, 0.5]) and series(metrics, "accuracy") == ([2], [0.6])
    assert series(metrics, "val_accuracy") == ([0, 1], [0.2, 0.4])
    assert ("Answer accuracy", "accuracy", "val_accuracy") in report.PANELS
    assert smooth([0, 3, 6, 3], 3) == [1.5, 3.0, 4.0, 4.5]


# ---- items ----
def test_outcomes():
    said = {True: {"correct": True}, False: {"correct": False}}
    got = [outcome(said[b], said[a]) for b, a in ((0, 1), (1, 0), (0, 0), (1, 1))]
    assert got == ["fixed", "broken", "wrong", "right"]


def test_choice_covers_categories_and_outcomes():
    kinds = [(category, right) for category in "ab" for right in [True] * 3 + [False] * 40]
    chosen = choose(kinds, 8, seed=3)
    assert sorted(kinds[i] for i in chosen) == sorted(2 * list(set(kinds)))
    assert chosen == choose(kinds, 8, seed=3) != choose(kinds, 8, seed=4)
    assert choose(kinds, 1000, seed=0) == list(range(86))


def test_other_items_are_refused():
    one, two = {"row": 0, "id": "x"}, {"row": 1, "id": "y"}
    with pytest.raises(ValueError, match="got 1 and 2"):
        pair_up([one], [one, two])
    with pytest.raises(ValueError, match="got x and y"):
        pair_up([one], [two])


# ---- page ----
def test_page_shows_what_it_should(tmp_path, tiny_data, samples):
    before = write_results(tmp_path / "b.jsonl", samples, lambda i, s: "no idea")
    after = write_results(tmp_path / "a.jsonl", samples, lambda i, s: gold_reply(s) if i % 2 else "")
    page = make_page(tmp_path, tiny_data, before, after, "--items", "10")
    read = Reader(page)
    assert read.tags.count("article") == 10
    assert read.tags.count("svg") == read.tags.count("image") == 20
    assert "0.000 → 0.500" in read.text  # accuracy and reward of half the items
    assert "24 held-out items: 12 fixed, 0 broken, 12 still wrong, 0 right before and after" in read.text
    assert "0.1 format + 0.2 count + 0.5 exact + 0.2 spatial" in read.text
    for term in ("format", "count", "exact", "spatial", "reward"):
        assert len(re.findall(rf"<td>{term}</td>", page)) == 20
    assert "rejected: missing_tag" in read.text and "refused" not in read.text and "(empty)" in read.text


def test_boxes_are_drawn_where_they_are(tmp_path, tiny_data, samples):
    results = write_results(tmp_path / "r.jsonl", samples, lambda i, s: gold_reply(s))
    page = make_page(tmp_path, tiny_data, results, results)
    gold = report.parse_ground_truth(samples[0].ground_truth)[0]["objects"]
    for o in gold:
        x1, y1, x2, y2 = o["bbox"]
        for kind in ("gold", "guess"):
            rect = f'<rect class="{kind}" x="{x1}" y="{y1}" width="{x2 - x1}" height="{y2 - y1}"/>'
            assert page.count(rect) >= 2


def test_nothing_hostile_survives_and_nothing_is_loaded(tmp_path, tiny_data, samples):
    scene = '<scene>{"objects":[{"id":"x.1","bbox":[0,0,1e308,1e308]}]}</scene>'
    results = write_results(tmp_path / "r.jsonl", samples, lambda i, s: HOSTILE + scene)
    page = make_page(tmp_path, tiny_data, results, results, "--title", HOSTILE)
    read = Reader(page)
    assert read.tags.count("script") == 1 and "img" not in read.tags
    assert read.tags.count("article") == 24 and read.tags.count("pre") == 48
    assert HOSTILE in read.text  # as text, whole
    assert not [name for name, _ in read.attributes if name.startswith("on") or name == "src"]
    assert {value[:22] for name, value in read.attributes if name == "href"} == {"data:image/png;base64,"}
    assert "http://" not in page and "https://" not in page
    assert "default-src 'none'" in page
    script = re.search("<script>(.*)</script>", page, re.S)[1]
    allowed = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{allowed}'" in page  # or the page's own script would not run either


def test_data_of_other_items_is_refused(tmp_path, tiny_data, samples):
    results = write_results(tmp_path / "r.jsonl", samples, lambda i, s: "B")
    with pytest.raises(SystemExit, match="row 0: expected item val-000000, got train-000000"):
        main(["--before", str(results), "--after", str(results), "--items", "1000",
              "--data", str(tiny_data / "train.parquet"), "--out", str(tmp_path)])  # fmt: skip
    with pytest.raises(SystemExit):
        main(["--before", str(results)])
    with pytest.raises(SystemExit):
        main([])


def test_boxes_of_a_reply_in_per_mille_are_drawn_in_pixels(samples):
    sample = samples[0]  # 84 x 84
    scene = {"objects": [{"id": "cup.1", "bbox": [0, 250, 500, 1000]}]}
    record = {"reply": f"<scene>{json.dumps(scene)}</scene>", "box_frame": "per_mille"}
    assert '<rect class="guess" x="0" y="21" width="42" height="63"/>' in draw_scene(sample, "", [], record)


@pytest.mark.parametrize(
    "text, says", [("", "No such file"), ('{"step": 1}\n{"step', "m.jsonl:2: expected metrics")]
)
def test_metrics_that_cannot_be_read_are_one_line(text, says, tmp_path):
    if text:
        (tmp_path / "m.jsonl").write_text(text)
    with pytest.raises(SystemExit, match=says):
        main(["--metrics", str(tmp_path / "m.jsonl"), "--out", str(tmp_path)])


# ---- records of others ----
ABSENT = object()


def change(lines, *path, value):
    """Set (or take away) what stands at a path of keys."""
    *above, key = path
    for k in above:
        lines = lines[k]
    lines.pop(key) if value is ABSENT else lines.__setitem__(key, value)


def refused(command, *args) -> str:
    """The one line that a command ends with; "" where it goes through."""
    try:
        command([*map(str, args)])
    except SystemExit as end:
        assert "\n" not in str(end)
        return str(end)
    return ""


@pytest.mark.parametrize(
    "path, value, says",
    [
        ((1, "category"), ["a"], ""),
        ((1, "category"), {"a": 1}, ""),
        ((1, "category"), ABSENT, ""),
        ((1, "category"), 7, ""),
        ((1, "category"), "\ud83d", ""),
        ((1, "parsed"), 5, ""),
        ((2, "parsed"), ["a", "b"], "record 1: expected records of evaluate.py, got others: ValueError"),
        ((2, "parsed"), "5", "record 1: expected records of evaluate.py, got others: ValueError"),
        ((2, "parsed"), {"x": 1}, "record 1: expected records of evaluate.py, got others: KeyError: 0"),
        ((1, "reply"), ABSENT, "record 0: expected records of evaluate.py, got others: KeyError: 'reply'"),
        (
            (1, "terms"),
            {"format": "x"},
            "expected records of evaluate.py, got others: KeyError: 'gold_objects'",
        ),
        ((1, "correct"), ABSENT, "expected records of evaluate.py, got others: KeyError: 'correct'"),
        ((1, "id"), "99", "expected records of its data set's items, got one of '99'"),
        ((0, "header", "data", "fingerprint"), ABSENT, "expected fingerprint None, got "),
        ((0, "header", "data"), [1], "expected records of evaluate.py, got others: AttributeError"),
        (
            (0, "header", "config", "template"),
            5,
            "expected results of evaluate.py, got something else: sequence",
        ),
        (
            (0, "header", "config", "model_path"),
            "\ud83d",
            "expected results of evaluate.py, got something else: ",
        ),
        ((0, "header", "config"), [1], "expected results of evaluate.py, got something else: "),
        ((0, "header", "config", "limit"), "x", "expected records of evaluate.py, got others: TypeError"),
    ],
)
def test_a_record_that_cannot_be_shown_is_named(path, value, says, tmp_path):
    fixtures.write(tmp_path / "robospatial_home.parquet", *fixtures.robospatial_home())
    config = {"dataset": "robospatial_home", "local_path": str(tmp_path), "model_path": "m"}
    loaded = load_items("robospatial_home", Selection.of(config))
    config |= {"template": "t", "provider": "hf"}
    data = {"n": 2, "rows": 2, "fingerprint": loaded.fingerprint}
    records = fixtures.records_of("robospatial_home", tmp_path, lambda i, sample: True)
    records = [r | {"reply": "r", "matches": [], "mean_iou": None, "reason": None} for r in records]
    lines = [{"header": {"config": config, "data": data}}, *records]
    change(lines, *path, value=value)
    file = tmp_path / "r.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    said = refused(evaluate.main, "--report", file)
    assert says in said and bool(says) == (f"error: {file}" in said)
    assert (tmp_path / "results.html").exists() == (not says)


@pytest.mark.parametrize(
    "key, value, says",
    [
        ("category", ["a"], ""),
        ("category", None, ""),
        ("parsed", 5, ""),
        ("reply", ABSENT, "record 3: expected records of evaluate.py, got others: KeyError: 'reply'"),
        ("row", None, "other.jsonl: expected the same items before and after, got 23 and 24"),
        ("meta", ABSENT, "expected records of evaluate.py, got others: KeyError: 'meta'"),
        ("matches", [[99, 0, 0.9, 0.9]], "record 3: expected records of evaluate.py, got others: IndexError"),
    ],
)
def test_a_pair_that_cannot_be_shown_is_named(key, value, says, tmp_path, tiny_data, samples):
    file = write_results(tmp_path / "r.jsonl", samples, lambda i, s: gold_reply(s))
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    change(lines, 4, key, value=value)
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    data = tiny_data / "val.parquet"
    other = write_results(tmp_path / "other.jsonl", samples, lambda i, s: "")
    said = refused(main, "--before", file, "--after", other, "--data", data, "--out", tmp_path)
    assert says in said and bool(says) == (f"error: {file}" in said)


def test_a_page_of_no_records_says_so(tmp_path, tiny_data):
    file = write_results(tmp_path / "r.jsonl", [], None)
    data = tiny_data / "val.parquet"
    said = refused(main, "--before", file, "--after", file, "--data", data, "--out", tmp_path)
    assert f"error: {file} and {file}: expected records of rows of {data}, got none" in said
