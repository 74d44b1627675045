"""What each part of the reward is worth: the same start, the same completions, eight ways to learn from them.

    python benchmarks/study.py                        # every arm, three seeds; two hours on two cores
    python benchmarks/study.py quick=true             # three arms of one seed; a quarter of an hour
    python benchmarks/study.py "arms=[dense,sparse]" "seeds=[0]"
    python benchmarks/study.py report=true results=assets/study      # picture and table of what is there

An arm is configs/study/ARM.yaml on top of configs/measured.yaml, or of configs/study/sft.yaml. Each arm and
seed is trained, merged, evaluated on all held-out rows, and leaves one small file in `results`: what is
there is not done again, and a killed run goes on from its last checkpoint. Those of the README are in
assets/study. The rows are the measured set's of tiny.py: who reads off exact boxes answers right.
"""

import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from hashlib import sha256
from pathlib import Path

import numpy as np
import yaml

REPO = Path(__file__).parents[1]
sys.path.insert(0, str(REPO))

import tiny  # noqa: E402
from config import Config, opt, write_whole  # noqa: E402
from results import read_records  # noqa: E402

ARMS = (
    "dense",
    "no_gate",
    "spatial",
    "sparse",
    "sparse_relation",
    "dense_strict",
    "sft_answers",
    "sft_scenes",
)
START = "start"  # no arm: what all begin with
QUICK = ("dense", "sparse", "sft_scenes")
TERMS = ("correct", "reward", "iou", "recall50", "count", "format", "worst_iou", "relations")
SHOWN = {"accuracy": "correct", "reward": "reward", "IoU": "iou", "found": "recall50"}
SHOWN |= {"count": "count", "format": "format"}
MEASURED = tiny.MEASURES, tiny.MARK, tiny.FINE, tiny.VAGUE, tiny.NEARLY  # what the rows depend on
SEEN = 0.75  # a scene is right if every gold object is found at this IoU
DRAWS = 4000  # of the bootstrap


class StudyConfig(Config):
    arms: list[str] = opt(list(ARMS), "arms to run, of configs/study")
    seeds: list[int] = opt([0, 1, 2], "seeds of each")
    quick: bool = opt(False, f"only {', '.join(QUICK)}, seed 0")
    jobs: int = opt(2, "runs at a time; they share the cores", ge=1)
    report: bool = opt(False, "run nothing: draw and print what is there")
    out: str = opt("runs/study", "folder of data and runs", path=True)
    results: str = opt("runs/study/results", "folder of the small result files", path=True)


# ---- running -----------------------------------------------------------------------------------------------
def run(*command, log: Path | None = None, threads: int | None = None):
    """A stage in its own process, its output on the terminal or at the end of `log`.

    Raises: SystemExit with its status and what it was.
    """
    words = [str(word) for word in command]
    print(" ".join(["$", *words]) + "\n", end="", flush=True)  # in one piece, others print too
    env = os.environ | ({"OMP_NUM_THREADS": str(threads)} if threads else {})
    with open(log or os.devnull, "a") as file:
        where = {"stdout": file, "stderr": subprocess.STDOUT} if log else {}
        status = subprocess.run([sys.executable, *words], cwd=REPO, env=env, **where).returncode
    if status:
        more = f", see {log}" if log else ""
        raise SystemExit(f"error: {words[0]} ended with status {status}{more}; the same command goes on")


def configs(arm: str) -> list[str]:
    base = "configs/study/sft.yaml" if arm.startswith("sft") else "configs/measured.yaml"
    return [base, f"configs/study/{arm}.yaml"]


def identity(arm: str) -> str:
    """Changes with the arm's settings, the data and the start."""
    settings = [yaml.safe_load((REPO / path).read_text()) for path in (configs(arm) if arm != START else ())]
    start = sha256((REPO / "assets/measured/model.safetensors").read_bytes()).hexdigest()
    return sha256(json.dumps([settings, start, MEASURED], sort_keys=True).encode()).hexdigest()[:16]


def do(arm: str, seed: int, cfg: StudyConfig):
    """Train, merge, evaluate, and leave the result file."""
    out, began = Path(cfg.out), time.time()
    folder, model = out / f"{arm}-{seed}", "assets/measured"
    how = {"log": out / f"{arm}-{seed}.log", "threads": max(1, (os.cpu_count() or 1) // cfg.jobs)}
    settings = [f"data={out}/data/train.parquet", f"seed={seed}", f"out={folder}"]
    if arm.startswith("sft"):
        run("train_sft.py", *configs(arm), *settings, **how)
        model = folder / "final"
    elif arm != START:
        run("train_grpo.py", *configs(arm), f"val_data={out}/data/val.parquet", *settings, **how)
        model = folder / "merged"
        if not model.exists():
            run("merge.py", folder, model, **how)
    name = f"{arm}-{seed}"
    asked = ["--dataset", out / "data" / "val.parquet", "--min_pixels", 784, "--max_new_tokens", 192]
    asked += ["--model_path", model, "--out", out / "answers", "--custom_filename", name]
    run("evaluate.py", *asked, **how)
    _, records = read_records(out / "answers" / f"{name}.jsonl")
    minutes = round((time.time() - began) / 60, 1)
    result = {"arm": arm, "seed": seed, "identity": identity(arm), "minutes": minutes}
    result |= {"curve": curve(folder / "metrics.jsonl"), "items": items(records)}
    path = Path(cfg.results) / f"{arm}-{seed}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    with write_whole(path) as tmp:
        Path(tmp).write_text(json.dumps(result, separators=(",", ":")) + "\n")


def do_all(wanted: list[tuple[int, str]], cfg: StudyConfig):
    """These seeds and arms, cfg.jobs at a time; after a failure none is begun."""
    with ThreadPoolExecutor(cfg.jobs) as pool:
        jobs = [pool.submit(do, arm, seed, cfg) for seed, arm in wanted]
        try:
            for job in as_completed(jobs):
                job.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def curve(path: Path) -> list[dict]:
    """Held-out figures of a GRPO run by step."""
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    kept = ("val_accuracy", "val_mean_iou", "val_recall50", "val_format", "val_reward", "reward")
    return [
        {"step": m["step"]} | {k: round(m[k], 4) for k in kept if k in m}
        for m in lines
        if "val_accuracy" in m
    ]


def items(records: list[dict]) -> dict[str, list]:
    """{term: its value for each held-out row, by row}."""
    rows = []
    for r in sorted(records, key=lambda r: r["row"]):
        ious = [iou for *_, iou, _ in r["matches"]] + [0.0] * (r["gold_objects"] - len(r["matches"]))
        terms = r["terms"] | {"correct": int(r["correct"]), "iou": sum(ious) / len(ious)}
        terms |= {"worst_iou": min(ious), "recall50": r["recall50"], "relations": r["triplet_jaccard"]}
        values = [round(float(terms[t]), 3) for t in TERMS]
        rows.append([int(v) if v.is_integer() else v for v in values])
    return dict(zip(TERMS, map(list, zip(*rows, strict=True)), strict=True))


# ---- figures -----------------------------------------------------------------------------------------------
def load(cfg: StudyConfig) -> dict[str, dict[int, dict]]:
    """{arm: {seed: result}} of the files that are there. Raises: SystemExit if one is damaged, of other
    settings, or of another number of rows."""
    found, sizes = {}, {}
    for arm in (START, *ARMS):
        for path in sorted(Path(cfg.results).glob(f"{arm}-*.json")):
            result = read_result(path)
            if result["identity"] != identity(arm):
                why = f"was made with other settings, data or start; remove it and what {cfg.out} has of it"
                raise SystemExit(f"error: {path} {why}")
            sizes[len(result["items"]["correct"])] = path.name
            found.setdefault(arm, {})[result["seed"]] = result
    if len(sizes) > 1:
        rows = " and ".join(f"{n} ({name})" for n, name in sizes.items())
        raise SystemExit(f"error: {cfg.results}: expected the same held-out rows in all, got {rows}")
    return found


def read_result(path: Path) -> dict:
    """What `do` has left. Raises: SystemExit if it is not whole, or under another's name."""
    try:
        result = json.loads(path.read_text())
        name, steps = f"{result['arm']}-{result['seed']}", [point["step"] for point in result["curve"]]
        values = np.array([result["items"][term] for term in TERMS], dtype=float)  # (terms, N)
        whole = (
            name == path.stem and type(result["seed"]) is int and values.size and {"identity"} <= set(result)
        )
        whole = whole and np.isfinite([*values.ravel(), *steps]).all()
    except (ValueError, KeyError, TypeError, AttributeError):
        whole = False
    if not whole:
        raise SystemExit(f"error: {path} is no whole result of this name; remove it")
    return result


def matrix(seeds: dict[int, dict], term: str) -> np.ndarray:
    """(S, N): a term by seed and held-out row."""
    return np.array([result["items"][term] for _, result in sorted(seeds.items())], dtype=float)


def interval(values: np.ndarray) -> tuple[float, float]:
    """95 % of the mean of (S, N) values: seeds and rows are both drawn with replacement."""
    (s, n), rng = values.shape, np.random.default_rng(0)
    by_seed = rng.multinomial(s, [1 / s] * s, DRAWS) / s  # (DRAWS, S)
    by_row = rng.multinomial(n, [1 / n] * n, DRAWS) / n  # (DRAWS, N)
    means = ((by_seed @ values) * by_row).sum(1)
    return tuple(np.quantile(means, [0.025, 0.975]))


def p_value(change: np.ndarray) -> float:
    """Two-sided, of (N,) changes: signs flipped at random, the row being what was drawn."""
    signs = np.random.default_rng(0).integers(0, 2, (DRAWS, len(change)), dtype=np.int8) * 2 - 1
    return (1 + (abs(signs @ change) >= abs(change.sum()) - 1e-9).sum()) / (1 + DRAWS)


def against(arm: dict[int, dict], dense: dict[int, dict]) -> np.ndarray | None:
    """(S, N): answers that turn right (1) or wrong (-1) from dense to the arm, over seeds that both have."""
    both = sorted(arm.keys() & dense.keys())
    pick = [{s: results[s] for s in both} for results in (arm, dense)]
    return matrix(pick[0], "correct") - matrix(pick[1], "correct") if both else None


def table(found: dict) -> str:
    """Markdown, a line an arm: percent, with half of a 95 % interval."""

    def shown(values, sign: str = "") -> str:
        low, high = interval(values)
        return f"{100 * values.mean():{sign}.1f}±{50 * (high - low):.1f}"

    lines = [["", *SHOWN, "right/wrong", "to dense", "p"]]
    lines.append(["---"] * len(lines[0]))
    for arm, seeds in found.items():
        right, correct = matrix(seeds, "worst_iou") >= SEEN, matrix(seeds, "correct")
        split = [f"{100 * correct[where].mean():.0f}" if where.any() else "-" for where in (right, ~right)]
        cells = [arm, *(shown(matrix(seeds, term)) for term in SHOWN.values()), "/".join(split), "", ""]
        dense = found.get("dense", {})
        if arm == START:  # it has no seeds of its own
            seeds = dict.fromkeys(dense, next(iter(seeds.values())))
        if arm != "dense" and (change := against(seeds, dense)) is not None:
            p = p_value(change.mean(0))
            cells[-2:] = shown(change, "+"), f"{p:.3f}" if p >= 0.001 else "<.001"
        lines.append(cells)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def draw(found: dict, path: Path):
    """Held-out accuracy and IoU of every arm by step: the mean of its seeds in a band from least to most."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    panels = {"held-out accuracy": ("val_accuracy", "correct"), "held-out IoU": ("val_mean_iou", "iou")}
    figure, axes = plt.subplots(1, 2, figsize=(12, 4.6), constrained_layout=True)
    for axis, (title, (key, term)) in zip(axes, panels.items(), strict=True):
        for i, (arm, seeds) in enumerate((a, s) for a, s in found.items() if a != START):
            curves = [{p["step"]: p[key] for p in r["curve"] if key in p} for r in seeds.values()]
            steps = sorted(set.intersection(*map(set, curves)))
            color = f"C{i}"
            if steps:
                values = np.array([[c[s] for s in steps] for c in curves])
                axis.plot(steps, values.mean(0), color=color, label=arm, lw=5 if arm == "dense" else 1.6)
                axis.fill_between(steps, values.min(0), values.max(0), color=color, alpha=0.15, lw=0)
            elif term == "correct":  # supervised: where it ends
                axis.axhline(matrix(seeds, term).mean(), color=color, ls=":", label=f"{arm} (its end)")
        axis.set(title=title, xlabel="step")
        axis.grid(alpha=0.3)
    if set(found) > {START}:
        axes[0].legend(fontsize=8)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main():
    cfg = StudyConfig.parse_args()
    os.chdir(REPO)
    out = Path(cfg.out)
    if unknown := set(cfg.arms) - set(ARMS):
        raise SystemExit(f"error: arms: expected some of {', '.join(ARMS)}, got {', '.join(sorted(unknown))}")
    arms, seeds = (QUICK, [0]) if cfg.quick else (cfg.arms, cfg.seeds)
    found = load(cfg)
    if not cfg.report:
        if not (out / "data" / "train.parquet").exists():
            run("synthesize.py", "source=measured", f"out={out}/data")
        wanted = dict.fromkeys([(0, START)] + [(seed, arm) for seed in seeds for arm in arms])  # each once
        wanted = [(seed, arm) for seed, arm in wanted if seed not in found.get(arm, {})]
        do_all(wanted, cfg)
        found = load(cfg)
    if not found:
        raise SystemExit(f"error: no results in {cfg.results}")
    out.mkdir(parents=True, exist_ok=True)
    draw(found, out / "study.png")
    text = table(found)
    (out / "study.md").write_text(text + "\n")
    print(text, f"\nwrote {out}/study.png, {out}/study.md")


if __name__ == "__main__":
    main()
