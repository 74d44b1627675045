"""sources.py, records.py: what comes back of small files of all formats, of spoilt records and files."""

import copy
import json
import math
import re
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import graph_files
import pytest
from graph_files import (
    COCO,
    GQA,
    HUB,
    LVIS,
    OLD_API,
    OPENIMAGES,
    PSG,
    SCENE_GRAPHS,
    VG,
    VG150_ARRAYS,
    jpeg,
    save,
    thing,
    write_big_vg,
    write_hub,
    write_openimages,
    write_pictures,
    write_vg,
    write_vg150,
)
from hypothesis import given, settings
from hypothesis import strategies as st

import records
from records import ByImage, JsonFile
from scenes import RawGraph
from sources import BadRecord, image_bytes, read

REPO = Path(__file__).parents[1]


def graphs(spec, **options) -> list[RawGraph]:
    """The graphs of a source, none of which is bad."""
    found = list(read(spec, **options))
    assert not [g for g in found if isinstance(g, BadRecord)]
    return found


def things(graph) -> dict[str, tuple]:
    return {o.key: (o.names, o.box) for o in graph.objects}


def until_broken(spec, **options):
    """(what came before, the error's text)."""
    found = []
    with pytest.raises(ValueError) as caught:
        for graph in read(spec, **options):
            found.append(graph)
    assert "\n" not in str(caught.value)
    return found, str(caught.value)


# ---- Visual Genome -----------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "how", [{}, {"indent": 2}, {"separators": (",", ":")}], ids=["plain", "pretty", "tight"]
)
def test_visual_genome(tmp_path, how):
    one, two, five = graphs(f"vg:{write_vg(tmp_path, **how)}")
    assert things(one) == {
        "10": (("man",), (100, 50, 160, 250)),
        "20": (("bike", "bicycle"), (90, 150, 210, 260)),  # the box that objects.json has, both names
        "30": (
            ("street",),
            (0, 300, 641, 480),
        ),  # "Street" is no other name; over the edge stays over the edge
        "99": (("hat",), (95, 55, 115, 75)),  # only a relation knows it
    }  # and not 98, which two ends name differently
    assert one.relations == (
        ("10", "riding a", "20"), ("99", "ON", "10"), ("98", "on", "98"), ("30", "under", "10"),
    )  # fmt: skip
    assert {o.key: o.attributes for o in one.objects} == {
        "10": ("tall",), "20": ("red", "old"), "30": (), "99": (),
    }  # fmt: skip
    assert (one.image_id, one.image, one.width, one.height) == ("1", "1.jpg", 640, 480)
    assert (two.width, two.height, things(two)) == (500, 333, {"40": (("Traffic Light",), (5, 6, 75, 86))})
    assert [g.image_group for g in (one, two, five)] == ["vg:1", "coco:417720", "flickr:4242"]
    assert {g.source for g in (one, two, five)} == {"vg"} and {g.exhaustive for g in (one, two, five)} == {()}
    assert five.relations == (("50", "next to", "51"),)
    assert all(type(c) is float for g in (one, two, five) for o in g.objects for c in o.box)


@pytest.mark.parametrize("name", ["relationships", "attributes", "image_data"])
def test_files_in_other_orders_or_short_of_images_are_joined(tmp_path, name):
    whole = graphs(f"vg:{write_vg(tmp_path / 'whole')}")
    turned = VG | {name: VG[name][::-1]}
    assert graphs(f"vg:{write_vg(tmp_path / 'turned', turned, indent=1, ensure_ascii=False)}") == whole
    longer = VG | {name: [{"image_id": 7, "relationships": [], "attributes": []}, "no record", {}, *VG[name]]}
    assert graphs(f"vg:{write_vg(tmp_path / 'longer', longer)}") == whole
    short = VG | {name: VG[name][1:]}
    found = list(read(f"vg:{write_vg(tmp_path / 'short', short)}"))
    assert found[1:] == whole[1:]
    if name == "image_data":
        assert isinstance(found[0], BadRecord) and "image 1" in found[0].name
        assert "image_data.json" in found[0].message
    else:
        assert found[0].objects != whole[0].objects and not (name == "relationships" and found[0].relations)


def test_visual_genome_needs_no_more_than_objects_and_sizes(tmp_path):
    folder = write_vg(tmp_path, {name: VG[name] for name in ("objects", "image_data")})
    assert [(len(g.objects), g.relations) for g in graphs(f"vg:{folder}")] == [(3, ()), (1, ()), (2, ())]


def test_scene_graphs_and_the_old_api(tmp_path):
    save(tmp_path / "image_data.json", VG["image_data"])
    path = save(tmp_path / "scene_graphs.json", SCENE_GRAPHS)
    one, two = graphs(f"vg:{tmp_path}")
    assert graphs(f"vg:{path}") == [one, two]
    assert things(one) == {"10": (("man",), (100, 50, 160, 250)), "20": (("bike",), (90, 150, 210, 260))}
    assert one.objects[0].attributes == ("tall",) and one.relations == (("10", "rides", "20"),)
    old = [{("id" if k == "image_id" else k): v for k, v in r.items()} for r in VG["image_data"]]
    save(tmp_path / "old" / "image_data.json", old)
    save(tmp_path / "old" / "scene_graphs.json", OLD_API)
    (graph,) = graphs(f"vg:{tmp_path / 'old'}")
    assert things(graph) == {
        "10": (("man", "guy"), (100, 50, 160, 250)),
        "20": (("bike",), (90, 150, 210, 260)),
    }
    assert graph.relations == (("10", "rides", "20"),)


def test_an_object_listed_twice_is_one_and_two_under_one_id_stay_two(tmp_path):
    data = copy.deepcopy(VG)
    data["objects"][2]["objects"] += [thing(50, 10, 10, 100, 100, "cup"), thing(50, 0, 0, 9, 9, "cup")]
    assert things(graphs(f"vg:{write_vg(tmp_path, data)}")[2]) == {
        "50": (("cup",), (10, 10, 110, 110)),
        "51": (("plate",), (150, 10, 250, 110)),
        "50'": (("cup",), (0, 0, 9, 9)),
    }


SPOILT = [  # what of image 1 becomes what, and a part of the message
    (("objects", 0, "objects", 0, "x"), math.nan, "box: expected numbers"),
    (("objects", 0, "objects", 0, "w"), -3, "'w': -3"),
    (("objects", 0, "objects", 0, "h"), "200", "height >= 0, got"),
    (("objects", 0, "objects", 0, "h"), math.inf, "height >= 0, got"),
    (("objects", 0, "objects", 0, "y"), None, "'y': None"),
    (("objects", 0, "objects", 0, "y"), 10**400, "box: expected"),
    (("objects", 0, "objects", 0, "names"), [5], "names: expected texts, got [5]"),
    (("objects", 0, "objects", 0, "names"), {"a": 1}, "names: expected texts"),
    (("objects", 0, "objects", 0, "object_id"), None, "expected object_id or id"),
    (("objects", 0, "objects", 0, "object_id"), [1], "object_id: expected a whole number or a text, got [1]"),
    (("objects", 0, "objects", 1, "merged_object_ids"), 7, "merged_object_ids: expected a list, got 7"),
    (("objects", 0, "objects", 1), "bike", "got 'bike'"),
    (("objects", 0, "objects"), {}, "objects: expected a list, got {}"),
    (("objects", 0, "image_id"), [1], "expected image_id"),
    (("relationships", 0, "relationships", 0, "predicate"), None, "predicate: expected a text, got None"),
    (("relationships", 0, "relationships", 0, "subject"), None, "subject"),
    (("relationships", 0, "relationships", 0, "object"), 5.5, "object: expected a whole number"),
    (("relationships", 0, "relationships", 0), 1, "got 1"),
    (("relationships", 0, "relationships", 1, "subject", "w"), -1, "'w': -1"),
    (("relationships", 0, "relationships"), 1, "relationships: expected a list, got 1"),
    (("attributes", 0, "attributes", 0, "attributes"), "tall", "attributes: expected a list, got 'tall'"),
    (("attributes", 0, "attributes", 0), None, "expected a record with attributes, got None"),
    (("image_data", 0, "width"), "640", "width: expected a whole number, got '640'"),
    (("image_data", 0, "height"), 0, "at least 1, got 640 x 0"),
]  # fmt: skip


@pytest.mark.parametrize(("path", "value", "message"), SPOILT, ids=lambda v: str(v)[:40])
def test_a_spoilt_record_is_named_and_the_others_are_read(tmp_path, path, value, message):
    data = copy.deepcopy(VG)
    *way, last = path
    place = data
    for step in way:
        place = place[step]
    place[last] = value
    whole = graphs(f"vg:{write_vg(tmp_path / 'whole')}")
    bad, *rest = read(f"vg:{write_vg(tmp_path / 'spoilt', data)}")
    assert isinstance(bad, BadRecord) and message in bad.message and "\n" not in bad.message
    assert ("record 0" if last == "image_id" else "image 1") in bad.name
    assert rest == whole[1:]


def test_an_image_that_comes_again_is_bad(tmp_path):
    found = list(read(f"vg:{write_vg(tmp_path, VG | {'objects': VG['objects'] + VG['objects'][:1]})}"))
    assert found[3] == BadRecord("image 1", "expected each image once, got it again") and len(found) == 4


# ---- broken files ------------------------------------------------------------------------------------------
def test_a_file_cut_anywhere_gives_its_whole_records_and_then_one_error(tmp_path):
    """Cut after every byte: never an exception of another kind, never a record that is not whole."""
    folder = write_vg(tmp_path, ensure_ascii=False)
    whole, text = graphs(f"vg:{folder}"), (folder / "objects.json").read_bytes()
    starts = [byte for byte, _ in JsonFile(folder / "objects.json").items()]
    ends = [starts[1] - 2, starts[2] - 2, len(text) - 1]  # where the three records are whole
    for cut in range(len(text)):
        (folder / "objects.json").write_bytes(text[:cut])
        found, message = until_broken(f"vg:{folder}")
        assert found == whole[: sum(cut >= end for end in ends)], cut
        byte = int(re.match(rf"{folder / 'objects.json'}: byte (\d+): ", message)[1])
        assert cut - 16 <= byte <= cut and message.endswith(f" (the file ends at byte {cut}: cut off?)")


@pytest.mark.parametrize(("text", "message"), [
    ("", "byte 0: expected [, got nothing (the file ends at byte 0: cut off?)"),
    ("  \n ", "byte 4: expected [, got nothing"),
    ('{"image_id": 1}', "byte 0: expected [, got {"),
    ("PK\x03\x04", "byte 0: expected [, got P"),
    ('[{"image_id": 1, "objects": []}] x', "byte 33: expected the end of the file, got x"),
    ('[{"image_id": 1, "objects": []},]', "byte 32: not JSON: Expecting value"),
    ('[{"image_id": 1, "objects": []} {}]', "byte 32: expected , or ], got {"),
    ('[{"image_id": 1, "objects": []}, {"é": tru, "b": "cccccccccccccccccccc"}]', "byte 40: not JSON"),
    ('[{"image_id": 1, "objects": []}, ' + "[" * 100_000, "byte 33: not a record: maximum recursion"),
    ('[{"image_id": 1, "objects": []}, ' + "1" * 5000 + "]", "byte 33: not a record: Exceeds the limit"),
])  # fmt: skip
def test_what_is_not_json_is_said_with_its_byte(tmp_path, text, message):
    folder = write_vg(tmp_path)
    (folder / "objects.json").write_text(text, encoding="utf-8")
    found, error = until_broken(f"vg:{folder}")
    assert error.startswith(f"{folder / 'objects.json'}: {message}")
    assert [g.image_id for g in found] == ["1"] * text.startswith('[{"image_id": 1, "objects": []}')


def test_a_mistake_is_found_without_reading_on(tmp_path, monkeypatch):
    """Ten megabytes follow; a cut record would have to wait for them."""
    path = tmp_path / "a.json"
    path.write_text('[1, {"a": tru, "b": ' + " " * 10_000_000 + "1}]")
    file = JsonFile(path)
    with pytest.raises(ValueError, match="byte 10"):
        list(file.items())
    assert file.file.tell() < 1_000_000
    monkeypatch.setattr(records, "LONGEST", 100_000)
    path.write_text('[1, "' + "x" * 10_000_000)
    file = JsonFile(path)
    with pytest.raises(ValueError, match="expected a record of at most 100,000 characters"):
        list(file.items())
    assert file.file.tell() < 1_000_000


def test_bytes_that_are_no_utf8_end_a_file_where_they_stand(tmp_path):
    folder = write_vg(tmp_path, ensure_ascii=False)
    text = (folder / "objects.json").read_bytes()
    spot = text.index(b"Traffic")
    (folder / "objects.json").write_bytes(text[:spot] + b"\xff" + text[spot + 1 :])
    found, message = until_broken(f"vg:{folder}")
    assert [g.image_id for g in found] == ["1"] and f"byte {spot}: expected UTF-8, got b'\\xff'" in message
    (folder / "objects.json").write_bytes(text + b" \xc3")  # half a letter
    found, message = until_broken(f"vg:{folder}")
    assert len(found) == 3 and f"byte {len(text) + 1}: expected UTF-8, got b'\\xc3'" in message


def test_a_broken_file_beside_ends_the_reading_too(tmp_path):
    folder = write_vg(tmp_path)
    text = (folder / "relationships.json").read_text()
    (folder / "relationships.json").write_text(text[:-40])
    found, message = until_broken(f"vg:{folder}")
    assert [g.image_id for g in found] == ["1", "2"] and "relationships.json: byte" in message
    save(folder / "objects.json", VG["objects"][::-1])  # the third image is asked for first
    assert "relationships.json: byte" in until_broken(f"vg:{folder}")[1]


LEAVES = st.none() | st.booleans() | st.floats(allow_nan=False) | st.text() | st.integers()
TREES = st.recursive(LEAVES, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=8)


@settings(max_examples=60, deadline=None)
@given(st.lists(TREES), st.integers(1, 40), st.sampled_from([None, 1]), st.booleans())
def test_the_stream_equals_json_load_wherever_pieces_end(tmp_path_factory, values, piece, indent, ascii_only):
    path = tmp_path_factory.mktemp("stream") / "a.json"
    path.write_bytes(json.dumps(values, indent=indent, ensure_ascii=ascii_only).encode("utf-8", "replace"))
    expected = json.loads(path.read_bytes())
    file = JsonFile(path)
    file.file = Small(file.file, piece)
    found = list(file.items())
    assert [value for _, value in found] == expected and file.peek() == ""
    for byte, value in found:  # and each is found again at its byte
        file.seek(byte)
        assert file.value() == value


class Small:
    """A file that gives a few bytes at a time, whatever is asked for."""

    def __init__(self, file, piece):
        self.file, self.piece, self.seek, self.tell = file, piece, file.seek, file.tell

    def read(self, size):
        return self.file.read(min(size, self.piece))


def test_a_byte_order_mark_is_stepped_over(tmp_path):
    (tmp_path / "a.json").write_bytes(b"\xef\xbb\xbf[1, 2]")
    assert list(JsonFile(tmp_path / "a.json").items()) == [(4, 1), (7, 2)]


def test_records_are_sought_only_once_orders_differ(tmp_path):
    records = [{"image_id": i, "é": "ü" * i} for i in range(40)]
    table = ByImage(save(tmp_path / "a.json", records, ensure_ascii=False))
    assert [table.get(str(i)) for i in range(5)] == records[:5] and table.starts is None
    assert table.get("39") == records[39] and table.get("7") == records[7] and table.get("x") is None
    assert len(table.starts) == 40


# ---- VG150 -------------------------------------------------------------------------------------------------
def test_vg150(tmp_path):
    folder = write_vg150(tmp_path)
    one, three = graphs(f"vg150:{folder}")
    assert graphs(f"vg150:{folder / 'VG-SGG-with-attri.h5'}") == [one, three]
    # 128 +- 64 and 256 +- 128 of 1024 are 50..150 and 100..300 of 800.
    assert things(one) == {"0": (("man",), (50, 100, 150, 300)), "1": (("horse",), (300, 250, 500, 350))}
    assert [o.attributes for o in one.objects] == [("tall", "white"), ()]
    assert one.relations == (("0", "riding", "1"),) and (one.width, one.height) == (800, 600)
    # The corrupt image between them has no rows: the second is image 3, of 480 x 640.
    assert things(three) == {"2": (("hat",), (50, 100, 150, 300))}
    assert (three.image_id, three.image_group, three.relations) == ("3", "coco:99", ())
    assert [g.image_id for g in graphs(f"vg150:{folder}", split="test")] == ["4"]
    assert len(graphs(f"vg150:{folder}", split="all")) == 3


@pytest.mark.parametrize(("array", "row", "value", "message"), [
    ("labels", 0, [9], "label: expected an index of the dictionary, got 9"),
    ("predicates", 0, [0], "predicate: expected an index of the dictionary, got 0"),
    ("attributes", 0, [3] + [0] * 9, "attribute: expected an index"),
    ("relationships", 0, [0, 2], "expected boxes 0 to 1, got [0, 2]"),  # box 2 is of another image
    ("relationships", 0, [-1, 0], "expected boxes 0 to 1, got [-1, 0]"),
    ("img_to_last_box", 0, 4, "expected rows up to 3, got 0 to 4"),
    ("img_to_first_rel", 0, -2, "got -2 to 0"),
    ("boxes_1024", 1, [5, 5, -1, 5], "height >= 0, got [5, 5, -1, 5]"),
])  # fmt: skip
def test_vg150_rows_out_of_range(tmp_path, array, row, value, message):
    arrays = copy.deepcopy(VG150_ARRAYS)
    arrays[array][row] = value
    bad, good = read(f"vg150:{write_vg150(tmp_path, arrays)}")
    assert isinstance(bad, BadRecord) and message in bad.message and "image 1 " in bad.name
    assert good.image_id == "3"


def test_vg150_files_that_do_not_fit(tmp_path):
    folder = write_vg150(tmp_path)
    save(folder / "image_data.json", graph_files.VG150_IMAGES[:2])
    assert "expected 3 images" in until_broken(f"vg150:{folder}")[1]
    (folder / "image_data.json").unlink()
    assert "image_data.json: No such file" in until_broken(f"vg150:{folder}")[1]
    write_vg150(folder, {k: v for k, v in VG150_ARRAYS.items() if k != "labels"})
    assert "missing labels" in until_broken(f"vg150:{folder}")[1]
    write_vg150(folder, VG150_ARRAYS | {"labels": [[1], [2]]})
    assert "labels: expected 4 x 1 whole numbers, got (2, 1)" in until_broken(f"vg150:{folder}")[1]
    (folder / "VG-SGG-with-attri.h5").write_text("no HDF5")
    assert "expected HDF5" in until_broken(f"vg150:{folder}")[1]
    (folder / "VG-SGG-with-attri.h5").unlink()
    assert "expected one VG-SGG*.h5, got none" in until_broken(f"vg150:{folder}")[1]
    write_vg150(folder)
    assert "expected split train, test or all, got 'val'" in until_broken(f"vg150:{folder}", split="val")[1]


# ---- the Hub's parquet -------------------------------------------------------------------------------------
def test_hub_columns_from_a_file_and_a_folder(tmp_path):
    path = write_hub(tmp_path / "train-00000-of-00001.parquet")
    one, two = graphs(f"hub:{path}")
    assert things(one) == {
        "railing.1": (("railing",), (0, 100, 320, 140)),
        "flower.4": (("flower",), (10, 20, 30, 40)),
    }
    assert one.relations == (("flower.4", "on", "railing.1"),) and (one.width, one.height) == (320, 240)
    assert things(two) == {"t-shirt.7": (("t-shirt",), (1, 2, 3.5, 4))} and two.image_group == "vg:2"
    assert image_bytes(two) == jpeg(100, 200) and two.image == f"parquet:{path}#1"
    save(tmp_path / "image_data.json", VG["image_data"])
    found = graphs(f"hub:{tmp_path}", image_data=str(tmp_path / "image_data.json"))
    assert found[1].image == f"parquet:{tmp_path}#1" and found[1].image_group == "coco:417720"
    write_hub(tmp_path / "val-00000-of-00001.parquet", HUB[1:])
    (only,) = graphs(f"hub:{tmp_path}", split="val")
    assert only.image_id == "2" and image_bytes(only) == jpeg(100, 200)


@pytest.mark.parametrize(("change", "message"), [
    ({"objects": "[{"}, "objects: expected a list in JSON, got '[{'"),
    ({"objects": "{}"}, "objects: expected a list, got {}"),
    ({"objects": "[" * 9999}, "objects: expected a list in JSON"),
    ({"objects": [{"id": "a.1", "bbox": [3, 0, 2, 9]}]}, "x1 <= x2 and y1 <= y2, got [3, 0, 2, 9]"),
    ({"objects": [{"id": "a.1", "bbox": ["1", 0, 2, 9]}]}, "got ['1', 0, 2, 9]"),
    ({"objects": [{"id": "a.1", "bbox": [1, 0, 2]}]}, "got [1, 0, 2]"),
    ({"objects": [{"id": "a.1"}]}, "bbox: expected a value, got nothing"),
    ({"objects": [{"bbox": [1, 0, 2, 9]}]}, "id: expected a text, got nothing"),
    ({"relationships": [{"subject": 1, "predicate": "on", "object": "a.1"}]}, "subject: expected a text"),
    ({"bytes": b"GIF89a"}, "image: "),
    ({"bytes": None}, "image: neither bytes nor a path"),
])  # fmt: skip
def test_hub_rows_that_cannot_be_read(tmp_path, change, message):
    path = write_hub(tmp_path / "train.parquet", [HUB[0] | change, HUB[1]])
    bad, good = read(f"hub:{path}")
    assert isinstance(bad, BadRecord) and message in bad.message and bad.name == f"{path}, row 0 ('1')"
    assert good.image_id == "2"


def test_hub_tables_that_are_others(tmp_path):
    import datasets

    datasets.Dataset.from_dict({"image_id": ["1"], "question": ["?"]}).to_parquet(tmp_path / "train.parquet")
    assert (
        "missing ['image', 'objects', 'relationships']"
        in until_broken(f"hub:{tmp_path / 'train.parquet'}")[1]
    )
    assert "expected val.parquet" in until_broken(f"hub:{tmp_path}", split="val")[1]
    with pytest.raises(ValueError, match="no such file"):
        read(f"hub:{tmp_path / 'no.parquet'}")


# ---- GQA ---------------------------------------------------------------------------------------------------
def test_gqa(tmp_path):
    path = save(tmp_path / "val_sceneGraphs.json", GQA)
    chair, tv = graphs(f"gqa:{path}")
    assert things(chair) == {
        "271881": (("chair",), (220, 310, 270, 390)),
        "275312": (("rug",), (100, 350, 500, 480)),
    }
    assert chair.objects[0].attributes == ("brown", "wooden") and (chair.width, chair.height) == (640, 480)
    # An end that is not there is left to the cleaning, which counts it.
    assert chair.relations == (("271881", "on", "275312"), ("271881", "near", "279472"))
    assert tv.relations == (("1", "on", "1"),) and (tv.image, tv.image_group) == ("n5.jpg", "vg:n5")
    photos = save(tmp_path / "image_data.json", [{"image_id": 2407890, "coco_id": 3}])
    assert graphs(f"gqa:{path}", image_data=str(photos))[0].image_group == "coco:3"


@pytest.mark.parametrize(("change", "message"), [
    ({"width": None}, "width: expected a whole number, got None"),
    ({"objects": []}, "objects: expected a record, got []"),
    ({"objects": {"1": {"x": 1, "y": 2, "w": 3, "h": 4}}}, "name: expected a text, got nothing"),
    ({"objects": {"1": {"name": "a", "x": 1, "y": 2, "w": 3}}}, "height >= 0, got"),
    ({"objects": {"1": GQA["n5"]["objects"]["1"] | {"relations": 3}}}, "expected a list or a record"),
    ({"objects": {"1": GQA["n5"]["objects"]["1"] | {"relations": [{"name": "on"}]}}}, "expected object, got"),
])  # fmt: skip
def test_gqa_records_that_cannot_be_read(tmp_path, change, message):
    bad, good = read(
        f"gqa:{save(tmp_path / 'a.json', {'2407890': GQA['2407890'] | change, 'n5': GQA['n5']})}"
    )
    assert isinstance(bad, BadRecord) and message in bad.message and bad.name.endswith("image 2407890")
    assert good.image_id == "n5"


def test_gqa_cut_or_of_another_kind(tmp_path):
    path = save(tmp_path / "a.json", GQA)
    text = path.read_text()
    path.write_text(text[:-10])
    found, message = until_broken(f"gqa:{path}")
    assert [g.image_id for g in found] == ["2407890"] and f"ends at byte {len(text) - 10}" in message
    path.write_text("[]")
    assert "byte 0: expected {, got [" in until_broken(f"gqa:{path}")[1]
    path.write_text("{1: 2}")
    assert "byte 1: expected a key in quotes, got 1" in until_broken(f"gqa:{path}")[1]


# ---- Open Images -------------------------------------------------------------------------------------------
def test_openimages(tmp_path):
    path = write_openimages(tmp_path)
    man, person = graphs(f"openimages:{path}", images=str(tmp_path))
    # Shares of 200 x 100; the order in the file is XMin, XMax, YMin, YMax.
    assert things(man) == {
        "0": (("Man",), pytest.approx((10, 10, 110, 90))),
        "1": (("Man",), pytest.approx((120, 10, 160, 90))),
        "2": (("Table",), pytest.approx((100, 50, 200, 100))),
        "3": (("Guitar",), pytest.approx((50, 50, 100, 75))),
    }
    # The row of the table, far below the others, and its man's box printed with other digits: joined.
    assert man.relations == (("0", "holds", "3"), ("0", "at", "2"))
    assert [o.attributes for o in man.objects] == [("Smile",), (), (), ()]
    assert [o.group for o in man.objects] == [False, False, True, False]
    # Tables have a box for several; no person or guitar has a box in the list of boxes; no dog is there.
    assert man.exhaustive == ("Man", "Dog")
    assert person.relations == (("0", "plays", "1"),) and (person.width, person.height) == (64, 48)
    assert person.exhaustive == ()  # without boxes nothing is known to be all
    assert graphs(f"openimages:{tmp_path}", images=str(tmp_path)) == [man, person]
    assert man.licence == "CC BY 2.0" and man.image_group == "openimages:000ac95750ac7399"


def test_openimages_without_what_may_lie_beside(tmp_path):
    keep = [name for name in OPENIMAGES if "vrd" in name or "class" in name]
    path = write_openimages(tmp_path, {name: OPENIMAGES[name] for name in keep})
    man, _ = graphs(f"openimages:{path}", images=str(tmp_path / "images" / "validation"))
    assert [o.names for o in man.objects] == [("Man",), ("Guitar",), ("Table",)] and man.exhaustive == ()
    assert man.objects[0].attributes == ()
    assert "expected a folder of images" in until_broken(f"openimages:{path}")[1]
    (tmp_path / keep[1]).unlink()
    assert "class-descriptions" in until_broken(f"openimages:{path}", images=str(tmp_path))[1]


@pytest.mark.parametrize(("row", "message"), [
    ("/m/04yx4,/m/0342h,0.5,0.05,0.1,0.9,0.25,0.5,0.5,0.75,holds", "expected XMin1, XMax1"),
    ("/m/04yx4,/m/0342h,0.05,0.5,0.1,0.9,0.25,nan,0.5,0.75,holds", "expected XMin2, XMax2"),
    ("/m/04yx4,/m/0342h,0.05,0.5,0.1,0.9,0.25,x,0.5,0.75,holds", "expected XMin2, XMax2"),
    ("/m/04yx4,/m/0342h,10,300,20,200,0.25,0.5,0.5,0.75,holds", "as shares of the image"),
    ("/m/04yx4,/m/nobody,0.05,0.5,0.1,0.9,0.25,0.5,0.5,0.75,holds", "got /m/nobody"),
    ("/m/04yx4,/m/0342h,0.05,0.5,0.1,0.9,0.2", "RelationshipLabel: expected a value"),
    ("", "RelationshipLabel: expected a value"),
])  # fmt: skip
def test_openimages_rows_that_cannot_be_read(tmp_path, row, message):
    path = write_openimages(tmp_path)
    with open(path, "a") as file:
        file.write(f"000ac95750ac7399,{row}\n")
    bad, good = read(f"openimages:{path}", images=str(tmp_path))
    assert isinstance(bad, BadRecord) and message in bad.message and "image 000ac95750ac7399" in bad.name
    assert good.image_id == "00aaaaaaaaaaaaaa"


def test_openimages_of_other_columns_or_without_pictures(tmp_path):
    path = write_openimages(tmp_path)
    (tmp_path / "images" / "validation" / "00aaaaaaaaaaaaaa.jpg").unlink()
    good, bad = read(f"openimages:{path}", images=str(tmp_path))
    assert (
        isinstance(good, RawGraph) and "for its size" in bad.message and "00aaaaaaaaaaaaaa.jpg" in bad.message
    )
    path.write_text("ImageID,LabelName\n")
    assert "missing ['LabelName1'" in until_broken(f"openimages:{path}", images=str(tmp_path))[1]
    path.write_text("")
    assert "missing ['ImageID'" in until_broken(f"openimages:{path}", images=str(tmp_path))[1]


# ---- PSG ---------------------------------------------------------------------------------------------------
def test_psg(tmp_path):
    path = save(tmp_path / "psg.json", PSG)
    (graph,) = graphs(f"psg:{path}")
    assert things(graph) == {
        "0": (("person",), (49, 162, 207, 617)),
        "1": (("bicycle",), (259, 158, 397, 631)),
        "2": (("tree-merged",), (0, 285, 480, 640)),  # of bbox_mode 1; stuff is numbered after things
    }
    assert graph.relations == (("0", "beside", "1"), ("0", "over", "2"))
    assert graph.exhaustive == ("person", "car") and [o.crowd for o in graph.objects] == [False, True, False]
    assert [o.group for o in graph.objects] == [False, False, True]
    assert (graph.image, graph.image_id, graph.image_group) == (
        "train2017/000000417720.jpg",
        "107902",
        "coco:417720",
    )
    assert [g.image_id for g in graphs(f"psg:{path}", split="test")] == ["7"]
    assert len(graphs(f"psg:{path}", split="all")) == 2
    write_pictures(tmp_path / "coco" / "train2017", {"000000417720.jpg": (480, 640)})
    assert graphs(f"psg:{path}", images=str(tmp_path / "coco"))[0].image.endswith(
        "train2017/000000417720.jpg"
    )


@pytest.mark.parametrize(("change", "message"), [
    ({"relations": [[0, 3, 0]]}, "object: expected 0 to 2, got 3"),
    ({"relations": [[0, -1, 0]]}, "object: expected 0 to 2, got -1"),
    ({"relations": [[0, 1, 3]]}, "predicate: expected 0 to 2, got 3"),
    ({"relations": [[0, 1]]}, "expected [subject, object, predicate], got [0, 1]"),
    ({"relations": [[0, "1", 0]]}, "object: expected a whole number, got '1'"),
    ({"segments_info": []}, "expected a segment for each annotation, got 0 for 3"),
    ({"annotations": [{"bbox": [0, 0, 1, 1], "category_id": 5}] * 3}, "category_id: expected 0 to 4, got 5"),
    ({"annotations": [{"bbox": [0, 0, 1, 1], "bbox_mode": 2, "category_id": 1}] * 3}, "expected 0 (corners)"),
    ({"annotations": [{"bbox": 5, "category_id": 1}] * 3}, "bbox: expected a list, got 5"),
    ({"file_name": None}, "file_name: expected a text, got None"),
    ({"image_id": None, "coco_image_id": None}, "expected image_id or coco_image_id"),
])  # fmt: skip
def test_psg_records_that_cannot_be_read(tmp_path, change, message):
    data = PSG | {"data": [PSG["data"][0] | change, PSG["data"][1]], "test_image_ids": []}
    bad, good = read(f"psg:{save(tmp_path / 'psg.json', data)}")
    assert isinstance(bad, BadRecord) and message in bad.message and "record 0" in bad.name
    assert good.image_id == "7"


def test_folders_and_files_of_another_kind(tmp_path):
    path = write_openimages(tmp_path)
    for kind in ("gqa", "psg", "coco"):
        assert "Is a directory" in until_broken(f"{kind}:{tmp_path}")[1]
        assert "byte 0: expected {, got I" in until_broken(f"{kind}:{path}")[1]
    assert "byte 0: expected [, got I" in until_broken(f"vg:{path}", images=str(tmp_path))[1]
    assert "expected HDF5" in until_broken(f"vg150:{path}")[1]


def test_psg_cut(tmp_path):
    """Its lists of names come last: without them nothing can be read, with them what is whole."""
    path = save(tmp_path / "psg.json", PSG)
    path.write_text(path.read_text()[:-100])
    assert until_broken(f"psg:{path}")[0] == []
    turned = dict(reversed(PSG.items()))
    path.write_text(save(tmp_path / "psg.json", turned).read_text()[:-60])
    found, message = until_broken(f"psg:{path}", split="all")
    assert [g.image_id for g in found] == ["107902"] and "cut off?" in message
    save(path, {k: v for k, v in PSG.items() if k != "stuff_classes"})
    assert "stuff: expected a list, got nothing" in until_broken(f"psg:{path}")[1]


# ---- COCO, LVIS --------------------------------------------------------------------------------------------
def test_coco(tmp_path):
    path = save(tmp_path / "instances.json", COCO)
    plant, crowd, none = graphs(f"coco:{path}")
    assert things(plant) == {
        "0": (("potted plant",), (236.75, 142.5, 261.5, 212)),
        "1": (("car",), (0, 0, 640, 426)),
    }
    assert things(crowd) == {
        "0": (("car",), (203.5, 304.5, 231.5, 322.75)),
        "1": (("car",), (59, 253, 311, 337)),
    }
    assert [o.crowd for o in crowd.objects] == [False, True]
    assert plant.exhaustive == ("car", "potted plant", "toothbrush") == none.exhaustive
    assert crowd.exhaustive == ("potted plant", "toothbrush")  # a crowd box: not every car has its own
    assert [g.licence for g in (plant, crowd, none)] == [
        "CC BY-NC 2.0",
        "No known copyright restrictions",
        "",
    ]
    assert (plant.image_group, none.objects, plant.relations) == ("coco:139", (), ())
    turned = save(tmp_path / "turned.json", dict(reversed(COCO.items())))
    assert graphs(f"coco:{turned}") == [plant, crowd, none]


def test_licences_by_number_where_the_file_lists_none(tmp_path):
    images = [COCO["images"][0] | {"id": i, "license": i} for i in range(10)]
    path = save(tmp_path / "a.json", {k: v for k, v in COCO.items() if k != "licenses"} | {"images": images})
    found = [g.licence for g in read(f"coco:{path}") if isinstance(g, RawGraph)]
    assert found[4] == "CC BY 2.0" and found[5] == "CC BY-SA 2.0" and found[1] == "CC BY-NC-SA 2.0"
    assert found[0] == found[9] == "" and len(set(found)) == 9


def test_lvis(tmp_path):
    (graph,) = graphs(f"coco:{save(tmp_path / 'lvis.json', LVIS)}")
    # Cups were looked for and boxed, not all books were, there is no cat, and nobody looked for a dog.
    assert graph.exhaustive == ("cup", "cat") and graph.licence == "CC BY 2.0"
    assert graph.image == "train2017/000000391895.jpg" and len(graph.objects) == 2


def test_coco_records_that_cannot_be_read(tmp_path):
    data, box = copy.deepcopy(COCO), {"category_id": 3, "bbox": [1, 1, 2, 2]}
    data["annotations"] += [
        {"image_id": 5, "category_id": 3, "bbox": [1, 1, -2, 2], "id": 77},
        {"image_id": 255917, "category_id": 1, "bbox": [1, 1, 2, 2]},
        {**box, "image_id": 12345},
        {**box},
        "x",
    ]
    data["images"] += [{"id": 8, "width": 5, "height": 5}, 7, {**data["images"][0], "id": 9, "license": [2]}]
    found = list(read(f"coco:{save(tmp_path / 'a.json', data)}"))
    assert [g.image_id for g in found if isinstance(g, RawGraph)] == ["139"]
    bad = {
        g.name.removeprefix(f"{tmp_path / 'a.json'}, "): g.message for g in found if isinstance(g, BadRecord)
    }
    assert list(bad) == ["annotation 7", "annotation 8", "image 255917", "image 5", "image 8",
                         "image (record 4)", "image 9", "annotations of image 12345"]  # fmt: skip
    assert bad["image 5"].startswith("annotation 77: box: expected numbers")
    assert bad["image 255917"] == "category_id: expected one of the file's categories, got 1"
    assert bad["image 8"] == "coco_url: expected a text, got nothing"
    assert bad["image 9"] == "license: expected a whole number, got [2]"


def test_coco_that_is_not_whole_gives_nothing(tmp_path):
    """Boxes of any image may have stood in what is lost."""
    path = save(tmp_path / "a.json", COCO)
    text = path.read_text()
    path.write_text(text[:-200])
    assert until_broken(f"coco:{path}")[0] == []
    save(path, {k: v for k, v in COCO.items() if k != "categories"})
    message = "expected images, annotations, categories, missing categories"
    assert until_broken(f"coco:{path}") == ([], f"{path}: {message}")
    save(path, COCO | {"categories": [{"id": "3", "name": "car"}]})
    assert "id: expected a whole number, got '3'" in until_broken(f"coco:{path}")[1]


# ---- pictures ----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("below", ["", "VG_100K", "VG_100K_2", "images"])
def test_pictures_are_found_below_the_folder_and_given_back_byte_for_byte(tmp_path, below):
    folder = write_vg(tmp_path / "vg")
    write_pictures(tmp_path / "photos" / below, {"1.jpg": (640, 480)})
    one, two, _ = graphs(f"vg:{folder}", images=str(tmp_path / "photos"))
    assert one.image == str(tmp_path / "photos" / below / "1.jpg") and image_bytes(one) == jpeg(640, 480)
    with pytest.raises(OSError, match="photos/2.jpg"):  # missing: no error before it is needed
        image_bytes(two)


def test_the_pictures_own_size_upright_decides(tmp_path):
    folder = write_vg(tmp_path / "vg", VG)
    for data, sizes in (
        (jpeg(480, 640, 6), None),
        (jpeg(640, 480, 6), "480 x 640"),
        (jpeg(641, 480), "641 x 480"),
    ):
        (tmp_path / "1.jpg").write_bytes(data)
        first = next(read(f"vg:{folder}", images=str(tmp_path)))
        if sizes is None:  # lies on its side and is turned
            assert (first.width, first.height) == (640, 480) and image_bytes(first) == data
        else:
            assert first.message == f"expected a picture of 640 x 480, got {sizes}: {tmp_path / '1.jpg'}"
    (tmp_path / "1.jpg").write_bytes(b"no picture")
    assert "expected a readable picture" in next(read(f"vg:{folder}", images=str(tmp_path))).message


def test_sizes_come_from_pictures_where_no_file_states_them(tmp_path):
    folder = write_vg(tmp_path / "vg", {"objects": VG["objects"]})
    assert "expected image_data.json, or a folder of images" in until_broken(f"vg:{folder}")[1]
    write_pictures(tmp_path, {"1.jpg": (700, 500)})
    one, *bad = read(f"vg:{folder}", images=str(tmp_path))
    assert (one.width, one.height) == (700, 500)
    assert [b.message for b in bad] == [
        f"expected a picture, for its size: {tmp_path}/{n}.jpg" for n in (2, 5)
    ]


def test_without_images_no_picture_is_opened(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "open_image", None)
    assert len(graphs(f"vg:{write_vg(tmp_path)}")) == 3


@pytest.mark.parametrize("name", ["/etc/passwd", "../../secret.jpg", "a/../../secret.jpg"])
def test_annotations_do_not_choose_files_outside_the_folder(tmp_path, name):
    (tmp_path / "secret.jpg").write_bytes(jpeg(640, 426))
    (tmp_path / "photos" / "a").mkdir(parents=True)
    data = COCO | {"images": [COCO["images"][0] | {"file_name": name}], "annotations": []}
    (graph,) = graphs(f"coco:{save(tmp_path / 'a.json', data)}", images=str(tmp_path / "photos"))
    assert graph.image == str(tmp_path / "photos" / name.rpartition("/")[2])
    with pytest.raises(OSError):
        image_bytes(graph)


@pytest.mark.parametrize("image", ["parquet:no/such.parquet#0", "parquet:x", "a\0b.jpg", "", "/"])
def test_images_that_are_not_there_are_os_errors(tmp_path, image):
    graph = replace(graphs(f"vg:{write_vg(tmp_path)}")[0], image=image)
    with pytest.raises(OSError):
        image_bytes(graph)


def test_a_row_that_the_table_lacks_is_an_os_error(tmp_path):
    path = write_hub(tmp_path / "train.parquet")
    graph = graphs(f"hub:{path}")[0]
    with pytest.raises(OSError, match="#9"):
        image_bytes(replace(graph, image=f"parquet:{path}#9"))


def test_drawn_scenes_come_from_tiny(monkeypatch):
    class Tiny:
        @staticmethod
        def draw_graphs(n, seed):
            return iter([n, seed])

        @staticmethod
        def draw_picture(graph):
            return b"png of " + graph.image_id.encode()

    monkeypatch.setitem(sys.modules, "tiny", Tiny)
    assert list(read("drawn", n=7, seed="val")) == [7, "val"] and list(read("drawn:12")) == [12, 0]
    assert image_bytes(RawGraph("5", "drawn:", 9, 9, (), ())) == b"png of 5"


# ---- what is asked for -------------------------------------------------------------------------------------
@pytest.mark.parametrize(("spec", "message"), [
    ("", "expected one of vg, vg150, hub, gqa, openimages, psg, coco, drawn before a colon"),
    ("cocoo:/tmp", "did you mean coco?"),
    ("/data/psg.json", "expected one of vg"),
    ("vg:/no/such", "no such file or folder: /no/such"),
    ("psg:", "nothing after the colon"),
    ("drawn:many", "expected drawn:N with a whole number N, got 'many'"),
])  # fmt: skip
def test_a_source_that_cannot_be_meant_is_refused_at_once(spec, message):
    with pytest.raises(ValueError) as caught:
        read(spec)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_folders_that_are_not_there_are_refused_at_once(tmp_path):
    for option in ("images", "image_data"):
        with pytest.raises(ValueError, match="/no/such"):
            read(f"vg:{write_vg(tmp_path)}", **{option: "/no/such"})
    with pytest.raises(ValueError, match="expected objects.json or scene_graphs.json"):
        list(read(f"vg:{tmp_path.parent}"))


# ---- hostile values ----------------------------------------------------------------------------------------
HOSTILE = (
    None,
    True,
    -1,
    10**400,
    1.5,
    math.nan,
    math.inf,
    "",
    "x\0y",
    "../..",
    [],
    [[]],
    {},
    {"a": [None]},
    [5],
)


def spots(value, way=()):
    """Each place in a tree of lists and dicts."""
    yield way
    for key, inner in (
        value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    ):
        yield from spots(inner, (*way, key))


def spoil(data, way, value):
    """A copy with another value, or none, at one place."""
    data = copy.deepcopy(data)
    place = data
    for step in way[:-1]:
        place = place[step]
    if value is ...:
        del place[way[-1]]
    else:
        place[way[-1]] = value
    return data


SOURCES = {
    "vg": (VG, lambda folder, data: f"vg:{write_vg(folder, data)}"),
    "gqa": (GQA, lambda folder, data: f"gqa:{save(folder / 'a.json', data)}"),
    "psg": (PSG, lambda folder, data: f"psg:{save(folder / 'a.json', data)}"),
    "coco": (COCO, lambda folder, data: f"coco:{save(folder / 'a.json', data)}"),
    "lvis": (LVIS, lambda folder, data: f"coco:{save(folder / 'a.json', data)}"),
}


@pytest.mark.parametrize("source", SOURCES)
def test_no_value_anywhere_raises_anything_but_a_value_error(tmp_path, source):
    """Every value of the file, replaced by each hostile one and left out: the rest is read, or one line."""
    data, write = SOURCES[source]
    ends = Counter()
    places = [way for way in spots(data) if len(way) > (source == "vg")]
    for number, way in enumerate(places):
        for value in (..., HOSTILE[number % len(HOSTILE)], HOSTILE[(7 * number + 3) % len(HOSTILE)]):
            try:
                found = list(read(write(tmp_path, spoil(data, way, value))))
                ends["bad" if any(isinstance(g, BadRecord) for g in found) else "read"] += 1
                for bad in found:
                    assert isinstance(bad, RawGraph) or "\n" not in bad.message
            except ValueError as error:
                assert str(tmp_path) in str(error) and "\n" not in str(error), (way, value)
                ends["refused"] += 1
    assert min(ends["read"], ends["bad"]) > 5, ends


# ---- size --------------------------------------------------------------------------------------------------
def test_a_big_folder_is_read_in_little_memory(tmp_path):
    """The benchmark itself, small: the counts of what was written, and the peak of a process of its own."""
    command = [sys.executable, "benchmarks/graphs.py", "--n", "500"]
    done = subprocess.run(command, cwd=REPO, capture_output=True, text=True, check=True)
    lines = [line for line in done.stdout.splitlines() if line.startswith("read")]
    assert len(lines) >= 2 and all("500 graphs, 0 bad" in line for line in lines)
    assert "1,000 MB met" in done.stdout


def test_orders_of_a_big_folder_make_no_difference(tmp_path):
    folder = write_big_vg(tmp_path, 60)
    first = graphs(f"vg:{folder}")
    (folder / "shuffled.json").replace(folder / "relationships.json")
    assert graphs(f"vg:{folder}") == first and len(first) == 60
    flaws = Counter(len(o.names) > 1 for g in first for o in g.objects)
    assert 0.01 < flaws[True] / flaws.total() < 0.2  # the generator's other names arrive


def test_memory_does_not_grow_with_the_file(tmp_path):
    import tracemalloc

    def peak(n):
        folder = write_big_vg(tmp_path / str(n), n, objects=8, relations=5)
        tracemalloc.start()
        for _ in read(f"vg:{folder}"):
            pass
        size = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return size

    # Pieces of up to a megabyte of four files, and ids.
    assert peak(3000) < 30e6
