"""Read a model's reply: letters, yes or no, numbers, words, points, boxes, sequences. Text in, answer out.

    from answers import parse_choice
    parse_choice("<think>A cup? No.</think><answer>(B) arm chair</answer>", ["chair", "arm chair"])   # "B"

Pure functions of text, without a model or a judge: about 10,000 replies a second, and none of them raises.
A wrong reading is a bug, an unread reply is not: the rules are few, and what they leave unread is counted,
never guessed. Answer blocks are looked for in the last MAX_CHARS characters; of the block, or of what is no
thought, the first 1,024 and the last 3,072 are read. Time is linear: 64 kB of anything take less than 50 ms.

What differs from the paper's evaluator: a reply that names no option is unparsed, never option A, and one
that names two is a contradiction, never the first. `released_letter` reads as that evaluator does.
"""

import ast
import itertools
import math
import re
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

from rewards import MAX_CHARS, extract_answer

LETTERS = "ABCDEFGHIJ"
KINDS = ("choice", "yes_no", "number", "word", "sequence", "point", "box")  # of answers, as `read` takes them
MAX_STATEMENT = 120  # characters; a longer reply that announces no answer is a thought, not an answer
MAX_PHRASES = 16  # final-answer phrases read, the last ones
MAX_HEAD, MAX_TAIL = 1024, 3072  # characters read of a text, from its two ends


# ---- reading a choice out of a reply ----
# What is hard is not to find a letter but to leave alone what only looks like one: an article (A cup), a list
# of the options, a thought that is taken back, an option that is ruled out. So a reply is undressed (_TAGS to
# _FULL_WIDTH), asked where it announces an answer (_BOXED to _HEDGED) and what it states there (_LEAD to
# _ANOTHER); what doubts, negates or refuses empties what was found. Replies in quotes are in the tests.
_TAGS = re.compile(r"</?(?:ans(?:wer)?|[bip]|em|strong|br|code)\b[^<>]{0,40}>|<\|[^<>|]{1,40}\|>|</answer$")
_WRAPPERS = re.compile(r"\\(?:text|math)\w*\s?\{([^{}]*)\}")  # \text{B} -> B
_DRESS = re.compile(
    r"(?m:^[^\S\n]*[-•>✅]+ (?!\d))|[*`$#\"“”\ufeff\u200b]|\\[()\[\]]|\\(?:left|right|bf|rm|,)(?![a-z])"
)
_EMPHASIS = re.compile(r"(?<!\w)([_'])(\(?\w[^_'\n]{0,60}?)\1(?!\w)")  # 'B', _B_
_FULL_WIDTH = str.maketrans("（）：．，’。！、【】−", "():.,'.!,()-")
_BOXED = re.compile(r"\\boxed\s?\{((?:[^{}]|\{[^{}]{0,200}\}){0,200})\}")
_BELOW = r"(?:\s*(?:given |shown |as )?(?:below|above|follows)[:.])?"  # "the answer is below:"
_PHRASE = re.compile(  # in Chinese as well, which Qwen's models fall into
    r"\bfinal answer\s*(?:\n|(?=[(\[]))|\b(?:ans|answer|option|choice)(?:'s| to (?:the|this) question)?\s?"
    rf"(?:(?:(?:is|would be|should be|must be)\b|(?<='s)){_BELOW}(?:\s*:|\s+(?=\S)|(?=[(\[]))|:|=|->|→)"
    r"|(?:^|\n)(?:answer\s*\n|correct:)|\bit (?:must|should) be\b"
    r"|\bI(?:'d| would| will|'ll|'m| am)? (?:choose|pick|select|go with|going with|say|answer)\b:?"
    r"|(?:答案|正解|정답)[是为は은]?:?|应?选择?", re.I)  # fmt: skip
_HEDGED = re.compile(  # before an announcement, in its sentence: "I don't think the answer is A."
    r"\b(?:wrong|incorrect|not|no|none|neither|doubt|whether|unsure|unclear|might|may|could|would|suppose"
    r"|assum\w+|unlikely|example|at first|if(?! i (?:had|have|must|were)))\b|n't\b", re.I)  # fmt: skip
_LEAD = re.compile(  # a letter in its dress; a bare one only where it can be no article: not "A cup"
    r"(?:(?:so|thus|hence|therefore|yes|sure)[,:]? )?"
    r"(?:(?:it's|it is|it must be|i think|most likely|likely|probably|definitely|clearly|actually) )*"
    r"(?:the )?(?:correct )?(?:(?:option|choice|answer|letter):? )?"
    r"(?:[(\[{<]{1,2} ?([a-j])\.? ?[)\]}>]{1,2}|([a-j]) ?[).:,;!}](?![A-Za-z0-9])"
    r"|([a-j])(?=$|\n| (?:because|since|or|and|is (?:the )?(?:most )?(?:correct|best|right answer))\b|"
    r" ?[/&] ?[a-j]\b| [-–—] |—))", re.I)  # fmt: skip
_ANNOUNCED_LETTER = re.compile(  # behind "the answer is" no B is an article, and A is none before these
    r"(?:(?:most )?(?:likely|probably|definitely|clearly|actually) )?(?:(?:letter|option) )?"
    r"(?:([B-HJ])(?![\w'-])|(A)(?= ?[(—]| (?:as|based|but|given|due)\b))")  # fmt: skip
# The one line that counts where the options are judged one by one.
_ONLY_LETTER = re.compile(r"(?:(?:option|choice|answer):? )?[(\[]? ?[A-Ja-j] ?[)\].:!]{0,2}", re.I)
# Letters behind these are reasons, not answers: "The answer is (B) because (A) left of is wrong."
_BECAUSE = re.compile(r"\b(?:because|since|as)\b")
_ASIDE = re.compile(r"\b(?:while|whereas|unlike|rather than|instead of)\b|,? (?:\w+ly )?not\b|\n")
_ANOTHER = re.compile(  # a letter that an answer goes on to: "A/B", "B or maybe C", "A (left) (B)", "B C"
    r"[(\[]([A-J])[)\]]|(?:\b(?:[Oo]r|and)|[/,&;+]) ?(?:(?:maybe|perhaps|possibly|even|option) )*([A-HJ])"
    r"(?= ?(?:$|[().,;:/&?!]|or\b|and\b))|\b([A-J])[)\].:] ?\w|^[)\]}.:,;+ ]*([A-J])[)\].:!]*$")  # fmt: skip
_IS_LETTER = re.compile(  # "The answer is A. The lamp is B."
    r"(?i:\b(?:is|be|it's|meant|correction)[:( \[]+)([A-J])[)\]]*(?=[.,;!?\n]|$| (?:from|if|when|in)\b)"
)
_DOUBT = re.compile(  # "B. Wait, actually C."
    r"\b(?:wait|actually|hmm|sorry|maybe|perhaps|possibly|no|instead(?! of)|rather(?! than))\b", re.I
)
_RULED_OUT = re.compile(  # behind a letter: "(A) can be ruled out."; "(A) cat" is data.TEMPLATES' example
    r"[ :(–—-]*(?:\w+ ){0,4}(?:not|no|wrong|incorrect|false|ruled out|excluded|eliminated|unlikely|impossible"
    r"|isn't|cannot|can't)\b|cat\W*$", re.I)  # fmt: skip
_NEGATION = re.compile(  # turns a text round, or leaves it open: "It is not right", "Is it the lamp?"
    r"\b(?:not|neither|nor|never|no|none|non|cannot|unable|wrong|incorrect|unlikely|whether|rather than"
    r"|instead of|anything but|except|excluded|eliminated|ruled out|unclear|unlike|too \w+ to|let me"
    r"|which of|example|e\.g)\b|n't\b|\?")  # fmt: skip
_UNKNOWN = re.compile(  # names things without answering: "No, I can't see the image." is no "no"
    r"\b(?:can(?:'|no| no)t|(?:un|not )able to|do(?:n't| not) have|no (?:way to|access)|(?:im|not )possible"
    r" to)\b.{0,50}\b(?:see|view|tell|determined?|answer|say|access|help|know|confirm|provide|identify|count"
    r"|images?)\b|\bno (?:way|access|clear|context|one can|image|picture|photo|visual|visible|comment|idea"
    r"|clue|information)\b|\b(?:i'm sorry|i am sorry|nothing can be|as an ai|i can only|not enough"
    r"|insufficient|undetermined|indeterminate)\b|^error\b")  # fmt: skip
_NEITHER = re.compile(  # of the options: "None of these" is no 0
    r"\bnone of (?:these|those|them|the (?:above|given|listed|options|choices|answers))\b"
    r"|\bno (?:\w+ )?(?:answers?|options?|choices?)\b"
)
_REFUSAL = re.compile(f"{_UNKNOWN.pattern}|{_NEITHER.pattern}")
_DISCOURSE = re.compile(  # options' words that say nothing here: "Based on the above", "All right"
    r"\b(?:the|image|picture|question|options?|choices?|as|described|mentioned|shown) (?:above|below)\b"
    r"|\b(?:all|you're|you are|that's|that is) right\b")  # fmt: skip
# Takes back all that was announced before it: "The answer is A. No, wait: the answer is B."
_CORRECTS = re.compile(r"\b(?:wait|hmm|on second thought|misread|correction|scratch that)\b", re.I)
_REVERSES = re.compile(  # may take it back: "A. left\n\nHowever, it is on the right."
    rf"{_CORRECTS.pattern}|\b(?:however|actually|but|though|although|looking again|alternatively"
    r"|re-?consider\w*|re-?exam\w*|mistake\w*|in fact|i was wrong|closer look)\b", re.I)  # fmt: skip
_SHOWN = re.compile(r"\b(?:e\.g|example|such as|like|(?<!requested )(?<!required )format)\b[^.!?\n]*$", re.I)
_NEXT = re.compile(  # a turn that is not the model's own
    r"\n[ #*>-]{0,9}(?:<\|\w{1,12}\|>)?(?:(?:next )?question|user|human|q)\b[^\n:]{0,12}[\n:]", re.I
)
_YES_OR_NO = re.compile(r"\b(?:yes|no)(?: or |/)(?:yes|no)\b\)?( ?[:?])?")  # of the question: "Yes or no: no"
_YES_NO = re.compile(  # at the head of a clause, or concluding; a "no" before a noun is none: "No doubt"
    r"(?:^|(?<=[.!?:;,)\n] )|\b(?P<is>is|be)[:,]? |\b(?:so|thus|hence|therefore|but|and)[:,]? )"
    r"(?:(yes)(?![\w'])|(no)(?!\. of)(?= ?(?:$|[^\w\s'])| (?:it|there|this|that|the|they|he|she|i|we|you|not"
    r"|if|in|from|when|because|since|as|and|or)\b))")  # fmt: skip
_SENTENCE_END = re.compile(r"(?<=\w\w)[.!](?:\s(?!Or\b)|$)")  # not behind "B."
_NUMBER_WORDS = {w: i for i, w in enumerate(
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen "
    "seventeen eighteen nineteen".split())}  # fmt: skip
_TENS = {w: 10 * i for i, w in enumerate("twenty thirty forty fifty sixty seventy eighty ninety".split(), 2)}
_ONES = "|".join(list(_NUMBER_WORDS)[1:10])
_WORDED = re.compile(rf"\b(?:({'|'.join(_TENS)})(?:[- ]({_ONES}))?|({'|'.join(_NUMBER_WORDS)}))\b")
_SCALE = r"(?:hundred|thousand|million|billion|dozen|half|and a half|quarter|third)s?\b"


def _plain(text: str) -> str:
    """Without tags, Markdown and LaTeX dress, runs of blanks as one."""
    text = _DRESS.sub("", _WRAPPERS.sub(r"\1", _TAGS.sub("", text))).translate(_FULL_WIDTH)
    return re.sub(r"[^\S\n]+", " ", _EMPHASIS.sub(r"\2", text)).strip()


def _number_of(found: re.Match) -> str:
    tens, unit, word = found.groups()
    return str(_TENS[tens] + _NUMBER_WORDS.get(unit, 0) if tens else _NUMBER_WORDS[word])


def _ends(text: str) -> str:
    return text if len(text) <= MAX_HEAD + MAX_TAIL else f"{text[:MAX_HEAD]}\n{text[-MAX_TAIL:]}"


def normalised(text: str) -> str:
    """Plain text as it is compared: lower case, digits for number words, no hyphens, no full stop."""
    text = _WORDED.sub(_number_of, text.lower().replace("\n", " "))
    text = re.sub(r"(?<=\d),(?=\d{3}\b)", "", re.sub(r"(?<=[a-z])[-‐‑](?=[a-z])", " ", text))
    return text.strip(" .,;:!")


@dataclass(frozen=True)
class _Options:
    letters: dict[str, set[str]]  # normalised option text -> its letters (more than one if options repeat)
    plain: dict[str, str]  # letter -> plain option text
    anywhere: re.Pattern  # any option text on word and number boundaries, the longest first
    lettered: bool  # whether the reader was shown letters


@lru_cache(maxsize=4096)
def _options(choices: tuple[str, ...], lettered: bool = True) -> _Options:
    if not 2 <= len(choices) <= len(LETTERS):
        raise ValueError(f"choices: expected 2 to {len(LETTERS)} options, got {len(choices)}: {choices!r}")
    letters, plain = defaultdict(set), {}
    for letter, choice in zip(LETTERS, choices, strict=False):
        plain[letter] = _plain(choice)
        letters[normalised(plain[letter])].add(letter)
    # An option of one letter cannot be told from an article. A number must not be part of another (3 of 13,
    # 3.5, 3-4, 3 hundred) nor of "Option 2". Longest first: "arm chair" is not "chair".
    texts = sorted((t for t in letters if len(t) > 1 or t.isdigit()), key=len, reverse=True)
    number = rf"(?<![-/:])(?<!option )(?<!choice )(?<!image )(?<!figure ){{}}(?![-/:]\d| \d| ?{_SCALE})"
    inside = "|".join(number.format(re.escape(t)) if t[0].isdigit() else re.escape(t) for t in texts)
    anywhere = re.compile(rf"(?<!\w)(?<!\d[.,])(?:{inside or '(?!)'})(?!\w)(?![.,]\d)")
    return _Options(dict(letters), plain, anywhere, lettered)


def _said_yes_no(statement: str, options: _Options) -> set[str]:
    """Letters of every yes and no that a normalised statement answers with: "Yes? No." is a contradiction."""
    either = _YES_OR_NO.search(statement)
    statement = statement[either.end() :].strip() if either else statement
    if (either and not either[1]) or _UNKNOWN.search(re.split(r"[.!?] ", statement, maxsplit=1)[0]):
        return set()
    said = {m[2] or m[3] for m in _YES_NO.finditer(statement)
            if not (m["is"] and _hedged(statement, m.start()))}  # fmt: skip
    return {letter for word in said for letter in options.letters.get(word, ())}


def _named_texts(statement: str, options: _Options) -> set[str]:
    """Letters of the options whose text a statement names; none where it refuses, doubts or negates."""
    # The whole text of an option first, as it may hold what is looked for below; then yes and no, refusals,
    # zero without a digit ("There are no cups."), and the texts anywhere, if what is around does not negate.
    if normalised(statement) in options.letters:
        return options.letters[normalised(statement)]
    known = "|".join(options.letters)  # a compound that no option holds is one word: off-white is not white
    statement = normalised(re.sub(
        r"\b[A-Za-z]+(?:-[A-Za-z]+)+",
        lambda m: m[0] if m[0].lower().replace("-", " ") in known else m[0].replace("-", "_"), statement,
    ))  # fmt: skip
    if said := _said_yes_no(statement, options):
        return said
    for refusal in (_NEITHER, _UNKNOWN):  # which may be an option: "Cannot be determined"
        if refusal.search(statement):
            return {x for text, letters in options.letters.items() if refusal.search(text) for x in letters}
    if "0" in options.letters and _NOTHING.search(statement) and not re.search(r"[\d,;]|\bbut\b", statement):
        return options.letters["0"]
    if _NEGATION.search(options.anywhere.sub("", statement)) or _BOUND.search(statement):
        return set()
    return _texts_in(statement, options)


def _texts_in(text: str, options: _Options) -> set[str]:
    """Letters of all options whose text stands in a text, but for yes and no, which stand everywhere."""
    found = set(options.anywhere.findall(_DISCOURSE.sub("", normalised(text)))) - {"yes", "no"}
    return {letter for text in found for letter in options.letters[text]}


def _named_letters(statement: str, options: _Options, announced: bool = False) -> set[str]:
    """Letters at the head of a statement, in any usual dress: B  b)  (B)  [B]  B.  B: left  Option B.

    None if it rejects the letter; several if it goes on to another letter or to the text of another option.
    """
    if not options.lettered:
        return set()
    found = _LEAD.match(statement) or (_ANNOUNCED_LETTER.match(statement) if announced else None)
    if not found:
        if statement[1:2] == " " and options.letters.get(normalised(statement[2:])) == {statement[0]}:
            return {statement[0]}  # "B left"
        return set()
    letter, rest = found[found.lastindex].upper(), statement[found.end(found.lastindex) :]
    text = options.plain.get(letter)
    own = text and re.match(rf"[\s)\]}}.:,;!–—-]*{re.escape(text)}(?!\w)", rest, re.I)
    rest = rest[own.end() :] if own else rest  # "(B) right of, which is ..."
    if _RULED_OUT.match(rest if own else rest.lstrip(")]}.:;! ")):
        return set()
    line = rest.partition("\n")[0]
    doubt = _DOUBT.search(line)
    others = set(re.findall(r"\b([A-J])\b(?!')", line[doubt.end() :]) if doubt else ()) & set(options.plain)
    if announced and not own and re.match(r"[)\]]*[.!] (?!It |This |That |Or )[A-Z][a-z]", rest):
        return {letter} | others  # "The answer is B. Point A is farther away."
    clause = _SENTENCE_END.split(_ASIDE.split(rest, maxsplit=1)[0], maxsplit=1)[0]
    others |= {"".join(found) for found in _ANOTHER.findall(_BECAUSE.split(clause, maxsplit=1)[0])}
    texts = _said_yes_no(normalised(clause.lstrip(" )]}.:")), options)
    texts |= set() if own or _NEGATION.search(clause.lower()) else _texts_in(clause, options)
    return {letter} | others | (set() if letter in texts else texts)  # "(A) It is to the right."


def _stated(statement: str, options: _Options, announced: bool = False) -> set[str]:
    """All options that a short statement names: none, one, or a contradiction."""
    # An option may itself begin like a letter: "A is closer".
    if len(statement) > 1 and normalised(statement) in options.letters:
        return options.letters[normalised(statement)]
    return _named_letters(statement, options, announced) or _named_texts(statement, options)


def _hedged(text: str, at: int) -> bool:
    """Whether what stands before `at`, in its sentence, takes back what follows."""
    return bool(_HEDGED.search(re.split(r"[.!?;\n]", text[max(0, at - 80) : at])[-1]))


def _announcements(text: str) -> list[str]:
    """The lines behind the last final-answer phrases that nothing before or behind them puts in doubt."""
    # Only the last phrases: a long thought may announce hundreds, and each costs a look at its sentence.
    lines = []
    for phrase in list(_PHRASE.finditer(text))[-MAX_PHRASES:]:
        line = text[phrase.end() : phrase.end() + 2 * MAX_STATEMENT].lstrip(" :\n").partition("\n")[0]
        corrected = _CORRECTS.search(text, phrase.end())
        if not corrected and not _hedged(text, phrase.start()) and not re.match(r"[^.!]{0,60}\?", line):
            lines.append(line)
    return lines


def _announced(text: str, options: _Options) -> tuple[set[str], str]:
    """Options named in the last box or after final-answer phrases -> (letters, method)."""
    if (boxed := _last_box(text)) and (found := _stated(_plain(boxed), options, True)):
        return found, "boxed"
    found = set()
    for line in _announcements(_plain(text)):
        found |= _stated(_SENTENCE_END.split(line, maxsplit=1)[0], options, True)
        others = (m for m in _IS_LETTER.finditer(line) if "(" in m[0] or not _hedged(line, m.start()))
        found |= {m[1] for m in others} if found else set()
    return found, "phrase" if found else "none"


def _last_box(text: str) -> str:
    """What the last box holds; with the one before it, where that is another alternative."""
    boxes = list(_BOXED.finditer(text))[-2:]
    if not boxes or _SHOWN.search(text[: boxes[-1].start()][-80:]):
        return ""
    either = re.fullmatch(r"[$\s]*(?:[,/]|or|and)?[$\s]*", text[boxes[0].end() : boxes[-1].start()])
    return " or ".join(box[1] for box in (boxes if either else boxes[-1:]))


def _read(text: str, options: _Options, tail: str = "") -> tuple[set[str], str]:
    """Options named by a text outside its thinking, and by what takes that back -> (letters, method)."""
    # A first line that is an answer must agree, and what stands behind "however", or else below that line.
    found, method = _read_once(text, options)
    first, _, below = f"{text.strip()}\n{tail}".partition("\n")
    turns = list(_REVERSES.finditer(below))
    rest = re.sub(r"^\W*no\b\W+(?=\w)", "", below[turns[-1].end() :] if turns else below, flags=re.I)
    again = _read_once(rest, options)[0] or set(_IS_LETTER.findall(_plain(below)))
    again = again or _texts_in(_plain(rest if turns else ""), options)
    if not turns and re.search(r"\b(?:wrong|incorrect|not)\b", rest):  # "B\n\nA and C are wrong."
        again = set()
    if found and (turns or not found <= again):
        found = found | again | (_read_once(first, options)[0] if len(first) <= 30 else set())
    if found and (turn := _REVERSES.search(first)) and found == _read_once(first[: turn.start()], options)[0]:
        found = found | set(re.findall(r"\b[B-J]\b", first[turn.end() :]))  # "B. However, it could be D."
    return found, method


def _read_once(text: str, options: _Options) -> tuple[set[str], str]:
    # From the most to the least deliberate: an announcement; a letter that heads the first or last line; the
    # text of an option in a short reply, since a long one mentions options while it thinks; a yes or no.
    found, method = _announced(text, options)
    if found:
        return found, method
    text, method = _plain(text), "text"
    lines = [line.strip() for line in text.split("\n") if line.strip()]
    heads = [_named_letters(line[:MAX_STATEMENT], options) for line in lines[:32]]
    listing = len(set().union(*heads)) > 1  # the options repeated, or judged one by one
    for line in {line[: 2 * MAX_STATEMENT] for line in lines[:1] + lines[-1:]}:
        if listing and len(lines) > 1 and not _ONLY_LETTER.fullmatch(line):
            continue
        if letters := _named_letters(line, options):
            found, method = found | letters, "letter"
        else:
            found = found | options.letters.get(normalised(line), set())
    if not found and len(text) <= MAX_STATEMENT:
        found = _named_texts(text, options)
    if not found:
        found = set().union(*(_said_yes_no(normalised(line), options) for line in lines[:1] + lines[-1:]))
    return found, method


def _answer_block(reply: str) -> tuple[str, str, str]:
    """(the last answer block or "", what follows it, all that lies outside the thinking), cut by `_ends`."""
    reply = re.sub(r"(?:<|◁)(/?)think(?:ing)?(?:>|▷)", r"<\1think>", reply[-MAX_CHARS:])
    reply = re.sub(r"<\s{0,9}(/?)\s{0,9}answer\b[^<>]{0,40}>", lambda m: f"<{m[1]}answer>", reply, flags=re.I)
    reply = re.sub(r"<answer>([^<>]{1,200})<answer>", r"<answer>\1</answer>", reply)  # not closed properly
    _, closed, visible = reply.rpartition("</think>")
    # Thoughts hold drafts ("Format: <answer>A</answer>. Hm, no."): what stands in them is no answer. A
    # thought that never closes was cut off, unless an answer ends it.
    if not closed and "<think>" in reply:
        ended = re.search(r"<answer>([^<]*)</answer>\s*$", reply[-4 * MAX_STATEMENT :])
        return (ended[1].strip() if ended else ""), "", ""
    if (turn := _NEXT.search(visible)) and visible[: turn.start()].strip():  # a question that it asks itself
        visible = visible[: turn.start()]
    visible = re.sub(r"<answer>\s{0,99}</answer>\s{0,99}$", "", visible)
    before, opened, last = visible.rpartition("<answer>")
    block, _, tail = last.partition("</answer>")
    two = r"<answer>([^<]*)</answer>[^\w.!?]*(?:or|and)?[^\w.!?]*$"  # or more, as alternatives
    if either := re.search(two, before[-4 * MAX_STATEMENT :]):
        block = f"{either[1]} or {block}"
    if opened and not _SHOWN.search(before[-80:]):
        return _ends(block.strip()), _ends(tail), _ends(visible)
    return "", "", _ends(f"{before}\n{tail}" if opened else visible)


def read_choice(reply: str, choices: Sequence[str], lettered: bool = True) -> tuple[str | None, str]:
    """The option a reply settles on, and how that was found: (letter, method) or (None, why not).

    Methods: answer_tag, boxed, phrase, letter, text. Reasons: none (names no option), conflict (several, or a
    letter and the text of another option), outside (a letter beyond the options), empty. Text never raises.
    Not `lettered`: the options were shown without letters, so that only their texts count.
    """
    options = _options(tuple(choices), lettered)
    if not isinstance(reply, str) or not reply.strip():
        return None, "empty"
    block, tail, visible = _answer_block(reply)
    if block:  # and what is announced behind it: "<answer>(B)</answer> Final Answer: (C)" is a contradiction
        found, method = _read(block, options, tail)[0], "answer_tag"
    else:
        found, method = _read(visible, options)
    if len(found) != 1:
        return None, "conflict" if found else "none"
    letter = next(iter(found))
    return (letter, method) if letter in LETTERS[: len(choices)] else (None, "outside")


def parse_choice(reply: str, choices: Sequence[str]) -> str | None:
    r"""The letter of the option a reply settles on, or None: never a default, never a guess.

    Args: the model's whole reply; the option texts in order, without letters.
    The first of these that names an option decides: the last <answer> block; the last \boxed{}; final-answer
    phrases; a reply (or its first or last line) that is a letter in any usual dress; a short reply with the
    text of one option, on word and number boundaries, the longest option winning. Two candidates: None.

    >>> parse_choice("<think>A cup? No.</think><answer>(B) arm chair</answer>", ["chair", "arm chair"])
    'B'
    """
    return read_choice(reply, choices)[0]


# ---- reading other answers ----
# `_statements` lists the places that may hold the answer, the most deliberate first, and a reader says of
# each what it holds. The first that holds anything decides; two values are a conflict.
_DECIMAL = r"-?(?:\d{1,9}(?:\.\d{0,20})?|\.\d{1,20})(?:e[-+]?\d{1,3})?"
_NUMBER = re.compile(  # with a unit or none; not COVID-19, 3rd, 3/4, 10:30, 3-4, two and a half
    rf"(?<![\w.,])(?<!\w-)-?\d{{1,15}}(?:,\d{{3}}){{0,4}}(?:\.\d{{1,20}})?"
    rf"(?=(?:c?m|mm|km|ft|kg)?(?![\w]|[.,]\d|-\d| ?{_SCALE})|[^\x00-\u2fff])")  # fmt: skip
_POINT = re.compile(
    rf"[(\[{{<>]\s*({_DECIMAL})\s*,\s*({_DECIMAL})\s*[)\]}}<>]"
    rf"|\bx1?\W{{1,4}}({_DECIMAL})\W{{1,6}}y1?\W{{1,4}}({_DECIMAL})")  # fmt: skip
_BARE_POINT = re.compile(rf"[^\d(\[]*({_DECIMAL}) ?, ?({_DECIMAL})[^\d(\[]*")
_BOX = re.compile(  # [x1, y1, x2, y2] or two corners (x1, y1), (x2, y2), and no number beside them
    rf"(?:^|[^\d\s,.()-])\s*\(?\s*({_DECIMAL})\s*,\s*({_DECIMAL})\s*(?:,|\)\s*,?\s*\()\s*"
    rf"({_DECIMAL})\s*,\s*({_DECIMAL})(?!\d|\s*\)?\s*,\s*\(?\s*[-\d.])")  # fmt: skip
_LISTED = re.compile(  # what stands between two points of a list
    r"[^{}]{0,80}\}\s*,?\s*\{\s*\w+|[^<>]{0,80}>[^<>]{0,80}</point>\W*<point|</?\w[^<>]*>|\band\b|\bpoint\b",
    re.I)  # fmt: skip
_ORDER = re.compile(r"(?:.*(?:[:=]|\bis) )?(\W{0,9}(?:[A-H]\W{0,9}){2,8})", re.S)  # letters, what links them
_BOUND = re.compile(  # a limit, a time of day or what is below nothing is no number of things
    r"\b(?:than|least|most|over|under|above|below|beyond|up to|exceed\w*|maximum|minimum|minus|negative"
    r"|or (?:maybe|perhaps|possibly|even))(?: of)? -?\d|\d:\d"
    r"|(?:[<>≤≥]|&[lg]t;)=? ?-?\d|\d ?(?:\+|plus)(?! ?\d)|\d(?: \w+)? \(?(?:(?:or|and) (?:counting|more|less"
    r"|fewer|above|below|over|under|so|up|higher|greater)|at (?:least|most)|m(?:in|ax)imum)\b")  # fmt: skip
_NOT_COUNTED = re.compile(  # numbers of lists, steps and figures
    r"(?m:^[^\S\n]*\d+[.)] (?=.*\n))|\b(?:step|image|picture|figure|option) \d+:?|\bthe one\b"
)
_NOTHING = re.compile(
    r"^(?:none|nothing|zero|nobody|nobody at all)$|^none of\b|^no \w+(?: \w+)? (?:is|are)\b|\b(?:no one|not a"
    r" single)\b|\b(?:there (?:are|is)|i (?:can )?(?:see|count|find)) (?:no|not any|none)\b(?! (?:way|doubt))"
)
POINT_RANGE = {"unit": (1, 1), "per_mille": (1000, 1000)}  # what x and y are divided by; "pixel": the image's


def _statements(block: str, visible: str, longest: int) -> list[tuple[str, str]]:
    """Texts that may hold the answer, the most decisive first: (plain text, method)."""
    if block:
        return [(_plain(_last_box(block) or block), "answer_tag")]
    found = [(_plain(boxed), "boxed")] if (boxed := _last_box(visible)) else []
    text = _plain(visible)
    found += [(line, "phrase") for line in reversed(_announcements(text))]
    if len(text) <= longest:  # a longer one that announces nothing thinks aloud
        return [*found, (text, "text")]
    lines = (text.rpartition("\n")[2], text.partition("\n")[0])  # behind or before the explanation
    answers = (line for line in lines if not re.match(r"(?:\d+[.)]|step \d) ", line, re.I))
    return found + [(line, "text") for line in answers if len(line) <= MAX_STATEMENT]


def _first(reply: str, find: Callable, longest=MAX_STATEMENT, agree=True) -> tuple[object, str]:
    """What the first statement that holds anything holds, if that is one thing."""
    if not isinstance(reply, str) or not reply.strip():
        return None, "empty"
    block, tail, visible = _answer_block(reply)
    first, _, below = f"{block or visible.strip()}\n{tail}".partition("\n")
    others = [below[turn.end() :] for turn in list(_REVERSES.finditer(below))[-1:]]  # "However, there are 4."
    others += [first] if below.strip() and re.match(r"(?!\d+[.)] ).{,30}$", first) else []
    for statement, method in _statements(block, visible, longest):
        if found := find(statement):
            found = found.union(*(find(_plain(text)) for text in others if agree))
            return (next(iter(found)), method) if len(found) == 1 else (None, "conflict")
    return None, "none"


def _numbers(statement: str) -> set[float]:
    """The numbers a statement gives as its answer: those before an explanation, if there are any."""
    statement = re.sub(r"\b(?:minus|negative) (?=\d)", "-", statement.lower()).replace("–", "-")
    in_digits = _WORDED.sub(_number_of, statement)
    if _REFUSAL.search(statement) or _CORRECTS.search(statement) or _BOUND.search(in_digits):
        return set()
    # Numbers that are not the answer go first: of lists and figures, the terms of a sum ("2 + 1 = 3", "2 on
    # the left and 3 on the right, for a total of 5"), what a share is of ("3 of the 5 chairs").
    statement = _NOT_COUNTED.sub("", statement)
    if re.search(r"= ?-?[\d.,]{1,20}[\s.!]{0,9}$", statement):
        statement = statement.rpartition("=")[2]
    if total := re.search(r"\b(?:total(?: of| is)?|altogether|in all):? ", statement):
        statement = statement[total.end() :]
    statement = re.sub(r"(?<=\d) of (?:the |these |those )?\w+", "", statement)
    for part in (re.split(r"[.!] (?=\w)|[:(;]| because | since ", statement, maxsplit=1)[0], statement):
        if _NOTHING.search(part.strip(" .!")):
            return {0.0}
        if _NEGATION.search(part) or re.search(_SCALE, part):
            return set()
        found = {float(n.replace(",", "")) for n in _NUMBER.findall(part)}
        if found := found | {float(_number_of(m)) for m in _WORDED.finditer(part)}:
            return found
    return set()


def read_number(reply: str) -> tuple[float | None, str]:
    """The one number a reply settles on: (number, method) or (None, why not).

    >>> read_number("<answer>three cups</answer>"), read_number("3 or 4")
    ((3.0, 'answer_tag'), (None, 'conflict'))
    """
    return _first(reply, _numbers)


def read_yes_no(reply: str) -> tuple[str | None, str]:
    """("yes" or "no", method) or (None, why not).

    >>> read_yes_no("No, no cup is there."), read_yes_no("No, but yes from the car.")
    (('no', 'text'), (None, 'conflict'))
    """
    letter, method = read_choice(reply, ("yes", "no"), lettered=False)
    return {"A": "yes", "B": "no", None: None}[letter], method


def read_word(reply: str) -> tuple[str | None, str]:
    """The normalised statement that answers an open question: (text, method) or (None, why not)."""

    def find(statement):
        return set() if _REFUSAL.search(normalised(statement)) else {normalised(statement)} - {""}

    return _first(reply, find, agree=False)


def word_matches(said: str, gold: str) -> bool:
    """Whether a statement is the gold word, or names it on word boundaries without an alternative or a not.

    >>> word_matches("it is on the left", "Left"), word_matches("left or right", "left")
    (True, False)
    """
    # What is left of the statement without the gold word must offer nothing else: "left or right" names both.
    gold = normalised(_plain(gold))
    said = re.sub(r"^(?:yes|no), |[,(]? ?\bnot .*$", "", said)  # left, not right
    rest, n = re.subn(rf"(?<!\w){re.escape(gold)}(?!\w)", " ", said)
    alternatives = re.search(r"\b(?:or|either|and|but|thought)\b|[/,]", rest)
    return said == gold or (n > 0 and not alternatives and not _NEGATION.search(rest))


def read_point(reply: str, frame: str, size: tuple[int, int]) -> tuple[tuple[float, float] | None, str]:
    """The point of a reply, the first of a list, as shares of the image: ((x, y), method) or (None, why not).

    Args: frame: unit (0 to 1), per_mille (0 to 1000) or pixel; size (W, H) of the image. The frame is what
        the question asked for; it is never guessed from the values, and a point beyond it is outside.
    """

    def find(statement):
        lone = re.split(r"\n(?=\d)", statement[:200])[0]
        found = list(_POINT.finditer(statement)) or [*filter(None, [_BARE_POINT.fullmatch(lone)])]
        # A list of points is answered by its first, as the benchmark has it; points apart are a way of
        # thinking: "From (0.1, 0.2) to (0.9, 0.4), so the centre is (0.5, 0.3)".
        between = (statement[a.end() : b.start()] for a, b in itertools.pairwise(found))
        listed = all(not re.search(r"[^\W\d_]|[-=]>|→", _LISTED.sub("", text)) for text in between)
        points = [tuple(float(x) for x in m.groups() if x is not None) for m in found]
        return set(points[:1] if listed else points)

    point, method = _first(reply, find, longest=MAX_CHARS)
    if point is None:
        return None, method
    x, y = (c / full for c, full in zip(point, POINT_RANGE.get(frame, size), strict=True))
    return ((x, y), method) if 0 <= x <= 1 and 0 <= y <= 1 else (None, "outside")


def read_box(reply: str, frame: str, size: tuple[int, int]) -> tuple[tuple[float, ...] | None, str]:
    """The one box of a reply, as shares of the image: ((x1, y1, x2, y2), method) or (None, why not).

    Args: as for `read_point`.

    >>> read_box("<answer>[10, 20, 30, 40]</answer>", "pixel", (100, 50))
    ((0.1, 0.4, 0.3, 0.8), 'answer_tag')
    """
    box, method = _first(
        reply, lambda s: {tuple(map(float, m.groups())) for m in _BOX.finditer(s)}, longest=MAX_CHARS
    )
    if box is None:
        return None, method
    box = tuple(c / full for c, full in zip(box, 2 * POINT_RANGE.get(frame, size), strict=True))
    whole = 0 <= box[0] < box[2] <= 1 and 0 <= box[1] < box[3] <= 1
    return (box, method) if whole else (None, "outside")


def iou(a: Sequence[float], b: Sequence[float]) -> float:
    """Intersection over union of two boxes with area.

    >>> iou((0, 0, 2, 2), (1, 0, 3, 2))
    0.3333333333333333
    """
    across, down = (max(0.0, min(a[i + 2], b[i + 2]) - max(a[i], b[i])) for i in (0, 1))
    areas = ((x2 - x1) * (y2 - y1) for x1, y1, x2, y2 in (a, b))
    return across * down / (sum(areas) - across * down)


def in_polygon(point: Sequence[float], polygon: Sequence[Sequence[float]]) -> bool:
    """Whether a point lies inside a polygon (even-odd rule).

    >>> in_polygon((0.8, 0.5), [(0, 0), (1, 0), (1, 1)]), in_polygon((0.2, 0.5), [(0, 0), (1, 0), (1, 1)])
    (True, False)
    """
    (x, y), inside = point, False  # crossings of the ray to the right
    for (x1, y1), (x2, y2) in zip(polygon, [*polygon[1:], polygon[0]], strict=True):
        if (y1 > y) != (y2 > y) and x < x1 + (x2 - x1) * (y - y1) / (y2 - y1):
            inside = not inside
    return inside


def parse_polygon(text: str) -> list[tuple[float, float]]:
    """The corners of a gold "[(x, y), ...]". Raises ValueError."""
    try:
        corners = [(float(x), float(y)) for x, y in ast.literal_eval(text)]
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
        corners = []
    if len(corners) < 3 or not all(map(math.isfinite, sum(corners, ()))):
        raise ValueError(f"expected at least three points [(x, y), ...], got {text[:80]!r}")
    return corners


def read_sequence(reply: str) -> tuple[str | None, str]:
    """Letters in the order that a reply gives them: ("BDAC", method) or (None, why not).

    >>> read_sequence("The answer is B -> D -> A -> C."), read_sequence("(B)(A)"), read_sequence("A cup")
    (('BDAC', 'phrase'), ('BA', 'text'), (None, 'none'))
    """

    def find(statement):
        if re.search(r"\.\.\.|…", statement) or _NEGATION.search(statement):
            return set()
        words = r"\b(?:\d+[.):] |(?:image|picture|option|step|first|next|finally|and|then)s?\b)|\\rightarrow"
        statement = re.sub(words, " ", statement, flags=re.I).strip()
        letters = statement.upper() if re.fullmatch("[a-h]{2,8}", statement) else statement
        order = re.sub("[^A-H]", "", found[1]) if (found := _ORDER.fullmatch(letters)) else ""
        return {order} if len(set(order)) == len(order) > 1 else set()

    return _first(reply, find)


def released_letter(reply: str, choices: Sequence[str]) -> str:
    """The letter that the paper's published evaluator reads on most multiple-choice sets: that of the option
    whose text is the whole answer, with or without an "(X)" before it, else A.

    The answer is what stands behind the last "Answer:", else in the answer block, else all of the reply.

    >>> [released_letter(r, ["cup", "plate"]) for r in ("(B) plate", "plate", "B", "I cannot tell.")]
    ['B', 'B', 'A', 'A']
    """
    text = reply[-MAX_CHARS:] if isinstance(reply, str) else ""
    text = text.rpartition("Answer:")[2] if "Answer:" in text else (extract_answer(text) or text)
    text = re.sub(r"^\s*\([A-Z]\)\s*", "", text).strip().lower()
    return next(
        (x for x, choice in zip(LETTERS, choices, strict=False) if text == choice.strip().lower()), "A"
    )


# ---- every kind of answer ----
def read(
    kind: str, reply: str, options: Sequence[str] = (), frame: str = "unit", size: tuple[int, int] = (1, 1),
    finish_reason: str = "stop",
) -> tuple[object, str]:  # fmt: skip
    """(what a reply answers to a question of this kind, method) or (None, why not).

    Args: kind: choice (of `options`), yes_no, number, word, sequence, point or box (in `frame`, of an image
        of `size`); finish_reason: of a reply cut off ("length") only a closed answer block or box counts that
        nothing takes back, or a letter that is its first line: anything else may be a thought on its way.
    """
    readers = {"yes_no": read_yes_no, "number": read_number, "word": read_word, "sequence": read_sequence,
               "choice": lambda reply: read_choice(reply, options),
               "point": lambda reply: read_point(reply, frame, size),
               "box": lambda reply: read_box(reply, frame, size)}  # fmt: skip
    said, method = readers[kind](reply)
    if said is None or finish_reason != "length":
        return said, method
    if method == "letter":
        first, whole, _ = reply.strip().partition("\n")
        whole = whole and read_choice(first, options)[0] == said
    else:
        end = {"answer_tag": "</answer>", "boxed": "}"}.get(method, "\0")
        _, whole, after = reply.lower().rpartition(end)
        whole = whole and not _CORRECTS.search(after)
    return (said, method) if whole else (None, "unfinished")


def is_right(kind: str, parsed, gold: str) -> bool:
    """Whether what `read` found is the gold answer, which for a choice is written "(B) text".

    A point has to lie in the gold polygon, a box to overlap the gold one with IoU 0.5; both golds are in
    shares of the image.
    """
    gold = gold.strip()
    if parsed is None:
        return False
    if kind == "choice":
        return parsed == gold[1].upper()
    if kind == "number":
        return math.isclose(parsed, float(gold), rel_tol=1e-6, abs_tol=1e-9)
    if kind == "point":
        return in_polygon(parsed, parse_polygon(gold))
    if kind == "box":
        return iou(parsed, ast.literal_eval(gold)) >= 0.5 - 1e-9  # of shares, which are rounded
    if kind == "word":
        return word_matches(parsed, gold)
    return parsed == (gold.lower() if kind == "yes_no" else gold.upper())
