"""Read checkpoint folders from stdin, one a line, and answer each with what vLLM generates from it, a line of JSON.

vLLM is imported once; each folder is loaded in a forked child, so that a failed load cannot touch the next one.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import sys
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

# Before vLLM is imported: the engine in this process, one thread (the same order of additions every time), no network,
# nothing compiled (which would take longer than all else).
_ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "TORCHDYNAMO_DISABLE": "1",
}

# Of different lengths: several tokens take the path through the experts together, and one at a time.
PROMPTS = ([1, 2, 3, 4, 5], [100, 7, 30], list(range(40, 60)))
NEW_TOKENS = 16
TIMEOUT_SECONDS = 600


def generate(folder: Path) -> dict[str, Any]:
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


def _generate_into(folder: Path, pipe: Connection) -> None:
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what vLLM prints is not a result
    try:
        result = generate(folder)
    except Exception as error:  # any failure to load is a finding, to be compared with the table
        result = {"error": f"{type(error).__name__}: {error}"}
    pipe.send(result)


def generate_apart(folder: Path) -> dict[str, Any]:
    """`generate` in a forked child; in place of tokens `error` if vLLM refuses, `broken` if it never answers."""
    context = multiprocessing.get_context("fork")
    receiving, sending = context.Pipe(duplex=False)
    child = context.Process(target=_generate_into, args=(folder, sending))
    child.start()
    sending.close()
    try:
        result = receiving.recv() if receiving.poll(TIMEOUT_SECONDS) else {"broken": f"silent for {TIMEOUT_SECONDS} s"}
    except EOFError:
        child.join()
        result = {"broken": f"ended with code {child.exitcode}"}
    child.kill()
    child.join()
    return result


def main() -> None:
    os.environ.update(_ENVIRONMENT)
    import vllm.entrypoints.llm  # noqa: F401  the children inherit what is imported here

    for line in sys.stdin:
        print(json.dumps(generate_apart(Path(line.rstrip("\n")))), flush=True)


if __name__ == "__main__":
    main()
