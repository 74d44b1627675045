"""Ask a model about one photo: its reply as it comes, the answer in it, and a picture of the scene it saw.

    python ask.py photo.jpg "Where is the cat relative to the couch? (A) on top of (B) in front of (C) behind"
    python ask.py photo.jpg "Where is the cat?" --options "on top of the couch" "behind it"
    python ask.py photo.jpg "How many cats are there?" --json --provider openai --base_url http://localhost:8000/v1

Asks OX-PIXL/SpatialThinker-7B through vLLM, else transformers, with the prompt, the pixel budget and the
reading of replies that training and evaluation have. Writes photo.scene.png beside the photo: boxes and names
in it, relations in a strip below. A scene that breaks the grammar of rewards.py, or was cut off, is drawn as
far as it can be read. Seconds on a GPU, once the model is loaded.
"""

import argparse
import contextlib
import json
import math
import os
import re
import sys
from pathlib import Path

from answers import LETTERS
from apis import Decoding, NoService, Reply
from backends import APIS, PROVIDERS, choose_provider, encoder_for
from config import path_argument, write_whole
from data import FIT, TEMPLATES, UNFIT, PromptEncoder, Sample
from drawing import draw_scene
from images import open_image, to_rgb
from results import read_reply
from rewards import MAX_CHARS, MAX_OBJECTS, MAX_RELATIONSHIPS, parse_scene, scene_or_fault
from stvqa import with_letters
from testsets import find_options

HOW = {  # a method of answers.py -> where the answer was found, the surest first
    "answer_tag": "in the answer block",
    "boxed": "in a box",
    "phrase": "behind words such as 'the answer is'",
    "letter": "by a letter at the head of a line",
    "text": "by what a short reply says, without a letter or a block",
    "conflict": "the reply names several answers",
    "outside": "the reply names a letter beyond the options",
    "unfinished": "the reply was cut off before it settled",
    "none": "the reply names no answer",
    "empty": "the reply is empty",
}


# ---- arguments ----
def parse_args(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("photo", type=path_argument, help="a picture's file")
    p.add_argument("question", help="with its options, as (A) left (B) right, or without: an open question")
    p.add_argument("--options", nargs="+", default=[], metavar="TEXT", help="options, 2 to 10, in order")
    p.add_argument(
        "--model_path",
        type=path_argument,
        default="OX-PIXL/SpatialThinker-7B",
        help="Hub id, folder, or API's name",
    )
    p.add_argument(
        "--processor_name",
        type=path_argument,
        help="Hub id or folder of the processor (default: the model's)",
    )
    p.add_argument("--template", default="spatial_thinker", choices=[*TEMPLATES], help="prompt")
    p.add_argument("--provider", default="auto", choices=["auto", *PROVIDERS], help="who generates")
    p.add_argument("--base_url", help="server of --provider openai or anthropic, as http://localhost:8000/v1")
    p.add_argument("--max_new_tokens", type=int, default=2048)
    p.add_argument("--min_pixels", type=int, default=512 * 512, help="the photo is scaled into this budget")
    p.add_argument("--max_pixels", type=int, default=2048 * 2048)
    p.add_argument("--out", type=path_argument, help="the picture to write (default: PHOTO.scene.png)")
    p.add_argument("--json", action="store_true", help="one JSON object on stdout, and nothing else")
    p.error = lambda message: sys.exit(f"error: {message} (python ask.py --help)")
    args = p.parse_args(argv)
    for name, least in (("max_new_tokens", 1), ("min_pixels", 1), ("max_pixels", args.min_pixels)):
        if getattr(args, name) < least:
            p.error(f"--{name}: expected at least {least}, got {getattr(args, name)}")
    return args


@contextlib.contextmanager
def one_line_errors():
    """End the program with one line where the photo, the question or the model cannot be used."""
    try:
        yield
    except KeyboardInterrupt:
        sys.exit("\nstopped")
    except (OSError, ValueError, ImportError, NoService) as error:
        sys.exit(f"error: {' '.join(str(error).split())[:500]}")


# ---- question ----
def read_question(text: str, options: list[str]) -> tuple[str, tuple[str, ...]]:
    """(question as the published models were trained on it, options); none for an open question.

    Raises: ValueError for an empty question, one with a control token, or options that are no options.

    >>> read_question("Where? A. left B. right", [])
    ('Where?\\nOptions:\\n(A) left\\n(B) right', ('left', 'right'))
    """
    if not text.strip():
        raise ValueError("question: expected a text, got nothing")
    if token := UNFIT.search(" ".join([text, *options])):
        raise ValueError(f"question: expected {FIT}, got {token[0]!r}")
    shown, lettered = find_options(text), "\n".join(options)
    if shown and options:
        raise ValueError("--options: expected options in the question or here, got both")
    if options:  # "(A) left" "(B) right", or all of them in one text
        spans = find_options(lettered)
        options = [lettered[start:end] for start, end in spans] if len(spans) >= len(options) else options
    elif shown:
        options = [text[start:end] for start, end in shown]
        head = re.sub(r"\(?[Aa][).:]?\s*$", "", text[: shown[0][0]])
        head = re.sub(r"\s*\b(?:options|choices):?\s*$", "", head, flags=re.I)
        text = " ".join(filter(None, (head.strip(), text[shown[-1][1] :].strip(" ,;\n"))))
    if not options:
        return text.strip(), ()
    options = [" ".join(o.split()) for o in options]
    if not 2 <= len(options) <= len(LETTERS) or not all(options):
        raise ValueError(f"options: expected 2 to {len(LETTERS)} texts, got {options}")
    return with_letters(text.strip(), options), tuple(options)


def read_photo(path: str):
    """The upright picture. Raises: OSError that names the file."""
    try:
        return to_rgb(open_image({"path": path}))
    except OSError as error:
        raise OSError(f"{path}: expected a picture, got {error}") from None


# ---- scene ----
def read_scene(reply: str, size: tuple[int, int]) -> tuple[dict | None, list[dict], list[dict]]:
    """(the scene as the reward reads it or None, objects that can be drawn, relationships).

    Boxes are cut to the image; those outside or without area are left out. Text never raises.
    """
    scene = parse_scene(reply)
    found = scene or loose_scene(reply)
    objects = {}
    for o in found["objects"]:
        x1, y1, x2, y2 = (min(max(c, 0), side) for c, side in zip(o["bbox"], size * 2, strict=True))
        if x1 < x2 and y1 < y2:
            objects.setdefault(o["id"], {"id": o["id"], "bbox": [x1, y1, x2, y2]})
    return scene, list(objects.values()), found["relationships"]


def loose_scene(reply: str) -> dict:
    """Objects and relationships that stand in a broken or unfinished scene, whatever is around them."""
    text = reply[-MAX_CHARS:].rpartition("<scene>")[2].partition("</scene>")[0]
    word = r'"\s*:\s*"([^"\\]{1,80})"\s*'
    objects, relationships = [], []
    for name, box in re.findall(rf'"id{word},\s*"bbox"\s*:\s*\[([^\[\]]{{7,200}})\]', text)[:MAX_OBJECTS]:
        with contextlib.suppress(ValueError):
            box = [float(c) for c in box.split(",")]
            if len(box) == 4 and all(map(math.isfinite, box)):
                objects.append({"id": name, "bbox": box})
    for words in re.findall(rf'"subject{word},\s*"predicate{word},\s*"object{word}', text)[
        :MAX_RELATIONSHIPS
    ]:
        relationships.append(dict(zip(("subject", "predicate", "object"), words, strict=True)))
    return {"objects": objects, "relationships": relationships}


# ---- asking ----
class Terminal:
    """Shows a reply piece by piece, and what was not shown of it at the end."""

    def __init__(self):
        self.shown = ""

    def show(self, text: str):
        self.shown += text
        safe = re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", "", text)  # nothing that moves the cursor
        print(safe.encode(errors="replace").decode(), end="", flush=True)

    def end(self, reply: str):
        if not reply.startswith(self.shown):  # a stream that broke off
            self.shown = ""
            print()
        self.show(reply[len(self.shown) :] + "\n")


def load_processor(args):
    """The model's processor; none for a model behind an API, which brings its own. Raises: OSError if neither
    this machine nor the Hub has the model: transformers finds out in minutes."""
    if args.provider in APIS:
        return None
    import httpx2
    from huggingface_hub import model_info, try_to_load_from_cache
    from transformers import AutoProcessor
    from transformers.utils.logging import disable_progress_bar

    path = args.model_path
    try:
        if not Path(path).is_dir() and not try_to_load_from_cache(path, "config.json"):
            model_info(path, timeout=30)
    except (OSError, ValueError, httpx2.HTTPError) as error:
        raise OSError(f"--model_path {path}: expected a folder or a model of the Hub, got {error}") from None
    disable_progress_bar()
    return AutoProcessor.from_pretrained(args.processor_name or path)


def ask(args, sample: Sample, show=None) -> Reply:
    """The model's reply. Raises: ValueError if there is none."""
    if args.provider == "auto":
        args.provider = choose_provider()
    how = args.template, args.min_pixels, args.max_pixels
    encoder = encoder_for(lambda processor: PromptEncoder(processor, *how), load_processor(args))
    tokens, server = args.max_new_tokens, args.base_url
    decoding = Decoding(tokens, batch_size=1, concurrency=1, base_url=server, retries=2, show=show)
    [(_, reply)] = PROVIDERS[args.provider](args.model_path, [sample], encoder, decoding)
    if reply.finish_reason == "failed":
        raise ValueError(f"{args.model_path} through {args.provider}: {reply.error}")
    return reply


def describe(sample: Sample, reply: Reply, image) -> tuple[dict, object]:
    """(what --json prints but the picture's path, the picture)."""
    parsed, method = read_reply(sample, reply.text, reply.finish_reason)
    if parsed is None:
        answer = None
    elif sample.options:
        answer = f"({parsed}) {sample.options[LETTERS.index(parsed)]}"
    else:  # the prompt's example has a letter, and some replies copy it
        answer = re.sub(r"^\(?[a-j][).:]\s+", "", parsed)
    scene, objects, relationships = read_scene(reply.text, sample.size)
    says = f"answer: {'unread' if answer is None else answer}, {HOW[method]}"
    notes = [says] if objects else ["no boxes in the reply", says]
    picture = draw_scene(image, objects, relationships, notes)
    return {
        "reply": reply.text, "scene": scene, "answer": answer, "letter": parsed if sample.options else None,
        "method": method, "boxes": objects, "relationships": relationships,
        "finish_reason": reply.finish_reason,
    }, picture  # fmt: skip


def number(things: list, one: str, many: str) -> str:
    return f"{len(things)} {one if len(things) == 1 else many}"


def main(argv=None):
    args = parse_args(argv)
    os.environ.setdefault("VLLM_LOGGING_STREAM", "ext://sys.stderr")  # stdout is the reply's
    with one_line_errors():
        question, options = read_question(args.question, args.options)
        image = read_photo(args.photo)
        out = Path(args.out or Path(args.photo).with_suffix(".scene.png"))
        if not os.access(out.parent, os.W_OK) or out.is_dir() or out.resolve() == Path(args.photo).resolve():
            raise OSError(f"{out}: expected a place to write a picture to (--out)")
        kind = "choice" if options else "word"
        sample = Sample("photo", ({"path": args.photo},), image.size, question, options, "", "", kind=kind)
        terminal = None if args.json else Terminal()
        with contextlib.redirect_stdout(sys.stderr) if args.json else contextlib.nullcontext():
            reply = ask(args, sample, terminal and terminal.show)
        said, picture = describe(sample, reply, image)
        if terminal:
            terminal.end(reply.text)
            answer = "unread" if said["answer"] is None else said["answer"]
            terminal.show(f"\nanswer: {answer}\nread: {said['method']}, {HOW[said['method']]}\n")
        with write_whole(out) as tmp:
            picture.save(tmp, "PNG")
    if args.json:
        return print(json.dumps(said | {"png": str(out)}))
    if reply.finish_reason == "length":
        print(f"the reply was cut off after {reply.n_tokens} tokens (--max_new_tokens)")
    scene = "scene" if said["scene"] else f"no well-formed scene ({scene_or_fault(reply.text)})"
    counts = number(said["boxes"], "box", "boxes"), number(said["relationships"], "relation", "relations")
    terminal.show(f"{scene}: {', '.join(counts)}; wrote {out}\n")


if __name__ == "__main__":
    main()
