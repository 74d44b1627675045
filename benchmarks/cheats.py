"""What honest work and cheats earn under the spatial reward and each of its options.

    python benchmarks/cheats.py               # two tables of docs/rewards.md; a quarter of a minute
    python benchmarks/cheats.py --source vg:/data/visual_genome gqa:/data/gqa     # of real scenes as well

Scenes are those of the drawn set, and of graphs like Visual Genome's (tests/graph_files.py), with questions
by the rules of questions.py. A constant scene is the one that earns most, searched anew for every
column, as a policy would find it.
"""

import argparse
import itertools
import os
import random
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

for variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ[variable] = "1"
sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[1] / "tests")]

from graph_files import write_big_vg  # noqa: E402

import tiny  # noqa: E402
from config import plain_errors  # noqa: E402
from questions import candidates  # noqa: E402
from rewards import Weights, score_completion  # noqa: E402
from scenes import clean  # noqa: E402
from selection import choose, order_options  # noqa: E402
from sources import read  # noqa: E402
from stvqa import LETTERS, scene_json  # noqa: E402

RELATION = Weights(accuracy=0.3, relation=0.2)  # the relation term's weight comes from the answer's
COLUMNS = {
    "default": {},
    "gate=false": {"gate": False},
    "positive_ciou": {"box_credit": "positive_ciou"},
    "iou50": {"box_credit": "iou50"},
    "need_label": {"need_label": True},
    "positive_ciou, need_label": {"box_credit": "positive_ciou", "need_label": True},
    "relation": {"weights": RELATION},
}
CENTRED = [(0.5 - side / 2, 0.5 - side / 2, 0.5 + side / 2, 0.5 + side / 2) for side in (0.25, 0.5, 0.75, 1)]
FITTED_ON = 40  # scenes on which a constant scene is searched


class Scene(NamedTuple):
    objects: list  # (id, box01)
    relationships: list  # (id, predicate, id)
    options: list[str]  # "(A) left"
    answer: str
    size: tuple[int, int]


# ---- scenes ------------------------------------------------------------------------------------------------
def as_scene(graph, question, options) -> Scene:
    sides = (graph.width, graph.height) * 2
    box = {o.id: [x / side for x, side in zip(o.box, sides, strict=True)] for o in graph.objects}
    lettered = [f"({LETTERS[i]}) {text}" for i, text in enumerate(options)]
    objects = [(name, box[name]) for name in question.objects]
    answer = lettered[list(options).index(question.answer)]
    return Scene(objects, list(question.relationships), lettered, answer, sides[:2])


def drawn(n: int, seed: int = 0) -> list[Scene]:
    return [as_scene(*asked) for asked in tiny.ask(n, f"{seed} cheats", {"relation": 0.5}, set())]


def like_vg(n: int, seed: int = 0) -> list[Scene]:
    with tempfile.TemporaryDirectory() as folder:
        write_big_vg(Path(folder), n, seed)
        return of_source(n, seed, f"vg:{folder}")


def of_source(n: int, seed: int, *sources: str) -> list[Scene]:
    """At most n questions about the scene graphs of KIND:PATH, as synthesize.py reads them."""
    graphs = [clean(raw)[0] for source in sources for raw in read(source)]
    by_id = {graph.image_id: graph for graph in graphs}
    chosen = choose([q for graph in graphs for q in candidates(graph, 2)], n, {"relation": 0.5}, 2, seed)
    options = order_options(seed, chosen)
    return [as_scene(by_id[q.image_id], q, options[q.key]) for q in chosen]


# ---- what a policy may write -------------------------------------------------------------------------------
def completion(scene: Scene, objects, relationships, answer: str) -> str:
    sides = scene.size * 2
    objects = [(name, [x * side for x, side in zip(box, sides, strict=True)]) for name, box in objects]
    graph = scene_json(objects, relationships)
    return f"<observe>o</observe><scene>{graph}</scene><think>t</think><answer>{answer}</answer>"


def noisy(scene: Scene, rng) -> list:
    """Every coordinate off by 0.15 of the image in the mean square."""

    def span(low, high):
        low, high = sorted(min(max(x + rng.gauss(0, 0.15), 0), 0.99) for x in (low, high))
        return low, max(high, low + 0.01)

    spans = [(name, span(box[0], box[2]), span(box[1], box[3])) for name, box in scene.objects]
    return [(name, (x[0], y[0], x[1], y[1])) for name, x, y in spans]


def chain(ids: list[str], n: int) -> list[tuple]:
    """n made-up relations between different objects."""
    return [(a, "near", b) for a, b in itertools.islice(itertools.permutations(ids, 2), n)]


def constant(n: int, relations: int, box) -> tuple[list, list]:
    ids = [f"thing.{i}" for i in range(1, n + 1)]
    return [(i, box) for i in ids], chain(ids, relations)


def junk(scene: Scene, objects: list) -> tuple[list, list]:
    name = {old: f"zzz.{i}" for i, (old, _) in enumerate(objects)}
    return [(name[old], box) for old, box in objects], [
        (name[s], p, name[o]) for s, p, o in scene.relationships
    ]


def identical(scene: Scene, true_names: bool) -> tuple[list, list]:
    ids = [name if true_names else f"thing.{i}" for i, (name, _) in enumerate(scene.objects)]
    made_up = chain(ids, len(scene.relationships))
    return [(i, CENTRED[1]) for i in ids], scene.relationships if true_names else made_up


def made_up(scene: Scene) -> list[tuple]:
    return chain([name for name, _ in scene.objects], len(scene.relationships))


def flood(scene: Scene, predicates: list[str]) -> list[tuple]:
    pairs = itertools.permutations([name for name, _ in scene.objects], 2)
    return [(a, p, b) for a, b in pairs for p in predicates][:1000]


# ---- measuring ---------------------------------------------------------------------------------------------
def earned(scene: Scene, parts: tuple[list, list], answer: str, options: dict) -> float:
    boxes = [
        (name, [x * side for x, side in zip(b, scene.size * 2, strict=True)]) for name, b in scene.objects
    ]
    gold = f"<scene>{scene_json(boxes, scene.relationships)}</scene><answer>{scene.answer}</answer>"
    return score_completion(completion(scene, *parts, answer), gold, scene.size, **options).reward


def best_constant(scenes: list[Scene], options: dict) -> tuple[list, list]:
    tried = [constant(*c) for c in itertools.product(range(1, 5), range(3), CENTRED) if c[1] < max(c[0], 1)]
    some = scenes[:FITTED_ON]
    return max(tried, key=lambda parts: sum(earned(s, parts, s.answer, options) for s in some))


def policies(scenes: list[Scene], options: dict) -> dict:
    """{who: scene, rng -> (objects and relations, answer)}"""
    best = best_constant(scenes, options)
    predicates = sorted({p for s in scenes for _, p, _ in s.relationships})
    whole = constant(1, 0, CENTRED[-1])
    return {
        "honest, perfect": lambda s, rng: ((s.objects, s.relationships), s.answer),
        "honest, noise 0.15": lambda s, rng: ((noisy(s, rng), s.relationships), s.answer),
        "the same, junk labels": lambda s, rng: (junk(s, noisy(s, rng)), s.answer),
        "all but boxes known, boxes identical": lambda s, rng: (identical(s, True), s.answer),
        "answer and counts known, boxes identical": lambda s, rng: (identical(s, False), s.answer),
        "answer known, best constant scene": lambda s, rng: (best, s.answer),
        "answer known, whole-image box": lambda s, rng: (whole, s.answer),
        "neither: best constant scene, any answer": lambda s, rng: (best, rng.choice(s.options)),
        "perfect but relations: made up": lambda s, rng: ((s.objects, made_up(s)), s.answer),
        "perfect but relations: all of them": lambda s, rng: ((s.objects, flood(s, predicates)), s.answer),
    }


def measure(scenes: list[Scene], columns=COLUMNS) -> dict[str, dict[str, list[float]]]:
    """{who: {column: the reward on each scene}}, with the same noise in every column."""
    table = {}
    for column, options in columns.items():
        for who, policy in policies(scenes, options).items():
            rng = random.Random(who.replace("the same, junk labels", "honest, noise 0.15"))
            said = [policy(s, rng) for s in scenes]
            rewards = [earned(s, *what, options) for s, what in zip(scenes, said, strict=True)]
            table.setdefault(who, {})[column] = rewards
    return table


def markdown(table: dict) -> str:
    head = ["", *COLUMNS]
    lines = [[who, *(f"{sum(r) / len(r):.3f}" for r in row.values())] for who, row in table.items()]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [head, ["---"] * len(head), *lines])


def main(argv: list[str] | None = None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--n", type=int, default=400, help="questions of each kind of scene")
    parser.add_argument(
        "--source", nargs="*", default=[], help="KIND:PATH of scene graphs, for a third table"
    )
    args = parser.parse_args(argv)
    with plain_errors():
        real = {" ".join(args.source): of_source(args.n, 0, *args.source)} if args.source else {}
    tables = {"Drawn scenes": drawn(args.n), "Scenes like Visual Genome's": like_vg(args.n)} | real
    for name, scenes in tables.items():
        objects, relations = (
            sum(map(len, part)) / len(scenes) for part in list(zip(*scenes, strict=True))[:2]
        )
        print(f"{name}, {len(scenes)} questions, {objects:.1f} objects and {relations:.1f} relations each:\n")
        print(markdown(measure(scenes)), end="\n\n", flush=True)


if __name__ == "__main__":
    main()
