"""Lets `transformers` load folders whose experts are stored in bitsandbytes' 4-bit form.

    import moeconv.transformers
    model = AutoModelForCausalLM.from_pretrained("folder that `moeconv quantize --format nf4` wrote")

`load_in_4bit` of transformers leaves fused experts (3-D parameters such as `experts.gate_up_proj`) as they are, and
finds no place for files that hold them in 4 bits. Importing this module registers a quantizer for the `quant_method`
of such folders, through the public hooks of transformers. Without the import transformers refuses to load them, since
tensors of codes do not have the shapes of parameters.

Which parameters are packed, and how, is read from the files: each brings its state, such as
`NAME.quant_state.bitsandbytes__nf4` and what lies beside it. A packed `X.weight` of a plain `nn.Linear` makes X a
`bitsandbytes.nn.Linear4bit`, which peft knows. Every other packed parameter stays where it is and is unpacked when it
is read: all experts of one layer for the time of its forward pass, never more (`bitsandbytes.nn.parametrize`). The
model is built on the meta device, so that loading takes no more memory than the files have bytes.

Not supported: parameters on disk, tensor parallelism, and adapters on experts (`target_parameters` of peft).
Checked with transformers 5.10 and 5.23, bitsandbytes 0.50 and peft 0.21.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from copy import copy
from typing import Any, NamedTuple

from moeconv.errors import CheckpointError, Problem, UsageError
from moeconv.formats import METHOD

_NEEDS = "moeconv.transformers needs transformers>=5.10 and bitsandbytes>=0.50"
_INSTALL = "pip install 'moeconv[transformers]'"
try:
    import bitsandbytes
    import torch
    import transformers
    from bitsandbytes.functional import QuantState, dequantize_4bit
    from bitsandbytes.nn.modules import Linear4bit, Params4bit
    from bitsandbytes.nn.parametrize import Bnb4bitParametrization, replace_parameter_4bit_prequantized
    from safetensors import safe_open
    from torch import Tensor, nn
    from torch.nn.utils.parametrize import is_parametrized, remove_parametrizations
    from transformers import PreTrainedModel
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import (
        ConversionOps,
        WeightConverter,
        WeightRenaming,
        WeightTransform,
        rename_source_key,
    )
    from transformers.quantizers.auto import register_quantization_config, register_quantizer
    from transformers.quantizers.base import HfQuantizer
    from transformers.quantizers.quantizers_utils import should_convert_module
    from transformers.utils.quantization_config import QuantizationConfigMixin
except ImportError as error:
    raise ImportError(f"{_NEEDS}: {error}.\n  -> {_INSTALL}") from error
# Before 5.10 quantizers of transformers have no say in how tensors of a checkpoint are converted; before 0.50 unpacked
# experts of bitsandbytes pile up where activations are checkpointed.
for _library, _floor in ((transformers, (5, 10)), (bitsandbytes, (0, 50))):
    if tuple(map(int, _library.__version__.split(".")[:2])) < _floor:
        raise ImportError(f"{_NEEDS}; this is {_library.__name__} {_library.__version__}.\n  -> {_INSTALL}")

#: What follows the name of a packed tensor in that of its state, by which it is recognized.
_STATES = tuple(f".quant_state.{key}" for key in QuantState.valid_qs_type_keys)
_PARTS = (".absmax", ".quant_map")
_NESTED_PARTS = (".nested_absmax", ".nested_quant_map")
_AGAIN = "Download or quantize the folder again: its files do not belong together, or are damaged."
_IGNORE = "Quantize again with --ignore for that module."


class Packed(NamedTuple):
    """One packed parameter of a model.

    Attributes:
        name: in the model.
        converted: its name in the checkpoint, after the renamings of transformers.
        shape: what it unpacks to.
        nbytes: of its codes and scales.
    """

    name: str
    converted: str
    shape: torch.Size
    nbytes: int

    @property
    def place(self) -> Tensor:
        """Room for its codes [numel / 2, 1] on the meta device."""
        return torch.empty((self.shape.numel() + 1) // 2, 1, dtype=torch.uint8, device="meta")


@register_quantization_config(METHOD)
class PackedConfig(QuantizationConfigMixin):
    """`quantization_config` of config.json. What it says of the form is for readers: tensors bring their own state.

    Args:
        bnb_4bit_compute_dtype: in which packed linear layers compute: `float32`, `bfloat16` or `float16`; None for
            the dtype of their input.
        described: whatever else it says, kept for `save_pretrained`.

    Raises:
        CheckpointError: not a dtype in which layers can compute.
    """

    def __init__(self, bnb_4bit_compute_dtype: str | None = None, **described: Any) -> None:
        self.__dict__.update(described)
        self.quant_method: str = METHOD  # type: ignore[assignment]
        self.bnb_4bit_compute_dtype = bnb_4bit_compute_dtype
        if bnb_4bit_compute_dtype not in (None, "float32", "bfloat16", "float16"):
            raise CheckpointError(
                f"config.json: bnb_4bit_compute_dtype is {bnb_4bit_compute_dtype!r}",
                "Write float32, bfloat16 or float16, or remove it.",
            )

    @property
    def compute_dtype(self) -> torch.dtype | None:
        """`bnb_4bit_compute_dtype` as torch has it."""
        return getattr(torch, self.bnb_4bit_compute_dtype) if self.bnb_4bit_compute_dtype else None


class Unpacking(Bnb4bitParametrization):
    """Turns the codes of a parameter into its values whenever it is read.

    The state keeps what the file says. It is no part of the module, so `to` and the like do not reach it: it follows
    the codes to their device, and values get the dtype of what they are multiplied with (`_prepare`).

    Args:
        state: of the codes.
        dtype: of the values.
    """

    def __init__(self, state: QuantState, dtype: torch.dtype) -> None:
        super().__init__(state)
        self.dtype = dtype

    @torch.no_grad()
    def forward(self, quantized_param: Tensor) -> Tensor:
        """The values, in the parameter's shape, from its codes [numel / 2, 1]."""
        state = self.quant_state
        if state.absmax.device != quantized_param.device:
            state.to(quantized_param.device)
        if state.dtype != self.dtype:
            state = copy(state)
            state.dtype = self.dtype
        return dequantize_4bit(quantized_param, state)


class AttachPacked(ConversionOps):
    """Puts one packed tensor, with its state, where the model has the parameter."""

    def __init__(self, hf_quantizer: PackedQuantizer) -> None:
        # Without an attribute of this name the loader casts all that it reads to the parameter's dtype: absmax to
        # uint8, and the model loads without a word and computes nonsense.
        self.hf_quantizer = hf_quantizer

    def __deepcopy__(self, memo: dict[int, Any]) -> AttachPacked:
        return self  # the loader copies converters, with their operations, for every tensor

    def convert(
        self, input_dict: dict[str, Any], source_patterns: list[str], target_patterns: list[str], **kwargs: Any
    ) -> dict[str, list[Tensor]]:
        """Attach one parameter, or return it where the loader has to.

        Args:
            input_dict: lists of one tensor, by the patterns that matched it.
            source_patterns: all patterns.
            target_patterns: of what is made.
            kwargs: the name in the model, the model, and names that have not been found yet.
        """
        name, model = kwargs["full_layer_name"], kwargs["model"]
        tensors = {self.hf_quantizer.suffixes[pattern]: found[0] for pattern, found in input_dict.items()}
        codes = tensors.pop("")
        owner, _, leaf = name.rpartition(".")
        module = model.get_submodule(owner)
        if isinstance(module, Linear4bit):
            return {name: [Params4bit.from_prequantized(codes, tensors, device=codes.device, module=module)]}
        if not is_parametrized(module):
            module.register_forward_pre_hook(_prepare, with_kwargs=True)
        setattr(module, leaf, nn.Parameter(codes, requires_grad=False))
        replace_parameter_4bit_prequantized(module, leaf, tensors, codes.device)
        module._is_hf_initialized = True  # else its values would be made, to be initialized, and thrown away
        chain = module.parametrizations[leaf]
        chain[0] = Unpacking(chain[0].quant_state, model.config.dtype)
        kwargs["missing_keys"].discard(name)
        return {}


@register_quantizer(METHOD)
class PackedQuantizer(HfQuantizer):
    """Loads what is packed already; it quantizes nothing.

    Attributes:
        packed: by their names in the model.
        suffixes: what the loader's patterns stand for: codes (nothing), or a part of their state.
    """

    requires_calibration = True  # by which transformers refuses to quantize with it
    is_trainable = True  # adapters on it are
    quantization_config: PackedConfig
    packed: dict[str, Packed]
    suffixes: dict[str, str]

    def is_serializable(self) -> bool:
        """State dicts hold the packed form."""
        return True

    def validate_environment(self, *_: Any, device_map: Any = None, **__: Any) -> None:
        """Asked for a `device_map` as it was given, and as it was found where that is "auto".

        Raises:
            UsageError: it leaves something on disk.
        """
        if isinstance(device_map, dict) and "disk" in device_map.values():
            raise UsageError(
                "device_map leaves parts of the model on disk, where packed parameters have no form",
                "Give a device_map without disk, or more room with max_memory.",
            )

    def param_element_size(self, model: PreTrainedModel, param_name: str, param: Tensor) -> float:
        """Bytes for each element that `param` has now, for device maps. Scales count as well."""
        packed = self.packed.get(param_name)
        return packed.nbytes / param.numel() if packed else super().param_element_size(model, param_name, param)

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **about: Any) -> None:
        """Give packed parameters their packed form in a model that is still on the meta device."""
        if getattr(model.config, "distributed_config", None) is not None:
            raise UsageError("packed parameters cannot be split over devices", "Load without distributed_config.")
        self.packed = {packed.name: packed for packed in _packed(model, about["checkpoint_files"] or ())}
        # Patterns are regular expressions, and `\1` is what a group matched. With whole names, since layers whose
        # experts are not packed have names that differ in nothing but a number.
        names = "|".join(re.escape(packed.converted) for packed in self.packed.values())
        parts = ("", *_PARTS, *_NESTED_PARTS, *_STATES)
        self.suffixes = {rf"^({names}){re.escape(part)}$": part.removeprefix(".") for part in parts}
        for packed in self.packed.values():
            owner, _, leaf = packed.name.rpartition(".")
            module = model.get_submodule(owner)
            if type(module) is nn.Linear and leaf == "weight":
                made = _packed_linear(module, packed.place, self.quantization_config.compute_dtype)
                model.set_submodule(owner, made)
            else:
                setattr(module, leaf, nn.Parameter(packed.place, requires_grad=False))

    def update_weight_conversions(
        self, weight_conversions: list[WeightTransform], model: PreTrainedModel | None = None
    ) -> list[WeightTransform]:
        """The conversions of a model, after that of packed tensors: the first whose patterns match is taken."""
        ours = [WeightConverter(list(self.suffixes), [r"\1"], [AttachPacked(self)])] if self.packed else []
        return [*ours, *weight_conversions]

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **_: Any) -> PreTrainedModel:
        """Prepare for saving, which runs conversions backwards, and for peft."""
        held = vars(model)
        held["_weight_conversions"] = [each for each in held["_weight_conversions"] if not self._undoes_packed(each)]
        held["is_loaded_in_4bit"] = True  # peft looks for it before it wraps a Linear4bit
        return model

    def _undoes_packed(self, conversion: WeightTransform) -> bool:
        """It is ours, which has nothing to undo, or would take codes for the parameter that it makes on loading."""
        if not isinstance(conversion, WeightConverter):
            return False
        if any(isinstance(each, AttachPacked) for each in conversion.operations):
            return True
        back = conversion.reverse_transform()
        return any(back.rename_source_key(name)[1] is not None for name in self.packed)

    def _dequantize(self, model: PreTrainedModel, dtype: torch.dtype | None = None) -> PreTrainedModel:
        """Unpack all parameters for good, which `model.dequantize()` asks for.

        Raises:
            UsageError: the model is spread over devices.
        """
        if len(set(getattr(model, "hf_device_map", {}).values())) > 1:
            raise UsageError("a model that is spread over devices cannot be dequantized", "Load it onto one device.")
        made = getattr(torch, dtype) if isinstance(dtype, str) else dtype or model.dtype
        for name in self.packed:
            owner, _, leaf = name.rpartition(".")
            module = model.get_submodule(owner)
            if isinstance(module, Linear4bit):
                model.set_submodule(owner, _plain_linear(module, made))
            else:
                values = getattr(module, leaf).to(made)
                remove_parametrizations(module, leaf, leave_parametrized=False)
                setattr(module, leaf, nn.Parameter(values))
        del model.is_loaded_in_4bit, model._weight_conversions  # so that it is saved as one that was never packed
        return model


def _packed(model: PreTrainedModel, files: Sequence[str]) -> Iterator[Packed]:
    """Packed parameters that a model has, from the headers of its files and the states in them.

    Raises:
        CheckpointError: with all that is wrong. Found before anything is loaded, since the loader would take some of
            it for parameters that `ignore_mismatched_sizes` allows to make up.
    """
    shapes, states = _read_states(files)
    conversions = get_model_conversion_mapping(model)
    renamings = [each for each in conversions if isinstance(each, WeightRenaming)]
    converters = [each for each in conversions if isinstance(each, WeightConverter)]
    there = dict(model.named_parameters())
    problems = list(_incomplete(shapes, states))
    for stored, state in states.items():
        converted, _ = rename_source_key(stored, renamings, [])
        name, _ = rename_source_key(converted, [], [], model.base_model_prefix, there)
        if name in there:
            shape, unpacked = there[name].shape, torch.Size(state["shape"])
            problems += _unfit(model, stored, name, shape, unpacked)
            scales = -(-unpacked.numel() // state["blocksize"]) * (1 if _is_nested(state) else 4)
            yield Packed(name, converted, shape, (shape.numel() + 1) // 2 + scales)
        elif stored in there or rename_source_key(converted, [], converters)[1] is not None:
            message = f"{stored} is packed, but transformers makes the parameter from other tensors, or renames it"
            problems.append(Problem(message, "Quantize again, from the folder as its family is published."))
    if problems:
        raise CheckpointError.of(problems)


def _read_states(files: Iterable[str]) -> tuple[dict[str, list[int]], dict[str, dict[str, Any]]]:
    """Shapes of all tensors, and what states say beside tensors by the names of packed ones."""
    shapes: dict[str, list[int]] = {}
    states: dict[str, dict[str, Any]] = {}
    for file in files:
        if not file.endswith(".safetensors"):
            raise CheckpointError(f"{file} is no safetensors file", "Load the folder as moeconv wrote it.")
        with safe_open(file, framework="pt") as opened:
            for key in opened.keys():  # noqa: SIM118
                shapes[key] = opened.get_slice(key).get_shape()
                for suffix in _STATES:
                    if key.endswith(suffix):
                        states[key.removesuffix(suffix)] = json.loads(bytes(opened.get_tensor(key).tolist()))
    return shapes, states


def _is_nested(state: dict[str, Any]) -> bool:
    """Scales are quantized themselves."""
    return "nested_blocksize" in state


def _incomplete(shapes: dict[str, list[int]], states: dict[str, dict[str, Any]]) -> Iterator[Problem]:
    """Packed tensors without all of their parts, or with parts of another size."""
    for key in shapes:
        name, _, part = key.rpartition(".")
        if f".{part}" in _PARTS and name not in states:
            yield Problem(f"{key}: there is no quant_state for {name}", _AGAIN)
    for name, state in states.items():
        parts = ("", *_PARTS, *(_NESTED_PARTS if _is_nested(state) else ()))
        missing = [part for part in parts if name + part not in shapes]
        if missing:
            yield Problem(f"{name} is packed, and {', '.join(name + part for part in missing)} is not there", _AGAIN)
            continue
        count = torch.Size(state["shape"]).numel()
        wanted = ("", (count + 1) // 2), (".absmax", -(-count // state["blocksize"]))
        for part, size in wanted:
            if (held := torch.Size(shapes[name + part]).numel()) != size:
                yield Problem(f"{name}{part} has {held:,} elements, its state speaks of {size:,}", _AGAIN)


def _unfit(
    model: PreTrainedModel, stored: str, name: str, shape: torch.Size, unpacked: torch.Size
) -> Iterator[Problem]:  # fmt: skip
    """Why a parameter of a model cannot be the packed one."""
    if unpacked != shape:
        message = f"{stored} was packed as {list(unpacked)}, the model has {list(shape)}"
        yield Problem(message, "Load it with the config.json that moeconv wrote beside it.")
    precise = {*(model._keep_in_fp32_modules or ()), *(model._keep_in_fp32_modules_strict or ())}
    if not should_convert_module(name.removesuffix(".weight"), list(precise)):
        yield Problem(f"{stored} is packed, but {type(model).__name__} needs it in full precision", _IGNORE)
    if name in {*model.all_tied_weights_keys, *model.all_tied_weights_keys.values()}:
        yield Problem(f"{stored} is packed, but {type(model).__name__} has it in two places", _IGNORE)


def _packed_linear(linear: nn.Linear, place: Tensor, compute: torch.dtype | None) -> Linear4bit:
    """A layer on the meta device with room for codes."""
    with torch.device("meta"):
        made = Linear4bit(linear.in_features, linear.out_features, linear.bias is not None, compute)
    made.weight = Params4bit(place, module=made)
    # On CPUs with AVX512-BF16 the first forward pass would re-pack the weight, with scales rounded to BF16: it fails on
    # sizes that are no multiples of 32 and 64, and what is saved afterwards is not what was loaded.
    made.support_avx512bf16_for_cpu = False
    made.register_forward_pre_hook(_refuse_integers)
    return made


def _plain_linear(packed: Linear4bit, dtype: torch.dtype) -> nn.Linear:
    """The same layer, unpacked."""
    with torch.device("meta"):
        made = nn.Linear(packed.in_features, packed.out_features, packed.bias is not None)
    state: QuantState = copy(packed.weight.quant_state)  # type: ignore[attr-defined]
    state.dtype = dtype
    made.weight = nn.Parameter(dequantize_4bit(packed.weight.data, state))
    made.bias = packed.bias
    return made.train(packed.training)


def _prepare(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Before a forward pass: parameters will be unpacked in the dtype of its first input."""
    given = (each for each in (*args, *kwargs.values()) if isinstance(each, Tensor) and each.is_floating_point())
    dtype = next((each.dtype for each in given), None)
    for chain in module.get_submodule("parametrizations").children() if is_parametrized(module) else ():
        unpacking, *others = chain.children()
        if not isinstance(unpacking, Unpacking):
            continue
        if others:
            # peft 0.21 leaves its parametrization behind after the pass: outputs drift from one to the next. What it
            # merges goes into a copy, and is lost.
            raise UsageError(
                f"packed parameters of {type(module).__name__} have a parametrization besides, such as an adapter",
                "Leave target_parameters of peft empty: adapters go on linear layers (target_modules).",
            )
        unpacking.dtype = dtype or unpacking.dtype


def _refuse_integers(module: nn.Module, args: tuple[Any, ...]) -> None:
    """Some models cast what they give a layer to the dtype of its weight, which is that of codes."""
    if not args[0].is_floating_point():
        raise CheckpointError("the model casts the input of a packed layer to the dtype of its weight", _IGNORE)
