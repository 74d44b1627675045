"""Scene graphs from files: seven formats, each read record by record into the same RawGraph.

    for graph in read("vg:/data/visual_genome", images="/data/visual_genome"):
        ...                                         # a RawGraph, or a BadRecord: one that cannot be read

| spec                    | what it reads                                                                |
|-------------------------|------------------------------------------------------------------------------|
| vg:FOLDER               | Visual Genome: objects.json, with relationships.json, attributes.json and    |
|                         | image_data.json where they lie beside it; or scene_graphs.json               |
| vg150:FOLDER, FILE.h5   | VG-SGG.h5, with VG-SGG-dicts.json and image_data.json beside it              |
| hub:ID, FILE, FOLDER    | JosephZ/vg150_train_sgg_prompt, or parquet with its columns                  |
| gqa:FILE.json           | train_sceneGraphs.json                                                       |
| openimages:FOLDER, FILE | Open Images' relationships, with the CSV of class names beside it; those of  |
|                         | attribute names, boxes and image labels where they lie there                 |
| psg:psg.json            | panoptic scene graphs                                                        |
| coco:instances.json     | COCO's boxes; LVIS, whose lists say what was looked for                      |
| drawn, drawn:N          | N scenes drawn by tiny.py                                                    |

Only the format changes here: boxes become x1, y1, x2, y2 in pixels; names stay as written, for scenes.clean.
JSON is decoded a record at a time, so that memory does not grow with the file: 2,000 graphs of Visual Genome
a second (benchmarks/graphs.py). Of COCO the boxes are held, 40 bytes each, since the file has them in any
order; of VG150 the arrays.

Annotations are CC BY 4.0 (Visual Genome, GQA, COCO, Open Images). A graph's `licence` is its photo's; empty
where the file does not say, as of all photos of Visual Genome.
"""

import csv
import difflib
import functools
import json
import math
import re
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from images import open_image, read_bytes
from records import (
    Bad,
    ByImage,
    CsvByImage,
    JsonFile,
    Pictures,
    corners,
    get,
    id_of,
    image_of,
    shown,
    stated_size,
    texts,
    xyxy,
)
from scenes import Box, RawGraph, RawObject
from tables import read_table

# COCO's numbers of licences, for files that do not list them.
COCO_LICENCES = {
    1: "CC BY-NC-SA 2.0", 2: "CC BY-NC 2.0", 3: "CC BY-NC-ND 2.0", 4: "CC BY 2.0", 5: "CC BY-SA 2.0",
    6: "CC BY-ND 2.0", 7: "No known copyright restrictions", 8: "United States Government Work",
}  # fmt: skip
SAME_BOX = 0.002  # Open Images: of the image's side, up to which two boxes of a label are one object


@dataclass(frozen=True, slots=True)
class BadRecord:
    """A record that cannot be read: which one, and what was expected and found."""

    name: str
    message: str


def read(
    spec: str,
    images: str | None = None,
    split: str = "train",
    image_data: str | None = None,
    n: int = 1000,
    seed: object = 0,
) -> Iterator[RawGraph | BadRecord]:
    """The graphs of a source, in its order, each image once.

    Args:
        spec: "kind:where", see the top of this file.
        images: folder of the pictures, or of their folders. Without it no picture is opened, and
            RawGraph.image is a name only.
        split: of sources that have splits: train, test or all of vg150 and psg, any that the hub's set has.
        image_data: Visual Genome's image_data.json: for gqa and hub it tells which photos are COCO's too.
        n, seed: of drawn scenes.
    Raises: ValueError, one line: an unknown kind, a missing file; from the iterator, after all whole records,
        a broken one with the byte at which it breaks.
    """
    kind, _, where = spec.partition(":")
    if kind == "drawn":
        if where and not where.isdecimal():
            raise ValueError(f"{spec}: expected drawn:N with a whole number N, got {where!r}")
        import tiny

        return tiny.draw_graphs(int(where or n), seed)
    if kind not in READERS:
        near = difflib.get_close_matches(kind, [*READERS, "drawn"], 1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ValueError(f"{spec}: expected one of {', '.join(READERS)}, drawn before a colon{hint}")
    on_hub = kind == "hub" and where.count("/") == 1 and not where.endswith(".parquet")
    if not where or not on_hub and not Path(where).exists():
        raise ValueError(f"{spec}: no such file or folder: {where or 'nothing after the colon'}")
    for path in (images, image_data):
        if path and not Path(path).exists():
            raise ValueError(f"{path}: no such file or folder")
    return once(READERS[kind](where, Pictures(images), split, image_data))


def once(graphs: Iterator[RawGraph | BadRecord]) -> Iterator[RawGraph | BadRecord]:
    seen = set()
    for graph in graphs:
        if isinstance(graph, RawGraph):
            if graph.image_id in seen:
                graph = BadRecord(f"image {graph.image_id}", "expected each image once, got it again")
            else:
                seen.add(graph.image_id)
        yield graph


def image_bytes(graph) -> bytes:
    """The encoded picture of a RawGraph or SceneGraph, as its file has it. Raises: OSError with the path."""
    scheme, _, where = graph.image.partition(":")
    if scheme == "drawn":
        import tiny

        return tiny.draw_picture(graph)
    try:
        if scheme != "parquet":
            return read_bytes({"path": graph.image})
        source, _, row = where.rpartition("#")
        split, _, row = row.rpartition("/")
        return read_bytes(hub_table(source, split or "train")[int(row)]["image"])
    except (ValueError, IndexError, TypeError) as error:  # no such table, row, or picture in it
        raise OSError(f"{graph.image}: {error}") from None


# ---- Visual Genome -----------------------------------------------------------------------------------------
def read_vg(where, pictures, split, image_data):
    path = Path(where)
    folder = path if path.is_dir() else path.parent
    tries = (path, folder / "objects.json", folder / "scene_graphs.json")
    main = next((p for p in tries if p.is_file()), None)
    if main is None:
        raise ValueError(f"{folder}: expected objects.json or scene_graphs.json, got neither")
    names = ("relationships", "attributes") if main.name == "objects.json" else ()
    beside = {name: folder / f"{name}.json" for name in (*names, "image_data")}
    beside["image_data"] = Path(image_data) if image_data else beside["image_data"]
    files = {name: ByImage(p) for name, p in beside.items() if p.exists()}
    if "image_data" not in files and not pictures.folders:
        raise ValueError(f"{folder}: expected image_data.json, or a folder of images, for the images' sizes")
    stream = JsonFile(main)
    for row, (_, record) in enumerate(stream.items()):
        image_id = image_of(record)
        if image_id is None:
            yield BadRecord(f"{main}, record {row}", f"expected image_id, got {shown(record)}")
            continue
        others = {name: file.get(image_id) for name, file in files.items()}
        try:
            yield vg_graph(image_id, record, others, pictures)
        except Bad as error:
            yield BadRecord(f"{main}, image {image_id}", str(error))
    stream.finish()


def vg_graph(image_id: str, record: dict, others: dict, pictures: Pictures) -> RawGraph:
    """Args: others: {file: its record of this image, or None}. Raises: Bad."""
    data = others.get("image_data")
    if "image_data" in others and data is None and not pictures.folders:
        raise Bad("expected the image in image_data.json, for its size")
    image, width, height = pictures.place(f"{image_id}.jpg", data and stated_size(data))
    things = Things()
    for o in get(record, "objects" if "objects" in record else "bounding_boxes", list):
        things.add(o)
    if attributes := others.get("attributes"):
        for o in get(attributes, "attributes", list, ()):
            things.describe(o)
    holder = others.get("relationships") or record
    relations = [things.relation(r) for r in get(holder, "relationships", list, ())]
    things.add_missing()
    return RawGraph(
        image_id, image, width, height,
        tuple(RawObject(key, *thing) for key, thing in things.known.items()),
        tuple(relations), image_group=vg_group(image_id, data), source="vg",
    )  # fmt: skip


def vg_group(image_id: str, data: dict | None) -> str:
    """Photos of Visual Genome that are also COCO's have COCO's name."""
    for kind in ("coco", "flickr"):
        if isinstance(data, dict) and isinstance(number := data.get(f"{kind}_id"), (int, str)) and number:
            return f"{kind}:{number}"
    return f"vg:{image_id}"


class Things:
    """The objects of one image. Annotators boxed the same thing several times; the copies were merged later.

    known: {key: (names, box, attributes)}; merged: {id of a copy: key of the object that it is part of};
    unknown: {id: ends of relations whose object is in neither}.
    """

    def __init__(self):
        self.known: dict[str, tuple] = {}
        self.merged: dict[str, str] = {}
        self.unknown: dict[str, list[dict]] = {}

    def add(self, o):
        key = key_of(o)
        thing = names_of(o), box_of(o), texts(o.get("attributes"), "attributes")
        while key in self.known:
            if self.known[key] == thing:
                return
            key += "'"
        self.known[key] = thing
        for copy in copies_of(o):
            self.merged.setdefault(copy, key)

    def find(self, o) -> str | None:
        """The key of the object that a record from another file speaks of."""
        key = key_of(o)
        if key in self.known:
            return key
        for copy in (key, *copies_of(o)):
            if copy in self.known or copy in self.merged:
                return self.merged.get(copy, copy)
        return None

    def describe(self, o):
        """Add the attributes of a record of attributes.json."""
        more = texts(get(o, "attributes", list, []), "attributes")
        if more and (key := self.find(o)):
            names, box, attributes = self.known[key]
            self.known[key] = names, box, tuple(dict.fromkeys(attributes + more))

    def relation(self, r) -> tuple[str, str, str]:
        """(key, predicate, key) of a relation, whose ends are ids or whole objects."""
        return self.end(r, "subject"), get(r, "predicate", str), self.end(r, "object")

    def end(self, r, side: str) -> str:
        end = get(r, side) if isinstance(r, dict) and side in r else None
        if not isinstance(end, dict):
            return self.merged.get(key := id_of(r, f"{side}_id", side), key)
        key = self.find(end)
        if key is None:
            key = key_of(end)
            self.unknown.setdefault(key, []).append(end)
            return key
        names, *rest = self.known[key]
        # Who drew the relation may have called it otherwise, or have meant something else.
        for name in names_of(end):
            if name not in names and name.lower().strip() not in {n.lower().strip() for n in names}:
                names += (name,)
                self.known[key] = names, *rest
        return key

    def add_missing(self):
        """Make objects of ends that only relations know, where these agree on the name."""
        for key, ends in self.unknown.items():
            names = {tuple(n.lower().strip() for n in names_of(end)) for end in ends}
            if len(names) == 1:
                self.known[key] = names_of(ends[0]), box_of(ends[0]), ()


def key_of(o) -> str:
    key = o.get("object_id") if isinstance(o, dict) else None
    return str(key) if type(key) is int else id_of(o, "object_id", "id")


def copies_of(o: dict) -> list[str]:
    copies = o.get("merged_object_ids")
    return [str(copy) for copy in get(o, "merged_object_ids", list)] if copies else []


def names_of(o: dict) -> tuple[str, ...]:
    """names (a list) or name; in old dumps object_names or boxed_objects, a list of records with a name."""
    names = o.get("names")
    if names is None:
        names = o.get("name", o.get("object_names"))
    if type(names) is str:
        return (names,)
    if names is None and "boxed_objects" in o:
        return tuple(get(boxed, "name", str) for boxed in get(o, "boxed_objects", list))
    if names is None:
        raise Bad(f"names: expected texts, got {shown(o)}")
    return texts(names, "names") or ("",)


def box_of(o: dict) -> Box:
    return corners(o.get("x"), o.get("y"), o.get("w", o.get("width")), o.get("h", o.get("height")), o)


# ---- VG150 -------------------------------------------------------------------------------------------------
# Left out of VG150, as their pictures are damaged.
CORRUPT = {"1592", "1722", "4616", "4617"}
SPLITS = {"train": 0, "test": 2}


def read_vg150(where, pictures, split, image_data):
    path = Path(where)
    folder = path if path.is_dir() else path.parent
    path = sole(folder, "VG-SGG*.h5") if path.is_dir() else path
    check_split(path, split)
    arrays = vg150_arrays(path)
    names = vg150_names(sole(folder, "*dicts*.json"))
    data_path = Path(image_data) if image_data else folder / "image_data.json"
    records = [record for _, record in JsonFile(data_path).items()]
    total = len(arrays["split"])
    if len(records) != total:
        records = [record for record in records if image_of(record) not in CORRUPT]
    if len(records) != total:
        raise ValueError(f"{data_path}: expected {total} images as in {path}, got {len(records)}")
    for i, record in enumerate(records):
        if split != "all" and arrays["split"][i] != SPLITS[split]:
            continue
        name = image_of(record)
        try:
            yield vg150_graph(i, record, arrays, names, pictures)
        except Bad as error:
            yield BadRecord(f"{path}, image {name} (row {i})", str(error))


def check_split(path, split: str):
    if split not in ("train", "test", "all"):
        raise ValueError(f"{path}: expected split train, test or all, got {split!r}")


def sole(folder: Path, pattern: str) -> Path:
    found = sorted(folder.glob(pattern))
    if len(found) != 1:
        raise ValueError(f"{folder}: expected one {pattern}, got {[p.name for p in found] or 'none'}")
    return found[0]


def vg150_arrays(path: Path) -> dict[str, np.ndarray]:
    """The file's arrays, whole: 200 MB at most. Raises: ValueError."""
    import h5py

    # What a row is, and numbers in a row.
    images = ("split", "img_to_first_box", "img_to_last_box", "img_to_first_rel", "img_to_last_rel")
    columns = {name: ("image", 1) for name in images}
    columns |= {"boxes_1024": ("box", 4), "labels": ("box", 1), "attributes": ("box", 10)}
    columns |= {"relationships": ("relation", 2), "predicates": ("relation", 1)}
    try:
        with h5py.File(path) as file:
            arrays = {name: np.atleast_1d(file[name][()]) for name in columns if name in file}
    except (OSError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: expected HDF5 of arrays: {error}") from None
    if missing := [name for name in columns if name not in arrays and name != "attributes"]:
        raise ValueError(f"{path}: expected arrays {', '.join(columns)}, missing {', '.join(missing)}")
    lengths = {}
    for name, rows in arrays.items():
        row, width = columns[name]
        n = lengths.setdefault(row, len(rows))
        if rows.dtype.kind not in "iu" or rows.size != n * width:
            got = f"{rows.shape} {rows.dtype}"
            raise ValueError(f"{path}: {name}: expected {n} x {width} whole numbers, got {got}")
        arrays[name] = rows.reshape(n, width) if width > 1 else rows.reshape(n)
    return arrays


def vg150_names(path: Path) -> dict[str, dict[str, str]]:
    """{"label" or "predicate" or "attribute": {index as text: name}}."""
    dicts = JsonFile(path).value()
    try:
        names = {kind: get(dicts, f"idx_to_{kind}", dict) for kind in ("label", "predicate")}
        names["attribute"] = get(dicts, "idx_to_attribute", dict, {})
        for kind in names:
            texts(list(names[kind].values()), kind)
    except Bad as error:
        raise ValueError(f"{path}: {error}") from None
    return names


def vg150_graph(i, record, arrays, names, pictures) -> RawGraph:
    image_id = id_of(record, "image_id", "id")
    stated = stated_size(record)
    image, width, height = pictures.place(f"{image_id}.jpg", stated)
    rows, links = (vg150_range(arrays, i, *kinds) for kinds in (("box", "labels"), ("rel", "predicates")))

    def name(kind, index):
        if str(index) not in names[kind]:
            raise Bad(f"{kind}: expected an index of the dictionary, got {index}")
        return names[kind][str(index)]

    scale = max(stated) / 1024  # the longer side is 1024 there; a box is its centre and size
    objects = []
    for row in rows:
        x, y, w, h = (number * scale for number in arrays["boxes_1024"][row].tolist())
        box = corners(x - w / 2, y - h / 2, w, h, arrays["boxes_1024"][row].tolist())
        seen = arrays["attributes"][row].tolist() if "attributes" in arrays and names["attribute"] else ()
        attributes = tuple(name("attribute", a) for a in seen if a)
        objects.append(RawObject(str(row), (name("label", arrays["labels"][row]),), box, attributes))
    relations = []
    for link in links:
        ends = arrays["relationships"][link].tolist()
        if not all(end in rows for end in ends):
            raise Bad(f"relationship {link}: expected boxes {rows.start} to {rows.stop - 1}, got {ends}")
        relations.append((str(ends[0]), name("predicate", arrays["predicates"][link]), str(ends[1])))
    return RawGraph(image_id, image, width, height, tuple(objects), tuple(relations),
                    image_group=vg_group(image_id, record), source="vg150")  # fmt: skip


def vg150_range(arrays, i: int, kind: str, of: str) -> range:
    """The rows of an image. Raises: Bad."""
    first, last = (int(arrays[f"img_to_{end}_{kind}"][i]) for end in ("first", "last"))
    if first == last == -1:
        return range(0)
    if not 0 <= first <= last < len(arrays[of]):
        raise Bad(f"img_to_first_{kind}: expected rows up to {len(arrays[of]) - 1}, got {first} to {last}")
    return range(first, last + 1)


# ---- the Hub's parquet -------------------------------------------------------------------------------------
HUB_COLUMNS = ("image_id", "image", "objects", "relationships")


@functools.lru_cache(4)
def hub_table(source: str, split: str):
    table = read_table(source, split, None, ["image"])
    if missing := [column for column in HUB_COLUMNS if column not in table.column_names]:
        raise ValueError(f"{source}: expected columns {list(HUB_COLUMNS)}, missing {missing}")
    return table


def read_hub(where, pictures, split, image_data):
    table, photos = hub_table(where, split), vg_photos(image_data)
    for row in range(len(table)):
        record = table[row]
        image = f"parquet:{where}#{'' if split == 'train' else split + '/'}{row}"
        try:
            yield hub_graph(record, image, photos)
        except Bad as error:
            yield BadRecord(f"{where}, row {row} ({shown(record['image_id'])})", str(error))


def vg_photos(image_data: str | None) -> dict[str, str]:
    """{image id: the group of its photo} from Visual Genome's image_data.json."""
    records = JsonFile(image_data).items() if image_data else ()
    return {key: vg_group(key, record) for _, record in records if (key := image_of(record))}


def hub_graph(record: dict, image: str, photos: dict) -> RawGraph:
    image_id = id_of(record, "image_id")
    try:
        width, height = open_image(record["image"]).size
    except OSError as error:
        raise Bad(f"image: {error}") from None
    objects = []
    for o in from_text(record, "objects"):
        key = get(o, "id", str)
        name, dot, number = key.rpartition(".")
        objects.append(RawObject(key, (name if dot and number.isdecimal() else key,), xyxy(get(o, "bbox"))))
    relations = tuple(
        (get(r, "subject", str), get(r, "predicate", str), get(r, "object", str))
        for r in from_text(record, "relationships")
    )
    group = photos.get(image_id, f"vg:{image_id}")
    return RawGraph(image_id, image, width, height, tuple(objects), relations, (), group, source="hub")


def from_text(record: dict, column: str) -> list:
    """A list that is stored as JSON text, or as a list. Raises: Bad."""
    value = record[column]
    try:
        value = json.loads(value) if isinstance(value, str) else value
    except (ValueError, RecursionError) as error:
        raise Bad(f"{column}: expected a list in JSON, got {shown(value)}: {error}") from None
    if not isinstance(value, list):
        raise Bad(f"{column}: expected a list, got {shown(value)}")
    return value


# ---- GQA ---------------------------------------------------------------------------------------------------
def read_gqa(where, pictures, split, image_data):
    photos, stream = vg_photos(image_data), JsonFile(where)
    for image_id in stream.keys():
        record = stream.value()
        try:
            yield gqa_graph(image_id, record, pictures, photos.get(image_id, f"vg:{image_id}"))
        except Bad as error:
            yield BadRecord(f"{where}, image {image_id}", str(error))
    stream.finish()


def gqa_graph(image_id: str, record, pictures: Pictures, group: str) -> RawGraph:
    image, width, height = pictures.place(f"{image_id}.jpg", stated_size(record))
    objects, relations = [], []
    for key, o in get(record, "objects", dict).items():
        name = get(o, "name", str)
        objects.append(RawObject(key, (name,), box_of(o), texts(o.get("attributes"), "attributes")))
        # The files have a list; the page that describes them shows a dict.
        listed = get(o, "relations", (list, dict), [])
        for r in listed.values() if isinstance(listed, dict) else listed:
            relations.append((key, get(r, "name", str), id_of(r, "object")))
    return RawGraph(image_id, image, width, height, tuple(objects), tuple(relations),
                    image_group=group, source="gqa")  # fmt: skip


# ---- Open Images -------------------------------------------------------------------------------------------
VRD_COLUMNS = ("ImageID,LabelName1,LabelName2,XMin1,XMax1,YMin1,YMax1,XMin2,XMax2,YMin2,YMax2,"
               "RelationshipLabel").split(",")  # fmt: skip
BOX_COLUMNS = "ImageID,LabelName,XMin,XMax,YMin,YMax,IsGroupOf".split(",")
LABEL_COLUMNS = "ImageID,LabelName,Confidence".split(",")


def read_openimages(where, pictures, split, image_data):
    path = Path(where)
    path = sole(path, "*-vrd.csv") if path.is_dir() else path
    if not pictures.folders:
        raise ValueError(f"{path}: expected a folder of images: the boxes are shares of the pictures' sizes")
    part = next((part for part in ("train", "validation", "test") if part in path.name), "")
    beside = [p for p in sorted(path.parent.glob("*.csv")) if p != path]
    names = described(p for p in beside if "class-descriptions" in p.name)
    words = described(p for p in beside if "attributes-description" in p.name)
    if not names:
        raise ValueError(f"{path.parent}: expected a CSV of class-descriptions, for the names of /m/...")
    rows = CsvByImage(path, VRD_COLUMNS)
    boxes, labels = (
        next((CsvByImage(p, columns) for p in beside if word in p.name and part in p.name), None)
        for word, columns in (("annotations-bbox", BOX_COLUMNS), ("imagelabels", LABEL_COLUMNS))
    )
    for image_id in rows.images():
        try:
            found = [table.rows(image_id) if table else [] for table in (rows, boxes, labels)]
            yield openimages_graph(image_id, *found, names, words, pictures)
        except Bad as error:
            yield BadRecord(f"{path}, image {image_id}", str(error))


def described(paths) -> dict[str, str]:
    """{"/m/04yx4": "Man"} of CSVs with two columns; a line of headings does no harm."""
    names = {}
    for path in paths:
        with open(path, encoding="utf-8-sig", errors="replace", newline="") as file:
            names |= {row[0]: row[1] for row in csv.reader(file) if len(row) >= 2}
    return names


def openimages_graph(image_id, rows, boxes, labels, names, words, pictures) -> RawGraph:
    """Args: names, words: {machine id: text} of classes and of attributes. Raises: Bad."""
    image, width, height = pictures.place(f"{image_id}.jpg", None)
    objects, where = [], {}  # [class, share box, group, attributes]; {class: its numbers in objects}

    def add(label, box, group=False):
        objects.append([label, box, group, []])
        where.setdefault(label, []).append(len(objects) - 1)
        return len(objects) - 1

    def find(row, end):
        """The number of the object that an end of a relation is: no ids, only the same box again."""
        label, box = field(row, f"LabelName{end}"), shares(row, end)
        for number in where.get(label, ()):
            if max(abs(a - b) for a, b in zip(box, objects[number][1], strict=True)) <= SAME_BOX:
                return number
        return add(label, box)

    depicted = set()
    for row in boxes:
        label = field(row, "LabelName")
        add(label, shares(row, ""), row.get("IsGroupOf") == "1")
        depicted |= {label} if row.get("IsDepiction") == "1" else set()
    boxed = len(objects)
    relations = []
    for row in rows:
        predicate, subject = field(row, "RelationshipLabel"), find(row, 1)
        if predicate != "is":
            relations.append((str(subject), predicate, str(find(row, 2))))
        elif words:
            objects[subject][3].append(named(words, field(row, "LabelName2")))
    # A label that people confirmed has a box for each instance, or a box for several; its kinds have theirs
    # under their own names. Of one that they denied there is none.
    exhaustive = {}
    for row in labels if boxes else ():
        label, said = field(row, "LabelName"), field(row, "Confidence")
        instances = where.get(label, ())
        single = all(number < boxed and not objects[number][2] for number in instances)
        sure = single and said.removesuffix(".0") == ("1" if instances else "0")
        if sure and label in names and label not in depicted:
            exhaustive[names[label]] = True
    made = [
        RawObject(str(number), (named(names, label),), pixels(box, width, height), tuple(dict.fromkeys(more)),
                  group=group)
        for number, (label, box, group, more) in enumerate(objects)
    ]  # fmt: skip
    return RawGraph(image_id, image, width, height, tuple(made), tuple(relations), tuple(exhaustive),
                    f"openimages:{image_id}", "CC BY 2.0", "openimages")  # fmt: skip


def field(row: dict, column: str) -> str:
    if not row.get(column):
        raise Bad(f"{column}: expected a value, got {shown(list(row.values()))}")
    return row[column]


def named(names: dict, label: str) -> str:
    if label not in names:
        raise Bad(f"expected a label that the descriptions name, got {label}")
    return names[label]


def shares(row: dict, end) -> Box:
    """x1, x2, y1, y2 of a row: shares of the image's sides, in the file's order. Raises: Bad."""
    columns = [f"{name}{end}" for name in ("XMin", "XMax", "YMin", "YMax")]
    try:
        x1, x2, y1, y2 = (float(row[column]) for column in columns)
    except (KeyError, TypeError, ValueError):
        x1 = x2 = y1 = y2 = math.nan
    if not (-1 <= x1 <= x2 <= 2 and -1 <= y1 <= y2 <= 2):
        got = [row.get(column) for column in columns]
        raise Bad(f"box: expected {', '.join(columns)} as shares of the image, got {got}")
    return x1, x2, y1, y2


def pixels(box: Box, width: int, height: int) -> Box:
    x1, x2, y1, y2 = box
    return x1 * width, y1 * height, x2 * width, y2 * height


# ---- PSG ---------------------------------------------------------------------------------------------------
def read_psg(where, pictures, split, image_data):
    check_split(where, split)
    names = psg_names(where)
    stream = JsonFile(where)
    for key in stream.keys():
        if key != "data":
            stream.skip()
            continue
        for row, (_, record) in enumerate(stream.items()):
            try:
                image_id = id_of(record, "image_id", "coco_image_id")
                if split == "all" or (image_id in names["test"]) == (split == "test"):
                    yield psg_graph(image_id, record, names, pictures)
            except Bad as error:
                yield BadRecord(f"{where}, record {row} (image {image_of(record)})", str(error))
    stream.finish()


def psg_names(path) -> dict[str, list[str]]:
    """The file's lists of names, which come after its data: {"thing", "stuff", "predicate", "test"}."""
    lists, stream = {}, JsonFile(path)
    try:
        for key in stream.keys():
            if key in ("thing_classes", "stuff_classes", "predicate_classes", "test_image_ids"):
                lists[key.split("_")[0]] = stream.value()
            else:
                stream.skip()
    except ValueError:
        if not {"thing", "stuff", "predicate"} <= set(lists):
            raise
    for kind in ("thing", "stuff", "predicate"):
        try:
            lists[kind] = texts(get(lists, kind, list), f"{kind}_classes")
        except Bad as error:
            raise ValueError(f"{path}: {error}") from None
    tests = lists.get("test")
    return lists | {"test": set(map(str, tests)) if isinstance(tests, list) else set()}


def psg_graph(image_id: str, record, names: dict, pictures: Pictures) -> RawGraph:
    image, width, height = pictures.place(get(record, "file_name", str), stated_size(record))
    classes = names["thing"] + names["stuff"]
    boxes, segments = get(record, "annotations", list), get(record, "segments_info", list)
    if len(boxes) != len(segments):
        raise Bad(f"expected a segment for each annotation, got {len(segments)} for {len(boxes)}")
    objects, crowds = [], set()
    for row, (o, segment) in enumerate(zip(boxes, segments, strict=True)):
        number = index(o, "category_id", len(classes))
        label, stuff = (
            classes[number],
            number >= len(names["thing"]),
        )  # of stuff all that there is has one box
        mode = get(o, "bbox_mode", int, 0)
        if mode not in (0, 1):
            raise Bad(f"bbox_mode: expected 0 (corners) or 1 (corner and size), got {mode}")
        box = get(o, "bbox", list)
        box = xywh(box) if mode == 1 else xyxy(box)
        crowd = bool(get(segment, "iscrowd", int, 0))
        crowds |= {label} if crowd else set()
        objects.append(RawObject(str(row), (label,), box, group=stuff, crowd=crowd))
    relations = []
    limits = {"subject": len(objects), "object": len(objects), "predicate": len(names["predicate"])}
    for r in get(record, "relations", list, []):
        if not isinstance(r, list) or len(r) != 3:
            raise Bad(f"relations: expected [subject, object, predicate], got {shown(r)}")
        ends = dict(zip(limits, r, strict=True))
        s, o, p = (index(ends, key, limit) for key, limit in limits.items())
        relations.append((str(s), names["predicate"][p], str(o)))
    exhaustive = tuple(name for name in names["thing"] if name not in crowds)
    group = f"coco:{id_of(record, 'coco_image_id')}" if record.get("coco_image_id") else f"vg:{image_id}"
    return RawGraph(image_id, image, width, height, tuple(objects), tuple(relations), exhaustive, group,
                    source="psg")  # fmt: skip


def index(record, key, limit: int) -> int:
    value = get(record, key, int)
    if not 0 <= value < limit:
        raise Bad(f"{key}: expected 0 to {limit - 1}, got {value}")
    return value


def xywh(value) -> Box:
    if not isinstance(value, list) or len(value) != 4:
        raise Bad(f"bbox: expected [x, y, width, height], got {shown(value)}")
    return corners(*value, value)


# ---- COCO, LVIS --------------------------------------------------------------------------------------------
class Boxes:
    """The boxes of a file that lists them in any order, as columns.

    numbers: {image id: its number, as in `owner`}; bad: {image number: what is wrong with one of its boxes}.
    """

    def __init__(self):
        self.numbers, self.bad = {}, {}
        self.owner, self.category, self.crowd, self.corners = array("i"), array("q"), array("b"), array("d")

    def add(self, record):
        number = self.numbers.setdefault(id_of(record, "image_id"), len(self.numbers))
        try:
            category, box = get(record, "category_id", int), xywh(get(record, "bbox"))
            crowd = bool(get(record, "iscrowd", int, 0))
            self.category.append(category)
        except (Bad, OverflowError) as error:
            self.bad.setdefault(number, f"annotation {record.get('id')}: {error}")
            return
        self.owner.append(number)
        self.crowd.append(crowd)
        self.corners.extend(box)

    def by_image(self):
        """(rows in order of their image, where each image's begin)."""
        order = np.argsort(np.array(self.owner), kind="stable")
        return order, np.searchsorted(np.array(self.owner)[order], np.arange(len(self.numbers) + 1))


def read_coco(where, pictures, split, image_data):
    stream, boxes, lists = JsonFile(where), Boxes(), {}
    for key in stream.keys():
        if key == "images":
            lists[key] = [slim(record) for _, record in stream.items()]
        elif key == "annotations":
            lists[key] = boxes
            for row, (_, record) in enumerate(stream.items()):
                try:
                    boxes.add(record)
                except Bad as error:
                    yield BadRecord(f"{where}, annotation {row}", str(error))
        elif key in ("categories", "licenses"):
            lists[key] = stream.value()
        else:
            stream.skip()
    stream.finish()
    if missing := [key for key in ("images", "annotations", "categories") if key not in lists]:
        raise ValueError(f"{where}: expected images, annotations, categories, missing {', '.join(missing)}")
    names, licences = coco_lists(where, lists)
    order, starts = boxes.by_image()
    listed = set()
    for row, record in enumerate(lists["images"]):
        name = f"{where}, image {record.get('id') if isinstance(record, dict) else f'(record {row})'}"
        try:
            image_id = id_of(record, "id")
            listed.add(image_id)
            number = boxes.numbers.get(image_id)
            if number in boxes.bad:
                raise Bad(boxes.bad[number])
            rows = () if number is None else order[starts[number] : starts[number + 1]]
            yield coco_graph(image_id, record, boxes, rows, names, licences, pictures)
        except Bad as error:
            yield BadRecord(name, str(error))
    for image_id in filter(lambda i: i not in listed, boxes.numbers):
        yield BadRecord(f"{where}, annotations of image {image_id}", "expected the image in images, got none")


def slim(record):
    """An image's record without what is not used: 118,000 of them are held."""
    used = ("id", "file_name", "coco_url", "width", "height", "license", "neg_category_ids",
            "not_exhaustive_category_ids")  # fmt: skip
    return {key: record[key] for key in used if key in record} if isinstance(record, dict) else shown(record)


def coco_lists(path, lists: dict) -> tuple[dict[int, str], dict[int, str]]:
    """({category: name}, {licence: text}). Raises: ValueError."""
    try:
        names = {get(c, "id", int): get(c, "name", str) for c in get(lists, "categories", list)}
        given = {get(one, "id", int): one for one in get(lists, "licenses", list, [])}
    except Bad as error:
        raise ValueError(f"{path}: categories or licenses: {error}") from None
    licences = {} if given else dict(COCO_LICENCES)
    for number, one in given.items():
        url = str(one.get("url") or "")
        known = re.search(r"creativecommons\.org/licenses/([a-z-]+)/(\d\.\d)", url)
        licences[number] = f"CC {known[1].upper()} {known[2]}" if known else str(one.get("name") or url)
    return names, licences


def coco_graph(image_id, record, boxes: Boxes, rows, names, licences, pictures) -> RawGraph:
    # LVIS has only an address, .../train2017/000000391895.jpg.
    file_name = record.get("file_name") or "/".join(get(record, "coco_url", str).split("/")[-2:])
    if not isinstance(file_name, str):
        raise Bad(f"file_name: expected a text, got {shown(file_name)}")
    image, width, height = pictures.place(file_name, stated_size(record))
    objects, crowds, seen = [], set(), set()
    for n, row in enumerate(rows):
        category = boxes.category[row]
        if category not in names:
            raise Bad(f"category_id: expected one of the file's categories, got {category}")
        crowd = bool(boxes.crowd[row])
        seen.add(category)
        crowds |= {category} if crowd else set()
        box = tuple(boxes.corners[4 * row : 4 * row + 4])
        objects.append(RawObject(str(n), (names[category],), box, crowd=crowd))
    complete = set(names)
    if "neg_category_ids" in record:  # LVIS looked in each image for some categories only
        complete = seen - set(numbers(record, "not_exhaustive_category_ids"))
        complete |= set(numbers(record, "neg_category_ids"))
    exhaustive = tuple(name for category, name in names.items() if category in complete - crowds)
    return RawGraph(image_id, image, width, height, tuple(objects), (), exhaustive, f"coco:{image_id}",
                    licences.get(get(record, "license", int, -1), ""), "coco")  # fmt: skip


def numbers(record, key) -> list[int]:
    values = get(record, key, list, [])
    return [get({key: value}, key, int) for value in values]


READERS = {
    "vg": read_vg,
    "vg150": read_vg150,
    "hub": read_hub,
    "gqa": read_gqa,
    "openimages": read_openimages,
    "psg": read_psg,
    "coco": read_coco,
}
