"""Golden vectors: matrices that AutoAWQ, AutoGPTQ and AutoRound have packed, and what each reads back from them.

    PYTHON tests/golden/make_columns.py FOLDER

Run with torch 2.13.0 and the unpacked distributions of autoawq 0.2.9, auto-gptq 0.7.1 and auto-round 0.16.1 in FOLDER,
side by side. None of them can be imported whole beside that torch: modules are taken one by one. Writes
columns.safetensors beside this file, with the parts as `LIBRARY/KIND/PART` and the decoded matrix as
`LIBRARY/KIND/weight`.
"""

from __future__ import annotations

import importlib
import sys
import types
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

ROWS, COLUMNS, GROUP = 64, 128, 32


def _from(folder: Path, package: str, module: str) -> Any:
    """A module of a package whose `__init__` files are not run."""
    words = module.split(".")
    for count in range(len(words)):
        name = ".".join([package, *words[:count]])
        if name not in sys.modules:
            sys.modules[name] = types.ModuleType(name)
            sys.modules[name].__path__ = [str(folder / name.replace(".", "/"))]
    return importlib.import_module(f"{package}.{module}")


def _matrix() -> tuple[torch.nn.Linear, Tensor, Tensor, Tensor]:
    """A linear layer whose weights are on the grid of scales and zero points [N, groups], and those."""
    generator = torch.Generator().manual_seed(7)
    codes = torch.randint(0, 16, (ROWS, COLUMNS), generator=generator)
    zeros = torch.randint(1, 15, (ROWS, COLUMNS // GROUP), generator=generator)
    scales = (torch.rand((ROWS, COLUMNS // GROUP), generator=generator) + 0.5).mul(0.01).half()
    linear = torch.nn.Linear(COLUMNS, ROWS, bias=False)
    wide_zeros, wide_scales = (item.repeat_interleave(GROUP, 1) for item in (zeros, scales))
    linear.weight.data = ((codes - wide_zeros) * wide_scales.float()).contiguous()
    return linear, scales, zeros, codes


def _read_by(layer: torch.nn.Module, dtype: torch.dtype = torch.float16) -> Tensor:
    """What a layer multiplies with: it gets the unit matrix."""
    with torch.no_grad():
        decoded: Tensor = layer(torch.eye(COLUMNS, dtype=dtype)).T
    return decoded.contiguous()


def main(folder: Path) -> None:
    """Pack and read with every library."""
    made: dict[str, Tensor] = {}

    def keep(name: str, layer: torch.nn.Module, decoded: Tensor) -> None:
        for part in ("qweight", "qzeros", "scales", "g_idx"):
            if isinstance(getattr(layer, part, None), Tensor):
                made[f"{name}/{part}"] = getattr(layer, part).contiguous().clone()
        made[f"{name}/weight"] = decoded.half()

    linear, scales, zeros, _ = _matrix()
    awq = next(folder.glob("autoawq*"))
    gemm, packing = _from(awq, "awq", "modules.linear.gemm"), _from(awq, "awq", "utils.packing_utils")
    layer = gemm.WQLinear_GEMM.from_linear(
        linear.half(), 4, GROUP, scales=scales.T.contiguous(), zeros=zeros.T.contiguous().half()
    )
    decoded = packing.dequantize_gemm(layer.qweight, layer.qzeros, layer.scales, 4, GROUP)
    keep("autoawq/gemm", layer, decoded.T.contiguous())

    gptq = next(folder.glob("auto_gptq*"))
    for bits in (4, 8):
        for kind in ("asym", "sym", "order"):
            linear, scales, zeros, _ = _matrix()
            if kind == "sym":
                zeros = torch.full_like(zeros, 1 << bits - 1)
            module = _from(gptq, "auto_gptq", "nn_modules.qlinear.qlinear_cuda")
            layer = module.QuantLinear(bits, GROUP, COLUMNS, ROWS, False)
            order = torch.arange(COLUMNS) // GROUP
            if kind == "order":
                order = order[torch.randperm(COLUMNS, generator=torch.Generator().manual_seed(3))]
            layer.pack(linear, scales.float().clone(), zeros.float().clone(), order.int())
            keep(f"autogptq/{kind}{bits}", layer, _read_by(layer, torch.float32))

    auto_round = next(folder.glob("auto_round*"))
    _from(auto_round, "auto_round", "utils.bit_packing")  # which the layers import, and a choice of devices
    sys.modules["auto_round.utils"].get_packing_device = lambda _: torch.device("cpu")  # type: ignore[attr-defined]
    for name, file in (("round", "torch.qlinear_torch"), ("round_gptq", "torch.qlinear_torch_zp")):
        for bits in (4, 8):
            for kind in ("asym", "sym"):
                linear, scales, zeros, _ = _matrix()
                module = _from(auto_round, "auto_round_extension", file)
                layer = module.QuantLinear(bits, GROUP, COLUMNS, ROWS, False)
                layer.device = torch.device("cpu")
                packed: Any = 1 << bits - 1 if kind == "sym" else zeros.float().clone()
                layer.pack(linear, scales.clone(), packed, None, device="cpu")
                keep(f"auto{name}/{kind}{bits}", layer, _read_by(layer))
    save_file(made, Path(__file__).parent / "columns.safetensors")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
