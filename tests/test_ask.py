"""ask.py and drawing.py: one photo, from the command line to the picture, on the tiny model and a server."""

import json
import threading
import time

import numpy as np
import pytest
from PIL import Image
from servers import KEY, anthropic_answer, openai_answer, serve, text_of

import ask
import drawing
import evaluate
from ask import HOW, main, parse_args, read_question, read_scene
from data import Sample
from drawing import colour_of, draw_scene

QUESTION = "Where is the cat relative to the couch? (A) on top of (B) in front of (C) behind (D) beside"
SHOWN = "\n".join(
    [QUESTION.partition(" (A)")[0], "Options:", "(A) on top of", "(B) in front of", "(C) behind"]
)
SHOWN += "\n(D) beside"
LEFT_RIGHT = "Where?\nOptions:\n(A) left\n(B) right", ("left", "right")
SCENE = (
    '{"objects":[{"id":"cat.1","bbox":[4,2,14,12]},{"id":"couch.1","bbox":[0,8,30,24]}],'
    '"relationships":[{"subject":"cat.1","predicate":"on top of","object":"couch.1"}]}'
)
REPLY = (
    f"<observe>A cat.</observe>\n<scene>{SCENE}</scene>\n<think>On.</think>\n<answer>(A) on top of</answer>"
)
BOXES = [{"id": "cat.1", "bbox": [4, 2, 14, 12]}, {"id": "couch.1", "bbox": [0, 8, 30, 20]}]  # 20 pixels high
TALL = {"id": "cat.1", "bbox": [4, 8, 14, 20]}


@pytest.fixture
def photo(tmp_path, monkeypatch):
    """The path of a picture of 30 x 20 pixels that lies on its side in its file, as phones write them."""
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setenv("ANTHROPIC_API_KEY", KEY)
    upright = Image.new("RGB", (30, 20), (90, 120, 60))
    exif = Image.Exif()
    exif[274] = 6  # to be turned clockwise
    upright.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "photo.jpg", exif=exif)
    return str(tmp_path / "photo.jpg")


# ---- what is asked ----
@pytest.mark.parametrize(
    "text, options, expected",
    [
        (QUESTION, [], (SHOWN, ("on top of", "in front of", "behind", "beside"))),
        ("Where?\nA. left\nB. right", [], LEFT_RIGHT),
        ("Where? Options: a) left, b) right", [], LEFT_RIGHT),
        ("Where?", ["left", "right"], LEFT_RIGHT),
        ("Where?", ["(A) left", "(B) right"], LEFT_RIGHT),
        ("Where?", ["A. left B. right"], LEFT_RIGHT),
        ("(A) 1 (B) 2\nHow many?", [], ("How many?\nOptions:\n(A) 1\n(B) 2", ("1", "2"))),
        (" How many cats? ", [], ("How many cats?", ())),
    ],
)
def test_options_reach_the_model_as_it_was_trained_on_them(text, options, expected):
    assert read_question(text, options) == expected


@pytest.mark.parametrize(
    "text, options, message",
    [
        (" ", [], "question: expected a text"),
        ("Where is <|image_pad|>?", [], "no control token"),
        ("Where?", ["left", "\udcff"], r"no half of a surrogate pair, got '\\udcff'"),
        ("Where?", ["left"], "expected 2 to 10 texts"),
        ("Where?", ["left", " "], "expected 2 to 10 texts"),
        ("Where?", list("abcdefghijk"), "expected 2 to 10 texts"),
        ("Where? (A) left (B) right", ["left", "right"], "got both"),
    ],
)
def test_what_cannot_be_asked_is_named(text, options, message):
    with pytest.raises(ValueError, match=message):
        read_question(text, options)


def test_settings_are_those_of_evaluation():
    ours, theirs = (vars(p(a)) for p, a in ((parse_args, ["p", "q"]), (evaluate.parse_args, [])))
    shared = (ours.keys() & theirs.keys()) - {"out"}
    assert {"model_path", "template", "provider", "min_pixels", "max_pixels", "max_new_tokens"} <= shared
    assert {key: ours[key] for key in shared} == {key: theirs[key] for key in shared}


# ---- the scene of a reply ----
@pytest.mark.parametrize(
    "scene, boxes",
    [
        (SCENE, BOXES),
        (SCENE[:75], BOXES[:1]),  # cut off
        (SCENE.replace('"couch.1"}]', '"wall.1"}]'), BOXES),  # a relation to nothing
        (SCENE.replace("[4,2,14,12]", "[14,2,4,12]"), BOXES[1:]),  # inverted
        (SCENE.replace("[4,2,14,12]", "[4,2,14]"), BOXES[1:]),
        (SCENE.replace("[4,2,14,12]", '[4,2,14,"x"]'), BOXES[1:]),
        (SCENE.replace("[4,2,14,12]", "[4,2,14,1e999]"), BOXES[1:]),
        (SCENE.replace("[4,2,14,12]", "[NaN,2,14,12]"), BOXES[1:]),
        (SCENE.replace("[4,2,14,12]", "[300,2,400,12]"), BOXES[1:]),  # outside
        (SCENE.replace("[4,2,14,12]", f"[4,8,14,{'9' * 150}]"), [TALL, *BOXES[1:]]),
        (SCENE.replace("cat.1", "couch.1"), [BOXES[0] | {"id": "couch.1"}]),  # one name
        ("[" * 60_000, []),
        ('"id":"' * 10_000, []),
        ('"subject" : "a" ' + " " * 60_000, []),
        ("", []),
    ],
)  # fmt: skip
def test_of_a_broken_scene_is_drawn_what_can_be_read(scene, boxes):
    started = time.time()
    _, found, relationships = read_scene(f"<scene>{scene}</scene>", (30, 20))
    assert found == boxes and time.time() - started < 1
    image = draw_scene(Image.new("RGB", (30, 20)), found, relationships, ["\ud800\x1b[2J\n" * 99])
    assert image.width == 640


# ---- the picture ----
@pytest.mark.parametrize("size", [(20, 20), (4032, 3024), (300, 4), (4, 300), (1, 1)])
def test_names_stay_in_the_picture_and_colours_tell_objects_apart(size, monkeypatch):
    w, h = size
    names, name = [], drawing.Pen.name

    def note(pen, x, y, text, ground, ink=None):
        names.append((text, ground, x, y, x + pen.width(text), y + pen.chip, pen.draw.im.size))
        name(pen, x, y, text, ground, ink)

    monkeypatch.setattr(drawing.Pen, "name", note)
    objects = [{"id": f"cup.{i}", "bbox": [w * i / 14, 0, w, h]} for i in range(12)]
    objects += [{"id": "x" * 80 + ".1", "bbox": [0, h / 2, w / 2, h]}]
    relation = {"subject": "cup.3", "predicate": "on " * 99, "object": "x" * 80 + ".1"}
    picture = draw_scene(
        Image.new("RGB", size, (128, 128, 128)), objects, [relation] * 50, ["answer: " + "y" * 999]
    )
    assert max(draw_scene(Image.new("RGB", size), [], []).size) == max(640, min(max(size), 2048))
    assert all(x1 >= 0 and y1 >= 0 and x2 <= W and y2 <= H for *_, x1, y1, x2, y2, (W, H) in names)
    chips = {text: ground for text, ground, *_ in names if text.startswith("cup ")}
    assert len(set(chips.values())) == len(chips) == 12  # the same colour in the picture and in the strip
    assert any(text == "and 10 more relations" for text, *_ in names)
    assert picture.width <= 2048


def test_a_box_is_drawn_where_it_is():
    picture = np.asarray(draw_scene(Image.new("RGB", (1000, 800), "grey"), BOXES[:0], []))
    assert picture.shape == (800, 1000, 3) and (picture == 128).all()
    box = {"id": "cat.1", "bbox": [200, 300, 400, 500]}
    drawn = np.asarray(draw_scene(Image.new("RGB", (1000, 800), "grey"), [box], []))
    ys, xs = np.where((drawn == colour_of(0)).all(-1) & (np.arange(800) > 299)[:, None])  # below its name
    assert (xs.min(), xs.max(), ys.min(), ys.max()) == (201, 399, 301, 499)
    assert (drawn[310:490, 210:390] == 128).all()  # what is in it can be seen


# ---- asking ----
def test_the_tiny_model_answers_on_a_terminal_and_for_scripts(photo, tiny_start, tmp_path, capsys):
    small = (
        "--model_path",
        str(tiny_start),
        "--provider",
        "hf",
        "--min_pixels",
        "784",
        "--max_pixels",
        "12544",
    )
    picture = tmp_path / "photo.scene.png"
    main([photo, QUESTION, *small, "--max_new_tokens", "48"])
    shown = capsys.readouterr().out
    assert Image.open(picture).width == 640
    picture.unlink()
    main([photo, QUESTION, *small, "--max_new_tokens", "48", "--json"])
    said = json.loads(capsys.readouterr().out)
    keys = "reply scene answer letter method boxes relationships finish_reason png"
    assert list(said) == keys.split() and said["png"] == str(picture) and picture.exists()
    assert shown.startswith(said["reply"] + "\n\nanswer: ") and said["reply"].startswith("<observe>")
    assert said["finish_reason"] == "length" and "cut off after 48 tokens" in shown


def test_transformers_shows_a_reply_word_by_word(photo, tiny_start):
    frame = ("--min_pixels", "7056", "--max_pixels", "12544", "--max_new_tokens", "24")
    args = parse_args([photo, "q", "--model_path", str(tiny_start), "--provider", "hf", *frame])
    sample, pieces = Sample("", ({"path": photo},), (30, 20), SHOWN, (), "", "", kind="word"), []
    reply = ask.ask(args, sample, pieces.append)
    assert "".join(pieces) == reply.text and reply.n_tokens == 24 and len(list(filter(None, pieces))) > 3


def stream(provider: str, *texts: str, end: bool = True):
    """The events of a streamed answer, in pieces."""
    if provider == "openai":
        chunk = openai_answer("") | {"object": "chat.completion.chunk", "usage": None}
        choices = [{"index": 0, "delta": {"content": text}, "finish_reason": None} for text in texts]
        choices += [{"index": 0, "delta": {}, "finish_reason": "stop"}] * end
        events = [chunk | {"choices": [c]} for c in choices]
    else:
        begin = anthropic_answer("") | {"content": [], "stop_reason": None}
        block = {"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": ""}}
        events = [{"type": "message_start", "message": begin}, block]
        events += [
            {"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": text}}
            for text in texts
        ]
        stop = {"stop_reason": "end_turn", "stop_sequence": None}
        events += [{"type": "message_delta", "delta": stop, "usage": {"output_tokens": 3}}] * end
        events += [{"type": "message_stop"}] * end
    for event in events:
        yield f"event: {event.get('type', 'message')}\ndata: {json.dumps(event)}\n\n".encode()


ANSWER = {"openai": openai_answer, "anthropic": anthropic_answer}


@pytest.fixture(params=ANSWER)
def api(request):
    """(provider, what asks a server that responds so)"""

    def asks(photo, respond, *flags):
        with serve(respond) as (url, api):
            url = f"{url}/v1" if request.param == "openai" else url
            main(
                [photo, QUESTION, "--model_path", "m", "--provider", request.param, "--base_url", url, *flags]
            )
            return api.bodies

    return request.param, asks


def test_a_server_streams_and_gets_the_one_prompt(api, photo, capsys, monkeypatch):
    provider, asks = api
    first, on_screen = threading.Event(), []

    def respond(body, nth):
        def pieces():
            for piece in stream(provider, REPLY[:20], REPLY[20:]):
                if REPLY[21:30].encode() in piece:
                    assert first.wait(10), "the first piece was not shown before the second was sent"
                yield piece

        return 200, pieces(), {}

    shown = ask.Terminal.show

    def show(self, text):
        on_screen.append(text)
        first.set()
        shown(self, text)

    monkeypatch.setattr(ask.Terminal, "show", show)
    (body,) = asks(photo, respond)
    assert body["stream"] is True and body["temperature"] == 0
    assert text_of(body).endswith(f"Image size: (30 x 20)\n\n{SHOWN}") and "<observe>" in text_of(body)
    assert on_screen[:2] == [REPLY[:20], REPLY[20:]]
    out = capsys.readouterr().out
    assert out.startswith(REPLY) and out.count(REPLY) == 1
    assert (
        "answer: (A) on top of\nread: answer_tag, in the answer block\nscene: 2 boxes, 1 relation; wrote "
        in out
    )


@pytest.mark.parametrize("fault", ["whole", "broken off", "refused", "cut", "garbage"])
def test_what_cannot_be_streamed_is_printed_at_the_end(fault, api, photo, capsys):
    provider, asks = api
    whole = 200, ANSWER[provider]("(B)"), {}
    faults = {
        "whole": whole,
        "broken off": (200, stream(provider, "(C"[:2], end=False), {}),
        "refused": (400, {"error": {"type": "x", "message": "no stream here"}}, {}),
        "cut": "cut",
        "garbage": (200, b"data: {nope\n\n", {}),
    }
    asks(photo, lambda body, nth: faults[fault] if body.get("stream") else whole)
    out = capsys.readouterr().out
    assert out.startswith("(C\n(B)\n" if fault == "broken off" else "(B)\n")
    assert (
        "answer: (B) in front of\nread: letter, by a letter at" in out
        and "\nno well-formed scene (missing_tag: expected <scene>...</scene>, got none that is closed): 0 b"
        in out
    )


@pytest.mark.parametrize(
    "scene, says",
    [
        ('{"objects":[{"id":"cat.1","bbox":[0,0,5,9]}]}', "\nscene: 1 box, 0 relations; wrote "),
        ('{"objects":[{"id":"cat.1","bbox":[5,0,0,9]}]}',
         "\nno well-formed scene (bad_box: expected finite x1 < x2 and y1 < y2, got cat.1 [5, 0,"),
        ("{", "\nno well-formed scene (bad_json: expected JSON, got '{': "),
    ],
)  # fmt: skip
def test_why_a_scene_is_not_well_formed_is_said(scene, says, photo, capsys):
    reply = f"<scene>{scene}</scene><answer>(A)</answer>"
    with serve(lambda body, nth: (200, openai_answer(reply), {})) as (url, _):
        main([photo, QUESTION, "--model_path", "m", "--provider", "openai", "--base_url", url])
    assert says in capsys.readouterr().out


def test_scripts_get_one_object(api, photo, capsys):
    provider, asks = api
    (body,) = asks(photo, lambda body, nth: (200, ANSWER[provider](REPLY), {}), "--json")
    said = json.loads(capsys.readouterr().out)
    assert "stream" not in body and said["reply"] == REPLY and said["boxes"] == BOXES
    assert (said["answer"], said["letter"], said["method"]) == ("(A) on top of", "A", "answer_tag")
    assert said["scene"] == json.loads(SCENE) and said["finish_reason"] == "stop"


@pytest.mark.parametrize(
    "reply, answer, method",
    [
        ("<answer>Three cats</answer>", "3 cats", "answer_tag"),
        ("", None, "empty"),
        ("I cannot tell.", None, "none"),
        ("<answer>(A) No</answer>", "no", "answer_tag"),
        ("B. Yes", "yes", "text"),
        ("<answer>a cat</answer>", "a cat", "answer_tag"),
    ],
)
def test_a_question_without_options_is_open(reply, answer, method, photo, capsys):
    with serve(lambda body, nth: (200, openai_answer(reply), {})) as (url, _):
        main([photo, "How many?", "--model_path", "m", "--provider", "openai", "--base_url", url, "--json"])
    said = json.loads(capsys.readouterr().out)
    assert (said["answer"], said["letter"], said["method"]) == (answer, None, method) and method in HOW


# ---- mistakes ----
API = ("--provider", "openai", "--model_path", "m")


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "the following arguments are required: photo, question"),
        (["PHOTO"], "the following arguments are required: question"),
        (["PHOTO", ""], "question: expected a text"),
        (["none.jpg", "q"], "none.jpg: expected a picture"),
        (["", "q"], "photo: expected a path"),
        ([__file__, "q"], "expected a picture, got .*cannot identify"),
        (["CUT", "q"], "cut.jpg: expected a picture, got .*truncated"),
        (["PHOTO", "q", "--max_new_tokens", "0"], "--max_new_tokens: expected at least 1, got 0"),
        (["PHOTO", "q", "--out", "none/x.png"], "none/x.png: expected a place"),
        (["PHOTO", "q", "--out", "PHOTO"], "expected a place"),
        (
            ["PHOTO", "q", "--provider", "hf", "--model_path", "/none"],
            "--model_path /none: expected a folder",
        ),
        (["PHOTO", "q", *API], "OPENAI_API_KEY is not set"),
        (["PHOTO", "q", *API, "--base_url", "http://127.0.0.1:9"], "m through openai: APIConnectionError"),
        (["PHOTO", "q", "--provider", "none"], "invalid choice: 'none'"),
    ],
)
def test_a_mistake_is_one_line(arguments, message, photo, tmp_path, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY")
    cut = tmp_path / "cut.jpg"
    Image.effect_noise((200, 200), 50).save(cut)
    cut.write_bytes(cut.read_bytes()[:-2000])
    named = {"PHOTO": photo, "CUT": str(cut)}
    with pytest.raises(SystemExit, match=message) as ended:
        main([named.get(a, a) for a in arguments])
    assert str(ended.value).startswith("error: ") and "\n" not in str(ended.value)
    assert not list(tmp_path.glob("*.png"))
