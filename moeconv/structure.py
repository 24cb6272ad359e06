"""What can be seen of a folder without reading its numbers: index, sizes, experts, and all that it says of itself."""

from __future__ import annotations

import hashlib
import threading
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

from moeconv.checkpoint import MANIFEST, Checkpoint
from moeconv.claims import (
    check_embeddings,
    check_layers,
    check_manifest,
    check_quantization,
    check_silence,
    files_told,
)
from moeconv.encoded import is_readable
from moeconv.engines import Reading, format_readings, readings
from moeconv.errors import Problem
from moeconv.files import Files
from moeconv.layouts import Found, find_units
from moeconv.looking import Hand, in_threads
from moeconv.matching import seen
from moeconv.names import collapse
from moeconv.plan import default_jobs
from moeconv.recipe import Recipe
from moeconv.recipe_file import load_recipe
from moeconv.units import Unit

_HASHED_NBYTES = 1 << 20


class Structure(NamedTuple):
    """A folder without its numbers.

    Attributes:
        problems: what is off.
        view: the folder in full precision.
        experts: names of tensors that are experts, in the view and as stored.
        formats: in which matrices are stored.
        readings: which engines read such a folder.
        notes: what could not be looked at.
        is_known: experts and quantized matrices are what they should be, so that numbers can be looked at.
        is_unread: its quantized matrices cannot be decoded here.
    """

    problems: tuple[Problem, ...]
    view: Checkpoint
    experts: frozenset[str]
    formats: tuple[str, ...]
    readings: tuple[Reading, ...]
    notes: tuple[str, ...]
    is_known: bool
    is_unread: bool


def check_structure(folder: Checkpoint, recipe: Recipe, files: Files, *, digests: bool) -> Structure:
    """Check what headers, config.json and moeconv.json tell.

    Args:
        folder: as opened, which has refused holes, overlaps and files of other sizes.
        recipe: how its experts are stored.
        files: door to the file system.
        digests: also hash whole files of which moeconv.json has a sha256.
    """
    problems: list[Problem] = []
    if folder.index_total_size is not None and folder.index_total_size != folder.nbytes:
        problems.append(
            Problem(
                f"the index says total_size {folder.index_total_size:,}; the tensors have {folder.nbytes:,} bytes",
                "Convert again: the index does not belong to these files.",
            )
        )
    if not folder.config:
        problems.append(
            Problem(f"{folder.root} has no config.json", "Copy it from the source: no engine loads without.")
        )
    view, own, unread = _seen(folder, recipe)
    found = _found(view, own)
    is_made = isinstance(folder.manifest.get("scheme"), dict)
    can_only_be_moved = not is_readable(folder.config) or (bool(folder.manifest) and not is_made)
    if unread and can_only_be_moved:
        view, own, found = folder, recipe, _found(folder, recipe)
    unknown = _collapsed(unread)[:3] if can_only_be_moved else []
    notes = [f"quantized numbers are not looked at: {problem.message}" for problem in unknown]
    if unread and not can_only_be_moved:
        problems += list(check_silence(folder)) or _collapsed(unread)
    problems += found.faults if not unread or can_only_be_moved else ()
    is_known = not found.faults and (not unread or can_only_be_moved)
    units = [unit for unit in found.units if set(unit.component.parts) & set(own.part_ids)]
    formats = tuple(sorted({t.encoded.format.name for t in view.tensors.values() if t.encoded}))
    problems += check_layers(folder, own, units)
    problems += check_embeddings(view)
    if not unread:
        problems += check_quantization(folder, view)
    problems += check_manifest(folder, formats, is_known=not unread)
    if digests and not problems:
        problems += check_digests(folder, files)
    # A sum of sizes (E+Z) is room for experts that compute nothing, which may be zero.
    hits = [hits for unit in units for rule, hits in unit.hits if rule.claim and len(rule.claim[0].symbols()) < 2]
    names = frozenset(tensor.spec.name for found_in in hits for tensor in found_in.values())
    return Structure(
        tuple(dict.fromkeys(problems)), view, names, formats, _readings(folder, recipe, units, formats), tuple(notes),
        is_known, bool(unread),
    )  # fmt: skip


def _seen(folder: Checkpoint, recipe: Recipe) -> tuple[Checkpoint, Recipe, list[Problem]]:
    """The folder in full precision with the recipe that is for it then, and what of it cannot be read."""
    problems: list[Problem] = []
    view = seen(folder, recipe, problems)
    return view, load_recipe(recipe.decoded) if recipe.decoded else recipe, problems


def _found(view: Checkpoint, recipe: Recipe) -> Found:
    """Experts, in the layout that moeconv.json tells of where shapes fit several."""
    found = find_units(view, recipe)
    said = view.manifest.get("layout")
    if found.faults and isinstance(said, str) and said in recipe.layouts:
        other = find_units(view, recipe, said)
        return found if other.faults else other
    return found


def _collapsed(problems: Sequence[Problem]) -> list[Problem]:
    """What is wrong with a source, as what is wrong with a result: the same of many modules once."""
    groups: dict[str, list[str]] = {}
    for problem in problems:
        name, colon, what = problem.message.partition(": ")
        is_name = bool(colon) and " " not in name
        groups.setdefault(what if is_name else "", []).append(name if is_name else problem.message)
    remedy = "Restore the file from where the folder was made, or convert again."
    lines = [f"{line}: {what}" if what else line for what, names in groups.items() for line in collapse(names)]
    return [Problem(line, remedy) for line in lines]


def _readings(folder: Checkpoint, recipe: Recipe, units: Sequence[Unit], formats: Sequence[str]) -> tuple[Reading, ...]:
    """What engines make of such a folder, as far as it is known."""
    if formats:
        return format_readings(folder.config, formats)
    if not units:
        return ()
    layout = Counter(unit.layout for unit in units).most_common(1)[0][0]
    shapes = [tensor.spec.shape for unit in units for tensor in unit.tensors()]
    return readings(recipe, folder.config, layout, shapes)


def check_digests(folder: Checkpoint, files: Files) -> list[Problem]:
    """Whole files have the sha256 that moeconv.json tells of."""
    told = [(str(e["path"]), e["sha256"]) for e in files_told(folder.manifest) if e.get("sha256") and e.get("path")]
    hashing = _Hashing(folder, files)
    if told:
        in_threads(default_jobs(None, len(told)), told, lambda: _HashingHand(hashing))
    return sorted(hashing.problems)


class _Hashing:
    def __init__(self, folder: Checkpoint, files: Files) -> None:
        self.folder = folder
        self.files = files
        self.lock = threading.Lock()
        self.problems: list[Problem] = []


class _HashingHand(Hand[tuple[str, object]]):
    """Hashes one file after another."""

    def __init__(self, whole: _Hashing) -> None:
        self._whole = whole
        self._buffer = bytearray(_HASHED_NBYTES)

    def take(self, item: tuple[str, object]) -> None:
        path, wanted = item
        whole = self._whole.folder.root / path
        nbytes = self._whole.files.stat(whole).nbytes
        digest = hashlib.sha256()
        file = self._whole.files.open_read(whole)
        try:
            for at in range(0, nbytes, _HASHED_NBYTES):
                content = memoryview(self._buffer)[: min(_HASHED_NBYTES, nbytes - at)]
                file.read_into(content, at)
                digest.update(content)
        finally:
            file.close()
        if digest.hexdigest() != wanted:
            with self._whole.lock:
                self._whole.problems.append(
                    Problem(
                        f"{whole} is not the file that was written: its sha256 is not the one in {MANIFEST}",
                        "Copy it again from where it was made, or convert again; if it happens twice, check the disk.",
                    )
                )

    def close(self) -> None:
        pass
