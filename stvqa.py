"""STVQA-7K's row format: columns, types, a row made of a question, and parquet files of such rows.

    row = stvqa_row(image_id=..., image=png_bytes, size=(W, H), objects=[("cup.1", (x1, y1, x2, y2))], ...)
    write_parquet("train.parquet", rows)

Whatever writes rows writes them here, so that `data.load_samples` reads them all alike.
"""

import json
from collections.abc import Iterable, Sequence
from itertools import islice

from config import write_whole
from data import build_prompt_text

COLUMNS = {
    "image_id": "string",
    "images": "image",
    "problem": "string",
    "question_only": "string",
    "answer": "string",
    "answer_only": "string",
    "answer_text": "string",
    "answer_text_only": "string",
    "answer_option_text": "string",
    "answer_option_text_only": "string",
    "category": "string",
    "level": "string",
    "question_with_options": "string",
    "options": "texts",
    "rating": "int32",
}
LETTERS = "ABCDEFGHIJ"


def scene_json(objects, relationships) -> str:
    """One line of JSON. Args: objects: (id, box); relationships: (subject id, predicate, object id)."""
    objects = [{"id": i, "bbox": list(box)} for i, box in objects]
    relationships = [dict(zip(("subject", "predicate", "object"), r, strict=True)) for r in relationships]
    return json.dumps({"objects": objects, "relationships": relationships}, separators=(",", ":"))


def with_letters(text: str, options: Sequence[str]) -> str:
    """The question, and its options a line each."""
    return "\n".join([text, "Options:", *(f"({LETTERS[i]}) {o}" for i, o in enumerate(options))])


def stvqa_row(
    *,
    image_id: str,
    image: bytes,
    size: tuple[int, int],
    text: str,
    options: Sequence[str],
    answer: str,
    objects: Sequence[tuple],
    relationships: Sequence[tuple],
    category: str,
    level: str,
    rating: int,
    path: str | None = None,
) -> dict:
    """A row with STVQA-7K's columns.

    Args: image: an encoded picture; size: its (W, H) in pixels, upright; options: in the order shown;
        objects: (id, box in pixels) of the gold scene.
    """
    scene = f"<scene>{scene_json(objects, relationships)}</scene>"
    letter = LETTERS[options.index(answer)]
    lettered, question = f"({letter}) {answer}", with_letters(text, options)
    return {
        "image_id": image_id,
        "images": {"bytes": image, "path": path},
        "problem": build_prompt_text("spatial_thinker", question, size),
        "question_only": text,
        "answer": f"{scene}\n<answer>{letter}</answer>",
        "answer_only": letter,
        "answer_text": f"{scene}\n<answer>{answer}</answer>",
        "answer_text_only": answer,
        "answer_option_text": f"{scene}\n<answer>{lettered}</answer>",
        "answer_option_text_only": lettered,
        "category": category,
        "level": level,
        "question_with_options": question,
        "options": list(options),
        "rating": rating,
    }


def stvqa_features(**extra: str):
    """The columns' types. Args: extra: {further column: "string", "int32", ...}."""
    from datasets import Features, Image, List, Value

    special = {"image": Image(), "texts": List(Value("string"))}
    columns = COLUMNS | extra
    return Features({name: special.get(kind) or Value(kind) for name, kind in columns.items()})


def write_parquet(path, rows: Iterable[dict], features=None, rows_at_once: int = 256):
    """Write rows whole or not at all, rows_at_once in memory; the same rows give the same bytes."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    features = features or stvqa_features()
    schema = features.arrow_schema  # it holds the types for the datasets library
    rows = iter(rows)
    with write_whole(path) as tmp, pq.ParquetWriter(tmp, schema) as writer:
        while batch := list(islice(rows, rows_at_once)):
            writer.write_table(pa.Table.from_pylist(batch, schema=schema))
