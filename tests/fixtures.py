"""A few rows of every benchmark in its schema, features included, on drawn images; right replies; flags.

    python tests/fixtures.py FOLDER        # FOLDER/cv-bench.parquet ... for --dataset all --local_path FOLDER

The Hub's own rows cannot be shipped. Columns are those of testsets.py's sources and the others that the data
sets' cards list.
"""

import base64
import io
import json
import sys
from pathlib import Path

import numpy as np
from datasets import Dataset, Features, Image, List, Value
from PIL import Image as PIL

TEXT, WHOLE, IMAGE, TEXTS = Value("string"), Value("int64"), Image(), List(Value("string"))


def png(seed: int, size=(84, 56)) -> bytes:
    """A small picture of its own for every seed."""
    pixels = np.random.default_rng(seed).integers(0, 255, (4, 6, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    PIL.fromarray(pixels).resize(size, PIL.Resampling.NEAREST).save(buffer, "PNG")
    return buffer.getvalue()


def image(seed: int) -> dict:
    return {"bytes": png(seed), "path": None}


def lettered(options) -> str:
    return "\n".join(f"({letter}) {o}" for letter, o in zip("ABCDEF", options, strict=False))


def cv_bench():
    """Two of each source; the right ones, were every second answer right, are by hand in the tests."""
    features = {
        "idx": WHOLE,
        "type": TEXT,
        "task": TEXT,
        "image": IMAGE,
        "question": TEXT,
        "choices": TEXTS,
        "answer": TEXT,
        "prompt": TEXT,
        "filename": TEXT,
        "source": TEXT,
        "source_dataset": TEXT,
        "source_filename": TEXT,
        "target_class": TEXT,
        "target_size": TEXT,
        "bbox": List(List(Value("float64"))),
    }
    rows = []
    kinds = [
        ("2D", "Count", "ADE20K"),
        ("2D", "Relation", "ADE20K"),
        ("2D", "Count", "COCO"),
        ("3D", "Depth", "Omni3D"),
        ("3D", "Distance", "Omni3D"),
        ("2D", "Relation", "COCO"),
    ]
    for i, (dimensions, task, source) in enumerate(kinds):
        choices = ["3", "13", "1", "0"] if task == "Count" else ["lamp", "arm chair"]
        question = "How many chairs are in the image?" if task == "Count" else "Which object is closer?"
        rows.append(
            {
                "idx": i,
                "type": dimensions,
                "task": task,
                "image": image(i),
                "question": question,
                "choices": choices,
                "answer": f"({'AB'[i % 2]})",
                "prompt": f"{question} Select from the following choices.\n{lettered(choices)}",
                "filename": f"img/{i}.png",
                "source": source,
                "source_dataset": f"{source} val",
                "source_filename": f"{i}.jpg",
                "target_class": None,
                "target_size": None,
                "bbox": None,
            }
        )
    return features, rows


def blink(task: str):
    features = {
        "idx": TEXT,
        "question": TEXT,
        "sub_task": TEXT,
        **{f"image_{i}": IMAGE for i in range(1, 5)},
        "choices": TEXTS,
        "answer": TEXT,
        "prompt": TEXT,
        "explanation": TEXT,
    }
    choices, n_images = {
        "Spatial_Relation": (["yes", "no"], 1),
        "Relative_Depth": (["A is closer", "B is closer"], 1),
        "Object_Localization": (["Box A", "Box B"], 1),
        "Counting": (["0", "3", "2", "1"], 1),
        "Multi-view_Reasoning": (["left", "right"], 2),
        "Jigsaw": (["the second image", "the third image"], 3),
    }[task]
    rows = []
    for i in range(4):
        images = {f"image_{k}": image(10 * i + k) if k <= n_images else None for k in range(1, 5)}
        rows.append(
            {
                "idx": f"val_{task}_{i}",
                "question": "Which one?",
                "sub_task": task,
                **images,
                "choices": choices,
                "answer": f"({'AB'[i % 2]})",
                "explanation": "",
                "prompt": f"Look at the picture. Which one?\nSelect from the following choices.\n"
                f"{lettered(choices)}",
            }
        )
    return features, rows


def realworld_qa():
    features = {"image": IMAGE, "question": TEXT, "answer": TEXT}
    only = "Please answer directly with only the letter of the correct option and nothing else."
    word = "Please answer directly with a single word or number."
    return features, [
        {
            "image": image(1),
            "question": f"Which way is it?\n\nA. Left.\nB. Right.\nC. Straight.\n{only}",
            "answer": "B",
        },
        {"image": image(2), "question": f"How many cars are there?\n{word}", "answer": "3"},
        {"image": image(3), "question": f"Is the light green?\n{word}", "answer": "Yes"},
        {"image": image(4), "question": f"Which colour is the sign?\n{word}", "answer": "Red"},
    ]


def spatialbench():
    features = {"image": IMAGE, "text": TEXT, "answer": TEXT, "category": TEXT, "question_id": WHOLE}
    rows = []
    for category in ("existence", "reach", "size"):
        for pair in range(2):
            for k, answer in enumerate(("Yes", "No")):
                rows.append(
                    {
                        "image": image(100 + pair),
                        "text": f"Is the {'cup plate'.split()[k]} there?",
                        "answer": answer,
                        "category": category,
                        "question_id": len(rows),
                    }
                )
    rows.append(
        {
            "image": image(7),
            "text": "Is the cup left or right of the plate?",
            "answer": "left",
            "category": "positional",
            "question_id": len(rows),
        }
    )
    rows.append(
        {
            "image": image(8),
            "text": "Where is the cup?\nA. left\nB. right",
            "answer": "A",
            "category": "positional",
            "question_id": len(rows),
        }
    )
    rows += [
        {
            "image": image(9 + n),
            "text": "How many cups are there?",
            "answer": str(n),
            "category": "counting",
            "question_id": len(rows) + n,
        }
        for n in (2, 4)
    ]
    return features, rows


def mmvp():
    features = {"image": IMAGE, "text": TEXT, "label": TEXT}
    return features, [
        {
            "image": image(i),
            "text": "Is the door open or closed?\n(a) Open\n(b) Closed",
            "label": f"({'ab'[i % 2]})",
        }
        for i in range(6)
    ]


def three_d_sr():
    features = {"image": IMAGE, "prompt": TEXT, "choices": TEXT, "answer": TEXT, "task": TEXT}
    choices = ["front", "back", "left", "right"]
    return features, [
        {
            "image": image(i),
            "prompt": "Which side of the car faces the camera?",
            "choices": str(choices),
            "answer": "ABCD"[i],
            "task": task,
        }
        for i, task in enumerate(("height", "location", "orientation", "multi_object"))
    ]


def lego():
    features = {"image": List(IMAGE), "prompt": TEXT, "choices": TEXTS, "answer": TEXT, "category": TEXT}
    choices = ["first", "second", "third", "fourth"]
    rows = [
        {
            "image": [image(i), image(50 + i)],
            "prompt": f"Which piece comes next?\n{lettered(choices)}",
            "choices": choices,
            "answer": "ABCD"[i],
            "category": "next_step",
        }
        for i in range(2)
    ]
    rows.append(
        {
            "image": [image(i) for i in range(3)],
            "prompt": f"Put the pictures in order.\n{lettered(choices)}",
            "choices": choices,
            "answer": "BDAC",
            "category": "sort",
        }
    )
    return features, rows


def spatialreasoner():
    features = {"image": IMAGE, "prompt": TEXT, "choices": TEXT, "answer": TEXT, "task": TEXT}
    return features, [
        {
            "image": image(i),
            "prompt": "Which object is closer, the lamp or the arm chair?",
            "choices": "['lamp', 'arm chair']",
            "task": "Depth",
            "answer": ("lamp", "arm chair")[i % 2],
        }
        for i in range(4)
    ]


def robospatial():
    features = {
        "image": IMAGE,
        "depth_image": IMAGE,
        "prompt": TEXT,
        "answer": TEXT,
        "options": TEXTS,
        "category": TEXT,
    }
    return features, [
        {
            "image": image(i),
            "depth_image": image(60 + i),
            "prompt": "Can the cup be placed left of the plate?",
            "answer": ("yes", "no")[i % 2],
            "options": ["yes", "no"],
            "category": ("configuration", "compatibility")[i // 2],
        }
        for i in range(4)
    ]


def robospatial_home():
    """The upstream file, with points."""
    features = {"category": TEXT, "question": TEXT, "answer": TEXT, "img": IMAGE, "depth_image": IMAGE}
    rows = [
        {
            "category": "configuration",
            "question": "Is the cup left of the plate?",
            "answer": "Yes",
            "img": image(1),
            "depth_image": image(61),
        }
    ]
    rows.append(
        {
            "category": "context",
            "question": "Pinpoint a free spot left of the plate. Your answer "
            "should be formatted as a list of tuples, i.e. [(x1, y1)], with coordinates from 0 to 1.",
            "answer": "[(0.1, 0.1), (0.5, 0.1), (0.5, 0.6), (0.1, 0.6)]",
            "img": image(2),
            "depth_image": image(62),
        }
    )
    return features, rows


def hallusionbench():
    features = {
        name: TEXT
        for name in (
            "category",
            "subcategory",
            "visual_input",
            "set_id",
            "figure_id",
            "sample_note",
            "question_id",
            "question",
            "gt_answer_details",
            "gt_answer",
            "filename",
        )
    } | {"image": IMAGE}
    rows = []
    for figure in ("0", "1"):
        for question in ("0", "1"):
            for category in ("VD", "VS"):
                rows.append(
                    {
                        "category": category,
                        "subcategory": "chart",
                        "visual_input": "1",
                        "set_id": "0",
                        "figure_id": figure,
                        "sample_note": "",
                        "question_id": question,
                        "question": f"Is bar {question} higher? Answer with yes or no.",
                        "gt_answer_details": "",
                        "gt_answer": str(int(figure == question)),
                        "filename": f"{figure}.png",
                        "image": image(int(figure)),
                    }
                )
    return features, rows


def vstarbench():
    features = {"image": IMAGE, "text": TEXT, "category": TEXT, "label": TEXT, "question_id": TEXT}
    tail = "Answer with the option's letter from the given choices directly."
    options = ["The color is red.", "The color is blue.", "The color is green."]
    text = f"What is the color of the cup?\n{lettered(options)}\n{tail}"
    return features, [
        {
            "image": image(i),
            "text": text,
            "category": ("direct_attributes", "relative_position")[i % 2],
            "label": "ABC"[i],
            "question_id": str(i),
        }
        for i in range(3)
    ]


def mmstar():
    features = {
        "index": WHOLE,
        "question": TEXT,
        "image": IMAGE,
        "answer": TEXT,
        "category": TEXT,
        "l2_category": TEXT,
        "meta_info": {"source": TEXT, "split": TEXT, "image_path": TEXT},
    }
    return features, [
        {
            "index": i,
            "question": "Which one is it?\nOptions: A: a cup, B: a plate, C: a lamp, D: a chair",
            "image": image(i),
            "answer": "ABCD"[i],
            "category": ("coarse perception", "math")[i % 2],
            "l2_category": ("image scene", "geometry", "geometry", "geometry")[i],
            "meta_info": {"source": "drawn", "split": "val", "image_path": f"{i}.png"},
        }
        for i in range(4)
    ]


def stvqa():
    from stvqa import stvqa_features
    from tiny import rows

    return stvqa_features(), rows(6, 0, "val", set())


TABLES = {
    **{name: cv_bench for name in ("cv-bench", "cv-bench-2D", "cv-bench-3D")},
    **{f"blink-{name}": lambda task=task: blink(task) for name, task in {
        "spatial": "Spatial_Relation", "depth": "Relative_Depth", "object": "Object_Localization",
        "counting": "Counting", "multi-view": "Multi-view_Reasoning", "jigsaw": "Jigsaw"}.items()},
    "realworld_qa": realworld_qa, "spatialbench": spatialbench, "mmvp": mmvp, "3dsrbench": three_d_sr,
    "3dsrbench_full": three_d_sr, "lego": lego, "spatialreasoner": spatialreasoner,
    "robospatial": robospatial, "robospatial_rgb": robospatial, "robospatial_home": robospatial_home,
    "stvqa": stvqa, "hallusionbench": hallusionbench, "vstarbench": vstarbench, "mmstar": mmstar,
}  # fmt: skip


def write(path: Path, features, rows):
    features = features if isinstance(features, Features) else Features(features)
    Dataset.from_list(rows, features=features).to_parquet(str(path))


def write_all(folder: Path):
    folder.mkdir(parents=True, exist_ok=True)
    for name, table in TABLES.items():
        write(folder / f"{name}.parquet", *table())


def write_mmvp_upstream(folder: Path, rows: int = 300):
    """MMVP/MMVP as it lies on the Hub: 150 pairs, their labels at the known places swapped."""
    (folder / "MMVP Images").mkdir(parents=True)
    lines = ["lndex,Question,Options,Correct Answer"]
    pictures = [png(n, (28, 28)) for n in range(4)]
    for n in range(1, rows + 1):
        question, options = "Is the door open, or closed?", "(a) Open (b) Closed"
        if n in (99, 100):
            question, options = "Does the elephant have long or short tusks?", "(a) Long (b) Short"
        if n in (279, 280):
            question, options = "Is the person standing or sitting?", "(a) Standing (b) Sitting"
        lines.append(f'{n},"{question}",{options},({"ab"[(n + 1) % 2]})')
        (folder / "MMVP Images" / f"{n}.jpg").write_bytes(pictures[n % 4])
    (folder / "Questions.csv").write_text("\n".join(lines) + "\n", encoding="utf-8-sig")


def write_3dsrbench_upstream(path: Path, plain: bool = False, none: str = ""):
    """The circular .tsv: two questions, each with a mirrored image, each with both rotations.

    Args: plain: the other .tsv, without qid; none: what stands where there is no option.
    """
    columns = ["index", "question", "A", "B", "C", "D", "answer", "category", "qid", "image_source", "image"]
    columns = [c for c in columns if not (plain and c == "qid")]
    lines = ["\t".join(columns)]
    for q in ("AAAA", "BBBB"):
        for flip in ("", "-flip"):
            for turn in (0, 1):
                a, b = ("lamp", "chair") if turn == 0 else ("chair", "lamp")
                picture = base64.b64encode(png(len(lines))).decode()
                lines.append(
                    "\t".join(
                        [
                            str(len(lines)),
                            "Which is higher?",
                            a,
                            b,
                            none,
                            none,
                            "AB"[turn],
                            "height",
                            *([] if plain else [f"{q}{flip}-{turn}"]),
                            "COCO",
                            picture,
                        ]
                    )
                )
    path.write_text("\n".join(lines) + "\n")


def right_reply(sample) -> str:
    """A reply in the trained style that answers a sample rightly."""
    answer = sample.answer
    if sample.kind == "point":
        (x, y), (u, v), *_ = json.loads(answer.replace("(", "[").replace(")", "]"))
        answer = f"[({(x + u) / 2:.3f}, {max(y, v) + 0.01:.3f})]"
    return f"<think>so</think><answer>{answer}</answer>"


def flags(model, data, out, *extra) -> list[str]:
    """Of an evaluation of the drawn set's held-out rows."""
    return [
        *("--dataset", str(data / "val.parquet"), "--model_path", str(model), "--out", str(out)),
        *("--min_pixels", "784", "--max_pixels", "802816", *extra),
    ]


def served(url, data, out, *extra) -> list[str]:
    """The same by an OpenAI-compatible server, into OUT/x.jsonl."""
    named = ("--provider", "openai", "--base_url", url, "--custom_filename", "x", "--concurrency", "2")
    return flags("tiny", data, out, *named, *extra)


def records_of(name, folder, right) -> list[dict]:
    """Records of a benchmark in which right(i, sample) items are answered rightly, the rest not at all."""
    from results import grade
    from testsets import Selection, load_items

    loaded, records = load_items(name, Selection(local_path=str(folder))), []
    for i, (sample, (row, _)) in enumerate(zip(loaded.items, loaded.items.keys, strict=True)):
        reply = right_reply(sample) if right(i, sample) else "I cannot tell."
        records.append(
            {
                "id": sample.id,
                "row": row,
                "category": sample.category,
                "kind": sample.kind,
                "gold": sample.answer,
                "meta": sample.meta,
                "cluster": loaded.clusters[row],
                "finish_reason": "stop",
                **grade(sample, reply),
            }
        )
    return records


def write_results(path, correct, clusters=None, seed=0):
    """A results file of made-up records, with as many keys as comparisons need."""
    config = {"dataset": "x", "model_path": "m", "template": "t", "provider": "hf"}
    clusters = list(range(len(correct))) if clusters is None else clusters
    lines = [{"header": {"config": config, "data": {"n": len(correct)}}}]
    lines += [
        {
            "id": str(i),
            "row": i,
            "correct": bool(right),
            "cluster": str(clusters[i]),
            "finish_reason": "stop",
            "question_hash": f"{i} {seed}",
        }
        for i, right in enumerate(correct)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    write_all(Path(sys.argv[1]))
