"""reader.py: a model reads what the rules leave unread, behind a real server; nothing is paid for twice."""

import json
import re

import pytest
from fixtures import served
from servers import KEY, anthropic_answer, openai_answer, serve, text_of

from evaluate import main, parse_args
from reader import MAX_REPLY, is_unread, parse_reader, reading_request, verdict
from results import details, overview, read_records, summarise_run

CHOICE = {"kind": "choice", "choices": ["left", "right"]}


@pytest.mark.parametrize(
    "record, said, read",
    [
        (CHOICE, "B", "B"),
        (CHOICE, " (B).\n", "B"),
        (CHOICE, "<think>A?</think>\n**B**", "B"),
        (CHOICE, "none", None),
        (CHOICE, "b", None),
        (CHOICE, "C", None),  # beyond the options
        (CHOICE, "A or B", None),
        (CHOICE, "The answer is B", None),  # a reader that cannot do as it is told is not believed
        (CHOICE, "", None),
        ({"kind": "yes_no"}, "Yes.", "yes"),
        ({"kind": "yes_no"}, "no", "no"),
        ({"kind": "yes_no"}, "none", None),
        ({"kind": "number"}, "12", 12.0),
        ({"kind": "number"}, "-0.5", -0.5),
        ({"kind": "number"}, "1,200", 1200.0),
        ({"kind": "number"}, "none", None),
        ({"kind": "number"}, "9" * 400, None),
        ({"kind": "number"}, "1e999", None),
        ({"kind": "number"}, "nan", None),
    ],
)
def test_only_the_bare_answer_counts(record, said, read):
    assert verdict(record, said) == read


def test_what_is_shown():
    record = {
        "kind": "choice",
        "choices": ["left", "right"],
        "id": "7",
        "reply": "x" * 9000 + "the end",
        "gold": "(A) left",
    }
    text = reading_request(record, "Where is it?").problem
    assert "Where is it?\n(A) left\n(B) right\n</question>" in text and "the letter" in text
    assert text.count("x") < MAX_REPLY + 10 and "the end\n</reply>" in text
    assert "(A) left\n(B)" not in reading_request(record, "Where? A. left B. right").problem


def test_what_is_unread():
    record = {"kind": "choice", "parsed": None, "finish_reason": "stop", "reply": "hm"}
    assert is_unread(record, "openai:m") and is_unread(record | {"read_by": "openai:other"}, "openai:m")
    for other in ({"parsed": "A"}, {"finish_reason": "length"}, {"finish_reason": "failed"}, {"reply": " "},
                  {"kind": "point"}, {"read_by": "openai:m"}):  # fmt: skip
        assert not is_unread(record | other, "openai:m")


def test_its_name(capsys):
    assert parse_reader("openai:org/m:1") == ("openai", "org/m:1")
    for bad in ("m", "openai:", "nobody:m", ":m"):
        with pytest.raises(SystemExit):
            parse_args(["--reader", bad])
        assert "--reader: expected PROVIDER:MODEL" in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--reader_url", "--base_url"])
def test_a_url_that_is_none_is_refused_before_anything_is_asked(option, capsys):
    with pytest.raises(SystemExit):
        parse_args(["--reader", "openai:m", option, "http:/me:hidd3n@h"])
    assert f"error: {option}: expected http://HOST:PORT/PATH, got http:/h\n" in capsys.readouterr().err


@pytest.mark.parametrize("provider", ["openai", "anthropic"])
def test_a_run_with_a_reader_pays_for_nothing_twice(provider, tiny_data, tmp_path, capsys, monkeypatch):
    """The model's replies are right but odd, or nothing; the reader fails on one at first."""
    monkeypatch.setenv("ANTHROPIC_API_KEY", KEY)
    answer = {"openai": openai_answer, "anthropic": anthropic_answer}[provider]
    down = {"now": True}

    def model(body, nth):
        n = sum(map(ord, text_of(body))) % 3
        return 200, openai_answer(("(A)", "Perhaps the first, perhaps not: Alpha.", "I cannot tell.")[n]), {}

    def reads(body, nth):
        reply = re.search(r"<reply>\n(.*)\n</reply>", text_of(body), re.S)[1]
        if down["now"] and "Alpha" in reply:
            return 400, {"error": {"type": "x", "message": "not now"}}, {}
        return 200, answer("A" if "Alpha" in reply else "none"), {}

    with serve(model) as (url, asked), serve(reads) as (reader_url, shown):
        run = served(f"{url}/", tiny_data, tmp_path, "--limit", "24", "--retries", "0")
        main(run)
        plain = json.loads((tmp_path / "x.summary.json").read_text())
        assert "reader" not in plain and not shown.bodies and "with reader" not in capsys.readouterr().out
        run += ["--reader", f"{provider}:r", "--reader_url", f"{reader_url}"]
        n_asked = len(asked.bodies)
        with pytest.raises(
            SystemExit, match=rf"0 items failed .* and \d+ replies .* shown to {provider}:r, "
        ):
            main(run)  # what is answered is not asked again, what is unread is shown
        out = capsys.readouterr().out
        records = read_records(tmp_path / "x.jsonl")[1]
        unread = [r for r in records if r["parsed"] is None]
        odd = [r for r in unread if "Alpha" in r["reply"]]
        assert 0 < len(odd) < len(unread) < len(records) == 24 and len(asked.bodies) == n_asked
        assert f"{len(odd)} of {len(unread)} unread replies could not be shown to {provider}:r" in out
        assert [r["id"] for r in unread if "read_by" not in r] == [r["id"] for r in odd]
        down["now"], first = False, len(shown.bodies)
        main(run)  # only what failed is asked for again
        assert len(shown.bodies) == first + len(odd) and len(asked.bodies) == n_asked
        before = len(shown.bodies)
        main(run)
        assert len(shown.bodies) == before
    records = read_records(tmp_path / "x.jsonl")[1]
    for r in records:
        assert ("read_by" in r) == (r["parsed"] is None)
        if "read_by" in r:
            said = "A" if "Alpha" in r["reply"] else None
            right = said is not None and r["gold"][1] == "A"
            assert (r["read_by"], r["read"], r["read_correct"]) == (f"{provider}:r", said, right)
            assert not r["correct"]
    summary = json.loads((tmp_path / "x.summary.json").read_text())
    extra = sum(r.get("read_correct", False) for r in records)
    assert summary["correct"] == plain["correct"] and summary["unparsed"] == len(unread)
    assert extra > 0 and summary["reader"]["correct"] == plain["correct"] + extra
    assert (summary["reader"]["shown"], summary["reader"]["read"]) == (len(unread), len(odd))
    assert "with reader" in overview([summary]) and f"{provider}:r reads" in details(summary)
    assert all(reader_url not in path.read_text() for path in tmp_path.iterdir())
    shown_text = text_of(shown.bodies[0])
    assert "image_url" not in json.dumps(shown.bodies) and "gold" not in shown_text
    main(["--rescore", str(tmp_path / "x.jsonl")])  # keeps what was read
    assert json.loads((tmp_path / "x.summary.json").read_text())["reader"] == summary["reader"]


def test_a_local_model_reads(tiny_base, tiny_data, tmp_path):
    """Loaded here, as --provider loads it; this one knows no words, so that it reads nothing."""
    with serve(lambda body, nth: (200, openai_answer("Hm."), {})) as (url, _):
        main(served(url, tiny_data, tmp_path, "--limit", "3", "--reader", f"hf:{tiny_base}"))
    records = read_records(tmp_path / "x.jsonl")[1]
    assert [(r["read_by"], r["read"], r["correct"]) for r in records] == [
        (f"hf:{tiny_base}", None, False)
    ] * 3
    assert all(r["read_reply"] for r in records)


def test_a_rotation_that_only_the_reader_reads_counts_with_it():
    base = {"row": 0, "turns": 2, "category": "", "kind": "choice", "gold": "(A) x", "meta": {},
            "method": "none", "finish_reason": "stop"}  # fmt: skip
    records = [
        base | {"id": "0@0", "parsed": "A", "correct": True},
        base
        | {
            "id": "0@1",
            "parsed": None,
            "correct": False,
            "read_by": "hf:m",
            "read": "A",
            "read_correct": True,
        },
    ]
    config = {"dataset": "x", "model_path": "m", "template": "t", "provider": "hf", "circular": True}
    summary = summarise_run({"config": config, "data": {"n": 2}}, records)
    assert (summary["n"], summary["correct"], summary["reader"]["correct"]) == (1, 0, 1)
    records[1] |= {"parsed": "B", "method": "letter"}  # later rules read it: their word counts
    assert "reader" not in summarise_run({"config": config, "data": {"n": 2}}, records)
