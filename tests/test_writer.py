"""A model writes questions: what is accepted, what is refused, what is paid, what is asked again."""

import json
from dataclasses import replace

import pytest
from models_behind import BAD, WRONG, Model, as_reply
from servers import KEY, serve

from backends import NoService, Reply
from questions import CATEGORIES, Question, candidates
from scenes import Relationship, SceneGraph, SceneObject, clean
from tiny import draw_graphs, draw_picture
from writer import PRICES, BudgetSpent, Purse, instructions, names_fault, read_reply, scene_text, write

DRAWN = ("relation", "size", "instance_location", "distance", "count", "existence")


@pytest.fixture(autouse=True)
def key(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setenv("ANTHROPIC_API_KEY", KEY)


@pytest.fixture(scope="module")
def graphs():
    return [clean(raw)[0] for raw in draw_graphs(60, seed=1)]


@pytest.fixture(scope="module")
def tasks(graphs):
    """(key, graph, category, level): each graph once, the categories in turn."""
    out = []
    for i, graph in enumerate(graphs):
        supported = sorted({q.category for q in candidates(graph)})
        category = supported[i % len(supported)]
        out.append((f"{graph.image_id}/{category}", graph, category, "easy"))
    return out


def run(tasks, model, done=(), dialect="openai", purse=None, **service):
    with serve(model.respond) as (url, api):
        service = {"base_url": f"{url}/v1" if dialect == "openai" else url, "concurrency": 8} | service
        return list(write(tasks, f"{dialect}:m", list(done), purse=purse or Purse(), **service)), api


# ---- replies ----
@pytest.fixture(scope="module")
def question(graphs):
    return next((g, q) for g in graphs for q in candidates(g) if q.form == "relation/image")


@pytest.mark.parametrize("kind", [*BAD, *WRONG])
def test_a_bad_reply_has_its_fault_in_a_line(question, kind):
    graph, q = question
    fault = read_reply((BAD | WRONG)[kind](q), graph, q.category, q.level, "task", "openai:m")
    assert isinstance(fault, str) and ": " in fault and "\n" not in fault and len(fault) < 400


def test_a_good_reply_becomes_a_question(question):
    graph, q = question
    lettered = [f"({x}) {o}" for x, o in zip("ABCD", [q.answer, *q.wrong], strict=True)]
    replies = as_reply(q), f"```json\n{as_reply(q)}\n```", as_reply(q, options=lettered, answer="A")
    for text in replies:
        got = read_reply(text, graph, q.category, q.level, "task", "openai:m")
        assert isinstance(got, Question), got
        assert (got.text, got.answer, set(got.wrong)) == (q.text, q.answer, set(q.wrong))
        assert got.objects == q.objects and got.writer == "openai:m" and got.category == q.category


def test_every_wrong_key_is_refused_where_boxes_decide(graphs):
    """Each of the rules' questions with another option keyed, but for places and absence."""
    for graph in graphs:
        for q in candidates(graph):
            if q.category in ("relation", "size", "distance", "count"):
                wrong = replace(q, answer=q.wrong[0], wrong=(q.answer, *q.wrong[1:]))
                found = read_reply(as_reply(wrong), graph, q.category, q.level, "task", "m")
                assert isinstance(found, str), (q, found)


def test_names_must_be_those_of_the_ids(graphs):
    graph = next(g for g in graphs if len(g.objects) >= 3)
    a, b, c = graph.objects[:3]
    text, options = f"Where is the {a.label} relative to the {b.label}?", ["left of", "right of"]
    assert names_fault(graph, "relation", text, options, [a.id, b.id]) is None
    assert b.id in names_fault(graph, "relation", text, options, [a.id])
    assert c.id in names_fault(graph, "relation", text, options, [a.id, b.id, c.id])
    kind = a.kinds[0]
    twins = [replace(o, label=kind, kinds=()) for o in graph.objects]
    twin = replace(graph, objects=tuple(twins))
    assert "could be any of" in names_fault(twin, "relation", f"Where is the {kind}?", options, [a.id])


# ---- with a server ----
@pytest.mark.parametrize("dialect", ["openai", "anthropic"])
def test_nothing_wrong_is_accepted_nothing_good_lost_nothing_paid_twice(graphs, tasks, dialect):
    model = Model(graphs, dialect)
    records, api = run(tasks, model, dialect=dialect)
    good = {r["key"]: r["question"] for r in records if r["question"]}
    assert set(good) == {key for key, *_ in tasks}
    for key, graph, category, _ in tasks:
        truths = {q.text: q.answer for q in candidates(graph) if q.category == category}
        assert truths[good[key]["text"]] == good[key]["answer"]
    assert len(model.kinds) >= 12  # of the ways to misbehave
    assert not any(r["fault"] and r["fault"].startswith("failed") for r in records)
    replies = [(r["key"], r["attempt"]) for r in records]
    assert len(replies) == len(set(replies)) == len(api.counts)
    prefix = [body.get("system") or body["messages"][0]["content"] for body in api.bodies]
    assert len({json.dumps(p) for p in prefix}) <= len(DRAWN)  # the same for all calls of a category
    if dialect == "anthropic":
        assert all(p[0]["cache_control"] == {"type": "ephemeral"} for p in prefix)
    temperatures = {body["temperature"] for body in api.bodies}
    assert temperatures == {0.3, 0.7}


def test_a_run_that_was_cut_off_pays_for_what_is_missing_only(graphs, tasks):
    tasks = tasks[:20]
    whole, _ = run(tasks, Model(graphs, trouble=()))
    for n in (1, len(whole) // 2):
        rest, _ = run(tasks, Model(graphs, trouble=()), done=whole[:n])
        got = {r["key"]: r["question"] for r in whole[:n] + rest if r["question"]}
        assert got == {r["key"]: r["question"] for r in whole if r["question"]}
        assert len(rest) == len(whole) - n
    assert run(tasks, Model(graphs), done=whole)[0] == []


def test_after_three_refused_replies_a_task_has_failed(graphs, tasks):
    model = Model(graphs)
    model.write = lambda category, text: "No."
    records, api = run(tasks[:5], model)
    assert [sorted(r["attempt"] for r in records if r["key"] == key) for key, *_ in tasks[:5]] == [
        [0, 1, 2]
    ] * 5
    assert not any(r["question"] for r in records) and all(r["fault"].startswith("reply: ") for r in records)
    assert {body["temperature"] for body in api.bodies} == {0.3, 0.7, 1.0}
    assert run(tasks[:5], model, done=records)[0] == []


def test_a_request_without_a_reply_is_no_attempt(graphs, tasks):
    model = Model(graphs, bad=False)
    answer, down = model.respond, [True]
    model.respond = lambda body, nth: (
        (400, {"error": {"message": "no"}}, {}) if down[0] else answer(body, nth)
    )
    records, _ = run(tasks[:4], model)
    assert all(r["fault"].startswith("failed") and r["dollars"] == 0 for r in records)
    down[0] = False
    again, _ = run(tasks[:4], model, done=records)
    assert sum(bool(r["question"]) for r in again) == 4 and all(r["attempt"] == 0 for r in again)


def test_a_model_that_sees_is_shown_the_picture(graphs, tasks):
    model = Model(graphs, bad=False, trouble=())
    records, api = run(tasks[:6], model, picture=draw_picture)
    assert all(r["question"] for r in records)
    assert all(len(body["messages"][-1]["content"]) == 2 for body in api.bodies)
    _, api = run(tasks[:6], model)
    assert all(len(body["messages"][-1]["content"]) == 1 for body in api.bodies)


# ---- money ----
def test_the_budget_holds_and_everything_paid_for_is_kept(graphs, tasks):
    purse, records = Purse(budget=0.8, prices=(100, 1000)), []  # 50 tokens in, 3 out: 0.008 dollars a reply
    with serve(Model(graphs, bad=False, trouble=()).respond) as (url, api):
        with pytest.raises(BudgetSpent, match=r"\$0.79 of \$0.80 spent, .* \$0.0080") as ended:
            for _ in range(3):  # rounds of tasks
                for record in write(tasks, "openai:m", [], purse=purse, base_url=url, concurrency=1):
                    records.append(record)
    assert "\n" not in str(ended.value)
    assert len(records) == len(api.bodies) and len(records) == 99 and purse.spent == pytest.approx(0.792)


def test_prices(graphs):
    assert Purse().price("openai:gpt-4o-2024-11-20", None) == PRICES["gpt-4o"]
    assert Purse().price("openai:gpt-4o-mini", None) == PRICES["gpt-4o-mini"]
    assert Purse().price("openai:mine", "http://localhost") == Purse().price("vllm:x", None) == (0, 0)
    assert Purse(prices=(1, 2)).price("openai:mine", "http://localhost") == (1, 2)
    with pytest.raises(ValueError, match="prices=IN,OUT .* for openai:new, got none"):
        Purse(budget=1).price("openai:new", None)
    purse = Purse(budget=1)
    assert purse.pay("m", (3, 15), Reply("", "stop", n_tokens=100, prompt_tokens=1000)) == pytest.approx(
        0.0045
    )


def test_without_a_key_it_ends_before_it_asks(graphs, tasks, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY")
    with pytest.raises(NoService, match="OPENAI_API_KEY is not set"):
        list(write(tasks, "openai:gpt-4o", [], purse=Purse()))


# ---- prompts ----
def test_instructions_are_short_and_fixed_and_the_scene_is_whole(graphs):
    for category in CATEGORIES:
        text = instructions(category)
        assert text == instructions(category) and category in text and len(text) < 2500 and "{" in text
    graph = graphs[0]
    shown = json.loads(scene_text(graph, "hard").partition("Scene: ")[2])
    assert (shown["width"], shown["height"]) == (84, 84)
    assert [o["id"] for o in shown["objects"]] == [o.id for o in graph.objects]
    x1, y1, x2, y2 = graph.objects[0].box
    assert shown["objects"][0]["middle"] == [round((x1 + x2) / 168, 3), round((y1 + y2) / 168, 3)]


def test_two_words_of_one_meaning_are_two_right_options():
    """The words of a cup that sits on a table: some mean the same, some the contrary."""
    cup = SceneObject("cup.1", "cup", (200, 100, 260, 160))
    table = SceneObject("table.1", "table", (100, 150, 400, 400))
    triple = Relationship("cup.1", "sitting on", "table.1")
    graph = SceneGraph("1", "", 640, 480, (cup, table), (triple,))

    def said(answer, *wrong, objects=("cup.1", "table.1")):
        text, options = "Where is the cup with respect to the table?", [answer, *wrong]
        reply = {"question": text, "options": options, "answer": answer, "level": "easy", "rating": 5}
        reply |= {"objects": objects}
        return read_reply(json.dumps(reply), graph, "relation", "easy", "task", "m")

    assert isinstance(said("sitting on", "under", "behind"), Question)
    assert isinstance(said("on", "under", "inside"), Question)
    assert "on top of is right too" in said("sitting on", "on top of", "under")
    assert "under is against the graph" in said("under", "on", "inside")
    assert "underneath is against the graph" in said("underneath", "on", "inside")
    assert isinstance(said("on", "under", "inside", objects=("cup.1",)), str)
