"""What a checkpoint holds, at a glance: family, layout by layer range, experts, dtypes, quantization, sizes."""

from __future__ import annotations

from collections import Counter
from typing import Any

from moeconv.checkpoint import Checkpoint, StoredTensor
from moeconv.errors import Problem, shown
from moeconv.explain import count, size
from moeconv.layouts import find_units
from moeconv.names import collapse
from moeconv.recipe import Recipe
from moeconv.states import stated_view
from moeconv.units import Unit


def inspect_json(source: Checkpoint, recipe: Recipe | None, layout: str | None = None) -> dict[str, Any]:
    """The checkpoint as JSON. Without a recipe nothing is said of experts."""
    problems: list[Problem] = []
    shown = stated_view(source, problems)
    found = find_units(shown, recipe, layout) if recipe else None
    dtypes: Counter[str] = Counter()
    for tensor in source.tensors.values():
        dtypes[tensor.spec.dtype] += tensor.spec.nbytes
    quantization = source.config.get("quantization_config")
    return {
        "schema_version": 1,
        "source": str(source.root),
        "model_type": source.config.get("model_type"),
        "architectures": source.config.get("architectures"),
        "recipe": recipe.name if recipe else None,
        "experts": _experts(list(found.units)) if found else [],
        "problems": [str(problem) for problem in (*problems, *(found.problems if found else ()))],
        "tensors": len(source.tensors),
        "bytes": source.nbytes,
        "expert_bytes": sum(_nbytes(t) for unit in found.units for t in unit.tensors() if _is_stacked(unit, recipe))
        if found and recipe
        else None,
        "bytes_by_dtype": dict(dtypes.most_common()),
        "quantization": quantization.get("quant_method", "unnamed") if isinstance(quantization, dict) else None,
        "files": [{"path": file.path, "bytes": file.nbytes} for file in source.files],
        "sidecars": [file.path for file in source.sidecars],
        "left_out": [{"path": f.path, "bytes": f.nbytes, "why": f.why} for f in source.left_out],
        "made_by_moeconv": bool(source.manifest),
    }


def _is_stacked(unit: Unit, recipe: Recipe | None) -> bool:
    return recipe is not None and any(part in recipe.part_ids for part in unit.component.parts)


def _dtype(tensor: StoredTensor) -> str:
    return tensor.encoded.format.name if tensor.encoded else tensor.spec.dtype


def _nbytes(tensor: StoredTensor) -> int:
    parts = tensor.encoded.parts.values() if tensor.encoded else (tensor,)
    return sum(part.spec.nbytes for part in parts)


def _experts(units: list[Unit]) -> list[dict[str, Any]]:
    alike: dict[tuple[Any, ...], list[Unit]] = {}
    for unit in units:
        dtypes = tuple(sorted({_dtype(tensor) for tensor in unit.tensors()}))
        alike.setdefault((unit.component.parts, unit.layout, tuple(sorted(unit.sizes.items())), dtypes), []).append(
            unit
        )
    return [
        {
            "blocks": collapse([unit.block for unit in group]),
            "parts": group[0].parts,
            "layout": layout,
            "form": group[0].component.form,
            "sizes": dict(sizes),
            "dtypes": list(dtypes),
            "tensors": sum(len(unit.tensors()) for unit in group),
            "bytes": sum(_nbytes(tensor) for unit in group for tensor in unit.tensors()),
        }
        for (_, layout, sizes, dtypes), group in alike.items()
    ]


def inspect_text(report: dict[str, Any]) -> str:
    """`inspect_json` for a terminal."""
    named = report["architectures"] or []
    lines = [
        f"{report['source']}",
        f"  model      {report['model_type']}  {', '.join(map(str, named if isinstance(named, list) else [named]))}",
        f"  recipe     {report['recipe'] or 'none: no shipped recipe is for this model_type'}",
    ]
    for group in report["experts"]:
        sizes = ", ".join(f"{symbol}={value:,}" for symbol, value in group["sizes"].items())
        lines.append(
            f"  {group['layout']:<10} {' '.join(group['blocks'])}: {', '.join(group['parts'])} "
            f"({sizes}; {'/'.join(group['dtypes'])}; {group['tensors']:,} tensors, {size(group['bytes'])})"
        )
    if report["expert_bytes"]:
        share = 100 * report["expert_bytes"] / max(1, report["bytes"])
        lines.append(f"  experts    {size(report['expert_bytes'])}, {share:.1f} % of the weights")
    by_dtype = ", ".join(f"{dtype} {size(nbytes)}" for dtype, nbytes in report["bytes_by_dtype"].items())
    lines += [
        f"  weights    {size(report['bytes'])} in {count(report['files'], 'file')}, "
        f"{report['tensors']:,} tensors ({by_dtype})",
        f"  quantized  {report['quantization'] or 'no'}",
        f"  other      {len(report['sidecars'])} files",
    ]
    lines += [f"  left out   {item['path']} ({size(item['bytes'])}): {item['why']}" for item in report["left_out"]]
    return "\n".join([*map(shown, lines), *(f"  problem    {problem}" for problem in report["problems"])])
