"""Run in a process of its own, whose threads vLLM sets: the engine as trainer and evaluator use it.

    python tests/engine.py MODEL DATA

Prints as JSON what llm.generate gives for a few requests, and what ours gives for the same.
"""

import json
import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
from backends import engine_sums, start_vllm, vllm_generate  # noqa: E402
from data import PromptEncoder, load_samples  # noqa: E402

PIXELS = (784, 802816)


def main(model, data):
    from transformers import AutoProcessor

    encoder = PromptEncoder(AutoProcessor.from_pretrained(model), "spatial_thinker", *PIXELS)
    prompts = [encoder.for_engine(sample) for sample in load_samples(data, "val")[:6]]
    prompts.append(encoder.for_engine(replace(prompts[0].sample, encoded_images=())))
    both = prompts[0].sample.encoded_images + prompts[1].sample.encoded_images
    two = replace(prompts[0].sample, encoded_images=both, question="Is <image> left of <image>, or behind?")
    prompts.append(encoder.for_engine(two))
    llm = start_vllm(
        model,
        max_model_len=512,
        images=2,
        min_pixels=PIXELS[0],
        max_pixels=PIXELS[1],
        logprobs_mode="processed_logprobs",
        max_num_batched_tokens=64,  # a CPU takes a whole prompt in one step all the same
    )
    from vllm import SamplingParams

    def params():
        same = {"n": 3, "temperature": 1.0, "max_tokens": 16, "logprobs": 0, "flat_logprobs": True}
        return [SamplingParams(seed=100 + i, detokenize=False, **same) for i in range(len(prompts))]

    def said(output):
        return [
            [list(o.token_ids), list(o.logprobs.logprobs), o.finish_reason, o.index] for o in output.outputs
        ]

    def forget():  # what one run computed would be taken over by the next, in other batches
        llm.llm_engine.reset_encoder_cache()
        llm.reset_prefix_cache()

    plain = [{"prompt_token_ids": p.vllm_ids} for p in prompts]
    for request, prompt in zip(plain, prompts, strict=True):
        request |= {"multi_modal_data": {"image": prompt.images}} if prompt.images else {}
    results = {"plain": [said(output) for output in llm.generate(plain, params(), use_tqdm=False)]}
    for name, at_once in (("all", None), ("two", 2)):
        forget()
        taken, most = 0, 0

        def requests():
            nonlocal taken
            for i, p in enumerate(params()):
                taken += 1
                yield f"row {i}", prompts[i], p

        results[name] = {}
        for done, (key, prompt, output) in enumerate(vllm_generate(llm, requests(), at_once)):
            assert prompt is prompts[int(key.split()[1])]
            most = max(most, taken - done)
            results[name][key] = said(output)
        results[f"most of {name}"] = most
    forget()
    lone, steps = SamplingParams(temperature=0.0, max_tokens=16, detokenize=False), []
    [(*_, output)] = vllm_generate(llm, [("row 0", prompts[0], lone)], 1, lambda ids: steps.append([*ids]))
    results["steps"] = {"seen": steps, "said": list(output.outputs[0].token_ids)}
    try:
        wrong = replace(prompts[1], ids=[*prompts[1].ids, 0])
        list(vllm_generate(llm, [("row 1", wrong, params()[1])], None))
    except RuntimeError as error:
        results["error"] = str(error)

    def sums():
        return {name: values.tolist() for name, values in engine_sums(llm).items()}

    results["sums"] = sums()

    def nudge(model):
        model.get_parameter("language_model.model.norm.weight").data[3] += 2**-10

    llm.apply_model(nudge)
    results["nudged"] = sums()
    print(json.dumps(results))


if __name__ == "__main__":
    main(*sys.argv[1:])
