"""Answers a checkpoint folder with the parameters vLLM holds once it has loaded it; see `tests.vllm.server`.

vLLM's own code reads the configuration, builds the model and loads the weights. What it does after that, to suit a
kernel, is left out, and so is the choice of kernels: this needs no machine that has kernels for quantized experts.
"""

from __future__ import annotations

import importlib
import re
import sys
from pathlib import Path
from typing import Any

from tests.vllm.server import Answer, serve

#: Inside the folder that is asked for.
PARAMETERS = "vllm-parameters.pt"


class _Kernel:
    """Any kernel, chosen and not run."""

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def input_quant_key(self) -> None:
        """It quantizes its input itself."""


#: What chooses a kernel, in modules of vLLM that import it by name; backends come with a class of experts.
_MAKES_KERNEL = re.compile(r"init_\w+_linear_kernel")
_CHOOSES_BACKEND = re.compile(r"select_\w+_moe_backend")


def _stub_kernels() -> None:
    """Each of these is replaced where it is used."""
    from vllm.model_executor.layers.quantization import fp8, modelopt  # noqa: F401
    from vllm.model_executor.layers.quantization.compressed_tensors import compressed_tensors, compressed_tensors_moe

    for weights in ("w4a4_mxfp4", "w4a4_nvfp4", "w8a8_fp8", "w8a8_int8", "w8a8_mxfp8", "wna16"):
        importlib.import_module(f"{compressed_tensors_moe.__name__}.compressed_tensors_moe_{weights}")
    used = [
        module for name, module in sys.modules.items() if name.startswith("vllm.model_executor.layers.quantization")
    ]
    for module in used:
        for name in dir(module):
            if name == "choose_mp_linear_kernel":
                setattr(module, name, lambda *_, **__: _Kernel)
            elif _MAKES_KERNEL.fullmatch(name):
                setattr(module, name, lambda *_, **__: _Kernel())
            elif _CHOOSES_BACKEND.fullmatch(name):
                setattr(module, name, lambda *_, **__: (None, None))
    compressed_tensors.CompressedTensorsConfig._check_scheme_supported = lambda *_, **__: True


def load(folder: Path) -> Answer:
    """Save all parameters and persistent buffers of the model in `folder`, by name."""
    import torch
    from vllm.config import set_current_vllm_config
    from vllm.distributed import ensure_model_parallel_initialized, init_distributed_environment
    from vllm.engine.arg_utils import EngineArgs
    from vllm.model_executor.model_loader import get_model_loader
    from vllm.utils.torch_utils import set_default_torch_dtype

    _stub_kernels()
    arguments = EngineArgs(
        str(folder),
        skip_tokenizer_init=True,
        enforce_eager=True,
        dtype="bfloat16",
        max_model_len=128,
    )
    config = arguments.create_engine_config()
    loader = get_model_loader(config.load_config)
    with set_current_vllm_config(config), set_default_torch_dtype(config.model_config.dtype):
        init_distributed_environment(1, 0, f"file://{folder / 'rendezvous'}", 0, "gloo")
        ensure_model_parallel_initialized(1, 1)
        model = loader.create_model(vllm_config=config, model_config=config.model_config)
        loader.load_weights(model, config.model_config)
    shared = dict(model.named_parameters(remove_duplicate=False))
    buffers = {name: tensor for name, tensor in model.state_dict().items() if name not in shared}
    parameters = {name: parameter.data for name, parameter in model.named_parameters()}
    torch.save(parameters | buffers, folder / PARAMETERS)
    return {"file": str(folder / PARAMETERS)}


if __name__ == "__main__":
    serve(load)
