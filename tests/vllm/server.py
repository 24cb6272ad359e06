"""A process that imports vLLM once and answers folders, one a line of stdin, each with a line of JSON.

Each folder is loaded in a forked child, so that a failed load cannot touch the next one.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

Answer = dict[str, Any]
Ask = Callable[[Path], Answer]

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
TIMEOUT_SECONDS = 600


def _answer_into(answer: Ask, folder: Path, pipe: Connection) -> None:
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what vLLM prints is not a result
    try:
        result = answer(folder)
    except Exception as error:  # any failure to load is a finding, to be compared with the table
        result = {"error": f"{type(error).__name__}: {error}"}
    pipe.send(result)


def _answer_apart(answer: Ask, folder: Path) -> Answer:
    """`answer` in a forked child; instead `error` if vLLM refuses, `broken` if it never answers."""
    context = multiprocessing.get_context("fork")
    receiving, sending = context.Pipe(duplex=False)
    child = context.Process(target=_answer_into, args=(answer, folder, sending))
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


def serve(answer: Ask) -> None:
    """Answer folders until stdin ends."""
    os.environ.update(_ENVIRONMENT)
    import vllm.entrypoints.llm  # noqa: F401  the children inherit what is imported here

    for line in sys.stdin:
        print(json.dumps(_answer_apart(answer, Path(line.rstrip("\n")))), flush=True)


@contextmanager
def asking(module: str) -> Iterator[Ask]:
    """A function that asks a process of `module`, which must call `serve`."""
    with subprocess.Popen(
        [sys.executable, "-m", module],
        cwd=Path(__file__).parents[2],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as server:
        assert server.stdin is not None
        assert server.stdout is not None

        def ask(folder: Path) -> Answer:
            server.stdin.write(f"{folder}\n")
            server.stdin.flush()
            answer = json.loads(server.stdout.readline())
            assert "broken" not in answer, answer["broken"]
            return answer

        yield ask
        server.stdin.close()
