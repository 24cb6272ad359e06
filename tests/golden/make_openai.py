"""Golden vectors: what OpenAI's rule of the gpt-oss release makes of matrices in MXFP4, on a CPU.

    PYTHON tests/golden/make_openai.py MXFP_PY

MXFP_PY is `triton_kernels/numerics_details/mxfp.py` of the Triton repository as of August 2025; later versions round
ties to even. Only its function `downcast_to_mxfp_torch` and what that calls are run, with torch 2.13.0. Writes
openai.safetensors beside this file: `DTYPE/KIND/weight_blocks` and `DTYPE/KIND/weight_scales`, of the matrices of
`sources`.
"""

from __future__ import annotations

import ast
import sys
import types
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).parents[2]))

from tests.golden.sources import MATRICES, TORCH_DTYPES, matrix_of

NEEDED = ("DequantScaleRoundingMode", "right_shift_unsigned", "get_max_quant_val", "downcast_to_mxfp_torch")


def functions_of(path: Path) -> dict[str, Any]:
    """Those functions of a file, without its imports, most of which need a GPU."""
    from enum import Enum

    tree = ast.parse(path.read_text())
    tree.body = [node for node in tree.body if getattr(node, "name", "") in NEEDED]
    triton = types.SimpleNamespace(cdiv=lambda a, b: -(-a // b))
    found: dict[str, Any] = {"torch": torch, "F": torch.nn.functional, "Enum": Enum, "triton": triton}
    exec(compile(tree, str(path), "exec"), found)
    return found


def main(path: Path) -> None:
    """Encode every matrix in every dtype."""
    downcast = functions_of(path)["downcast_to_mxfp_torch"]
    made: dict[str, torch.Tensor] = {}
    for dtype in TORCH_DTYPES:
        for kind in MATRICES:
            matrix = matrix_of(kind, dtype)
            codes, scales = downcast(matrix, torch.uint8, 1)
            made[f"{dtype}/{kind}/weight_blocks"] = codes.reshape(*scales.shape, 16).contiguous()
            made[f"{dtype}/{kind}/weight_scales"] = scales.contiguous()
    save_file(made, Path(__file__).parent / "openai.safetensors")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
