"""review.py: the page of a data set, and the CSV of what to keep; the page itself in a real browser."""

import base64
import hashlib
import io
import json
import random
import re
from html.parser import HTMLParser

import pytest
from browser import CHROMIUM, Browser
from PIL import Image, ImageDraw

from review import (
    choose,
    draw_boxes,
    draw_table,
    picture_uri,
    read_decisions,
    show_item,
    show_votes,
    write_page,
)

HOSTILE = "<script>alert(1)</script><img src=x onerror=alert(2)>\"'</article></svg>$title &lt;b&gt; \u202e"


def make_item(n: int, **changes) -> dict:
    """A question about a drawn cup and dog; of two categories in turn."""
    category = ("relation", "depth")[n % 2]
    item = {
        "key": f"k{n:03}",
        "split": "train",
        "category": category,
        "form": f"{category}/image",
        "level": ("easy", "medium", "hard")[n % 3],
        "rating": 7,
        "text": f"Where is cup {n}?",
        "options": ["left of", "right of", "above", "below"],
        "answer": "above",
        "letter": "C",
        "objects": [
            {"id": "cup.1", "label": "cup", "box": [10, 20, 50, 60]},
            {"id": "dog.1", "label": "dog", "box": [100, 80, 150, 110]},
        ],
        "relationships": [("cup.1", "above", "dog.1")],
        "fact": "gap 34 px of at least 12.8 px",
        "votes": [{"model": "judge", "said": "above", "state": "right", "raw": "<answer>(C) above</answer>"}],
        "blind": [{"model": "reader", "said": "below", "state": "wrong", "raw": "(D)"}],
        "writer": "rules",
        "source": "drawn",
        "licence": "CC0",
        "image_id": f"image{n}",
        "width": 160,
        "height": 120,
    }
    return item | changes


def drawn(item: dict) -> bytes:
    """Its picture: a grey field with its boxes filled."""
    image = Image.new("RGB", (item["width"], item["height"]), "lightgrey")
    for o in item["objects"]:
        ImageDraw.Draw(image).rectangle(o["box"], fill="steelblue")
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


CARD = {
    "name": "a small set",
    "totals": {"questions": 12345, "images": 6},
    "tables": {"Levels": [("easy", 3), ("hard", 1)]},
    "models": {"writer": "rules"},
    "cost": 1.5,
    "notes": ["Short of hard ones."],
}


def make_page(folder, items, card=CARD, picture=drawn, **options) -> str:
    write_page(items, card, folder / "report.html", picture, **options)
    return (folder / "report.html").read_text(encoding="utf-8")


class Reader(HTMLParser):
    """Tags, attributes by tag, and the visible text."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.attributes, self.text = [], [], ""
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, *pair) for pair in attrs]

    def handle_data(self, data):
        self.text += data


# ---- samples ----
def test_the_same_samples_whatever_the_order():
    items = [make_item(n) for n in range(40)]
    chosen = choose(items, 3)
    assert [item["category"] for item in chosen] == ["depth"] * 3 + ["relation"] * 3
    assert choose(random.Random(0).sample(items, 40), 3) == chosen
    assert choose(items, 4)[:3] == chosen[:3]  # more of them: the same ones and others
    depths = [item["key"] for item in items if item["category"] == "depth"]
    order = sorted(depths, key=lambda key: hashlib.sha256(key.encode()).digest())
    assert [item["key"] for item in chosen[:3]] == order[:3] != depths[:3]
    assert len(choose(items, 100)) == 40 and choose([], 8) == []


def test_items_that_cannot_be_reviewed_are_named(tmp_path):
    with pytest.raises(ValueError, match="^items: expected every key once, got k001 twice$"):
        make_page(tmp_path, [make_item(1), make_item(2), make_item(1)])
    lacking = make_item(3)
    del lacking["options"]
    with pytest.raises(ValueError, match="^item k003: expected .*, got no options$"):
        make_page(tmp_path, [make_item(1), lacking])
    assert not list(tmp_path.iterdir())


# ---- the page ----
def test_page_shows_what_it_should(tmp_path):
    page = make_page(tmp_path, [make_item(n) for n in range(6)], per_category=2)
    read = Reader(page)
    assert read.tags.count("article") == page.count("<image ") == 4
    assert "4 of 6 items" in read.text and "12,345" in read.text and "$1.50" in read.text
    for text in (
        "Short of hard ones.",
        "gap 34 px",
        "cup.1 above dog.1",
        "licence CC0",
        "rating 7",
        "Levels",
    ):
        assert text in read.text
    assert page.count('<li class="right"><b>C</b><span>above</span>') == 4 == page.count('<li class="right">')
    assert page.count('<rect class="c0" x="10" y="20" width="40" height="40"/>') == 4
    assert page.count('<rect class="c1" x="100" y="80" width="50" height="30"/>') == 4
    assert page.count('viewBox="0 0 160 120"') == 4
    filters = [value for tag, name, value in read.attributes if (tag, name) == ("select", "id")]
    assert filters == ["category", "form", "level", "decision"]  # of source and split there is one only
    page = make_page(tmp_path, [make_item(n) for n in range(6)])
    assert page.index('<option value="easy">') < page.index('<option value="hard">')
    make_page(tmp_path, [], {"name": "an empty set"})


def test_hostile_text_is_text(tmp_path):
    fields = "category form level text fact writer source licence image_id split".split()
    item = make_item(1) | {name: name + HOSTILE for name in fields}
    item["objects"] = [{"id": "x.1" + HOSTILE, "label": HOSTILE, "box": [0, 0, 1e308, 20]}]
    item |= {"key": "key" + HOSTILE, "options": [HOSTILE, "b"], "answer": HOSTILE, "letter": "A"}
    item["relationships"] = [(HOSTILE, HOSTILE, HOSTILE)]
    item["votes"] = [{"model": HOSTILE, "said": HOSTILE, "state": HOSTILE, "raw": HOSTILE * 9}, HOSTILE, None]
    card = {"name": HOSTILE, "totals": {HOSTILE: HOSTILE}, "cost": HOSTILE, "models": [HOSTILE]}
    card |= {"notes": HOSTILE, "tables": {HOSTILE: [(HOSTILE, HOSTILE), (HOSTILE, 1), (HOSTILE, 2.5)]}}
    item["blind"] = [{"said": "half a surrogate \ud800"}]
    read = Reader(make_page(tmp_path, [item, make_item(2)], card))
    assert read.tags.count("script") == 1 and "img" not in read.tags and read.tags.count("article") == 2
    assert not [name for _, name, _ in read.attributes if name.startswith("on") or name == "src"]
    assert {value[:23] for tag, name, value in read.attributes if name == "href"} == {
        "data:image/jpeg;base64,"
    }
    assert read.text.count("text" + HOSTILE) == 1 and read.text.count(HOSTILE) >= 15


def test_nothing_is_loaded_and_no_script_but_its_own_runs(tmp_path):
    page = make_page(tmp_path, [make_item(1)])
    script = re.search("<script>(.*)</script>", page, re.S)[1]
    allowed = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{allowed}'" in page and "default-src 'none'" in page
    assert "http://" not in page and "https://" not in page


def test_what_the_browser_keeps_belongs_to_the_set(tmp_path):
    def store(items, card=CARD, **options):
        return re.search('data-store="(.*?)"', make_page(tmp_path, items, card, **options))[1]

    items = [make_item(n) for n in range(6)]
    assert store(items) == store(items[::-1], per_category=1)  # whatever is shown, in whatever order
    assert len({store(items), store(items[1:]), store(items, CARD | {"name": "another"})}) == 3


# ---- pictures and boxes ----
def decoded(uri: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(uri.removeprefix("data:image/jpeg;base64,"))))


def encoded(image: Image.Image, kind="PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def test_pictures_are_small_upright_jpegs():
    large = decoded(picture_uri(encoded(Image.new("RGB", (3000, 1500), "red"), "JPEG")))
    assert (large.format, large.size) == ("JPEG", (512, 256))
    assert decoded(picture_uri(encoded(Image.new("L", (90, 40))))).size == (90, 40)
    exif = Image.Exif()
    exif[0x0112] = 6  # lies on its side
    assert decoded(picture_uri(encoded(Image.new("RGB", (300, 100)), "JPEG", exif=exif))).size == (100, 300)
    clear = decoded(picture_uri(encoded(Image.new("RGBA", (8, 8), (255, 0, 0, 0)))))
    assert clear.getpixel((4, 4)) == (255, 255, 255)
    whole = encoded(Image.effect_noise((200, 200), 90))
    for damaged in (b"", b"no picture", whole[: len(whole) // 2]):
        with pytest.raises(OSError):
            picture_uri(damaged)


def test_missing_pictures_are_grey_frames_and_one_warning(tmp_path, capsys):
    def picture(item):
        if item["key"] == "k001":
            raise FileNotFoundError(2, "No such file or directory", "/data/<b>1.jpg")
        if item["key"] == "k002":
            raise OSError("/data/2.parquet#7 is gone")
        return drawn(item) if item["key"] != "k003" else b"no picture"

    page = make_page(tmp_path, [make_item(n) for n in range(5)], picture=picture)
    assert page.count('<rect class="missing" width="160" height="120"/>') == 3
    assert page.count("<image ") == 2 and page.count('class="c0" x="10"') == 5  # boxes all the same
    assert "no picture: /data/&lt;b&gt;1.jpg: No such file or directory" in page
    assert "no picture: image2: /data/2.parquet#7 is gone" in page and "no picture: image3: " in page
    warned = capsys.readouterr().out.splitlines()
    assert len(warned) == 1 and warned[0].startswith(
        "warning: 3 of 5 pictures are missing on the page, first "
    )


def names_on(item) -> list[tuple[str, float, float, float]]:
    """(name, x, baseline, height of the letters) of what is written on the picture."""
    found = re.findall(
        r'<text class="c\d" x="(.+?)" y="(.+?)" font-size="(.+?)">(.+?)</text>', draw_boxes(item)
    )
    return [(name, float(x), float(y), float(height)) for x, y, height, name in found]


def test_names_stand_inside_the_picture_and_apart():
    boxes = [[0, 0, 40, 119], [0, 0, 160, 120], [120, 0, 160, 30], [120, 20, 160, 60], [121, 21, 159, 59]]
    objects = [{"id": f"cup.{k}", "label": "cup", "box": box} for k, box in enumerate(boxes, 1)]
    written = names_on(make_item(1, objects=objects))
    assert [name for name, *_ in written] == [f"cup {k}" for k in range(1, 6)]
    areas = []
    for name, x, y, height in written:
        width = 0.5 * height * len(name)
        areas.append((x, y - 0.8 * height, x + width, y))
        assert 0 <= x and x + width <= 160 and 0.7 * height <= y <= 120
    for i, (x1, y1, x2, y2) in enumerate(areas):
        for a1, b1, a2, b2 in areas[:i]:
            assert x2 <= a1 or a2 <= x1 or y2 <= b1 or b2 <= y1, "two names upon each other"
    ((name, x, y, _),) = names_on(
        make_item(1, objects=[{"id": "a.1", "label": "cup", "box": [60, 50, 90, 80]}])
    )
    assert (name, x) == ("cup", 60) and y < 50  # above its box


# ---- items ----
def test_an_answer_that_is_not_under_its_letter_shows():
    fault = "expected the answer under its letter, once; got "
    assert fault not in show_item(make_item(1), "")
    assert fault not in show_item(make_item(1, letter=None), "")
    assert fault + "above under B" in show_item(make_item(1, letter="B"), "")
    assert fault + "between under C" in show_item(make_item(1, answer="between"), "")
    twice = show_item(make_item(1, options=["above", "left of", "above"]), "")
    assert fault in twice and twice.count('<li class="right">') == 2


def test_votes_are_counted_and_shown_by_model():
    votes = [{"model": "a", "said": "cup", "state": "right"}, {"model": "b", "said": None, "state": "error"}]
    votes += [{"model": "a", "said": "dog", "state": "wrong"}]
    read = Reader(show_votes("validators", votes))
    assert read.text == "validators1 of 3 righta ✓ cup✗ dogb ! nothing"
    assert show_votes("blind", []) == ""


# ---- tables ----
def bars(table: str) -> list[list[tuple[str, float, float]]]:
    """(colour, x, width) of every rectangle, (mark, x, 0) of every mark; a list a row."""
    rows = []
    for svg in re.findall("<svg.*?</svg>", table):
        rects = re.findall(r'<rect class="(\w+)" x="(.+?)" y=".+?" width="(.+?)"', svg)
        marks = re.findall(r'<path class="mark" d="M(.+?) ', svg)
        rows.append([(c, float(x), float(w)) for c, x, w in rects] + [("mark", float(x), 0.0) for x in marks])
    return rows


def test_counts_are_stacked_against_their_quota():
    rows = [
        ("category", "train", "val", "total", "quota"),
        ("depth", 30, 10, 40, 50),
        ("reach", 20, 0, 20, 80),
    ]
    table = draw_table("Categories", rows)
    assert bars(table) == [
        [("k0", 0, 37.5), ("k1", 37.5, 12.5), ("mark", 62.5, 0)],
        [("k0", 0, 25), ("k1", 25, 0), ("mark", 100, 0)],
    ]
    assert Reader(table).text == "Categoriescategorytrainvaltotalquotadepth30104050reach2002080"


def test_shares_stand_side_by_side_in_percent():
    table = draw_table("Accuracy", [("", "n", "blind", "judge", "chance"), ("a", 9000, 0.25, 1.0, 0.25)])
    assert bars(table) == [[("k0", 0, 25), ("k1", 0, 100), ("mark", 25, 0)]]
    assert Reader(table).text == "Accuracynblindjudgechancea9,00025.0 %100.0 %25.0 %"
    assert bars(draw_table("Mean", [("a", 2.5), ("b", 5.0)])) == [[("k0", 0, 50)], [("k0", 0, 100)]]


@pytest.mark.parametrize(
    "rows, widths",
    [
        ([("a", 0), ("b", 0)], [[0], [0]]),
        ([("a", 4), ("b", None), ("c", 1)], [[100], [0], [25]]),
        ([("a", float("nan")), ("b", float("inf")), ("c", 0.5)], [[0], [0], [50]]),
        ([("a", -3), ("b", 6)], [[0], [100]]),
        ([("a", "40/40/20"), ("b", "n/a")], [[], []]),
        ([("a",), ("b", 2, 2)], [[0, 0], [50, 50]]),
        ([("a", True)], [[]]),
    ],
)
def test_tables_of_any_values_are_drawn(rows, widths):
    assert [[w for _, _, w in row] for row in bars(draw_table("T", rows))] == widths


# ---- decisions ----
GOOD = {
    "as saved": b'\xef\xbb\xbfkey,decision,note\r\nk1,keep,\r\nk2,drop,"a, ""b""\r\nc"\r\n',
    "semicolons": b"key;decision;note\r\nk1;keep;a, b, c, d\r\nk2;drop;\r\n",
    "tabs": b"key\tdecision\tnote\nk1\tkeep\t\nk2\tdrop\t;;;\n",
    "utf-16": "key\tdecision\r\nk1\tkeep\r\nk2\tdrop\r\n".encode("utf-16"),
    "columns": b"row,Note,Decision,KEY,by\n1,x,keep,k1,me\n2,,drop,k2\n3,lost,,\n",
    "old line ends": b"key,decision\rk1,keep\rk2,drop\r",
    "blanks": b"\n\n key , decision \n\n k1 , Keep \n,,\nk2,DROP,extra,fields\nk3,\nk4\n",
    "latin-1": "key,decision,note\nk1,keep,caf\u00e9\nk2,drop,\n".encode("latin-1"),
    "twice": b"key,decision\nk1,keep\nk2,drop\nk1,keep\nk1,\n",
    "quoted": b'"key","decision","note"\n"k1","keep",""\n"k2","drop",""',
}
NO_COLUMNS = ": expected one column key and one column decision, got "
NO_DECISION = "expected keep or drop for a key, got "
BAD = {  # the file: what is said of it
    "word": (b"key,decision\nk1,keep\nk2,maybe\n", f", line 3: {NO_DECISION}'maybe' for 'k2'"),
    "no key": (b"key,decision\n,drop\n", f", line 2: {NO_DECISION}'drop' for ''"),
    "disagree": (
        b"key,decision\nk1,keep\n\nk1,drop\n",
        ", line 4: expected one decision for k1, got keep and drop",
    ),
    "columns": (b"key;verdict\nk1;keep\n", NO_COLUMNS + "key, verdict"),
    "two": (b"key,decision,key\n", NO_COLUMNS + "key, decision, key"),
    "two more": (b"decision,key,decision\n", NO_COLUMNS + "decision, key, decision"),
    "no head": (b"k1,keep\nk2,drop\n", NO_COLUMNS + "k1, keep"),
    "empty": (b"", NO_COLUMNS + "none"),
}


@pytest.mark.parametrize("name", GOOD)
def test_files_of_spreadsheets_are_read(name, tmp_path):
    (tmp_path / "review.csv").write_bytes(GOOD[name])
    assert read_decisions(tmp_path / "review.csv") == {"k1": "keep", "k2": "drop"}


@pytest.mark.parametrize("name", BAD)
def test_what_is_wrong_with_a_file_is_one_line(name, tmp_path):
    path = tmp_path / "review.csv"
    path.write_bytes(BAD[name][0])
    with pytest.raises(ValueError) as caught:
        read_decisions(path)
    assert str(caught.value) == f"{path}{BAD[name][1]}"


def test_a_file_of_something_else_is_refused(tmp_path):
    for content in (b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR", b'key,decision\nk1,"' + b"x" * 200_000, b"\xff\xfek"):
        (tmp_path / "review.csv").write_bytes(content)
        with pytest.raises(ValueError, match="review.csv") as caught:
            read_decisions(tmp_path / "review.csv")
        assert "\n" not in str(caught.value)
    with pytest.raises(FileNotFoundError):
        read_decisions(tmp_path / "none.csv")


# ---- in a browser ----
needs_browser = pytest.mark.skipif(not CHROMIUM, reason="needs chromium or google-chrome on the PATH")
KEYS = [item["key"] for item in choose([make_item(n) for n in range(6)], 8)]  # in the page's order


@pytest.fixture(scope="module")
def tab(tmp_path_factory):
    browser = Browser(tmp_path_factory.mktemp("browser"))
    yield browser
    browser.close()


@pytest.fixture
def page(tab, tmp_path):
    """The tab with a page of six items that nobody has decided on."""
    make_page(tmp_path, [make_item(n) for n in range(6)])
    tab.open(f"file://{tmp_path}/report.html")
    tab.run("localStorage.clear()")
    tab.open(f"file://{tmp_path}/report.html")
    return tab


def decisions(tab) -> dict:
    return dict(
        tab.run('[...document.querySelectorAll("article")].map(a => [a.dataset.key, a.dataset.decision])')
    )


def shown(tab) -> list:
    return tab.run('[...document.querySelectorAll("article:not([hidden])")].map(a => a.dataset.key)')


def text_of(tab, name: str) -> str:
    return tab.run(f"document.getElementById({name!r}).textContent")


def saved(tab, folder) -> bytes:
    """The file that the button saves."""
    tab.run('document.getElementById("save").click()')
    begun = tab.wait("Browser.downloadWillBegin")
    assert begun["suggestedFilename"] == "review.csv"
    while tab.wait("Browser.downloadProgress")["state"] != "completed":
        pass
    files = sorted(folder.glob("review*.csv"))
    content = files[0].read_bytes()
    files[0].unlink()
    return content


def load(tab, path, content: bytes) -> str:
    """What the page says of a CSV file."""
    path.write_bytes(content)
    tab.run('document.getElementById("status").textContent = ""')
    tab.give_file("#load", path)
    return tab.run("""new Promise(done => {
        const status = document.getElementById("status"), look = () => status.textContent
            ? done(status.textContent) : setTimeout(look, 5);
        look();
    })""")


@needs_browser
def test_keys_decide_and_the_browser_remembers(page, tmp_path):
    page.press("d", "j", "u", "j", "d", "j", "j", "k", "d")  # the first says nothing: no item is chosen yet
    wanted = dict.fromkeys(KEYS, "open") | {KEYS[0]: "keep", KEYS[1]: "drop", KEYS[2]: "drop"}
    assert decisions(page) == wanted
    assert text_of(page, "progress") == "1 kept, 2 dropped, 3 open"
    assert page.run("document.activeElement.dataset.key") == KEYS[2]
    page.open(f"file://{tmp_path}/report.html")
    assert decisions(page) == wanted
    pressed = page.run('[...document.querySelectorAll("[aria-pressed=true]")].map(b => b.value)')
    assert pressed == ["keep", "drop", "drop"]
    page.run('document.querySelector("[aria-pressed=true]").click()')  # once more: taken back
    assert decisions(page)[KEYS[0]] == "open"
    page.press("/", "d", "u", "j")  # typed, not meant
    assert page.run('document.getElementById("search").value') == "duj" and shown(page) == []
    assert decisions(page) == wanted | {KEYS[0]: "open"}


@needs_browser
def test_what_is_saved_is_read_here_and_there(page, tmp_path):
    folder = page.folder
    page.press("j", "u", "j", "d")
    note = 'says "cup", means\tmug; é'
    page.run(f"""for (const [at, text] of [[1, {json.dumps(note)}], [2, "only a note"]]) {{
        const note = document.querySelectorAll(".note")[at];
        note.value = text; note.dispatchEvent(new Event("input"));
    }}""")
    content = saved(page, folder)
    assert content.decode("utf-8-sig") == (
        f'key,decision,note\r\n{KEYS[0]},keep,\r\n{KEYS[1]},drop,"says ""cup"", means\tmug; é"\r\n'
        f"{KEYS[2]},,only a note\r\n"
    )
    (tmp_path / "there.csv").write_bytes(content)
    assert read_decisions(tmp_path / "there.csv") == {KEYS[0]: "keep", KEYS[1]: "drop"}
    page.run("localStorage.clear()")
    page.open(f"file://{tmp_path}/report.html")
    assert set(decisions(page).values()) == {"open"}
    more = content + f"elsewhere,drop,\r\n{KEYS[3]},keep,\r\n".encode()
    assert load(page, tmp_path / "more.csv", more) == (
        "Read 5 lines of more.csv; 1 of items that this page lacks stay in the file you save."
    )
    assert decisions(page) == dict.fromkeys(KEYS, "open") | dict(
        zip(KEYS, ("keep", "drop", "open", "keep"), strict=False)
    )
    assert page.run('document.querySelectorAll(".note")[1].value') == note
    (tmp_path / "again.csv").write_bytes(saved(page, folder))
    assert read_decisions(tmp_path / "again.csv") == read_decisions(tmp_path / "more.csv")


@needs_browser
def test_the_page_reads_the_files_that_python_reads(page, tmp_path):
    path = tmp_path / "review.csv"
    for name, content in GOOD.items():
        load(page, path, content)
        kept = page.run("[...reviews].filter(([key, r]) => r.decision).map(([key, r]) => [key, r.decision])")
        assert dict(kept) == {"k1": "keep", "k2": "drop"}, name
        page.run("reviews.clear()")
    for name, (content, message) in BAD.items():
        said = load(page, path, content)
        assert said == "review.csv: " + message.partition(": ")[2], name
        assert page.run("reviews.size") == 0, name


@needs_browser
def test_it_works_where_nothing_can_be_kept(tab, tmp_path):
    page = make_page(tmp_path, [make_item(n) for n in range(6)])
    tab.open("data:text/html;charset=utf-8;base64," + base64.b64encode(page.encode()).decode())
    assert tab.run("(() => { try { localStorage; return 1 } catch (error) { return error.name } })()") == (
        "SecurityError"
    )
    assert text_of(tab, "status").startswith("This browser keeps nothing for this page")
    leaving = "dispatchEvent(new Event('beforeunload', {cancelable: true}))"  # false: it would ask first
    assert tab.run(leaving)
    tab.press("j", "d")
    assert decisions(tab)[KEYS[0]] == "drop" and not tab.run(leaving)
    assert saved(tab, tab.folder).decode("utf-8-sig") == f"key,decision,note\r\n{KEYS[0]},drop,\r\n"
    assert tab.run(leaving)


@needs_browser
@pytest.mark.parametrize(
    "kept", ["{", "7", "[1]", '[["k001", null]]', '[["k001", {"decision": "burn"}]]', "null"]
)
def test_what_others_kept_does_no_harm(page, tmp_path, kept):
    page.run(f"localStorage.setItem(store, {kept!r})")
    page.open(f"file://{tmp_path}/report.html")
    assert set(decisions(page).values()) == {"open"}
    page.press("j", "d")
    assert decisions(page)[KEYS[0]] == "drop"
    page.open(f"file://{tmp_path}/report.html")
    assert decisions(page)[KEYS[0]] == "drop"


@needs_browser
def test_filters_and_search_narrow_the_samples(page):
    def choose_value(name, value):
        page.run(f"(s => {{ s.value = {value!r}; s.dispatchEvent(new Event('change')); }})(byId({name!r}))")

    choose_value("category", "depth")
    assert set(shown(page)) == {"k001", "k003", "k005"} and text_of(page, "count") == "3 shown"
    choose_value("level", "easy")
    assert shown(page) == ["k003"]
    page.press("j", "j", "u")  # the one that shows
    choose_value("category", "")
    choose_value("level", "")
    choose_value("decision", "keep")
    assert shown(page) == ["k003"]
    choose_value("decision", "")
    page.run("(s => { s.value = '  IMAGE4 cup'; s.dispatchEvent(new Event('input')); })(byId('search'))")
    assert shown(page) == ["k004"]


@needs_browser
def test_hostile_text_does_not_run_and_nothing_is_fetched(tab, tmp_path):
    fields = {name: HOSTILE for name in ("text", "fact", "writer", "source", "category", "key")}
    objects = [{"id": "x.1", "label": HOSTILE, "box": [10, 10, 60, 60]}]
    item = make_item(1, **fields, objects=objects, options=[HOSTILE, "b"], answer=HOSTILE, letter="A")
    make_page(tmp_path, [item, make_item(2)], CARD | {"name": HOSTILE})
    tab.open(f"file://{tmp_path}/report.html")
    assert tab.run('document.querySelector("article h3").textContent') == HOSTILE
    assert tab.run('document.querySelectorAll("img, iframe, article script").length') == 0
    tab.press("j", "d")
    assert decisions(tab)[HOSTILE] == "drop"
    requests = [
        m["params"]["request"]["url"] for m in tab.events if m["method"] == "Network.requestWillBeSent"
    ]
    assert requests and {url.partition(":")[0] for url in requests} <= {"file", "data"}
    wrong = ("Page.javascriptDialogOpening", "Runtime.exceptionThrown")
    assert not [m for m in tab.events if m["method"] in wrong]
    tab.run("""document.body.append(Object.assign(document.createElement("script"),
        {text: "window.ran = 1"}))""")
    assert tab.run("window.ran") is None  # the policy lets no other script run


@needs_browser
@pytest.mark.parametrize("width", [420, 1400])
def test_nothing_sticks_out(tab, tmp_path, width):
    long = "W" * 300
    objects = [{"id": f"cup.{k}", "label": long, "box": [k, k, k + 40, k + 40]} for k in range(8)]
    votes = [{"model": long, "said": long, "state": "right", "raw": long}]
    texts = dict.fromkeys("text answer fact source category form licence image_id".split(), long)
    lists = {"options": [long, "b"], "objects": objects, "votes": votes, "relationships": [(long,) * 3]}
    item = make_item(1, letter="A", **texts, **lists)
    table = [(long, long, long)] + [(long, 3, 4), ("b", 1, 2)]
    card = CARD | {"name": long, "totals": {long: long}, "notes": [long], "models": {long: long}}
    make_page(tmp_path, [item, make_item(2)], card | {"tables": {long: table}})
    tab.open(f"file://{tmp_path}/report.html")
    for dark in (False, True):
        tab.screenshot(tmp_path / "shot.png", width, 900, dark)
        assert tab.run("document.documentElement.scrollWidth") == width
    names = tab.run("""[...document.querySelectorAll("button, select, input")].map(field =>
        field.ariaLabel || field.textContent.trim())""")
    assert len(names) == 14 and all(names)  # a name for every field that can be reached
