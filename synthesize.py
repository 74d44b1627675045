"""Make a spatial VQA data set out of scene graphs, by rules alone or with language models.

    python synthesize.py source=vg:/data/visual_genome images=/data/visual_genome out=runs/stvqa
    python synthesize.py source=hub:JosephZ/vg150_train_sgg_prompt writer=anthropic:claude-sonnet-4-5 \\
        validator=openai:gpt-4o n=10000 out=runs/stvqa
    python synthesize.py source=psg:psg.json images=/data/coco writer=openai:my-model \\
        base_url=http://localhost:8000/v1 n=500 budget=5 out=runs/psg
    python synthesize.py out=runs/drawn                  # the built-in drawn set (15 s)
    python synthesize.py source=measured out=runs/tiny/data    # the demo's set: tiny.py, without the stages
    python synthesize.py out=runs/stvqa report=true      # its page again

Eight stages, each a function below and a file in `out`; a killed run goes on where it was, and the same
settings give the same set, byte for byte:

    read      graphs.jsonl      scene graphs, cleaned
    plan      plan.jsonl        which category and level each image is asked for
    ask       questions.jsonl   by rule, or by a language model whose replies are checked against the graph
    filter    blind.jsonl       what a model answers without the picture is dropped
    validate  votes.jsonl       what a second model, with the picture, answers otherwise is dropped
    select    selected.jsonl    quotas, even answers, options in order
    export    train.parquet, val.parquet, README.md     rows with STVQA-7K's columns, and where they are from
    report    report.html       the set on one page; its keep or drop choices (review.csv) are obeyed
"""

import contextlib
import fcntl
import json
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from itertools import groupby, islice
from pathlib import Path
from types import SimpleNamespace
from typing import Literal, NamedTuple

from pydantic import model_validator
from tqdm import tqdm

import review
import sources
import tiny
import votes
import writer
from apis import NoService
from backends import PROVIDERS
from config import Config, ConfigError, append, opt, plain_errors, write_run_record, write_whole
from questions import CATEGORIES, LEVELS, Question, candidates
from scenes import SceneGraph, clean
from selection import choose, hash01, order_options, quotas, split_of
from stvqa import LETTERS, stvqa_features, stvqa_row, write_parquet

SPLITS = ("train", "val")
NUMBERS = [range(n) for n in range(10)]
PER_FORM = 8  # questions of a form and an image from which the set is chosen
MEASURED_KEYS = {"out", "source", "n_train", "n_val", "worked", "seed"}  # what source=measured has a use for
PROVENANCE = ("key", "source", "image_group", "licence", "form", "topic", "fact", "writer", "votes", "blind")


class SynthesizeConfig(Config):
    out: str = opt("runs/drawn", "folder to write; a run that was cut off goes on in it", path=True)
    source: str = opt(
        "drawn",
        "KIND:PATH of scene graphs: vg, vg150, hub, gqa, openimages, psg, coco; or drawn, measured",
        path=True,
    )
    images: str | None = opt(None, "folder of the pictures, where the graphs do not hold them", path=True)
    limit: int | None = opt(None, "graphs read at most", ge=1)
    exclude: str | None = opt(
        None, "file of image ids, one a line, that must not be used: those of benchmarks", path=True
    )

    n: int | None = opt(None, "questions, train and val together; null: as many as the images allow", ge=1)
    val_share: float = opt(0.1, "held-out part of the questions; whole image groups are held out", ge=0, lt=1)
    n_train: int | None = opt(None, "training questions, in place of n and val_share", ge=1)
    n_val: int | None = opt(None, "held-out questions, in place of n and val_share", ge=0)
    shares: dict[str, float] = opt(
        {"relation": 0.5}, "{category: part of the set}; the others divide the rest"
    )
    per_image: int = opt(1, "questions about one image, each about other objects", ge=1)

    writer: str = opt("rules", "rules, or PROVIDER:MODEL (openai, anthropic, vllm, hf)")
    show_images: bool = opt(True, "a writing model sees the picture")
    blind: str | None = opt(None, "PROVIDER:MODEL that answers without the picture; what it can is dropped")
    validator: str | None = opt(
        None, "PROVIDER:MODEL that answers with the picture; what it cannot is dropped"
    )
    accept: Literal["majority", "any_of_4"] = opt(
        "majority", "of the validator's votes; any_of_4 as in the paper"
    )
    base_url: str | None = opt(None, "a server of your own for openai and anthropic models")
    concurrency: int = opt(16, "requests to a server at a time", ge=1)
    budget: float | None = opt(None, "dollars to spend at most in this folder", gt=0)
    prices: tuple[float, float] | None = opt(
        None, "dollars per million tokens in and out, for unlisted models"
    )

    report: bool = opt(False, "only make report.html again")
    push_to_hub: str | None = opt(None, "Hub data set to upload the finished set to")
    public: bool = opt(False, "upload it for everybody to see")
    worked: bool = opt(False, "drawn, measured: also worked examples for train_sft.py")
    n_careful: int = opt(40000, "worked examples of stage 1", ge=0)
    n_mixed: int = opt(14000, "worked examples of stage 2", ge=0)
    hasty: float = opt(0.6, "share of hasty annotators in stage 2", ge=0, le=1)
    seed: int = opt(0, "all choices follow from it")

    @model_validator(mode="after")
    def check(self):
        if unknown := set(self.shares) - set(CATEGORIES):
            raise ValueError(
                f"shares: expected categories of {', '.join(CATEGORIES)}, got {', '.join(unknown)}"
            )
        if min(self.shares.values(), default=0) < 0 or sum(self.shares.values()) > 1 + 1e-9:
            raise ValueError(f"shares: expected parts of 1, got {self.shares}")
        for key, spec in (("writer", self.writer), ("blind", self.blind), ("validator", self.validator)):
            provider, _, model = (spec or "").partition(":")
            if spec not in (None, "rules" if key == "writer" else None) and not (
                provider in PROVIDERS and model
            ):
                raise ValueError(f"{key}: expected PROVIDER:MODEL of {', '.join(PROVIDERS)}, got {spec}")
        if self.worked and self.source not in ("drawn", "measured"):
            raise ValueError(f"worked: expected source=drawn or measured, got {self.source}")
        if self.source == "measured" and (others := sorted(self.model_fields_set - MEASURED_KEYS)):
            used = ", ".join(sorted(MEASURED_KEYS))
            raise ValueError(f"source: measured takes {used} alone, got {', '.join(others)}")
        return self

    @property
    def models(self) -> list[str]:
        return [m for m in (None if self.writer == "rules" else self.writer, self.blind, self.validator) if m]


# ---- files of the stages -----------------------------------------------------------------------------------
class Ledger:
    """One stage's records, a line each, appended as they come: a killed run loses the line it was writing."""

    def __init__(self, path: Path, settings: dict | None = None):
        """Raises: ConfigError if the file was begun with other settings than those given."""
        self.path = path
        if path.exists():
            with open(path, "rb+") as file:  # cut off a torn line
                whole = 0
                for line in file:
                    whole += len(line) if line.endswith(b"\n") else 0
                file.truncate(whole)
        header = next(self._lines(), None) if path.exists() else None
        if header is None:
            self.add({"settings": settings})
        elif settings not in (None, header["settings"]):
            was = header["settings"]
            key = next(k for k in settings | was if settings.get(k) != was.get(k))
            raise ConfigError(
                f"{path}: was begun with {key}={was.get(key)}, now {settings.get(key)}: "
                "choose another out=, or delete the file"
            )

    def _lines(self) -> Iterator[dict]:
        with open(self.path, encoding="utf-8") as file:
            yield from map(json.loads, file)

    def __iter__(self) -> Iterator[dict]:
        return (r for r in islice(self._lines(), 1, None) if "end" not in r)

    @property
    def finished(self) -> bool:
        with open(self.path, "rb") as file:
            file.seek(max(file.seek(0, 2) - 20, 0))
            return file.read().endswith(b'{"end":true}\n')

    def add(self, record: dict):
        append(self.path, json.dumps(record, separators=(",", ":")) + "\n")


def write_lines(path: Path, records: Iterable[dict]):
    with write_whole(path) as tmp, open(tmp, "w", encoding="utf-8") as file:
        file.writelines(json.dumps(r, separators=(",", ":")) + "\n" for r in records)


def read_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in open(path, encoding="utf-8")]


# ---- 1. read -----------------------------------------------------------------------------------------------
def read(cfg: SynthesizeConfig, out: Path) -> Ledger:
    """Scene graphs, cleaned: {"graph", "dropped"} or {"bad"}, a record for each record of the source."""
    drawn = 2 * sum(sizes(cfg, 0).values()) + 400  # enough for rare answers, such as four of a kind
    limit = cfg.limit or (drawn if cfg.source == "drawn" else None)
    settings = {"source": cfg.source, "images": cfg.images, "limit": limit}
    settings |= {"seed": cfg.seed} if cfg.source == "drawn" else {}
    ledger = Ledger(out / "graphs.jsonl", settings)
    bad, dropped, counts = [], Counter(), Counter()

    def tally(record):
        if "bad" in record:
            bad.append(record["bad"])
        else:
            counts.update(graphs=1, objects=len(record["graph"]["objects"]))
            dropped.update(record["dropped"])

    for record in ledger:
        tally(record)
    if not ledger.finished:
        have = counts["graphs"] + len(bad)
        raw_graphs = sources.read(cfg.source, images=cfg.images, n=limit, seed=cfg.seed)
        for raw in tqdm(islice(raw_graphs, have, limit), "read", initial=have, disable=None):
            if isinstance(raw, sources.BadRecord):
                record = {"bad": f"{raw.name}: {raw.message}"}
            else:
                graph, lost = clean(raw)
                record = {"graph": graph.as_dict(), "dropped": dict(lost)}
            tally(record)
            ledger.add(record)
        ledger.add({"end": True})
    say = ", ".join(f"{reason} {count:,}" for reason, count in dropped.most_common())
    print(
        f"read      {counts['graphs']:,} graphs, {counts['objects']:,} objects; dropped: {say or 'nothing'}"
    )
    for line in bad[:5]:
        print(f"          skipped {line}")
    if len(bad) > 5:
        print(f"          and {len(bad) - 5:,} more (grep '\"bad\"' {ledger.path})")
    if not counts["graphs"]:
        raise ValueError(f"{cfg.source}: expected scene graphs, got none that can be read")
    return ledger


def graphs_of(ledger: Ledger, wanted: Iterable[str] | None = None) -> Iterator[SceneGraph]:
    wanted = None if wanted is None else set(wanted)
    for record in ledger:
        if "graph" in record and (wanted is None or record["graph"]["image_id"] in wanted):
            yield SceneGraph.from_dict(record["graph"])


# ---- 2. plan -----------------------------------------------------------------------------------------------
class Pick(NamedTuple):
    """What `choose` has to know of a question: small, since there are twenty of an image."""

    key: str
    image_id: str
    category: str
    form: str
    topic: str
    answer: str
    level: str
    rating: int
    objects: int  # a hash
    text: object
    wrong: range  # as many as there are wrong options


def sizes(cfg: SynthesizeConfig, images: int) -> dict[str, int]:
    """Questions of each split; the tiny set's size where a drawn source and no number is given."""
    n, share = cfg.n or images * cfg.per_image, cfg.val_share
    sizes = {"train": n - int(n * share + 0.5), "val": int(n * share + 0.5)}
    if cfg.source == "drawn" and not cfg.n:
        sizes = {"train": 4096, "val": 512}
    given = {"train": cfg.n_train, "val": cfg.n_val}
    return {split: sizes[split] if given[split] is None else given[split] for split in SPLITS}


def plan(cfg: SynthesizeConfig, out: Path, graphs: Ledger) -> tuple[list[dict], dict[str, int]]:
    """What each image is asked for, {key, image_id, category, level, split}; and the size of each split.

    By rules the key is a question's. For a language model it names image, category and level: what the rules
    could ask there says what the graph supports. Half as much again is planned where models may refuse it.
    """
    excluded = set(Path(cfg.exclude).read_text().split()) if cfg.exclude else set()
    picks, images, left_out = {split: [] for split in SPLITS}, 0, 0
    numbers = sizes(cfg, 1000)
    held_out = numbers["val"] / sum(numbers.values())
    for graph in tqdm(graphs_of(graphs), "plan", disable=None):
        if excluded & {graph.image_id, graph.image_group, graph.image_group.partition(":")[2]}:
            left_out += 1
            continue
        images += 1
        found = picks[split_of(graph.image_group, held_out, cfg.seed)]
        questions = candidates(graph, PER_FORM, voted=bool(cfg.validator))
        if cfg.writer == "rules":
            found += [Pick(q.key, q.image_id, q.category, q.form, q.topic, q.answer, q.level, q.rating,
                           hash(q.objects), hash(q.text), NUMBERS[len(q.wrong)])
                      for q in questions]  # fmt: skip
        for category, level in sorted({(q.category, q.level) for q in questions if cfg.writer != "rules"}):
            key = f"{graph.image_id}/{category}/{level}"
            found.append(
                Pick(key, graph.image_id, category, category, key, key, level, 0, 0, key, NUMBERS[3])
            )
    spare, planned, numbers = 1.5 if cfg.models else 1, [], sizes(cfg, images)
    for split, n in numbers.items():
        for p in choose(picks[split], int(n * spare + 0.5), cfg.shares, cfg.per_image, cfg.seed):
            planned.append({"key": p.key, "image_id": p.image_id, "category": p.category, "level": p.level,
                            "split": split})  # fmt: skip
    write_lines(out / "plan.jsonl", planned)
    counts = Counter(p["category"] for p in planned)
    print(f"plan      {len(planned):,} of {images:,} images" + f"; {left_out:,} excluded" * bool(left_out))
    print(f"          {', '.join(f'{c} {counts[c]:,}' for c in CATEGORIES)}")
    possible = {p.category for found in picks.values() for p in found}
    lacking = [c for c in CATEGORIES if not counts[c] and cfg.shares.get(c) != 0]
    for why, names in (
        ("no graph supports one", [c for c in lacking if c not in possible]),
        ("there are some, too few for even answers and shares", [c for c in lacking if c in possible]),
    ):
        if names:
            print(f"          none of {', '.join(names)}: {why}")
    if not planned and possible:
        raise ValueError(
            f"{cfg.source}: {images:,} images support questions, but too few for even answers and shares: "
            "give more images, or other shares"
        )
    if not planned:
        raise ValueError(f"{cfg.source}: expected graphs that support a question, got none among {images:,}")
    return planned, numbers


# ---- 3. ask ------------------------------------------------------------------------------------------------
def ask(cfg: SynthesizeConfig, out: Path, graphs: Ledger, planned: list[dict], purse) -> dict[str, Question]:
    """{plan's key: question}, by the rules or by a model."""
    plans = {p["key"]: p for p in planned}
    ledger = Ledger(out / "questions.jsonl", {"writer": cfg.writer})
    if cfg.writer == "rules":
        have = {record["key"] for record in ledger}
        todo = {p["image_id"] for p in planned if p["key"] not in have}
        for graph in tqdm(graphs_of(graphs, todo), "ask", total=len(todo), disable=None):
            for q in candidates(graph, PER_FORM, voted=bool(cfg.validator)):
                if q.key in plans and q.key not in have:
                    ledger.add({"key": q.key, "question": asdict(q)})
    else:
        by_image = {}
        for p in planned:
            by_image.setdefault(p["image_id"], []).append(p)
        tasks = ((p["key"], graph, p["category"], p["level"])
                 for graph in graphs_of(graphs, by_image) for p in by_image[graph.image_id])  # fmt: skip
        picture = sources.image_bytes if cfg.show_images else None
        replies = writer.write(tasks, cfg.writer, list(ledger), picture=picture,
                               voted=bool(cfg.validator), **service(cfg, purse))  # fmt: skip
        for record in tqdm(replies, "ask", disable=None):
            ledger.add(record)
    asked = {r["key"]: to_question(r["question"]) for r in ledger if r["key"] in plans and r["question"]}
    faults = Counter(r["fault"].partition(":")[0] for r in ledger if r.get("fault"))
    say = ", ".join(f"{fault} {n:,}" for fault, n in faults.most_common(6))
    print(f"ask       {len(asked):,} questions" + f"; replies refused: {say}" * bool(say))
    return asked


def service(cfg: SynthesizeConfig, purse) -> dict:
    return {"base_url": cfg.base_url, "concurrency": cfg.concurrency, "purse": purse, "seed": cfg.seed}


def to_question(record: dict) -> Question:
    """A question as JSON has it."""
    triples = tuple(map(tuple, record["relationships"]))
    lists = {name: tuple(record[name]) for name in ("wrong", "objects")}
    return Question(**record | lists | {"relationships": triples})


# ---- 4., 5. filter and validate ----------------------------------------------------------------------------
def judge(cfg: SynthesizeConfig, out: Path, graphs: Ledger, asked: dict, purse) -> tuple[dict, dict]:
    """What stays, {plan's key: question}, and all votes, {"blind" or "votes": {question's key: records}}."""
    said, stays = {"blind": {}, "votes": {}}, dict(asked)
    of_image = {}
    for q in asked.values():
        of_image.setdefault(q.image_id, []).append(q)
    items = {q.key: as_item({"split": "", "question": q, "options": (q.answer, *q.wrong)}, graph, said)
             for graph in graphs_of(graphs, of_image) for q in of_image[graph.image_id]}  # fmt: skip
    picture = pictures(cfg, graphs, list(items.values()))
    for name, file, model in (("blind", "blind", cfg.blind), ("votes", "votes", cfg.validator)):
        if not model:
            continue
        ledger, left = Ledger(out / f"{file}.jsonl", {"model": model}), [items[q.key] for q in stays.values()]
        options = {"accept": cfg.accept, "picture": picture} if name == "votes" else {}
        for record in tqdm(getattr(votes, {"blind": "blind", "votes": "validate"}[name])(
            left, model, list(ledger), **options, **service(cfg, purse)
        ), name, disable=None):  # fmt: skip
            ledger.add(record)
        for record in sorted(ledger, key=lambda r: r["vote"]):  # not as they arrived
            said[name].setdefault(record["key"], []).append(record)
        if name == "blind":
            keep = {k for k in items if not votes.is_blind(said[name].get(k, []))}
        else:
            keep = {k for k, i in items.items()
                    if votes.accepted(said[name].get(k, []), cfg.accept, i["unanimous"])}  # fmt: skip
        before, stays = len(stays), {k: q for k, q in stays.items() if q.key in keep}
        print(f"{'filter' if name == 'blind' else 'validate':10}{len(stays):,} of {before:,} stay")
    return stays, said


# ---- 6. select ---------------------------------------------------------------------------------------------
def select(
    cfg, out: Path, graphs: Ledger, planned: list, numbers: dict, asked: dict, said: dict
) -> list[dict]:
    """The set's items, in its order: questions with their gold scenes."""
    decisions = review.read_decisions(out / "review.csv") if (out / "review.csv").exists() else {}
    if unknown := set(decisions) - {q.key for q in asked.values()}:
        print(f"warning: {out}/review.csv: {len(unknown):,} keys are not of this set, first {min(unknown)}")
    chosen = {}
    for name, n in numbers.items():
        of = [asked[p["key"]] for p in planned if p["split"] == name and p["key"] in asked]
        of = [q for q in of if decisions.get(q.key) != "drop"]
        chosen[name] = choose(of, n, cfg.shares, cfg.per_image, cfg.seed)
    options = order_options(cfg.seed, *chosen.values())
    items = [
        {"split": name, "question": q, "options": options[q.key]} for name in chosen for q in chosen[name]
    ]
    by_image = {}
    for item in items:
        by_image.setdefault(item["question"].image_id, []).append(item)
    done = [as_item(i, g, said) for g in graphs_of(graphs, by_image) for i in by_image[g.image_id]]
    done.sort(key=lambda item: (item["split"], hash01(cfg.seed, "row", item["key"])))
    write_lines(out / "selected.jsonl", done)
    say = ", ".join(f"{name} {n:,}" for name, n in Counter(item["split"] for item in done).items())
    drops = list(decisions.values()).count("drop")
    dropped = f"; {drops:,} dropped by review.csv" if drops else ""
    print(f"select    {say}{dropped}")
    return done


def as_item(item: dict, graph: SceneGraph, said: dict) -> dict:
    q, known = item["question"], {o.id: o for o in graph.objects}
    return {
        "key": q.key,
        "split": item["split"],
        "image_id": q.image_id,
        "image": graph.image,
        "width": graph.width,
        "height": graph.height,
        "text": q.text,
        "options": list(item["options"]),
        "answer": q.answer,
        "letter": LETTERS[item["options"].index(q.answer)],
        "objects": [
            {"id": i, "label": known[i].label, "box": whole_box(known[i].box, graph)} for i in q.objects
        ],
        "relationships": q.relationships,
        "category": q.category,
        "level": q.level,
        "rating": q.rating,
        "form": q.form,
        "unanimous": q.form == "count/voted",  # the graph does not vouch for it
        "topic": q.topic,
        "fact": q.fact,
        "writer": q.writer,
        "source": graph.source,
        "image_group": graph.image_group,
        "licence": graph.licence,
        "votes": said.get("votes", {}).get(q.key, []),
        "blind": said.get("blind", {}).get(q.key, []),
    }


def provenance(item: dict) -> dict[str, str]:
    states = {name: Counter(vote["state"] for vote in item[name]) for name in ("votes", "blind")}
    said = {name: ", ".join(f"{n} {state}" for state, n in sorted(c.items())) for name, c in states.items()}
    return {name: said.get(name, item[name]) for name in PROVENANCE}


def whole_box(box, graph: SceneGraph) -> list[int]:
    """A box in whole pixels, at least one wide and high, inside the image."""
    x1, y1 = min(int(box[0] + 0.5), graph.width - 1), min(int(box[1] + 0.5), graph.height - 1)
    return [x1, y1, max(int(box[2] + 0.5), x1 + 1), max(int(box[3] + 0.5), y1 + 1)]


def pictures(cfg: SynthesizeConfig, graphs: Ledger, items: list[dict]):
    """A function from an item to its encoded picture. Of drawn scenes the graph is the picture."""
    drawn = [i["image_id"] for i in items if i["source"] == "drawn"]
    scenes = {g.image_id: g for g in graphs_of(graphs, drawn)} if drawn else {}
    return lambda item: sources.image_bytes(scenes.get(item["image_id"]) or SimpleNamespace(**item))


# ---- 7. export ---------------------------------------------------------------------------------------------
def export(cfg: SynthesizeConfig, out: Path, graphs: Ledger, items: list[dict]):
    """A parquet file for each split, and the card. Rows whose picture is missing are left out and named."""
    features = stvqa_features(**dict.fromkeys(PROVENANCE, "string"))
    picture = pictures(cfg, graphs, items)
    missing = []

    def rows(split):
        for item in items:
            if item["split"] != split:
                continue
            try:
                image = picture(item)
            except OSError as error:
                missing.append(f"{item['image_id']}: {error}")
                continue
            yield stvqa_row(
                image_id=item["image_id"],
                image=image,
                size=(item["width"], item["height"]),
                text=item["text"],
                options=item["options"],
                answer=item["answer"],
                objects=[(o["id"], o["box"]) for o in item["objects"]],
                relationships=item["relationships"],
                category=item["category"],
                level=item["level"],
                rating=item["rating"],
            ) | provenance(item)

    for split in SPLITS:
        write_parquet(out / f"{split}.parquet", rows(split), features)
        print(f"export    wrote {out / split}.parquet")
    for line in missing[:5]:
        print(f"          left out {line}")
    if len(missing) > 5:
        print(f"          and {len(missing) - 5:,} more")
    if len(missing) == len(items):
        for split in SPLITS:  # without a row each
            (out / f"{split}.parquet").unlink()
        raise ValueError(
            f"images={cfg.images}: none of {len(items):,} pictures can be read, first {missing[0]}"
        )


# ---- the card and the page ---------------------------------------------------------------------------------
def tables(items: list[dict], shares: dict[str, float]) -> dict[str, list[tuple]]:
    """{title: rows}; the first row of each names the columns. By shares: were no category rare."""
    wanted = quotas(len(items), shares, dict.fromkeys(CATEGORIES, len(items)))
    splits = Counter((i["category"], i["split"]) for i in items)
    levels = Counter((i["level"], i["split"]) for i in items)
    letters = Counter((len(i["options"]), i["letter"]) for i in items)
    counts, guesses = [], []
    for form, of in groupby(sorted(items, key=lambda i: i["form"]), lambda i: i["form"]):
        of = list(of)
        most = Counter(i["answer"] for i in of).most_common(1)[0][1]
        counts.append((form, len(of)))
        guesses.append((form, sum(1 / len(i["options"]) for i in of) / len(of), most / len(of)))
    first, numbers = LETTERS[: max((n for n, _ in letters), default=0)], sorted({n for n, _ in letters})
    return {
        "Questions": [
            ("category", *SPLITS, "by shares"),
            *((c, *(splits[c, s] for s in SPLITS), wanted[c]) for c in CATEGORIES),
        ],
        "Levels": [("level", *SPLITS), *((v, *(levels[v, s] for s in SPLITS)) for v in LEVELS)],
        "Right letters": [("options", *first), *((str(n), *(letters[n, x] for x in first)) for n in numbers)],
        "Always the most frequent answer of a form": [("form", "chance", "right"), *guesses],
        "Forms of question": [("form", "questions"), *counts],
    }


def vote_tables(out: Path) -> dict[str, list[tuple]]:
    """How often the models were right, by category, about all that was asked of them: kept and dropped."""
    found, category = {}, {}
    for name, title in (("votes", "Right votes of the validator"), ("blind", "Right without the picture")):
        if not (out / f"{name}.jsonl").exists():
            continue
        if not category:
            asked = (r["question"] for r in Ledger(out / "questions.jsonl") if r["question"])
            category = {q["key"]: q["category"] for q in asked}
        states = Counter((category.get(r["key"]), r["state"]) for r in Ledger(out / f"{name}.jsonl"))
        votes = {c: states[c, "right"] + states[c, "wrong"] for c in CATEGORIES}
        rows = [(c, states[c, "right"] / n) for c, n in votes.items() if n]
        if rows:
            found[title] = [("category", "right"), *rows]
    return found


def describe(cfg: SynthesizeConfig, items: list[dict]) -> dict:
    """The card: what is in the set, and how it was made."""
    licences = Counter(i["licence"] or "not stated" for i in items)
    return {
        "name": cfg.push_to_hub or "Spatial questions",
        "totals": {"questions": len(items), "images": len({i["image_id"] for i in items})}
        | dict(Counter(i["split"] for i in items)),
        "tables": tables(items, cfg.shares) | vote_tables(Path(cfg.out)),
        "models": {"writer": cfg.writer, "blind": cfg.blind or "none", "validator": cfg.validator or "none"},
        "cost": {"models": round(spent(Path(cfg.out)), 2)} if cfg.models else {},
        "notes": [f"prompts of the writer: {writer.PROMPTS}"] * (cfg.writer != "rules")
        + [f"source: {cfg.source}", f"seed: {cfg.seed}"]
        + [f"licence of {n:,} pictures: {licence}" for licence, n in licences.most_common()],
    }


def write_card(card: dict, path: Path):
    """README.md with the Hub's header."""
    lines = ["---", "task_categories: [visual-question-answering]", "tags: [spatial-reasoning, scene-graph]",
             "configs:", "- config_name: default", "  data_files:",
             *(f"  - {{split: {s}, path: {s}.parquet}}" for s in SPLITS), "---", "", f"# {card['name']}", "",
             "Spatial questions, gold scenes and provenance, in STVQA-7K's columns.", ""]  # fmt: skip
    lines += [f"- {name}: {n:,}" for name, n in card["totals"].items()]
    lines += [f"- {role}: {model}" for role, model in card["models"].items()]
    lines += [f"- cost: {name} {value}" for name, value in card["cost"].items()]
    lines += [f"- {note}" for note in card["notes"]]
    for title, rows in card["tables"].items():
        head, *body = ([f"{v:.1%}" if isinstance(v, float) else f"{v}" for v in row] for row in rows)
        lines += ["", f"## {title}", "", "| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
        lines += ["| " + " | ".join(row) + " |" for row in body]
    with write_whole(path) as tmp:
        tmp.write_text("\n".join(lines) + "\n", encoding="utf-8")


def upload(cfg: SynthesizeConfig, out: Path):
    """The parquet files and the card to the Hub, for nobody else to see unless public=true."""
    from huggingface_hub import HfApi

    api = HfApi()
    api.create_repo(cfg.push_to_hub, repo_type="dataset", private=not cfg.public, exist_ok=True)
    files = ["README.md", *(f"{split}.parquet" for split in SPLITS)]
    api.upload_folder(repo_id=cfg.push_to_hub, repo_type="dataset", folder_path=out, allow_patterns=files)
    print(f"upload    {cfg.push_to_hub}, {'public' if cfg.public else 'private'}")


def report(cfg: SynthesizeConfig, out: Path, graphs: Ledger, items: list[dict]):
    """The card as a file, and the page."""
    card = describe(cfg, items)
    write_card(card, out / "README.md")
    review.write_page(items, card, out / "report.html", pictures(cfg, graphs, items))
    print(f"report    {out}/report.html: keep or drop, save review.csv into {out}, and run again")


# ---- main --------------------------------------------------------------------------------------------------
def main():
    cfg = SynthesizeConfig.parse_args()
    out = Path(cfg.out)
    if (out / "config.yaml").exists():  # what this folder was begun with, unless said otherwise
        cfg = SynthesizeConfig.parse_args([out / "config.yaml", *sys.argv[1:]])
    with plain_errors(), model_errors():
        if not out.exists() and cfg.source != "measured":
            # A folder that was begun may have all that it needs of its source.
            sources.read(cfg.source, images=cfg.images)  # reads nothing yet, but refuses what is no source
        out.mkdir(parents=True, exist_ok=True)
        with alone(out):
            if cfg.source == "measured":
                return tiny.write_measured(cfg, out)
            if cfg.report:
                items = read_lines(out / "selected.jsonl")
                return report(cfg, out, Ledger(out / "graphs.jsonl"), items)
            purse = writer.Purse(cfg.budget, cfg.prices, spent(out)) if cfg.models else None
            graphs = read(cfg, out)
            write_run_record(cfg.model_copy(update={"push_to_hub": None, "public": False}), out)
            planned, numbers = plan(cfg, out, graphs)
            asked = ask(cfg, out, graphs, planned, purse)
            stays, said = judge(cfg, out, graphs, asked, purse)
            items = select(cfg, out, graphs, planned, numbers, stays, said)
            export(cfg, out, graphs, items)
            report(cfg, out, graphs, items)
            if cfg.worked:
                tiny.write_worked(cfg, out, {i["image_id"] for i in items})
            if cfg.push_to_hub:
                upload(cfg, out)


@contextlib.contextmanager
def model_errors():
    """End with one line where no model answers, or the money is spent. What was paid for is on disk."""
    try:
        yield
    except (NoService, writer.BudgetSpent) as error:
        raise SystemExit(f"error: {error}") from None
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from here", file=sys.stderr)
        raise SystemExit(130) from None


def spent(out: Path) -> float:
    """Dollars that earlier runs in a folder have paid."""
    files = [out / f"{name}.jsonl" for name in ("questions", "blind", "votes")]
    return sum(r.get("dollars", 0) for f in files if f.exists() for r in read_lines(f))


@contextlib.contextmanager
def alone(out: Path):
    """One run at a time in a folder; the lock goes with the process, however it ends."""
    with open(out / ".lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ValueError(f"{out}: another run is at work in this folder") from None
        yield


if __name__ == "__main__":
    main()
