"""Tiny random models of other families than Qwen2.5-VL, of the real classes, with processors of their own.

    build("smolvlm", folder)      # for AutoModelForImageTextToText, AutoProcessor and vLLM
    python tests/families.py FOLDER NAME ...      # replies of vLLM as JSON, of models in FOLDER/NAME

All share one tokenizer of bytes; each has the special tokens and the chat format of its family.
"""

import json
import sys
from pathlib import Path

import torch
import transformers as hf
from pictures import noise

sys.path.insert(0, str(Path(__file__).parent.parent))
import apis  # noqa: E402
import backends  # noqa: E402
from data import PromptEncoder, Sample  # noqa: E402

TEXT = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2,
        "num_key_value_heads": 1, "head_dim": 32, "max_position_embeddings": 8192}  # fmt: skip
SEEN = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}


def tokenizer(special: dict, extra: list[str]):
    """Bytes, and special tokens after them. Args: special: by attribute, as image_token."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    bytes_ = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(letters)}, merges=[]))
    bytes_.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bytes_.add_tokens([AddedToken("\n" * n, normalized=False) for n in (1, 2, 3, 4)])  # Gemma-3 knows these
    bytes_.decoder = decoders.ByteLevel()
    bytes_.add_special_tokens(
        [AddedToken(t, special=True) for t in ["<pad>", "<end>", *special.values(), *extra]]
    )
    return hf.PreTrainedTokenizerFast(tokenizer_object=bytes_, eos_token="<end>", pad_token="<pad>",
                                      extra_special_tokens=special)  # fmt: skip


def chat(image: str) -> str:
    return (
        "{% for m in messages %}{{ m.role }}: {% for c in m.content %}{% if c.type == 'image' %}" + image
        + "{% else %}{{ c.text }}{% endif %}{% endfor %}<end>\n{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}"
    )  # fmt: skip


def smolvlm(folder):
    special = {"image_token": "<image>", "fake_image_token": "<fake_token_around_image>",
               "global_image_token": "<global-img>",
               "end_of_utterance_token": "<end_of_utterance>"}  # fmt: skip
    words = tokenizer(special, [f"<row_{r}_col_{c}>" for r in range(1, 7) for c in range(1, 7)])
    images = hf.Idefics3ImageProcessor(size={"longest_edge": 128}, max_image_size={"longest_edge": 64})
    processor = hf.Idefics3Processor(images, words, image_seq_len=4, chat_template=chat("<image>"))
    config = hf.Idefics3Config(
        text_config={"model_type": "llama", "vocab_size": len(words),
                     "pad_token_id": words.pad_token_id} | TEXT,
        vision_config=SEEN | {"image_size": 64, "patch_size": 16},
        image_token_id=words.image_token_id, scale_factor=2, pad_token_id=words.pad_token_id)  # fmt: skip
    return hf.Idefics3ForConditionalGeneration(config), processor


def internvl(folder):
    special = {"start_image_token": "<img>", "end_image_token": "</img>",
               "context_image_token": "<IMG_CONTEXT>", "video_token": "<video>"}  # fmt: skip
    words = tokenizer(special, [])
    size = {"height": 56, "width": 56}
    images = hf.GotOcr2ImageProcessor(size=size, crop_to_patches=True, max_patches=4)
    videos = hf.InternVLVideoProcessor(size=size)
    processor = hf.InternVLProcessor(images, words, videos, 4, chat_template=chat("<IMG_CONTEXT>\n"))
    config = hf.InternVLConfig(
        text_config={"model_type": "qwen2", "vocab_size": len(words)} | TEXT,
        vision_config=SEEN | {"image_size": (56, 56), "patch_size": (14, 14)},
        image_token_id=words.convert_tokens_to_ids("<IMG_CONTEXT>"), image_seq_length=4)  # fmt: skip
    return hf.InternVLForConditionalGeneration(config), processor


def gemma3(folder):
    special = {
        "boi_token": "<start_of_image>",
        "eoi_token": "<end_of_image>",
        "image_token": "<image_soft_token>",
    }
    words = tokenizer(special, [])
    images = hf.Gemma3ImageProcessor(size={"height": 56, "width": 56})
    processor = hf.Gemma3Processor(images, words, chat("<start_of_image>"), image_seq_length=4)
    token_id = words.convert_tokens_to_ids
    config = hf.Gemma3Config(
        text_config={"vocab_size": len(words), "sliding_window": 64, "pad_token_id": words.pad_token_id,
                     "eos_token_id": words.eos_token_id, "bos_token_id": None} | TEXT,
        vision_config=SEEN | {"image_size": 56, "patch_size": 14}, mm_tokens_per_image=4,
        boi_token_index=token_id("<start_of_image>"), eoi_token_index=token_id("<end_of_image>"),
        image_token_index=token_id("<image_soft_token>"))  # fmt: skip
    return hf.Gemma3ForConditionalGeneration(config), processor


def qwen3vl(folder):
    special = {"image_token": "<|image_pad|>", "video_token": "<|video_pad|>",
               "vision_bos_token": "<|vision_start|>", "vision_eos_token": "<|vision_end|>"}  # fmt: skip
    words = tokenizer(special, [])
    images = hf.Qwen2VLImageProcessor(patch_size=16, merge_size=2)
    processor = hf.Qwen3VLProcessor(images, words, hf.Qwen3VLVideoProcessor(),
                                    chat("<|vision_start|><|image_pad|><|vision_end|>"))  # fmt: skip
    ids = dict(zip(("image", "video", "vision_start", "vision_end"), special.values(), strict=True))
    config = hf.Qwen3VLConfig(
        text_config={"vocab_size": len(words), "tie_word_embeddings": True,
                     "rope_parameters": {"rope_type": "default", "rope_theta": 10.0,
                                         "mrope_section": [8, 4, 4], "mrope_interleaved": True}} | TEXT,
        vision_config={"depth": 2, "hidden_size": 64, "intermediate_size": 128, "num_heads": 4,
                       "patch_size": 16, "out_hidden_size": 64, "num_position_embeddings": 64,
                       "deepstack_visual_indexes": [0]},
        tie_word_embeddings=True,
        **{f"{kind}_token_id": words.convert_tokens_to_ids(t) for kind, t in ids.items()})  # fmt: skip
    return hf.Qwen3VLForConditionalGeneration(config), processor


FAMILIES = {"smolvlm": smolvlm, "internvl": internvl, "gemma3": gemma3, "qwen3vl": qwen3vl}


def build(name: str, folder):
    """Write the model of a family and its processor."""
    torch.manual_seed(0)
    model, processor = FAMILIES[name](folder)
    with torch.no_grad():
        for parameter in model.parameters():  # what is 0 or 1 at the start would hide the image
            parameter.add_(torch.randn_like(parameter) * 0.2)
    model.generation_config.eos_token_id = processor.tokenizer.eos_token_id
    model.generation_config.pad_token_id = processor.tokenizer.pad_token_id
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    if name == "gemma3":  # the names of the Hub's files, which vLLM expects and transformers reads as well
        from safetensors.torch import load_file, save_file

        file, old, new = f"{folder}/model.safetensors", "vision_tower.", "vision_tower.vision_model."
        save_file({key.replace(old, new): w for key, w in load_file(file).items()}, file, {"format": "pt"})


SIZES = ((84, 56), (112, 56))
SAMPLES = [
    Sample(str(w), (noise(w, h),), (w, h), f"What is {'there ' * (w // 28)}?", (), "", "") for w, h in SIZES
]
HOW = apis.Decoding(max_new_tokens=8, batch_size=2)


def encoder_of(folder):
    def make(processor):
        return PromptEncoder(processor, "no_reasoning", 3136, 802816)

    return backends.encoder_for(make, hf.AutoProcessor.from_pretrained(folder))


def said(replies) -> list:
    """In the order of the samples."""
    return [
        [r.text, r.finish_reason, r.n_tokens, r.prompt_tokens, r.error]
        for _, r in sorted(replies, key=lambda r: r[0])
    ]


def main(folder, *names):
    """An engine after the other, in this process."""
    got = {}
    for name in names:
        path = f"{folder}/{name}"
        got[name] = said(backends.vllm_replies(path, SAMPLES, encoder_of(path), HOW))
    print(json.dumps(got))


if __name__ == "__main__":
    main(*sys.argv[1:])
