"""Draw a run: training curves, a page of held-out items before and after training, a page of any results.

    python report.py --metrics runs/tiny/metrics.jsonl --out runs/tiny \\
        --before results/start.jsonl --after results/end.jsonl --data runs/tiny/data/val.parquet

    python evaluate.py ... --report       # results.html and results.png beside the results

Writes curves.png and page.html into the folder, in seconds. `--before` and `--after` are results of
evaluate.py on the same items, `--data` is where those came from. The page is one file (assets/page.html,
filled in), loads nothing and runs offline. What a model wrote is escaped, and the page's policy lets no
script but its own run.
"""

import argparse
import ast
import base64
import hashlib
import html
import io
import json
import random
import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path
from string import Template

from PIL import Image

from config import path_argument, plain_errors, write_whole
from data import Sample, load_samples
from images import open_image, to_rgb
from results import Record, names_file, percent, read_records, run_name, summarise
from rewards import Weights, in_pixels, parse_ground_truth, parse_scene
from testsets import Selection, load_items, summarise_results

PANELS = (  # title, key of the samples, key of the held-out set
    ("Reward", "reward", "val_reward"),
    ("Answer accuracy", "accuracy", "val_accuracy"),
    ("Exact answer, letter and text", "exact", "val_exact"),
    ("IoU of matched boxes", "mean_iou", "val_mean_iou"),
    ("Spatial term", "spatial", "val_spatial"),
    ("Count term", "count", "val_count"),
    ("Format", "format", "val_format"),
)
TERM_NAMES = {"format": "format", "count": "count", "accuracy": "exact", "spatial": "spatial"}  # as shown
PAGE = Path(__file__).parent / "assets" / "page.html"  # markup, style and script, with $placeholders
BLUE, ORANGE, GREY = "#0072b2", "#d55e00", "#5f6368"
OUTCOMES = {"fixed": "fixed", "broken": "broken", "wrong": "still wrong", "right": "right before and after"}


# ---- curves ----
def read_metrics(path) -> list[dict]:
    """The lines of a metrics.jsonl. In older ones the samples' `accuracy` is what is now called `exact`."""
    lines = []
    with open(path, encoding="utf-8") as f:
        for number, line in enumerate(f, 1):
            try:
                lines.append(dict(json.loads(line)))
            except (ValueError, TypeError):
                raise ValueError(f"{path}:{number}: expected metrics as JSON, got {line[:60]!r}") from None
    return [
        {"exact" if key == "accuracy" else key: value for key, value in line.items()}
        if "exact" not in line
        else line
        for line in lines
    ]


def smooth(values: Sequence[float], window: int) -> list[float]:
    """Centred running mean over `window` values, fewer at the ends.

    >>> smooth([0, 3, 6, 3], 3)
    [1.5, 3.0, 4.0, 4.5]
    """
    half = window // 2
    parts = [values[max(0, i - half) : i + half + 1] for i in range(len(values))]
    return [sum(part) / len(part) for part in parts]


def draw_curves(metrics: list[dict], path: Path):
    """One panel for each of PANELS that has data: samples raw and smoothed, the held-out set as points."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    panels = [p for p in PANELS if any(key in m for m in metrics for key in p[1:])]
    if not panels:
        raise ValueError(f"metrics: expected some of {[p[1] for p in PANELS]}, got none")
    columns = min(3, len(panels)) if len(panels) <= 6 else 4
    rows = -(-len(panels) // columns)
    style = {
        "font.size": 9,
        "axes.titlesize": 10.5,
        "axes.spines.top": False,
        "axes.spines.right": False,
        **dict.fromkeys(("axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), GREY),
    }
    with plt.rc_context(style):
        figure, axes = plt.subplots(rows, columns, figsize=(3.3 * columns, 2.35 * rows + 0.35), squeeze=False)
        for axis in axes.flat[len(panels) :]:
            axis.axis("off")
        for axis, (title, key, held_out) in zip(axes.flat, panels, strict=False):
            draw_panel(axis, title, *series(metrics, key), *series(metrics, held_out))
        for axis in axes.flat[max(0, len(panels) - columns) : len(panels)]:
            axis.set_xlabel("step")
        legends = [axis.get_legend_handles_labels() for axis in axes.flat]
        legend = max(legends, key=lambda handles_labels: len(handles_labels[0]))
        figure.legend(*legend, loc="upper center", ncols=2, frameon=False)
        figure.tight_layout(rect=(0, 0, 1, 1 - 0.3 / figure.get_figheight()), h_pad=1.2, w_pad=1.6)
        with write_whole(path) as tmp:
            figure.savefig(tmp, format="png", dpi=180)
        plt.close(figure)


def series(metrics: list[dict], key: str) -> tuple[list, list]:
    """(steps, values) of the lines that have the key."""
    points = [(m["step"], m[key]) for m in metrics if m.get(key) is not None]
    return [step for step, _ in points], [value for _, value in points]


def draw_panel(axis, title: str, steps, values, val_steps, val_values):
    axis.set_title(title, loc="left", fontweight="bold", color="#202124")
    axis.grid(axis="y", color="#e8eaed", linewidth=0.8)
    axis.set_axisbelow(True)
    if values:
        axis.plot(steps, values, color=BLUE, alpha=0.22, linewidth=1)
        smoothed = smooth(values, max(1, len(values) // 10))
        axis.plot(steps, smoothed, color=BLUE, linewidth=2, label="training samples (smoothed)")
    if val_values:
        axis.plot(val_steps, val_values, color=ORANGE, linewidth=1.3, marker="o", markersize=4.5,
                  markeredgecolor="white", markeredgewidth=0.8, label="held-out set, greedy")  # fmt: skip
        text = {"textcoords": "offset points", "fontsize": 8.5, "color": ORANGE, "fontweight": "bold"}
        for at, offset, across, down in ((0, (2, -6), "left", "top"), (-1, (6, 0), "left", "center")):
            place = (val_steps[at], val_values[at])
            axis.annotate(f"{place[1]:.2f}", place, xytext=offset, ha=across, va=down, **text)
    axis.margins(x=0.12 if val_values else 0.05, y=0.18)


# ---- items ----
def pair_up(before: list[dict], after: list[dict]) -> list[tuple[dict, dict]]:
    """Records of the same items, in order. Raises: ValueError naming the first that differs."""
    if len(before) != len(after):
        raise ValueError(f"expected the same items before and after, got {len(before)} and {len(after)}")
    for b, a in zip(before, after, strict=True):
        if (b["row"], b["id"]) != (a["row"], a["id"]):
            raise ValueError(f"expected the same items before and after, got {b['id']} and {a['id']}")
    return list(zip(before, after, strict=True))


def outcome(before: dict, after: dict) -> str:
    """One of OUTCOMES."""
    if before["correct"]:
        return "right" if after["correct"] else "broken"
    return "fixed" if after["correct"] else "wrong"


def choose(kinds: Sequence[tuple], n: int, seed: int) -> list[int]:
    """Indices in order of at most n items, drawn in turn from every kind (category and outcome)."""
    cells = defaultdict(list)
    for i, kind in enumerate(kinds):
        cells[kind].append(i)
    rng = random.Random(seed)
    for key in sorted(cells):
        rng.shuffle(cells[key])
    chosen = []
    while len(chosen) < min(n, len(kinds)):
        for key in sorted(cells):
            if cells[key] and len(chosen) < n:
                chosen.append(cells[key].pop())
    return sorted(chosen)


# ---- page ----
e = html.escape


def image_uri(sample: Sample, which: int = 0, longest: int = 720) -> str:
    """One of the sample's images as a data URI: PNG if it is small, else JPEG of at most `longest` pixels.

    "" where the sample is text alone.
    """
    if not sample.encoded_images:
        return ""
    try:
        image = to_rgb(open_image(sample.encoded_images[which]))
    except OSError:  # damaged
        image = Image.new("RGB", (64, 64), "grey")
    small = max(image.size) <= 256
    image.thumbnail((longest, longest))
    buffer = io.BytesIO()
    image.save(buffer, "PNG" if small else "JPEG", quality=85)
    return f"data:image/{'png' if small else 'jpeg'};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def draw_box(box: Sequence[float], name: str, kind: str, size: tuple[int, int]) -> str:
    """A rectangle of kind gold or guess, with its name where the image has room for it."""
    x1, y1, x2, y2 = box
    rect = f'<rect class="{kind}" x="{x1:g}" y="{y1:g}" width="{x2 - x1:g}" height="{y2 - y1:g}"/>'
    height = max(size) / 26  # of the letters, in the image's pixels
    room = y1 > height  # for gold above the box; the guess goes to the other side, or one line further out
    above, below = y1 - 0.3 * height, y2 + 0.95 * height
    y = (above if room else below) if kind == "gold" else (below if room else below + height)
    y = above - height if y > size[1] else y
    x, anchor = (x1, "start") if x1 + x2 < size[0] else (x2, "end")
    place = f'x="{x:g}" y="{y:g}" font-size="{height:g}" text-anchor="{anchor}"'
    return rect + (f'<text class="{kind}" {place}>{e(name)}</text>' if name else "")


def draw_scene(sample: Sample, uri: str, gold: list[dict], record: dict) -> str:
    """The image with gold and predicted boxes; a predicted one bears its name unless it finds its object."""
    if not sample.encoded_images:
        return ""
    width, height = sample.size
    guesses = parse_scene(record["reply"]) or {"objects": []}
    guesses = in_pixels(guesses, record.get("box_frame", "pixel"), sample.size)["objects"]
    pairs = record.get("matches", [])
    hits = {i for i, j, iou, _ in pairs if iou >= 0.5 and guesses[i]["id"] == gold[j]["id"]}
    halos = [draw_box(o["bbox"], "", "halo", sample.size) for o in gold + guesses]  # below all lines
    boxes = [draw_box(o["bbox"], o["id"], "gold", sample.size) for o in gold]
    boxes += [draw_box(o["bbox"], "" if i in hits else o["id"], "guess", sample.size)
              for i, o in enumerate(guesses)]  # fmt: skip
    crisp = ' class="crisp"' if max(sample.size) <= 256 else ""
    image = f'<image href="{uri}" width="{width}" height="{height}"{crisp}/>'
    shapes = "".join([*halos, *boxes, *draw_answers(sample, record)])
    return f'<svg viewBox="0 0 {width} {height}">{image}{shapes}</svg>'


def draw_answers(sample: Sample, record: dict) -> list[str]:
    """The gold answer and the one given, where they are places in the image."""
    if sample.kind not in ("point", "box"):
        return []
    gold, said, (width, height) = ast.literal_eval(sample.answer), record.get("parsed"), sample.size
    if sample.kind == "box":
        boxes = [(gold, "gold"), *([(said, "guess")] if said else [])]
        boxes = [([c * side for c, side in zip(box, 2 * sample.size, strict=True)], k) for box, k in boxes]
        return [draw_box(box, "answer", kind, sample.size) for box, kind in boxes]
    corners = " ".join(f"{x * width:g},{y * height:g}" for x, y in gold)
    at = said and f'cx="{said[0] * width:g}" cy="{said[1] * height:g}" r="{max(sample.size) / 60:g}"'
    return [f'<polygon class="gold" points="{corners}"/>', f'<circle class="guess" {at}/>' if said else ""]


def other_images(sample: Sample) -> str:
    """Those behind the first, small, in the order of the text's marks."""
    return "".join(f'<img src="{image_uri(sample, k, 250)}">' for k in range(1, len(sample.encoded_images)))


def show_terms(record: dict) -> str:
    """Every reward term with its weight and what it contributes."""
    if "terms" not in record:
        return ""
    weights, rows = Weights(), []
    for term, name in TERM_NAMES.items():
        value, weight = record["terms"][term], getattr(weights, term)
        bar = f'<td class="bar"><i style="width:{100 * value:.0f}%"></i></td>'
        rows.append(f"<tr><td>{name}</td>{bar}<td>{value:.2f}</td><td>&times; {weight:g}</td>"
                    f"<td>{value * weight:.3f}</td></tr>")  # fmt: skip
    note = "" if record["mean_iou"] is None else f"mean IoU {record['mean_iou']:.2f}"
    note = f"rejected: {e(record['reason'])}" if record["reason"] else note
    total = f'<td>reward</td><td colspan="3">{note}</td><td>{record["terms"]["reward"]:.3f}</td>'
    return f'<table>{"".join(rows)}<tr class="total">{total}</tr></table>'


def show_reply(text: str) -> str:
    """The completion, escaped, with its block tags set off."""
    text = e(text)
    for name in ("observe", "scene", "think", "answer"):
        for tag in (f"&lt;{name}&gt;", f"&lt;/{name}&gt;"):
            text = text.replace(tag, f"<b>{tag}</b>")
    return f"<pre>{text}</pre>"


def show_side(title: str, sample: Sample, uri: str, gold: list[dict], record: dict) -> str:
    mark = "right" if record["correct"] else "wrong"
    said, how = e(str(record["parsed"])), e(record["method"])
    said = f"({said})" if record["kind"] == "choice" else said
    answer = f"no answer ({how})" if record["parsed"] is None else f"{said} {mark} ({how})"
    look = draw_scene(sample, uri, gold, record) + show_terms(record)
    title = f'<h3>{title} <span class="{mark}">{answer}</span></h3>'
    return f'<section>{title}<div class="look">{look}</div>{show_reply(record["reply"])}</section>'


def show_item(sample: Sample, before: dict, after: dict) -> str:
    """One article of the page."""
    gold = parse_ground_truth(sample.ground_truth)[0]["objects"] if "<scene>" in sample.ground_truth else []
    kind, uri = outcome(before, after), image_uri(sample)
    sides = show_side("Before", sample, uri, gold, before) + show_side("After", sample, uri, gold, after)
    tags = f'<span class="tag {kind}">{OUTCOMES[kind]}</span><span class="tag">{e(sample.category)}</span>'
    words = f'<p>{e(sample.question)}</p><p class="answer">{e(sample.answer)}</p>{other_images(sample)}'
    header = f'<header>{tags}<span class="id">{e(sample.id)}</span>{words}</header>'
    data = f'data-category="{e(sample.category)}" data-outcome="{kind}"'
    return f'<article {data}>{header}<div class="sides">{sides}</div></article>'


def show_summary(before: dict, after: dict) -> str:
    """The figures over all items, before and after."""
    named = {
        "accuracy": "answer accuracy",
        "reward": "reward",
        "format": "format",
        "count": "count term",
        "exact": "exact answer, letter and text",
        "spatial": "spatial term",
        "mean_iou": "mean IoU of matched boxes",
        "recall50": "objects found at IoU 0.5",
    }
    cells = []
    for key, name in named.items():
        if key in before and key in after:
            b, a = before[key], after[key]
            trend = "up" if a > b else "down" if a < b else ""
            change = f'<em class="{trend}">{a - b:+.3f}</em>'
            cells.append(f"<div><span>{name}</span><b>{b:.3f} &rarr; {a:.3f}</b>{change}</div>")
    return f'<div class="figures">{"".join(cells)}</div>'


def page(samples: Sequence[Sample], pairs: list[tuple[dict, dict]], chosen: list[int], title: str) -> str:
    """The whole page; samples[i] belongs to pairs[i], and `chosen` are those shown.

    Raises: ValueError that names a record which cannot be shown.
    """
    articles = []
    for i in chosen:
        with names_file(f"record {pairs[i][0]['id']}", also=(ValueError,)):
            articles.append(show_item(samples[i], *pairs[i]))
    before, after = (summarise(records) for records in zip(*pairs, strict=True))
    counts = Counter(outcome(b, a) for b, a in pairs)
    shown = Counter(outcome(*pairs[i]) for i in chosen)
    categories = sorted({pairs[i][0]["category"] for i in chosen})
    outcomes = ", ".join(f"{counts[k]} {name}" for k, name in OUTCOMES.items())
    parts = " + ".join(f"{getattr(Weights(), term):g} {name}" for term, name in TERM_NAMES.items())
    return whole_page(
        title=title,
        summary=show_summary(before, after),
        note=f"{len(pairs)} held-out items: {outcomes}. {len(chosen)} of them are shown. reward = {parts}; a "
        "malformed completion is rejected and scores 0, an answer that is not exact earns no spatial term.",
        selects={"category": categories},
        buttons={k: (name, shown[k]) for k, name in OUTCOMES.items()},
        items=articles,
    )


def whole_page(
    title: str,
    summary: str,
    note: str,
    selects: dict[str, list[str]],
    buttons: dict[str, tuple[str, int]],
    items: list[str],
) -> str:
    """One HTML file. selects: {data attribute of the articles: its values}; buttons: {outcome: (name, n)}."""
    return fill(
        PAGE,
        title=e(title),
        summary=summary,
        note=note,
        total=len(items),
        selects="".join(select(name, values) for name, values in selects.items()),
        buttons="".join(
            f'<button data-outcome="{k}">{name} <small>{n}</small></button>'
            for k, (name, n) in buttons.items()
        ),
        items="".join(items),
    )


def select(name: str, values: Sequence[str]) -> str:
    options = "".join(f'<option value="{e(v)}">{e(v)}</option>' for v in values)
    return f'<select id="{name}" aria-label="{name}"><option value="">{name}: all</option>{options}</select>'


def fill(path: Path, **values) -> str:
    """A template of a page with its $placeholders filled in, $policy among them.

    Script and style have no placeholders: the script's hash, which the page's policy demands, is that of the
    text between its tags.
    """
    template = path.read_text(encoding="utf-8")
    script = re.search("<script>(.*)</script>", template, re.S)[1]
    policy = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return Template(template).substitute(values, policy=policy)


# ---- the page of any results ----
def write_results(paths: Sequence[Path], out: Path, seed: int = 0, n: int = 48) -> list[Path]:
    """results.html with n items of every results file, and results.png with their accuracies, into `out`."""
    summaries, articles, names, categories, counts = [], [], [], set(), Counter()
    for path in paths:
        header, records = read_records(path)
        with names_file(path):
            summaries.append(summarise_results(header, records))
            chosen = choose_items(path, header, records, n, seed)
        name = path.stem if summaries[-1]["dataset"] in names else summaries[-1]["dataset"]
        names.append(name)
        for sample, record in chosen:
            with names_file(f"{path}, record {record['id']}", also=(ValueError,)):
                articles.append(show_result(name, sample, record))
            categories.add(record["category"])
            counts["right" if record["correct"] else "wrong"] += 1
            counts["unparsed"] += record["parsed"] is None
    text = whole_page(
        title=", ".join(dict.fromkeys(s["model"] for s in summaries)),
        summary=show_accuracies(names, summaries),
        note=f"{len(articles)} items, drawn evenly over categories, right and wrong.",
        selects={"dataset": names, "category": sorted(categories)},
        buttons={k: (k, counts[k]) for k in ("right", "wrong", "unparsed")},
        items=articles,
    )
    write_html(out / "results.html", text)
    draw_bars(summaries, out / "results.png")
    return [out / "results.html", out / "results.png"]


def choose_items(
    path: Path, header: dict, records: list[Record], n: int, seed: int
) -> list[tuple[Sample, Record]]:
    """At most n items of a results file with their images. Raises: ValueError if the data are others."""
    loaded = load_items(header["config"]["dataset"], Selection.of(header["config"]))
    if loaded.fingerprint != (before := header["data"].get("fingerprint")):
        raise ValueError(
            f"{path}: its data set has changed since: expected fingerprint {before}, got {loaded.fingerprint}"
        )
    items = loaded.items
    places = {items.id_of(i): i for i in range(len(items))}
    if strange := [r["id"] for r in records if r["id"] not in places]:
        raise ValueError(f"{path}: expected records of its data set's items, got one of {strange[0]!r}")
    chosen = choose([(r["category"], r["correct"]) for r in records], n, seed)
    return [(items.shown(places[records[k]["id"]]), records[k]) for k in chosen]


def show_accuracies(names: Sequence[str], summaries: Sequence[dict]) -> str:
    """A table with a line a results file."""
    rows = [("dataset", "n", "accuracy", "95 % interval", "paper")]
    for name, s in zip(names, summaries, strict=True):
        interval = " - ".join(map(percent, s["ci95"]))
        rows.append((name, str(s["n"]), percent(s["accuracy"]), interval, percent(s["paper"])))
    lines = ("".join(f"<td>{e(cell)}</td>" for cell in row) for row in rows)
    return f'<table class="results">{"".join(f"<tr>{line}</tr>" for line in lines)}</table>'


def write_html(path: Path, text: str):
    with write_whole(path) as tmp:
        # backslashreplace: a model may write half a surrogate
        tmp.write_text(text, encoding="utf-8", errors="backslashreplace")


def show_result(name: str, sample: Sample, record: dict) -> str:
    """One article of the page of results."""
    gold = parse_ground_truth(sample.ground_truth)[0]["objects"] if "<scene>" in sample.ground_truth else []
    kind = "right" if record["correct"] else "wrong"
    outcomes = f"{kind} unparsed" if record["parsed"] is None else kind
    title = "Reply, cut off" if record["finish_reason"] == "length" else "Reply"
    side = show_side(title, sample, image_uri(sample), gold, record)
    tags = (
        f'<span class="tag {"fixed" if kind == "right" else "broken"}">{kind}</span>'
        f'<span class="tag">{e(name)}</span><span class="tag">{e(record["category"])}</span>'
    )
    words = f'<p class="question">{e(sample.question)}</p><p class="answer">{e(sample.answer)}</p>'
    words += other_images(sample)
    data = f'data-dataset="{e(name)}" data-category="{e(record["category"])}" data-outcome="{outcomes}"'
    header = f'<header>{tags}<span class="id">{e(record["id"])}</span>{words}</header>'
    return f"<article {data}>{header}{side}</article>"


def draw_bars(summaries: Sequence[dict], path: Path):
    """Accuracy on every data set with its 95 % interval, a colour a model; the paper's figure as a mark."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    sets = list(dict.fromkeys(s["dataset"] for s in summaries))
    models = list(dict.fromkeys(run_name(s) for s in summaries))
    figure, axis = plt.subplots(figsize=(7, 1.1 + 0.42 * len(sets) * max(1, 0.6 * len(models))))
    height = 0.8 / len(models)
    for s in summaries:
        k = models.index(run_name(s))
        y = sets.index(s["dataset"]) + (k - (len(models) - 1) / 2) * height
        low, high = s["ci95"]
        first = next(t for t in summaries if run_name(t) == models[k]) is s
        axis.barh(
            y,
            100 * s["accuracy"],
            0.9 * height,
            color=f"C{k}",
            alpha=0.75,
            label=models[k] if first else None,
        )
        axis.plot([100 * low, 100 * high], [y, y], color="#202124", linewidth=1.2)
        axis.annotate(
            f"{100 * s['accuracy']:.1f}",
            (100 * high, y),
            (4, 0),
            textcoords="offset points",
            va="center",
            fontsize=8,
        )
        if s["paper"] is not None:
            named = None if any(line.get_label() == "paper" for line in axis.lines) else "paper"
            axis.plot(100 * s["paper"], y, "D", color="#d55e00", markersize=5, label=named)
    axis.set(xlim=(0, 108), xlabel="accuracy, %", yticks=range(len(sets)))
    axis.set_yticklabels([Path(name).name for name in sets])
    axis.invert_yaxis()
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(axis="x", color="#e8eaed", linewidth=0.8)
    axis.set_axisbelow(True)
    figure.legend(loc="upper center", ncols=3, frameon=False, fontsize=8)
    figure.tight_layout(rect=(0, 0, 1, 1 - 0.35 / figure.get_figheight()))
    with write_whole(path) as tmp:
        figure.savefig(tmp, format="png", dpi=160)
    plt.close(figure)


# ---- main ----
def write_page(before_path, after_path, data: str, path: Path, n: int, seed: int, title: str):
    before, after = (read_records(p)[1] for p in (before_path, after_path))
    rows = load_samples(data, "val", need_scene=any("terms" in b for b in before), max_bad_rows=1)
    by_row = {row: i for i, row in enumerate(rows.rows)}
    with names_file(before_path, after_path):
        # Evaluation asks some rows that training leaves out; the page does without them.
        pairs = [pair for pair in pair_up(before, after) if pair[0]["row"] in by_row]
        if not pairs:
            raise ValueError(f"expected records of rows of {data}, got none")
        chosen = choose([(b["category"], outcome(b, a)) for b, a in pairs], n, seed)
        samples = {i: rows[by_row[pairs[i][0]["row"]]] for i in chosen}
        for i, sample in samples.items():
            row, item = pairs[i][0]["row"], pairs[i][0]["meta"]["item"]
            if sample.id != item:
                raise ValueError(f"{data}, row {row}: expected item {item}, got {sample.id}")
        write_html(path, page(samples, pairs, chosen, title))


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--metrics", type=path_argument, help="metrics.jsonl of a run: draws curves.png")
    p.add_argument("--before", type=path_argument, help="evaluate.py's results at the start")
    p.add_argument(
        "--after",
        type=path_argument,
        help="its results on the same items at the end: with --before, makes page.html",
    )
    p.add_argument("--data", type=path_argument, help="the data set of these items: file, folder or Hub id")
    p.add_argument("--out", type=path_argument, default=".", help="folder to write into")
    p.add_argument("--items", type=int, default=48, help="items on the page")
    p.add_argument("--seed", type=int, default=0, help="of the choice of items")
    p.add_argument("--title", default="Before and after training", help="of the page")
    args = p.parse_args(argv)
    if bool(args.before) != bool(args.after) or (args.before and not args.data):
        p.error("--before, --after and --data belong together")
    if not args.metrics and not args.before:
        p.error("expected --metrics, or --before with --after and --data")
    out = Path(args.out)
    with plain_errors():
        out.mkdir(parents=True, exist_ok=True)
        if args.metrics:
            draw_curves(read_metrics(args.metrics), out / "curves.png")
            print(f"wrote {out / 'curves.png'}")
        if args.before:
            write_page(
                args.before, args.after, args.data, out / "page.html", args.items, args.seed, args.title
            )
            print(f"wrote {out / 'page.html'}")


if __name__ == "__main__":
    main()
