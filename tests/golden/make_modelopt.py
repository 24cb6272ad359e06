"""Golden vectors: what ModelOpt makes of matrices in NVFP4, on a CPU.

    PYTHON_WITH_MODELOPT tests/golden/make_modelopt.py

Run with nvidia-modelopt 0.47.0, requests, huggingface_hub and torch 2.13.0. Writes modelopt.safetensors beside this
file: codes, scales and the scale of the whole as `DTYPE/KIND/PART`. The matrices are those of `sources`.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).parents[2]))

from modelopt.torch.quantization.qtensor.nvfp4_tensor import NVFP4QTensor

from tests.golden.sources import MATRICES, TORCH_DTYPES, matrix_of


def main() -> None:
    """Encode every matrix in every dtype."""
    made: dict[str, torch.Tensor] = {}
    for dtype in TORCH_DTYPES:
        for kind in MATRICES:
            codes, scales, whole = NVFP4QTensor.quantize(matrix_of(kind, dtype), 16)
            made[f"{dtype}/{kind}/weight"] = codes._quantized_data.contiguous()
            made[f"{dtype}/{kind}/weight_scale"] = scales.contiguous()
            made[f"{dtype}/{kind}/weight_scale_2"] = whole
    save_file(made, Path(__file__).parent / "modelopt.safetensors")


if __name__ == "__main__":
    main()
