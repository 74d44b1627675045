"""A model writes questions: what is accepted, what is refused, what is paid, what is asked again."""

import json
import time
from dataclasses import replace

import pytest
from models_behind import BAD, WRONG, Model, as_reply
from servers import KEY, serve, text_of

from apis import NoService, Reply
from questions import CATEGORIES, Question, candidates
from scenes import Relationship, SceneGraph, SceneObject, clean
from tiny import draw_graphs, draw_picture
from writer import PRICES, BudgetSpent, Purse, again, instructions, names_fault, read_reply, scene_text, write

DRAWN = ("relation", "size", "instance_location", "distance", "count", "existence")


@pytest.fixture(autouse=True)
def key(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setenv("ANTHROPIC_API_KEY", KEY)


@pytest.fixture(scope="module")
def graphs():
    return [clean(raw)[0] for raw in draw_graphs(42, seed=1)]


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


SCENE = SceneGraph(
    "i", "", 640, 480,
    (SceneObject("cup.1", "cup", (50, 300, 100, 350)), SceneObject("plate.1", "plate", (300, 300, 400, 340)),
     SceneObject("dog.1", "dog", (450, 100, 600, 250)), SceneObject("man.1", "man", (150, 50, 250, 400)),
     SceneObject("chair.1", "chair", (20, 20, 60, 90)),
     SceneObject("chair.2", "chair", (560, 380, 630, 470))),
    (Relationship("man.1", "holding", "cup.1"),),
    frozenset({"chair", "cat"}),
)  # fmt: skip
SIDES, CORNERS = "left of|right of|above|below", "top left|top right|bottom left|bottom right"
# (category, question, options, answer, ids, what the fault says; None: a good question)
SAID = [
    ("relation", "Where is the cup relative to the plate?", SIDES, "left of", "cup plate", None),
    ("relation", "Where is the cup relative to the plate?", SIDES, "left of", "plate cup", None),
    ("relation", "Where is the cup relative to the plate?", SIDES, "right of", "plate cup", "against the"),
    ("relation", "Relative to the plate, where is the cup?", SIDES, "left of", "plate cup", None),
    ("relation", "Relative to the plate, where is the cup?", SIDES, "right of", "plate cup", "against the"),
    ("relation", "Where is the unicorn relative to the plate?", SIDES, "left of", "plate", "got 'unicorn"),
    ("relation", "Where is the cup relative to the red plate?", SIDES, "left of", "cup plate", "'red pla"),
    ("relation", "Where is the cup relative to the chair?", SIDES, "left of", "cup chair", "could be"),
    ("relation", "Where is the cup relative to the plate?", "left of|Left of", "left of", "cup plate", "dif"),
    ("relation", "From the man's point of view, where is the cup relative to the plate?", SIDES, "right of",
     "man cup plate", "the viewer's point of view"),
    ("existence", "Is there a cat in the image?", "yes|no", "no", "dog", None),
    ("existence", "Is there a cat in the image?", "yes|no", "yes", "dog", "does not say"),
    ("existence", "Is there a horse in the image?", "yes|no", "no", "dog", "does not say"),
    ("existence", "Is there a person in the image?", "yes|no", "no", "dog", "does not say"),
    ("existence", "Is there a person in the image?", "yes|no", "yes", "man", None),
    ("existence", "Is there a person in the image?", "yes|no", "yes", "dog", "does not say"),
    ("existence", "Is there no dog in the image?", "yes|no", "yes", "dog", "got 'no'"),
    ("existence", "Is there a dog in the image?", "yes|no", "no", "dog", "against the graph"),
    ("existence", "Is there a dog in the image?", "yes|no|maybe", "yes", "dog", "expected yes and no"),
    ("existence", "Is there a man holding a cup in the image?", "yes|no", "yes", "man cup", None),
    ("existence", "Is there a man holding a cup in the image?", "yes|no", "no", "man cup", "against the"),
    ("existence", "Is there a man holding a plate in the image?", "yes|no", "yes", "man plate", "states no"),
    ("count", "How many chairs are there in the image?", "1|2|3|4", "2", "chair.1 chair.2", None),
    ("count", "How many chairs are there in the image?", "1|2|3|4", "(B)", "chair.1 chair.2", None),
    ("count", "How many chairs are there in the image?", "1|2|3|4", "3", "chair.1 chair.2", "against the"),
    ("count", "How many chairs are there in the image?", "1|2|3|4", "2", "chair.1", "ids of all 2"),
    ("count", "How many chairs are there in the image?", "one|two", "two", "chair.1 chair.2", "in digits"),
    ("count", "How many chairs are left of the dog?", "1|2|3|4", "2", "chair.1 chair.2", "a condition"),
    ("count", "How many chairs are on the left?", "1|2|3|4", "2", "chair.1 chair.2", "a condition"),
    ("count", "How many red chairs are there?", "1|2|3|4", "2", "chair.1 chair.2", "red chairs"),
    ("count", "How many cups are there in the image?", "1|2|3|4", "1", "cup", "against the graph"),
    ("size", "Which looks largest in the image?", "the man|the cup|a dog", "the man", "man cup dog", None),
    ("size", "Which looks largest in the image?", "man|cup|dog", "dog", "man cup dog", "against the graph"),
    ("size", "Which looks largest in the image?", "man|cup|giraffe", "man", "man cup", "got 'giraffe'"),
    ("size", "Which looks the second largest in the image?", "man|cup|dog", "cup", "man cup dog", "plainly"),
    ("size", "Which is not the largest in the image?", "man|cup", "cup", "man cup", "asked, got 'not'"),
    ("reach", "What is the man holding?", "cup|plate|dog", "cup", "man cup plate dog", None),
    ("reach", "What is the man holding?", "cup|plate|dog", "plate", "man cup plate dog", "against the"),
    ("reach", "What is the man doing with the cup?", "holding|kicking", "holding", "man cup", None),
    ("reach", "What is the man doing with the cup?", "holding|kicking", "kicking", "man cup", "states holdi"),
    ("reach", "What is the man doing with the cup?", "holding|carrying", "holding", "man cup", "right, too"),
    ("reach", "What is the dog touching?", "cup|plate", "cup", "dog cup plate", "states no relation"),
    ("instance_location", "Where in the image is the dog?", CORNERS, "top right", "dog", None),
    ("instance_location", "Where in the image is the dog?", CORNERS, "top left", "dog", "against the graph"),
    ("distance", "In the image, which is closest to the plate?", "man|dog", "man", "man dog plate", None),
    ("distance", "In the image, which is closest to the plate?", "man|dog", "dog", "man dog plate", "agains"),
    ("distance", "In the image, which is closest to the plate?", "man|dog", "man", "man dog", "is not among"),
    ("size", "Which looks largest in the image?", "man|cup", "man", "man cup plate", "nothing names it"),
]  # fmt: skip


@pytest.mark.parametrize("category, question, options, answer, ids, fault", SAID)
def test_words_and_ids_are_held_against_the_scene(category, question, options, answer, ids, fault):
    ids = [i if "." in i else f"{i}.1" for i in ids.split()]
    said = {"question": question, "options": options.split("|"), "answer": answer, "objects": ids,
            "level": "easy", "rating": 5}  # fmt: skip
    got = read_reply(json.dumps(said), SCENE, category, "easy", "task", "m")
    if fault:
        assert isinstance(got, str) and fault in got and "\n" not in got
    else:
        assert isinstance(got, Question) and set(got.objects) == set(ids)
        if category == "relation":
            assert got.objects == ("cup.1", "plate.1")  # first the one whose place is asked for


def test_what_may_have_no_box_is_counted_only_where_votes_follow():
    said = {"question": "How many cups are there in the image?", "options": list("1234"), "answer": "1"}
    said |= {"objects": ["cup.1"], "level": "easy", "rating": 5}
    graph = replace(SCENE, exhaustive=frozenset())
    assert "against the graph" in read_reply(json.dumps(said), graph, "count", "easy", "task", "m")
    got = read_reply(json.dumps(said), graph, "count", "easy", "task", "m", voted=True)
    assert got.form == "count/voted"
    got = read_reply(json.dumps(said | {"answer": "2"}), graph, "count", "easy", "task", "m", voted=True)
    assert "against the graph" in got
    known = replace(SCENE, exhaustive=frozenset({"cup"}))
    assert (
        read_reply(json.dumps(said), known, "count", "easy", "task", "m", voted=True).form == "count/written"
    )


def test_all_that_the_rules_ask_may_be_said_by_a_model(graphs):
    asked = [(graph, q) for graph in graphs for q in candidates(graph)]
    for graph, q in asked:
        got = read_reply(as_reply(q), graph, q.category, q.level, "task", "m")
        assert isinstance(got, Question), (q, got)
        assert set(got.objects) == set(q.objects)
    assert len(asked) > 500


@pytest.mark.parametrize("text", [
    '{"question": "\\ud800 where is it?", "options": ["a", "b"], "answer": "a", "objects": ["cup.1"], '
    '"level": "easy", "rating": 1}',
    "\ud800", "\x00", "```", "```json\n```", "``````", "```" + " " * 19_000, "[" * 19_999, "{" * 10**6,
    '{"rating": ' + "9" * 10_000 + "}", "NaN", '"text"', "\u202e{}", " " * 10**6,
])  # fmt: skip
def test_hostile_replies_have_a_fault_in_no_time(text):
    started = time.process_time()
    fault = read_reply(text, SCENE, "relation", "easy", "task", "m")
    assert isinstance(fault, str) and fault.startswith("reply: ") and len(fault) < 200
    assert time.process_time() - started < 0.5
    again(fault, text).encode()  # can be sent


def test_a_follow_up_holds_the_fault_and_no_mark_of_an_image():
    text = again("reply: expected JSON, got 'x'", "Look: <|image_pad|><|im_end|>x" + "y" * 5000)
    assert "It was refused. reply: expected JSON, got 'x'." in text and "<|" not in text and len(text) < 1200


def test_another_level_than_planned_is_refused(question):
    graph, q = question
    other = "hard" if q.level != "hard" else "easy"
    assert read_reply(as_reply(q), graph, q.category, other, "t", "m").startswith(f"level: expected {other}")


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


ODD = {  # answers of a server that hold no question: {name: (what is sent, how often it is asked in all)}
    "an error with status 200": {"error": {"message": "overloaded", "type": "x"}},
    "no choices": {"id": "1", "choices": [], "content": [], "usage": None},
    "a refusal without text": {
        "choices": [
            {
                "index": 0,
                "finish_reason": "stop",
                "message": {"role": "assistant", "content": None, "refusal": "No."},
            }
        ],
        "content": None,
        "usage": None,
    },
}


@pytest.mark.parametrize("dialect", ["openai", "anthropic"])
@pytest.mark.parametrize("odd", ODD)
def test_answers_without_a_question_lose_no_task(odd, dialect, graphs, tasks):
    model = Model(graphs, dialect, bad=False, trouble=())
    answer = model.respond
    model.respond = lambda body, nth: (
        (200, ODD[odd], {}) if nth == 1 and "Your last" not in text_of(body) else answer(body, nth)
    )
    records, api = run(tasks[:6], model, dialect=dialect)
    assert sorted(r["key"] for r in records if r["question"]) == sorted(key for key, *_ in tasks[:6])
    assert len(api.bodies) == 12  # once more each, whether it is an attempt or not


def test_what_was_paid_for_is_kept_when_a_server_refuses_the_rest(graphs, tasks):
    """Six replies are slow; meanwhile one request is told that there is no such model."""
    model, met = Model(graphs, bad=False, trouble=()), []
    answer = model.respond

    def respond(body, nth):
        met.append(body)
        if len(met) == 4:
            return 404, {"error": {"message": "no such model"}}, {}
        time.sleep(0.4)
        return answer(body, nth)

    model.respond, records = respond, []
    with serve(model.respond) as (url, api):
        with pytest.raises(NoService, match="NotFoundError"):
            for record in write(tasks, "openai:m", [], purse=Purse(), base_url=f"{url}/v1", concurrency=4):
                records.append(record)
    assert len(records) == len(api.bodies) - 1 >= 3 and all(r["question"] for r in records)


def test_a_server_that_is_down_ends_the_run_and_costs_no_attempt(graphs, tasks):
    records = []
    with pytest.raises(NoService, match="the last 4 requests failed: APIConnectionError"):
        for record in write(tasks, "openai:m", [], purse=Purse(), base_url="http://127.0.0.1:9",
                            concurrency=2, retries=0):  # fmt: skip
            records.append(record)
    assert 4 <= len(records) <= 8 and all(r["fault"].startswith("failed: ") for r in records)
    again, _ = run(tasks, Model(graphs, bad=False, trouble=()), done=records)
    assert sum(bool(r["question"]) for r in again) == len(tasks)


# ---- money ----
def test_tokens_that_anthropic_counts_as_cached_are_paid(graphs, tasks):
    model = Model(graphs, "anthropic", bad=False, trouble=())
    usage = {"input_tokens": 50, "output_tokens": 3, "cache_creation_input_tokens": 600,
             "cache_read_input_tokens": 350}  # fmt: skip
    plain = model.answer
    model.answer = lambda text: plain(text) | {"usage": usage}
    (record,), _ = run(tasks[:1], model, dialect="anthropic", purse=Purse(prices=(1, 1)))
    assert record["tokens"] == [1000, 3] and record["dollars"] == pytest.approx(1003 / 1e6)


def test_a_failed_request_says_nothing_about_the_price_of_the_next(graphs):
    purse = Purse(budget=1)
    assert purse.expects("m", 0.5) == 0.5
    purse.pay("m", (10, 10), Reply("", "failed", error="x"))
    assert purse.expects("m", 0.5) == 0.5
    purse.pay("m", (10, 10), Reply("", "stop", n_tokens=1000, prompt_tokens=9000))
    assert purse.expects("m", 0.5) == purse.spent == pytest.approx(0.1) and purse.expects("n", 0.5) == 0.5
    assert purse.allows(0.9) and not purse.allows(0.91) and Purse().allows(1e9)


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
    assert Purse(prices=(1, 2)).price("vllm:/a/folder", None) == (0, 0)
    assert Purse().price("anthropic:claude-opus-5-5", None) == (0, 0)  # not of the price of claude-opus-5
    assert Purse().price("anthropic:claude-sonnet-4-5-20250929", None) == PRICES["claude-sonnet-4-5"]
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
