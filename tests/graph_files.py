"""Small files of every format that sources.py reads, and a folder of Visual Genome as large as one likes.

    python tests/graph_files.py FOLDER [N]        # N graphs as the benchmark and the tests see them

What the small files hold is written out below, so that a test can say what must come back, or spoil a copy.
"""

import copy
import io
import json
import random
import shutil
import sys
from pathlib import Path

from PIL import Image, ImageDraw


def save(path: Path, data, **how):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(data, **how), encoding="utf-8")
    return path


def write_pictures(folder: Path, sizes: dict[str, tuple[int, int]]):
    """A plain JPEG of each size, with a diagonal."""
    for name, size in sizes.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(jpeg(*size))


def jpeg(width: int, height: int, orientation: int = 1) -> bytes:
    image, out = Image.new("RGB", (width, height), "lightblue"), io.BytesIO()
    ImageDraw.Draw(image).line((0, 0, width, height), fill="black", width=3)
    exif = image.getexif()
    exif[0x0112] = orientation
    image.save(out, "JPEG", exif=exif)
    return out.getvalue()


# ---- Visual Genome -----------------------------------------------------------------------------------------
def thing(number, x, y, w, h, *names, merged=(), **more):
    box = {"x": x, "y": y, "w": w, "h": h}
    lists = {"names": list(names), "synsets": [], "merged_object_ids": list(merged)}
    return {"object_id": number, **box, **lists, **more}


def end(number, x, y, w, h, name, **more):
    """An end of a relation: nine in ten carry a name, not names."""
    return {"object_id": number, "x": x, "y": y, "w": w, "h": h, "name": name, "synsets": [], **more}


def relation(number, subject, predicate, obj):
    ends = {"subject": subject, "object": obj}
    return {"relationship_id": number, "predicate": predicate, "synsets": [], **ends}


MAN, BIKE = end(10, 100, 50, 60, 200, "man"), end(21, 92, 148, 120, 110, "bicycle")
VG = {
    "image_data": [
        {"image_id": 1, "width": 640, "height": 480, "url": "https://x/VG_100K_2/1.jpg", "coco_id": None,
         "flickr_id": None},
        {"image_id": 2, "width": 500, "height": 333, "url": "https://x/VG_100K/2.jpg", "coco_id": 417720,
         "flickr_id": 77},
        {"image_id": 5, "width": 300, "height": 400, "url": "https://x/VG_100K/5.jpg", "coco_id": None,
         "flickr_id": 4242},
    ],
    "objects": [
        {"image_id": 1, "image_url": "https://x/VG_100K_2/1.jpg", "objects": [
            thing(10, 100, 50, 60, 200, "man"),
            thing(20, 90, 150, 120, 110, "bike", merged=[21, 22]),
            thing(30, 0, 300, 641, 180, "street"),
        ]},
        {"image_id": 2, "image_url": "https://x/VG_100K/2.jpg", "objects": [
            thing(40, 5, 6, 70, 80, "Traffic Light"),
        ]},
        {"image_id": 5, "image_url": "https://x/VG_100K/5.jpg", "objects": [
            thing(50, 10, 10, 100, 100, "cup"), thing(51, 150, 10, 100, 100, "plate"),
        ]},
    ],
    "relationships": [
        {"image_id": 1, "relationships": [
            relation(1, MAN, "riding a", BIKE),  # another name, by way of a merged id
            relation(2, end(99, 95, 55, 20, 20, "hat"), "ON", MAN),  # 99 is in no list
            relation(3, end(98, 1, 2, 3, 4, "dog"), "on", end(98, 1, 2, 3, 4, "cat")),  # nor is 98: two names
            relation(4, end(97, 0, 310, 640, 170, "Street", merged_object_ids=[30]), "under", MAN),
        ]},
        {"image_id": 2, "relationships": []},
        {"image_id": 5, "relationships": [
            relation(5, thing(50, 11, 10, 100, 100, "cup"), "next to", end(51, 150, 10, 100, 100, "plate")),
        ]},
    ],
    "attributes": [
        {"image_id": 1, "attributes": [
            {"object_id": 10, "names": ["man"], "x": 0, "y": 0, "w": 1, "h": 1, "attributes": ["tall"]},
            {"object_id": 22, "names": ["bike"], "attributes": ["red", "old", "red"]},
            {"object_id": 30, "names": ["street"]},
        ]},
        {"image_id": 2, "attributes": []},
        {"image_id": 5, "attributes": []},
    ],
}  # fmt: skip
SCENE_GRAPHS = [
    {"image_id": 1, "objects": [thing(10, 100, 50, 60, 200, "man", attributes=["tall"]),
                                thing(20, 90, 150, 120, 110, "bike", merged=[21])],
     "relationships": [{"relationship_id": 1, "predicate": "rides", "subject_id": 10, "object_id": 21}]},
    {"image_id": 2, "objects": [thing(40, 5, 6, 70, 80, "light")], "relationships": []},
]  # fmt: skip
# What the first version of the API gave.
OLD_API = [{
    "id": 1,
    "bounding_boxes": [
        {"id": 10, "x": 100, "y": 50, "width": 60, "height": 200,
         "boxed_objects": [{"name": "man"}, {"name": "guy"}]},
        {"id": 20, "x": 90, "y": 150, "width": 120, "height": 110, "boxed_objects": [{"name": "bike"}]},
    ],
    "relationships": [{"id": 1, "predicate": "rides", "subject": 10, "object": 20}],
}]  # fmt: skip


def write_vg(folder: Path, data: dict | None = None, **how) -> Path:
    """Args: data: VG, or what a test has made of a copy."""
    for name, records in (data or VG).items():
        save(folder / f"{name}.json", records, **how)
    return folder


# ---- VG150 -------------------------------------------------------------------------------------------------
VG150_IMAGES = [
    {"image_id": 1, "width": 800, "height": 600, "coco_id": None, "flickr_id": None},
    {"image_id": 1592, "width": 10, "height": 10, "coco_id": None, "flickr_id": None},  # one of the corrupt
    {"image_id": 3, "width": 480, "height": 640, "coco_id": 99, "flickr_id": None},
    {"image_id": 4, "width": 640, "height": 480, "coco_id": None, "flickr_id": None},
]
VG150_NAMES = {
    "idx_to_label": {"1": "man", "2": "horse", "3": "hat"},
    "idx_to_predicate": {"1": "on", "2": "riding"},
    "idx_to_attribute": {"1": "white", "2": "tall"},
}
VG150_ARRAYS = {
    # Centre and size, the longer side being 1024: 800 -> 1024 makes 1.28 of 1, 640 -> 1024 makes 1.6.
    "boxes_1024": [[128, 256, 128, 256], [512, 384, 256, 128], [160, 320, 160, 320], [16, 16, 16, 16]],
    "labels": [[1], [2], [3], [1]],
    "attributes": [[2, 1] + [0] * 8, [0] * 10, [1] + [0] * 9, [0] * 10],
    "relationships": [[0, 1]],
    "predicates": [[2]],
    "img_to_first_box": [0, 2, 3],
    "img_to_last_box": [1, 2, 3],
    "img_to_first_rel": [0, -1, -1],
    "img_to_last_rel": [0, -1, -1],
    "split": [0, 0, 2],
}


def write_vg150(folder: Path, arrays: dict | None = None) -> Path:
    import h5py
    import numpy as np

    save(folder / "image_data.json", VG150_IMAGES)
    save(folder / "VG-SGG-dicts-with-attri.json", VG150_NAMES)
    with h5py.File(folder / "VG-SGG-with-attri.h5", "w") as file:
        for name, rows in (arrays or VG150_ARRAYS).items():
            file[name] = np.array(rows, dtype="int32")
    return folder


# ---- the Hub's parquet -------------------------------------------------------------------------------------
HUB = [
    {"image_id": "1", "size": (320, 240),
     "objects": [{"id": "railing.1", "bbox": [0, 100, 320, 140]},
                 {"id": "flower.4", "bbox": [10, 20, 30, 40]}],
     "relationships": [{"subject": "flower.4", "predicate": "on", "object": "railing.1"}]},
    {"image_id": "2", "size": (100, 200), "objects": [{"id": "t-shirt.7", "bbox": [1, 2, 3.5, 4]}],
     "relationships": []},
]  # fmt: skip


def write_hub(path: Path, rows: list[dict] | None = None) -> Path:
    import datasets

    columns = {
        key: [] for key in ("image_id", "image", "prompt_open", "prompt_close", "objects", "relationships")
    }
    for row in rows or HUB:
        columns["image_id"].append(row["image_id"])
        picture = row.get("bytes", jpeg(*row["size"]))
        columns["image"].append(picture and {"bytes": picture, "path": None})
        for prompt in ("prompt_open", "prompt_close"):
            columns[prompt].append("Describe the scene.")
        for key in ("objects", "relationships"):
            columns[key].append(row[key] if isinstance(row[key], str) else json.dumps(row[key]))
    features = datasets.Features(
        {key: datasets.Value("string") for key in columns} | {"image": datasets.Image()}
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    datasets.Dataset.from_dict(columns, features=features).to_parquet(path)
    return path


# ---- GQA ---------------------------------------------------------------------------------------------------
GQA = {
    "2407890": {"width": 640, "height": 480, "location": "living room", "objects": {
        "271881": {"name": "chair", "x": 220, "y": 310, "w": 50, "h": 80, "attributes": ["brown", "wooden"],
                   "relations": [{"name": "on", "object": "275312"}, {"name": "near", "object": "279472"}]},
        "275312": {"name": "rug", "x": 100, "y": 350, "w": 400, "h": 130, "attributes": [], "relations": []},
    }},
    "n5": {"width": 10, "height": 20, "objects": {
        "1": {"name": "tv", "x": 1, "y": 2, "w": 3, "h": 4,
              "relations": {"a": {"name": "on", "object": "1"}}},
    }},
}  # fmt: skip

# ---- Open Images -------------------------------------------------------------------------------------------
OPENIMAGES = {
    "oidv6-validation-annotations-vrd.csv": """\
ImageID,LabelName1,LabelName2,XMin1,XMax1,YMin1,YMax1,XMin2,XMax2,YMin2,YMax2,RelationshipLabel
000ac95750ac7399,/m/04yx4,/m/019nj4,0.05,0.55,0.1,0.9,0.05,0.55,0.1,0.9,is
000ac95750ac7399,/m/04yx4,/m/0342h,0.05,0.55,0.1,0.9,0.25,0.5,0.5,0.75,holds
00aaaaaaaaaaaaaa,/m/01g317,/m/0342h,0,1,0,1,0.5,1,0.5,1,plays
000ac95750ac7399,/m/04yx4,/m/04bcr3,0.0501,0.5501,0.1,0.9,0.5,1,0.5,1,at
""",
    "oidv7-class-descriptions-boxable.csv": """\
LabelName,DisplayName
/m/04yx4,Man
/m/0342h,Guitar
/m/01g317,Person
/m/04bcr3,Table
/m/0bt9lr,Dog
/m/01yrx,Cat
""",
    "oidv6-attributes-description.csv": "/m/019nj4,Smile\n",
    "validation-annotations-bbox.csv": """\
ImageID,Source,LabelName,Confidence,XMin,XMax,YMin,YMax,IsOccluded,IsTruncated,IsGroupOf,IsDepiction,IsInside
000ac95750ac7399,xclick,/m/04yx4,1,0.05,0.55,0.1,0.9,0,0,0,0,0
000ac95750ac7399,xclick,/m/04yx4,1,0.6,0.8,0.1,0.9,0,0,0,0,0
000ac95750ac7399,xclick,/m/04bcr3,1,0.5,1,0.5,1,0,0,1,0,0
0000000000000000,xclick,/m/04bcr3,1,0.5,1,0.5,1,0,0,1,0,0
""",
    "validation-annotations-human-imagelabels-boxable.csv": """\
ImageID,Source,LabelName,Confidence
000ac95750ac7399,verification,/m/04yx4,1
000ac95750ac7399,verification,/m/01g317,1
000ac95750ac7399,verification,/m/04bcr3,1
000ac95750ac7399,verification,/m/0342h,1
000ac95750ac7399,verification,/m/0bt9lr,0
00aaaaaaaaaaaaaa,verification,/m/01yrx,0
""",
    "train-annotations-bbox.csv": "of another part\n",
}


def write_openimages(folder: Path, files: dict | None = None) -> Path:
    """The path of the relationships; pictures lie in images/validation."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in (files or OPENIMAGES).items():
        (folder / name).write_text(text)
    sizes = {"000ac95750ac7399.jpg": (200, 100), "00aaaaaaaaaaaaaa.jpg": (64, 48)}
    write_pictures(folder / "images" / "validation", sizes)
    return folder / "oidv6-validation-annotations-vrd.csv"


# ---- PSG ---------------------------------------------------------------------------------------------------
PSG = {
    "data": [
        {"file_name": "train2017/000000417720.jpg", "height": 640, "width": 480, "image_id": "107902",
         "pan_seg_file_name": "panoptic_train2017/000000417720.png", "coco_image_id": "417720",
         "segments_info": [{"id": 1, "category_id": 0, "iscrowd": 0, "isthing": 1, "area": 9},
                           {"id": 2, "category_id": 1, "iscrowd": 1, "isthing": 1, "area": 9},
                           {"id": 3, "category_id": 4, "iscrowd": 0, "isthing": 0, "area": 9}],
         "annotations": [{"bbox": [49.0, 162.0, 207.0, 617.0], "bbox_mode": 0, "category_id": 0},
                         {"bbox": [259.0, 158.0, 397.0, 631.0], "bbox_mode": 0, "category_id": 1},
                         {"bbox": [0.0, 285.0, 480.0, 355.0], "bbox_mode": 1, "category_id": 4}],
         "relations": [[0, 1, 2], [0, 2, 0]]},
        {"file_name": "val2017/7.jpg", "height": 20, "width": 30, "image_id": "7", "coco_image_id": "8",
         "segments_info": [], "annotations": [], "relations": []},
    ],
    "thing_classes": ["person", "bicycle", "car"],
    "stuff_classes": ["sky-other-merged", "tree-merged"],
    "predicate_classes": ["over", "in front of", "beside"],
    "test_image_ids": ["7"],
}  # fmt: skip

# ---- COCO, LVIS --------------------------------------------------------------------------------------------
COCO = {
    "info": {"description": "three images"},
    "licenses": [
        {
            "id": 2,
            "name": "Attribution-NonCommercial License",
            "url": "http://creativecommons.org/licenses/by-nc/2.0/",
        },
        {"id": 7, "name": "No known copyright restrictions", "url": "http://flickr.com/commons/usage/"},
    ],
    "images": [
        {"id": 139, "file_name": "000000000139.jpg", "height": 426, "width": 640, "license": 2},
        {"id": 255917, "file_name": "000000255917.jpg", "height": 427, "width": 640, "license": 7},
        {"id": 5, "file_name": "5.jpg", "height": 10, "width": 10, "license": 4},
    ],
    "annotations": [
        {
            "id": 1,
            "image_id": 255917,
            "category_id": 3,
            "bbox": [203.5, 304.5, 28.0, 18.25],
            "iscrowd": 0,
            "segmentation": [[1, 2, 3, 4, 5, 6]],
            "area": 318.5,
        },
        {"id": 2, "image_id": 139, "category_id": 64, "bbox": [236.75, 142.5, 24.75, 69.5], "iscrowd": 0},
        {
            "id": 900300255917,
            "image_id": 255917,
            "category_id": 3,
            "bbox": [59.0, 253.0, 252.0, 84.0],
            "iscrowd": 1,
            "segmentation": {"counts": [1, 2], "size": [427, 640]},
        },
        {"id": 4, "image_id": 139, "category_id": 3, "bbox": [0, 0, 640, 426]},
    ],
    "categories": [
        {"id": 3, "name": "car", "supercategory": "vehicle"},
        {"id": 64, "name": "potted plant", "supercategory": "furniture"},
        {"id": 90, "name": "toothbrush", "supercategory": "indoor"},
    ],
}
LVIS = {
    "images": [{"id": 391895, "coco_url": "http://images.cocodataset.org/train2017/000000391895.jpg",
                "height": 360, "width": 640, "license": 4, "neg_category_ids": [3],
                "not_exhaustive_category_ids": [2]}],
    "annotations": [{"id": 1, "image_id": 391895, "category_id": 1, "bbox": [1, 2, 3, 4]},
                    {"id": 2, "image_id": 391895, "category_id": 2, "bbox": [5, 6, 7, 8]}],
    "categories": [{"id": i, "name": name} for i, name in enumerate(("cup", "book", "cat", "dog"), 1)],
}  # fmt: skip


# ---- a folder as large as Visual Genome --------------------------------------------------------------------
NAMES = (
    "man,woman,tree,shirt,building,window,sign,table,chair,car,"
    "plate,pole,street,sky,grass,fence,bike,bus,dog,"
    "cat,horse,cup,bowl,bag,clock,lamp,pillow,bench,boat,umbrella,ball,hat,shoe,jacket,trees,windows,people,"
    "leaves,street light,stop sign,tennis racket,baseball bat,the sidewalk,Dining table,monitor is off."
).split(",")
PREDICATES = (
    "on,on,on,on,has,has,wearing,in,in,of,near,behind,in front of,next to,holding,sitting on,riding,under,"
    "above,WEARING,standing on,are on,ON,attached to,with,by,hanging on,carrying,looking at,attache dto"
).split(",")


def big_image(rng: random.Random, image_id: int, first: int, objects: int, relations: int) -> dict[str, dict]:
    """{file: its record of one image}, with the flaws of the real ones in about their shares."""
    width, height = rng.choice(((800, 600), (500, 375), (640, 480), (375, 500)))
    url = f"https://cs.stanford.edu/people/rak248/VG_100K/{image_id}.jpg"
    things, ends, described = [], [], []
    for number in range(first, first + objects):
        w, h = int(width * rng.random() ** 2) + 2, int(height * rng.random() ** 2) + 2
        x, y = (
            rng.randint(0, max(0, width - w + 1)),
            rng.randint(0, max(0, height - h + 1)),
        )  # 1 px over the edge
        name = rng.choice(NAMES)
        merged = [number + 500_000_000] if rng.random() < 0.2 else []
        things.append(thing(number, x, y, w, h, name, merged=merged) | {"synsets": [f"{name}.n.01"]})
        # Relations have the box as it was before boxes were merged, nine in ten by name, some by another.
        called = rng.choice(NAMES) if rng.random() < 0.05 else name
        one = end(number, x + 2, y - 1, w - 1, h, called)
        if rng.random() < 0.1:
            del one["name"]
            one["names"] = [called]
        if merged and rng.random() < 0.5:
            one["object_id"] = merged[0]
        if rng.random() < 0.05:
            one["object_id"] = number + 900_000_000
        ends.append(one | {"synsets": [f"{name}.n.01"]})
        if rng.random() < 0.6:
            colours = rng.sample(("white", "black", "red", "tall", "wooden"), rng.randint(1, 2))
            described.append({**things[-1], "attributes": colours})
    related = []
    for number in range(relations):
        subject, obj = rng.choice(ends), rng.choice(ends)  # now and then the same
        related.append(relation(first + number, subject, rng.choice(PREDICATES), obj))
        if rng.random() < 0.16:
            related[-1] = copy.copy(rng.choice(related))
    coco = image_id * 3 if rng.random() < 0.48 else None
    return {
        "image_data": {"image_id": image_id, "width": width, "height": height, "url": url, "coco_id": coco,
                       "flickr_id": image_id * 7},
        "objects": {"image_id": image_id, "objects": things, "image_url": url},
        "relationships": {"image_id": image_id, "relationships": related},
        "attributes": {"image_id": image_id, "image_url": url, "attributes": described},
    }  # fmt: skip


def write_big_vg(folder: Path, n: int, seed: int = 0, objects: int = 35, relations: int = 21) -> Path:
    """n graphs of about so many objects and relations, written as they are made, 15 kB each.

    shuffled.json is relationships.json in another order: images of odd numbers, then those of even ones.
    """
    rng = random.Random(seed)
    folder.mkdir(parents=True, exist_ok=True)
    files = {name: open(folder / f"{name}.json", "w") for name in (*VG, "shuffled", "even")}
    for i in range(n):
        sizes = rng.randint(objects // 2, objects * 3 // 2), rng.randint(relations // 2, relations * 3 // 2)
        records = big_image(rng, i + 1, 1000 * i, *sizes)
        records["even" if i % 2 else "shuffled"] = records["relationships"]
        for name, record in records.items():
            files[name].write(("[" if i == 0 else ", ") + json.dumps(record))
    files.pop("even").close()
    with open(folder / "even.json") as rest:
        shutil.copyfileobj(rest, files["shuffled"])
    (folder / "even.json").unlink()
    for file in files.values():
        file.write("]" if n else "[]")
        file.close()
    return folder


if __name__ == "__main__":
    write_big_vg(Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 1000)
