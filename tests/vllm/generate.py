"""Answers a checkpoint folder with what vLLM generates from it; see `tests.vllm.server`."""

from __future__ import annotations

from pathlib import Path

from tests.vllm.server import Answer, serve

# Of different lengths: several tokens take the path through the experts together, and one at a time.
PROMPTS = ([1, 2, 3, 4, 5], [100, 7, 30], list(range(40, 60)))
NEW_TOKENS = 16


def generate(folder: Path) -> Answer:
    """Greedy tokens of each prompt, and the log-probability of each of them, with all the bits of a float."""
    from vllm import LLM, SamplingParams

    model = LLM(
        str(folder),
        skip_tokenizer_init=True,
        language_model_only=True,
        enforce_eager=True,
        dtype="bfloat16",
        seed=0,
        max_model_len=128,
        max_num_seqs=len(PROMPTS),
    )
    greedy = SamplingParams(temperature=0, max_tokens=NEW_TOKENS, ignore_eos=True, logprobs=0, detokenize=False)
    answers = model.generate([{"prompt_token_ids": prompt} for prompt in PROMPTS], greedy, use_tqdm=False)
    outputs = [answer.outputs[0] for answer in answers]
    return {
        "tokens": [list(output.token_ids) for output in outputs],
        "logprobs": [
            [step[token].logprob for token, step in zip(output.token_ids, output.logprobs, strict=True)]
            for output in outputs
        ],
    }


if __name__ == "__main__":
    serve(generate)
