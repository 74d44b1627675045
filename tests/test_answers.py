"""answers.py: what a reply says, over the replies that models give and some that they should not."""

import json
import math
import re
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import answers
from answers import (
    MAX_PHRASES,
    MAX_STATEMENT,
    in_polygon,
    is_right,
    parse_choice,
    parse_polygon,
    read,
    read_choice,
    read_number,
    read_point,
    read_sequence,
    read_word,
    read_yes_no,
    released_letter,
    word_matches,
)
from results import judge
from rewards import MAX_CHARS

HERE = Path(__file__).parent

SIDES = ("left of", "right of", "above", "below")
CHAIRS = ("chair", "arm chair", "table", "bed")
NUMBERS = ("3", "13", "4", "1")
YES_NO = ("yes", "no")
CLOSER = ("B is closer", "A is closer")

REPLIES = [
    # letters in every dress
    ("B", SIDES, "B"),
    ("b", SIDES, "B"),
    ("a", SIDES, "A"),
    (" B\n", SIDES, "B"),
    ("B.", SIDES, "B"),
    ("B)", SIDES, "B"),
    ("B:", SIDES, "B"),
    ("(B)", SIDES, "B"),
    ("(b)", SIDES, "B"),
    ("( B )", SIDES, "B"),
    ("[B]", SIDES, "B"),
    ("{B}", SIDES, "B"),
    ("（B）", SIDES, "B"),
    ("**B**", SIDES, "B"),
    ("`B`", SIDES, "B"),
    ('"B"', SIDES, "B"),
    ("$B$", SIDES, "B"),
    ("Option B", SIDES, "B"),
    ("option (b)", SIDES, "B"),
    ("It's (B).", SIDES, "B"),
    # letter and text
    ("(B) right of", SIDES, "B"),
    ("B. right of", SIDES, "B"),
    ("B: right of", SIDES, "B"),
    ("B) right of.", SIDES, "B"),
    ("B right of", SIDES, "B"),
    ("B - right of", SIDES, "B"),
    ("(B) RIGHT OF", SIDES, "B"),
    ("B because it is on the right", SIDES, "B"),
    ("(B) right of, not left of", SIDES, "B"),
    ("B. right of\n\nThe cup is on the far side, well to the right of the plate that we are asked about. "
     "It cannot be anything else in this picture.", SIDES, "B"),
    ("Let me look at it. The cup stands on the far side of the plate. The plate is round and lies in the "
     "middle of a big table.\n\n**(B) right of**", SIDES, "B"),
    # text alone
    ("right of", SIDES, "B"),
    ("Right of.", SIDES, "B"),
    ("It is right of the cup.", SIDES, "B"),
    ("arm chair", CHAIRS, "B"),
    ("The arm chair.", CHAIRS, "B"),
    ("the chair", CHAIRS, "A"),
    ("It is at the top left.", ("top", "top left"), "B"),
    ("armchair", CHAIRS, None),
    ("chairs", CHAIRS, None),
    ("13", NUMBERS, "B"),
    ("There are 13 cups", NUMBERS, "B"),
    ("three", NUMBERS, "A"),
    ("There are three cups.", NUMBERS, "A"),
    ("3.5", NUMBERS, None),
    ("-3", NUMBERS, None),
    ("103", NUMBERS, None),
    ("yes", YES_NO, "A"),
    ("No.", YES_NO, "B"),
    ("No, there is no cup.", YES_NO, "B"),
    ("Yes, there is no doubt.", YES_NO, "A"),
    ("No cup is there.", YES_NO, None),  # a "no" before a noun answers nothing
    ("yes or no", YES_NO, None),
    ("No idea.", YES_NO, None),
    ("I have no idea.", YES_NO, None),
    ("There is no cup.", YES_NO, None),  # the leading word counts
    ("A is closer", CLOSER, "B"),
    ("B is closer.", CLOSER, "A"),
    ("(B) A is closer", CLOSER, "B"),
    # answer blocks
    ("<answer>B</answer>", SIDES, "B"),
    ("<answer> (B) right of </answer>", SIDES, "B"),
    ("<think>left of?</think> <answer>\n(B) right of\n</answer>", SIDES, "B"),
    ("<answer>(A) left of</answer> No: <answer>(B) right of</answer>", SIDES, "B"),
    ("<think>maybe <answer>A</answer></think><answer>B</answer>", SIDES, "B"),
    ("<think>never closed <answer>(B)</answer>", SIDES, "B"),
    ("<answer>(B) right of", SIDES, "B"),
    ("<answer>right of</answer>", SIDES, "B"),
    ("<answer>The answer is B.</answer>", SIDES, "B"),
    ("<answer>\\boxed{B}</answer>", SIDES, "B"),
    ("<answer>(B) right of</answer>\nFinal Answer: (B)", SIDES, "B"),
    ("<answer>(B) right of</answer>\nFinal Answer: (C)", SIDES, None),
    ("<answer>(B) left of</answer>", SIDES, None),
    ("<answer>(A) or (B)</answer>", SIDES, None),
    ("<answer>(E) beside</answer>", SIDES, None),
    ("<answer>I do not know</answer> (B)", SIDES, None),
    # boxes and phrases
    ("\\boxed{B}", SIDES, "B"),
    ("So it is $\\boxed{\\text{B}}$.", SIDES, "B"),
    ("\\boxed{(B) right of}", SIDES, "B"),
    ("\\boxed{A}? No, \\boxed{B}", SIDES, "B"),
    ("The answer is B", SIDES, "B"),
    ("The answer is (B) right of.", SIDES, "B"),
    ("The answer is: B.", SIDES, "B"),
    ("the correct answer is option B", SIDES, "B"),
    ("Answer: b", SIDES, "B"),
    ("**Answer:** B", SIDES, "B"),
    ("### Answer\n(B)", SIDES, "B"),
    ("The answer is right of.", SIDES, "B"),
    ("The answer is arm chair", CHAIRS, "B"),
    ("The answer is a chair", CHAIRS, "A"),
    ("The correct option is B", SIDES, "B"),
    ("I would choose (C).", SIDES, "C"),
    ("I'd go with B", SIDES, "B"),
    ("Option B is correct.", SIDES, "B"),
    ("(B) is the right answer", SIDES, "B"),
    ("答案是B", SIDES, "B"),
    ("Final answer: B. At first I thought the answer is A.", SIDES, "B"),
    ("The answer is not B.", SIDES, None),
    ("The answer is either A or B.", SIDES, None),
    ("The answer is A. No, wait: the answer is B.", SIDES, None),
    ("I would say B. However, it could also be D.", SIDES, None),
    ("B, although D is possible.", SIDES, None),
    ("Most likely B; alternatively D.", SIDES, None),
    ("Although C looks right, the answer is B.", SIDES, "B"),
    ("B, but the lamp hides it.", SIDES, "B"),
    ("Option B is not correct.", SIDES, None),
    # nothing to read
    ("", SIDES, None),
    ("   ", SIDES, None),
    ("I cannot tell.", SIDES, None),
    ("A cup is on the table.", SIDES, None),
    ("A red cup", CHAIRS, None),
    ("It is not right of the cup.", SIDES, None),
    ("It is left of the cup and above the plate", SIDES, None),
    ("A and B", SIDES, None),
    ("A, B", SIDES, None),
    ("A/B", SIDES, None),
    ("(A) left of (B) right of", SIDES, None),
    ("A. left of\nB. right of\nC. above\nD. below", SIDES, None),
    ("E", SIDES, None),
    ("(A) right of", SIDES, None),
    ("B. above", SIDES, None),
    ("<think>The answer is B, since", SIDES, None),
    ("<observe>a cup</observe><scene>{}</scene><think>The cup is right of", SIDES, None),
    ("<think>The answer is B.</think>", SIDES, None),
    ("To see where the cup is we look at the plate first, which lies in the middle of the table. The cup "
     "stands on its far side, so that we may say that it is right of", SIDES, None),
    ("Error: rate limit", SIDES, None),
    # what evaluators of the field misread
    ("The answer is B", ("x", "y", "z"), "B"),  # not the T of The
    ("A", ("cup", "plate"), "A"),
    ("A cup", ("plate", "cup"), "B"),
    ("a cup", ("plate", "cup"), "B"),
    ("A plate", ("plate", "cup"), "A"),
    ("A white cup is on the table, so there is one.", SIDES, None),
    ("I think a chair is there", CHAIRS, "A"),
    ("It is an arm chair", CHAIRS, "B"),
    ("Both A and B", SIDES, None),
    ("None of the above", SIDES, None),
    ("Neither.", SIDES, None),
    ("(b) right of", SIDES, "B"),
    ("(C)", SIDES, "C"),
    ("D.", SIDES, "D"),
    ("\\boxed{b}", SIDES, "B"),
    ("\\boxed{right of}", SIDES, "B"),
    ("\\boxed{\\mathrm{B}}", SIDES, "B"),
    ("\\boxed{E}", SIDES, None),
    ("$\\boxed{B}$.", SIDES, "B"),
    ("**Final Answer: (B) right of**", SIDES, "B"),
    ("Final answer:\nB", SIDES, "B"),
    ("Therefore, the answer is **B**.", SIDES, "B"),
    ("So, (B).", SIDES, "B"),
    ("Answer - B", SIDES, None),
    ("answer=B", SIDES, "B"),
    ("Answer:B", SIDES, "B"),
    ("Answer: (B)", SIDES, "B"),
    ("answer is: right of", SIDES, "B"),
    ("My choice is B.", SIDES, "B"),
    ("I choose B", SIDES, "B"),
    ("I pick option (B)", SIDES, "B"),
    ("The best answer is (B): right of", SIDES, "B"),
    ("The answer is (B), not (A).", SIDES, "B"),
    ("The answer is A or B.", SIDES, None),
    ("<answer></answer>", SIDES, None),
    ("<answer>  </answer>B", SIDES, "B"),
    ("<answer>B</answer><answer></answer>", SIDES, "B"),
    ("<ANSWER>B</ANSWER>", SIDES, "B"),
    ("<answer>b) right of</answer>", SIDES, "B"),
    ("<answer>[B] right of</answer>", SIDES, "B"),
    ("<answer>Option B: right of</answer>", SIDES, "B"),
    ("<answer>A, B</answer>", SIDES, None),
    ("<answer>left of or right of</answer>", SIDES, None),
    ("<answer>not left of</answer>", SIDES, None),
    ("<answer>$B$</answer>", SIDES, "B"),
    ("<answer>**(B)** right of</answer>", SIDES, "B"),
    ("<answer>(B)right of</answer>", SIDES, "B"),
    ("<think>A</think>", SIDES, None),
    ("<think>A</think>B", SIDES, "B"),
    ("<think>A</think>\n\nThe answer is B.", SIDES, "B"),
    ("<think>\\boxed{A}</think>", SIDES, None),
    ("3", NUMBERS, "A"),
    ("(A) 3", NUMBERS, "A"),
    ("1", NUMBERS, "D"),
    ("13 or 3", NUMBERS, None),
    ("There is one.", NUMBERS, "D"),
    ("(B) 3", NUMBERS, None),
    ("Yes", YES_NO, "A"),
    ("Yes, no doubt", YES_NO, "A"),
    ("(A) yes", YES_NO, "A"),
    ("(B) yes", YES_NO, None),
    ("YES.", YES_NO, "A"),
    ("nope", YES_NO, None),
    ("the second image", ("the second image", "the third image"), "A"),
    ("It is the third image.", ("the second image", "the third image"), "B"),
    ("I'm sorry, but I cannot help with that.", SIDES, None),
    ("B" * 2, SIDES, None),
    ("ABCD", SIDES, None),
    ("F", SIDES, None),
    ("(Z)", SIDES, None),
]  # fmt: skip


# Replies that looked like an answer to an earlier version of the reader, and answers that it could not see.
HARD = [
    # lists and judgements of the options
    ("(A) left of\n(B) right of\n(C) above\n(D) below\n\nI'm sorry, I can't view the image.", SIDES, None),
    ("A. left of\nB. right of\nC. above\nD. below: This is not correct.", SIDES, None),
    ("B\n\nExplanation:\nA. left of: incorrect\nB. right of: correct\nD. below: incorrect", SIDES, "B"),
    ("B\n\nA, C and D are wrong.", SIDES, "B"),
    ("A. left of is wrong. B. right of is right.", SIDES, None),
    ("(A) is incorrect.", SIDES, None),
    ("Option (A) is incorrect.", SIDES, None),
    ("(A) is not correct, since the cup is farther away.", SIDES, None),
    ("(A) can be ruled out.", SIDES, None),
    ("(A) No.", SIDES, None),
    ("(D) below: This is incorrect because the cup is higher.", SIDES, None),
    ("A: No. B: Yes.", SIDES, None),
    ("A. left of B. right of C. above D. below", SIDES, None),
    ("A. left of; C. above", SIDES, None),
    ("C. D.", SIDES, None),
    ("Answer: B C", SIDES, None),
    # what stands before an announcement
    ("The wrong answer is A.", SIDES, None),
    ("I don't think the answer is A.", SIDES, None),
    ("I am not sure that the answer is A.", SIDES, None),
    ("I cannot confirm whether the answer is B.", SIDES, None),
    ("If the cup were closer, the answer would be A.", SIDES, None),
    ("If I had to choose, the answer would be B.", SIDES, "B"),
    ("One might think the answer is A.", SIDES, None),
    ("Neither A nor B is correct.", SIDES, None),
    ("None of A, B, C is right.", SIDES, None),
    ("I don't think (A) is correct.", SIDES, None),
    ("Point A is right of the tree.", ("A is closer", "B is closer"), None),
    ("B is right next to the wall.", ("A is closer", "B is closer"), None),
    ("The answer is below:\n\nB", SIDES, "B"),
    ("Based on the above, I see.", SIDES, None),
    ("All right, here we go.", ("left", "right"), None),
    # second thoughts
    ("B or maybe C", SIDES, None),
    ("The answer is B, possibly C.", SIDES, None),
    ("B. Wait, actually C.", SIDES, None),
    ("The answer is B. Hmm, no. It is C.", SIDES, None),
    ("Would I pick (A)? No.", SIDES, None),
    # explanations
    ("The answer is (B). Point (A) is farther away.", SIDES, "B"),
    ("The answer is B. The plate is left of the cup.", SIDES, "B"),
    ("The answer is (B) because (A) left of is wrong.", SIDES, "B"),
    ("The answer is B (it is on the far side).", SIDES, "B"),
    ("The answer is B based on the image.", SIDES, "B"),
    ("The answer is most likely B", SIDES, "B"),
    ("The answer to the question is B.", SIDES, "B"),
    ("I'm going with B.", SIDES, "B"),
    ("(D) Both A and B", ("left", "right", "up", "Both A and B"), "D"),
    # thoughts
    ("<think>Format: <answer>A</answer>. Hm, no.</think> The final answer is B.", SIDES, "B"),
    ("<thinking>Maybe the answer is A. No.</thinking>\nB", SIDES, "B"),
    ("<think>I must end with <answer>(A) left of</answer> or so; but the picture", SIDES, None),
    # dress
    ('{"answer": "B"}', SIDES, "B"),
    ("'B'", SIDES, "B"),
    ("_B_", SIDES, "B"),
    ("B!", SIDES, "B"),
    ("- B", SIDES, "B"),
    ("<b>B</b>", SIDES, "B"),
    ("<|begin_of_box|>B<|end_of_box|>", SIDES, "B"),
    ("\ufeffB", SIDES, "B"),
    ("\\boxed{\\textsf{B}}", SIDES, "B"),
    ("<answer>B<answer>", SIDES, "B"),
    ("<answer>B</Answer>", SIDES, "B"),
    ('<answer type="letter">B</answer>', SIDES, "B"),
    ("B</answer>", SIDES, "B"),
    ("正确答案是B。", SIDES, "B"),
    ("选B", SIDES, "B"),
    # compounds
    ("It is in the top-left corner.", ("top", "bottom", "top left", "top right"), "C"),
    ("front left", ("front", "back", "front-left"), "C"),
    ("non-metallic", ("metallic", "rubber"), None),
    ("off-white", ("white", "black"), None),
    ("twenty one", ("1", "21"), "B"),
    ("one hundred", ("1", "100"), None),
    ("fifteen", ("5", "15"), "B"),
    ("1,000", ("1000", "2000"), "A"),
    ("Option 2", ("2", "3"), None),
    ("It is a cup.", ("A", "B", "C", "D"), None),
    ("There are no cups.", ("0", "1", "2"), "A"),
    # refusals
    ("I am unable to see the lamp.", ("lamp", "desk"), None),
    ("Is it the lamp?", ("lamp", "desk"), None),
    ("I have no access to the image.", YES_NO, None),
    ("No, I can't see the image.", YES_NO, None),
    ("There is no way to know.", YES_NO, None),
    ("No doubt, it is on the left.", YES_NO, None),
    ("No obstacles are there, so yes.", YES_NO, "A"),
    ("Yes? No.", YES_NO, None),
    (
        "Yes, the chair is to the left of the table. From the camera's viewpoint, the chair stands nearer to "
        "the wall than the table does, which one can see from its shadow.",
        YES_NO,
        "A",
    ),
    ("No, it isn't.", ("Yes", "No", "Cannot tell"), "B"),
]
HARD_NUMBERS = [
    ("No one", 0), ("None of the 4 chairs is red.", 0), ("The answer is not 3.", None), ("It isn't 3.", None),
    ("As an AI from 2023 I cannot see images.", None), ("I'm sorry, I cannot count the 3 people.", None),
    ("one hundred", None), ("two dozen", None), ("two and a half meters", None), ("−3", -3),
    ("minus 3", -3),
    ("COVID-19", None), ("3 chairs (red = 2)", 3), ("The answer is 3. Two are on the left.", 3), ("3m", 3),
    ("three cups: one on the left and two on the right", 3), ("3 of the 5 chairs are red.", 3), ("3个", 3),
    ("2 on the left and 3 on the right, for a total of 5.", 5), ("I see no cups.", 0), ("10:30", None),
    ("1. cup\n2. plate\n3. fork\n\nThere are 3 objects.", 3), ("fewer than 5", None), ("Image 1", None),
]  # fmt: skip
HARD_SEQUENCES = [
    ("B, D, A, and C", "BDAC"), ("First B, then D, A, C", "BDAC"), ("B & D & A & C", "BDAC"),
    ("bdac", "BDAC"),
    ("As an AI, I cannot see the pictures.", None), ("The answer is not BDAC.", None), ("B\nD\nA\nC", "BDAC"),
    ("1. B\n2. D\n3. A\n4. C", "BDAC"), ("['B', 'D', 'A', 'C']", "BDAC"), ("Image B, Image D", "BD"),
    ("\\boxed{B \\rightarrow D \\rightarrow A}", "BDA"), ("B, D, A, ...", None),
    ("B, followed by D, A, C", None),
]  # fmt: skip
HARD_POINTS = [
    ("\\boxed{\\left(0.5, 0.3\\right)}", (0.5, 0.3)), ("x=0.5, y=0.3", (0.5, 0.3)), ("0.5, 0.3.", (0.5, 0.3)),
    ('{"x": 0.5, "y": 0.3}', (0.5, 0.3)), ("The point is 0.5, 0.3", (0.5, 0.3)), ("(0.5, 0.3, 0.9)", None),
    ("From (0.1, 0.2) to (0.9, 0.4), so the centre is (0.5, 0.3)", None),
]  # fmt: skip


# What a careful reader refuses, or reads all the same, by kind.
F, N, X = ("left", "right", "front", "behind"), ("3", "2", "1", "0"), None
LIST = [0.1, 0.2]  # the first point of all lists below
MENDED = [  # kind, reply, choices, right reading[, finish_reason]
    # two answers
    ("choice", "The answer is A. The lamp is B.", ("lamp", "chair"), X),
    ("choice", "Answer: A (left) or B (right) depending on the viewpoint.", F, X),
    ("choice", "The correct answer is A (left). Or B (right), if seen from the car.", F, X),
    ("choice", "The correct answer is (A). The cup would be (B) from behind.", F, X),
    ("choice", "The answer is left. Or right, from the car.", F, X),
    ("choice", "(A), (C)", F, X), ("choice", "(A) (C)", F, X), ("choice", "[A] and [B]", F, X),
    ("choice", "\\boxed{A} or \\boxed{B}", F, X), ("choice", "\\boxed{A, B}", F, X),
    ("choice", "<answer>A</answer> or <answer>B</answer>", F, X),
    ("choice", "<answer>A</answer><answer>B</answer>", F, X),
    # a letter beside another option's text
    ("choice", "(A) It is to the right.", F, X), ("choice", "A. The chair is on the right side", F, X),
    ("choice", "<answer>A - at the right</answer>", F, X),
    ("choice", "(B) on the left side of the man", F, X),
    ("choice", "<answer>(A) There are 2</answer>", N, X), ("choice", "A, i.e. behind", F, X),
    ("choice", "The answer is A, because the chair is on the right.", F, X),
    ("choice", "B. The chair is on the right, the lamp on the left", F, "B"),
    # nothing, and none of the options
    ("choice", "There are no people, but several chairs.", N, X), ("choice", "None of these.", N, X),
    ("choice", "There are no correct options.", N, X), ("choice", "None.", N, "D"),
    ("choice", "There are no chairs.", N, "D"),
    ("choice", "I think none of the above.", F[:3] + ("None of the above",), "D"),
    ("choice", "It is impossible to tell.", ("nan", "Two", "One", "Cannot be determined"), "D"),
    ("choice", "It cannot be determined from the image.", ("Yes", "No", "Cannot be determined"), "C"),
    ("choice", "I cannot tell which one.", ("left", "right", "None of the above"), X),
    # no before a noun, yes beside no
    ("yes_no", "No other object blocks the space, so yes, it can fit.", (), "yes"),
    ("yes_no", "No difference can be seen: the lines are equal.", (), X),
    ("yes_no", "No visible dog.", (), X),
    ("yes_no", "No, but yes in another frame.", (), X),
    ("yes_no", "Yes, but no if seen from the side.", (), X),
    ("yes_no", "Yes\n\nHowever, on a closer look the answer is no.", (), X),
    ("yes_no", "No, wait, yes.", (), X),
    ("yes_no", "<answer>yes</answer> Wait, no.", (), X), ("yes_no", "Answer with yes or no.", (), X),
    ("yes_no", "Now, the chair fits. Yes.", (), "yes"), ("yes_no", "no - the lamp is in front", (), "no"),
    # examples
    ("choice", "Your answer should look like <answer>(A) left</answer>.", F, X),
    ("choice", "Example: (A) left", F, X),
    ("choice", "within the answer tags, e.g., <answer> (A) cat </answer>.", F, X),
    ("choice", "Answer: (A) cat", F, X),
    ("choice", "Please answer like this: \\boxed{A}", F, X), ("choice", "(A) cat", ("cat", "dog"), "A"),
    ("choice", "In the requested format: <answer>A</answer>", F, "A"),
    # questions it asks itself
    ("choice", "B\n\nQuestion: Where is the lamp?\n(A) left\n(B) right\nAnswer: A", F, "B"),
    ("choice", "B\nUser: next question\nA", F, "B"), ("choice", "B\n### Question\nWhere?\nAnswer: A", F, "B"),
    ("choice", "B<|im_end|>\n<|im_start|>user\nfoo\n<|im_start|>assistant\nA", F, "B"),
    ("yes_no", "Yes\n\nQuestion: is it?\nAnswer: No", (), "yes"),
    ("number", "3\nQuestion: How many?\nAnswer: 5", (), 3),
    # limits
    *(("number", reply, (), X) for reply in (
        "10+", "<3", "3 or more", "at least three", ">= 5", "more than five", "up to ten",
        "3 at most", "> 3", "&lt;3", "minus two", "3 (or maybe 4)",
        "no fewer than 3", "a minimum of 3", "3 (or more)", "10 and counting", "\\boxed{10+}",
        "<answer>< 3</answer>")),
    ("choice", "3 or more", N, X), ("choice", "less than 2", ("less than 2", "2", "3"), "A"),
    # reversals
    ("choice", "A. left\n\nHowever, looking again, the object is on the right.", F, X),
    ("choice", "A. left\n\nNo, it is on the right.", F, X),
    ("choice", "A\n\nOn reflection I think it's B.", F, X),
    ("choice", "A. left\n\nSorry, I meant B.", F, X), ("choice", "Answer: A\n\nCorrection: B", F, X),
    ("choice", "<answer>A</answer>\nHowever, looking again it is on the right.", F, X),
    ("choice", "\\boxed{A}\n\nHowever, it is on the right, so B.", F, X),
    ("choice", "B. However, it is blurry.", F, "B"),
    ("number", "3\n\nHowever, looking again, there are 4 chairs.", (), X),
    ("number", "<answer>3</answer> Actually 4.", (), X),
    # lists of points
    *(("point", reply, (), LIST) for reply in (
        "[[0.1, 0.2], [0.3, 0.4]]", "1. (0.1, 0.2)\n2. (0.3, 0.4)", "- (0.1, 0.2)\n- (0.3, 0.4)",
        "(0.1, 0.2), (0.3, 0.4), and (0.5, 0.6)", "Point 1: (0.1, 0.2)\nPoint 2: (0.3, 0.4)",
        "(1e-1, 2.0e-1)",
        '{"point_2d": [0.1, 0.2]}\n{"point_2d": [0.5, 0.7]}',
        "<point>(0.1, 0.2)</point><point>(0.5, 0.7)</point>",
        '```json\n[\n {"point_2d": [0.1, 0.2], "l": "b"},\n {"point_2d": [0.3, 0.4], "l": "c"}\n]\n```',
        '<point x="0.1" y="0.2" alt="cup">cup</point> <point x="0.3" y="0.4" alt="cup">cup</point>',
        '<points x1="0.1" y1="0.2" x2="0.3" y2="0.4" alt="cup">cup</points>', "0.1, 0.2\n0.3, 0.4",
        "[(0.1, 0.2)" + ", (0.3, 0.4)" * 20 + "]", '[{"x": 0.1, "y": 0.2}, {"x": 0.3, "y": 0.4}]')),
    ("point", "From (0.1, 0.2) to (0.3, 0.4)", (), X), ("point", "(1e999, 0.2)", (), X),
    # no number is infinite
    ("number", "1e999", (), X), ("number", "9" * 400, (), X), ("number", "1" + ",000" * 200, (), X),
    # cut off
    ("choice", "Let me look.\n\nOption A: left. The object is", F, X, "length"),
    ("choice", "<answer>A or", F, X, "length"),
    ("choice", "A. left\nB. right\nC. fr", F, X, "length"),
    ("choice", "Option A: left. It is", F, X, "length"),
    ("choice", "maybe \\boxed{A}? wait, let me", F, X, "length"), ("yes_no", "Yes", (), X, "length"),
    ("choice", "B. right\n\nThe lamp is", F, "B", "length"),
    ("choice", "<answer>A</answer> and then", F, "A", "length"),
    ("number", "<answer>3</answer>\n", (), 3, "length"),
]  # fmt: skip


def reading(row: dict):
    """What the evaluation makes of a reply; of a word, the only one of `choices` that it matches."""
    sample = SimpleNamespace(
        kind=row["kind"], options=tuple(row["choices"]), size=(1, 1), meta={"frame": "unit"},
        answer={"choice": "(A) x", "number": "0", "point": "[(0, 0), (1, 0), (1, 1)]"}.get(row["kind"], "x"),
    )  # fmt: skip
    said = judge(sample, row["reply"], row.get("finish_reason", "stop"))["parsed"]
    if row["kind"] == "word":
        words = [word for word in row["choices"] if said is not None and word_matches(said, word)]
        return words[0] if len(words) == 1 else words or None
    return list(said) if isinstance(said, tuple) else said


# ---- reading ----
@pytest.mark.parametrize("row", MENDED, ids=[repr(row[1][:40]) for row in MENDED])
def test_nothing_wrong_is_read(row):
    kind, reply, choices, want, *reason = row
    row = {"kind": kind, "reply": reply, "choices": choices, "finish_reason": (reason or ["stop"])[0]}
    assert reading(row) == want


def test_the_blind_replies_read_as_the_readme_says():
    """150 replies that the rules were not written for; the README gives these figures as the reader's."""
    rows = [json.loads(line) for line in (HERE / "blind_replies.jsonl").read_text("utf-8").splitlines()]
    right = wrong = 0
    for row in rows:
        want = float(row["want"]) if row["kind"] == "number" and row["want"] else row["want"]
        right += reading(row) == want
        wrong += reading(row) not in (want, None)
    assert len(rows) == 150 and len({row["style"] for row in rows}) == 10
    figures = f"{right} right, {len(rows) - right - wrong} unread, {wrong} wrong"
    assert figures in (HERE.parent / "README.md").read_text("utf-8"), figures


@pytest.mark.parametrize("reply, choices, letter", HARD, ids=[repr(r[0][:40]) for r in HARD])
def test_hard_replies(reply, choices, letter):
    assert parse_choice(reply, choices) == letter


def test_hard_replies_of_other_kinds():
    assert [read_number(reply)[0] for reply, _ in HARD_NUMBERS] == [number for _, number in HARD_NUMBERS]
    assert [read_sequence(reply)[0] for reply, _ in HARD_SEQUENCES] == [order for _, order in HARD_SEQUENCES]
    assert [read_point(reply, "unit", (9, 9))[0] for reply, _ in HARD_POINTS] == [p for _, p in HARD_POINTS]


@pytest.mark.parametrize("reply, choices, letter", REPLIES, ids=[repr(r[0][:40]) for r in REPLIES])
def test_reply(reply, choices, letter):
    assert parse_choice(reply, choices) == letter


@pytest.mark.parametrize(
    "reply, how",
    [
        ("<answer>B</answer>", ("B", "answer_tag")),
        ("\\boxed{B}", ("B", "boxed")),
        ("answer: B", ("B", "phrase")),
        ("B", ("B", "letter")),
        ("right of", ("B", "text")),
        ("", (None, "empty")),
        ("hm", (None, "none")),
        ("A or B", (None, "conflict")),
        ("E", (None, "outside")),
    ],
)
def test_the_method_is_told(reply, how):
    assert read_choice(reply, SIDES) == how


STYLES = (
    "{x}", "({x})", "{x}.", "**{x}**", "({x}) {t}", "{x}. {t}", "{t}", "The answer is ({x}) {t}.",
    "Answer: {x}", "<think>so {w}</think><answer>({x}) {t}</answer>", "\\boxed{{{x}}}",
)  # fmt: skip


@settings(deadline=None)
@given(st.permutations(SIDES), st.integers(0, 3), st.integers(0, 3), st.sampled_from(STYLES))
def test_style_and_order_do_not_change_the_grade(choices, right, other, style):
    reply = style.format(x="ABCD"[right], t=choices[right], w=choices[other])
    assert parse_choice(reply, choices) == "ABCD"[right]


@settings(deadline=None)
@given(st.text(st.sampled_from("AB()[]{}<>/\\. \nanswerboxedthink是"), max_size=300))
def test_any_text_reads_as_a_letter_of_the_options_or_none(text):
    assert parse_choice(text, SIDES) in (None, "A", "B", "C", "D")


def worst_texts(pattern: re.Pattern) -> set[str]:
    """Texts that a pattern almost matches: each of its ways to begin, all of it, and all but its end."""
    texts = set()

    def text_of(items, before=""):
        said = ""
        for op, value in items:
            name = str(op)
            if name == "LITERAL":
                said += chr(value)
            elif name == "IN":
                first = next((str(v) if str(o) == "CATEGORY" else v for o, v in value if str(o) != "NEGATE"))
                plain = {"CATEGORY_DIGIT": "1", "CATEGORY_WORD": "w"}.get(first, " ")
                said += chr(first) if isinstance(first, int) else "A" if isinstance(first, tuple) else plain
            elif name in ("MAX_REPEAT", "MIN_REPEAT"):
                said += text_of(value[2], before + said) * max(1, min(value[0], 2))
            elif name == "SUBPATTERN":
                said += text_of(value[3], before + said)
            elif name == "BRANCH":
                ways = [text_of(way, before + said) for way in value[1]]
                texts.update(before + said + way for way in ways)
                said += ways[0]
            elif name in ("ANY", "NOT_LITERAL"):
                said += "x"
        return said

    texts.add(text_of(re._parser.parse(pattern.pattern, pattern.flags)))
    return {piece for text in texts for piece in (text, text[:-1]) if piece.strip()}


PATTERNS = {name: value for name, value in vars(answers).items() if isinstance(value, re.Pattern)}
READERS = {
    "choice": lambda reply: read("choice", reply, SIDES, finish_reason="length"),
    "released": lambda reply: released_letter(reply, SIDES),
    "word": lambda reply: word_matches(read_word(reply)[0] or "", "left of"),
    **{
        kind: lambda reply, kind=kind: read(kind, reply) for kind in ("yes_no", "number", "sequence", "point")
    },
}
SHORT = ["<", " ", "\n", "\n-", "(", "[", "{", "\\", "_", "'", "-", "1", "1,", "a", "a-", "B ",
"A->", "no ", "is ", "wait ",
         "answer", "<answer>", "<answer> ", "\\boxed{", "\\boxed{x ", "\\boxed{(A) no ", "(B) or ",
         "(0.1, ", "[x: ",
         "</point><point ", "answer: B\n", "Question"]  # fmt: skip


def cpu_s(reader, text: str) -> float:
    """Seconds of the quickest of up to three tries: a busy machine is not the reader's fault."""
    best = math.inf
    for _ in range(3):
        started = time.process_time()
        reader(text)
        best = min(best, time.process_time() - started)
        if best < 0.03:
            break
    return best


@pytest.mark.parametrize("name", PATTERNS)
def test_every_pattern_meets_its_own_worst_text(name):
    """As long a text as it may be given: what `_ends` leaves of 64 kB."""
    pattern, n, source = (
        PATTERNS[name],
        answers.MAX_HEAD + answers.MAX_TAIL,
        Path(answers.__file__).read_text(),
    )
    use = next((use for use in ("fullmatch", "match") if f"{name}.{use}(" in source), "split")
    for piece in worst_texts(pattern):
        for text in ((piece * n)[:n], piece + " " * n, piece + "1" * n, piece + "w" * n):
            assert cpu_s(getattr(pattern, use), text) < 0.05, (name, text[:60])


@pytest.mark.parametrize("reader", READERS)
def test_64_kb_of_anything_are_read_in_50_ms(reader):
    pieces = SHORT + [min(sorted(worst_texts(p)), key=len) for p in PATTERNS.values() if worst_texts(p)]
    for piece in pieces:
        long = (piece * 65_536)[:65_400]
        for text in (long, f"<answer>A {long}</answer>"):
            assert cpu_s(READERS[reader], text) < 0.05, (piece, text[:20])
    for text in (f"\\boxed{{(A) x {'no ' * 21_000}}}", "<" + " " * 65_000, f"\\boxed{{{'word ' * 13_000}}}"):
        assert cpu_s(READERS[reader], text) < 0.05, text[:20]


# ---- limits ----
def test_a_text_names_an_option_up_to_its_limit():
    """Of MAX_STATEMENT characters; what is longer and announces nothing is a thought."""
    said = "It is right of the cup" + " z" * 49
    assert (len(said), MAX_STATEMENT) == (120, 120)
    assert parse_choice(said, SIDES) == "B" and parse_choice(said + "z", SIDES) is None
    number = "There are 3 cups" + " z" * 52
    assert len(number) == 120
    assert read_number(number) == (3.0, "text") and read_number(number + "z") == (None, "none")
    lines = "z" * 200 + "\n" + number  # the last line of a long reply
    assert read_number(lines)[0] == 3.0 and read_number(lines + "z")[0] is None


def test_an_announced_text_is_read_up_to_its_limit():
    """Of twice as many characters behind the phrase."""
    for dashes, letter in ((231, "B"), (232, None)):  # and 9 characters
        assert parse_choice(f"The answer is:{'-' * dashes} right of", SIDES) == letter


def test_the_last_phrases_are_read():
    """MAX_PHRASES of them: an A before as many Bs is forgotten, with one B fewer it contradicts them."""
    assert MAX_PHRASES == 16
    for n, letter in ((16, "B"), (15, None)):
        assert parse_choice("Answer: A\n" + "Answer: B\n" * n + "z" * 120, SIDES) == letter


def test_the_end_of_a_very_long_reply_is_read():
    """MAX_CHARS of it, as the reward has it."""
    for n, letter in ((MAX_CHARS - 18, "B"), (MAX_CHARS - 17, None)):
        assert len("<answer>B</answer>") == 18
        assert parse_choice("<answer>B</answer>" + "." * n, SIDES) == letter
    for n, letter in ((MAX_CHARS - 8, "B"), (MAX_CHARS - 7, "A")):
        assert released_letter("Answer:B" + " " * n, ("A", "B")) == letter


def test_of_a_long_reply_its_two_ends_are_read():
    """MAX_HEAD characters of its beginning, MAX_TAIL of its end."""
    said = "\nThe answer is B.\n"  # 18 characters
    for before, after, letter in (
        (1006, 9000, "B"),
        (1010, 9000, None),
        (9000, 3054, "B"),
        (9000, 3061, None),
    ):
        assert parse_choice("z" * before + said + "z" * after, SIDES) == letter


def test_letters_go_as_far_as_the_options():
    ten = [f"no {i}" for i in range(10)]
    assert parse_choice("J", ten) == "J" and parse_choice("(J) no 9", ten) == "J"
    assert read_choice("J", ten[:9]) == (None, "outside") and read_choice("K", ten) == (None, "none")
    with pytest.raises(ValueError, match="expected 2 to 10 options, got 11"):
        parse_choice("A", [*ten, "no 10"])


# ---- right and wrong ----
def test_a_number_is_right_within_a_millionth():
    for said, right in (
        (3.0, True),
        (3.000002, True),
        (3.000004, False),
        (2.999998, True),
        (2.999996, False),
    ):
        assert is_right("number", said, "3.0") is right
    assert is_right("number", 1e-10, "0.0") and not is_right("number", 1e-8, "0.0")


def test_every_kind_is_right_in_its_own_way():
    square = "[(0, 0), (1, 0), (1, 1), (0, 1)]"
    for kind, parsed, gold, wrong in (
        ("choice", "B", " (b) right of", "A"),
        ("yes_no", "yes", "Yes", "no"),
        ("sequence", "BDAC", "bdac", "BDCA"),
        ("word", "it is red", "Red", "green"),
        ("point", (0.5, 0.5), square, (1.5, 0.5)),
        ("number", 2.0, "2", 3.0),
    ):
        assert is_right(kind, parsed, gold) and not is_right(kind, wrong, gold)
        assert not is_right(kind, None, gold)


def test_a_kind_chooses_its_reader():
    assert read("choice", "right of", SIDES) == ("B", "text")
    assert read("yes_no", "Yes.") == ("yes", "text")
    assert read("number", "three") == (3.0, "text")
    assert read("word", "Red.") == ("red", "text")
    assert read("sequence", "B->A") == ("BA", "text")
    assert read("point", "(25, 50)", frame="pixel", size=(100, 100)) == ((0.25, 0.5), "text")
    assert read("point", "(250, 1000)", frame="per_mille", size=(100, 100)) == ((0.25, 1.0), "text")
    assert read("point", "(0, 1)", frame="unit", size=(100, 100)) == (
        (0.0, 1.0),
        "text",
    )  # the edge is inside


def test_repeated_options_are_no_answer_by_text():
    assert parse_choice("cup", ["cup", "cup"]) is None
    assert parse_choice("B", ["cup", "cup"]) == "B"


def test_choices_are_checked():
    with pytest.raises(ValueError, match="expected 2 to 10 options, got 1"):
        parse_choice("A", ["cup"])


# ---- other answers ----
NUMBER_REPLIES = [
    ("3", 3), ("three", 3), ("Three.", 3), ("3 cups", 3), ("There are 3 cups.", 3), ("<answer>3</answer>", 3),
    ("<answer>three cups</answer>", 3), ("\\boxed{3}", 3), ("The answer is 3.", 3), ("3.0", 3), ("2.5", 2.5),
    ("1,200", 1200), ("-3", -3), ("twenty-one", 21), ("forty two", 42), ("seventeen", 17), ("2 + 1 = 3", 3),
    ("There are no cups.", 0), ("none", 0), ("zero", 0), ("**3**", 3), ("about 3", 3),
    ("<think>2? 4?</think><answer>3</answer>", 3), ("Final answer: 3", 3),
    ("3\n\nThere are two on the left and one on the right, which I counted one after the other, from the top "
     "of the picture to its bottom, carefully.", 3),
    ("3 or 4", None), ("3-4", None), ("between 3 and 4", None), ("", None), ("many", None), ("3rd", None),
    ("I have no idea", None), ("<think>3", None), ("3/4", None), ("a cup", None), ("nothing to see but 3", 3),
]  # fmt: skip
YES_NO_REPLIES = [
    ("yes", "yes"),
    ("Yes.", "yes"),
    ("NO", "no"),
    ("No, it is not.", "no"),
    ("<answer>yes</answer>", "yes"),
    ("<answer>(A) yes</answer>", "yes"),
    ("The answer is no.", "no"),
    ("\\boxed{Yes}", "yes"),
    ("Yes, the cup is there, no doubt.", "yes"),
    ("<think>no</think>yes", "yes"),
    ("Answer: No", "no"),
    ("A", None),
    ("(A)", None),
    ("maybe", None),
    ("", None),
    ("yes or no", None),
    ("yes/no", None),
    ("I cannot tell", None),
    ("No idea.", None),
    ("<think>yes", None),
    ("true", None),
]
WORD_REPLIES = [  # reply, gold, right
    ("left", "Left", True),
    ("<answer>left</answer>", "left", True),
    ("Left.", "left", True),
    ("It is on the left.", "left", True),
    ("The answer is left", "left", True),
    ("right", "left", False),
    ("left or right", "left", False),
    ("not left", "left", False),
    ("", "left", False),
    ("leftover", "left", False),
    ("stop sign", "Stop sign", True),
    ("<think>left", "left", False),
]
POINT_REPLIES = [  # reply, frame, size, point
    ("(0.25, 0.5)", "unit", (100, 100), (0.25, 0.5)),
    ("[(0.25, 0.5), (0.9, 0.9)]", "unit", (100, 100), (0.25, 0.5)),
    ("<answer>[0.25, 0.5]</answer>", "unit", (100, 100), (0.25, 0.5)),
    ("0.25, 0.5", "unit", (100, 100), (0.25, 0.5)),
    ("The point is at (.25, .5).", "unit", (100, 100), (0.25, 0.5)),
    ("(250, 500)", "per_mille", (64, 32), (0.25, 0.5)),
    ("(16, 16)", "pixel", (64, 32), (0.25, 0.5)),
    ("(250, 500)", "unit", (1000, 1000), None),  # the frame is declared, not guessed
    ("(65, 16)", "pixel", (64, 32), None),
    ("(-0.1, 0.5)", "unit", (100, 100), None),
    ("[0.1, 0.2, 0.3, 0.4]", "unit", (100, 100), None),  # a box is no point
    ("left of the cup", "unit", (100, 100), None),
    ("", "unit", (100, 100), None),
    ("<think>(0.1, 0.2)", "unit", (100, 100), None),
]  # fmt: skip
SEQUENCE_REPLIES = [
    ("BDAC", "BDAC"), ("B, D, A, C", "BDAC"), ("B D A C", "BDAC"), ("(B)(D)(A)(C)", "BDAC"),
    ("B->D->A->C", "BDAC"),
    ("The answer is BDAC.", "BDAC"), ("<answer>B-D-A-C</answer>", "BDAC"), ("\\boxed{BDAC}", "BDAC"),
    ("(B), (D), (A), (C)", "BDAC"), ("B > D > A > C", "BDAC"), ("BDAC or BDCA", None), ("A cup", None),
    ("BB", None), ("", None), ("B", None), ("<think>BDAC", None),
]  # fmt: skip


@pytest.mark.parametrize("reply, number", NUMBER_REPLIES, ids=[repr(r[0][:30]) for r in NUMBER_REPLIES])
def test_numbers(reply, number):
    assert read_number(reply)[0] == number


@pytest.mark.parametrize("reply, answer", YES_NO_REPLIES, ids=[repr(r[0][:30]) for r in YES_NO_REPLIES])
def test_yes_no(reply, answer):
    assert read_yes_no(reply)[0] == answer


@pytest.mark.parametrize("reply, gold, right", WORD_REPLIES, ids=[repr(r[0][:30]) for r in WORD_REPLIES])
def test_words(reply, gold, right):
    said, _ = read_word(reply)
    assert (said is not None and word_matches(said, gold)) == right


@pytest.mark.parametrize("reply, frame, size, point", POINT_REPLIES, ids=map(repr, POINT_REPLIES))
def test_points(reply, frame, size, point):
    assert read_point(reply, frame, size)[0] == point


@pytest.mark.parametrize("reply, order", SEQUENCE_REPLIES, ids=[repr(r[0][:30]) for r in SEQUENCE_REPLIES])
def test_sequences(reply, order):
    assert read_sequence(reply)[0] == order


@settings(deadline=None)
@given(st.text(st.sampled_from("AB0123456789.,-()[]{}<>/\\= \nanswerboxedthinkyesno"), max_size=300))
def test_no_reader_raises(text):
    for reader in (read_number, read_yes_no, read_word, read_sequence):
        reader(text)
    point, _ = read_point(text, "unit", (10, 10))
    assert point is None or all(0 <= c <= 1 for c in point)


@settings(deadline=None)
@given(
    st.integers(0, 10_000),
    st.sampled_from(
        (
            "{}",
            "**{}**",
            "<answer>{}</answer>",
            "The answer is {}.",
            "{} cups",
            "<think>7 and 8</think>{}",
            "\\boxed{{{}}}",
        )
    ),
)
def test_style_does_not_change_a_number(number, style):
    assert read_number(style.format(number))[0] == number


def test_a_polygon_is_compared_with_matplotlib():
    from matplotlib.path import Path

    polygon = [(0.1, 0.1), (0.9, 0.2), (0.5, 0.5), (0.8, 0.9), (0.2, 0.8)]  # not convex
    points = [(x / 20 + 0.013, y / 20 + 0.017) for x in range(20) for y in range(20)]
    inside = Path(polygon).contains_points(points)
    assert [in_polygon(p, polygon) for p in points] == list(inside) and 0 < sum(inside) < 400
    for bad in (
        "[(0.1, 0.2)]",
        "[(0, 0), (1, 1)]",
        "here",
        "[(0, 0), (1, 0), (1, float('inf'))]",
        "[[1, 2, 3]]",
        "(" * 5000,
    ):
        with pytest.raises(ValueError, match="expected at least three points"):
            parse_polygon(bad)


def test_what_style_costs_under_the_released_scoring():
    """400 balanced four-choice items and a model that is always right: theirs 0.25, ours 1.00."""
    items = [("ABCD"[i % 4], SIDES[i % 4]) for i in range(400)]
    for style, theirs in (
        ("({x}) {t}", 1.0),
        ("{t}", 1.0),
        ("<answer>({x}) {t}</answer>", 1.0),
        ("{x}", 0.25),
        ("({x})", 0.25),
        ("{x}. {t}", 0.25),
        ("\\boxed{{{x}}}", 0.25),
        ("The answer is ({x}) {t}.", 0.25),
        ("<answer>({x}) {t}</answer> Final Answer: {x}", 0.25),
    ):
        replies = [(style.format(x=x, t=t), x) for x, t in items]
        assert sum(released_letter(reply, SIDES) == x for reply, x in replies) == theirs * 400
        assert all(parse_choice(reply, SIDES) == x for reply, x in replies)
    assert sum(released_letter("I cannot tell.", SIDES) == x for x, _ in items) == 100
    assert parse_choice("I cannot tell.", SIDES) is None
