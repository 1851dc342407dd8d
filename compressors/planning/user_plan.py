"""Plans that an earlier run wrote and a user may have edited: read, and held against the model.

Of a matrix only name, shape, form and its sizes matter; whatever else there is is passed over.
"""

import json
from bisect import bisect_left
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lrc.compressors.layers import FORMS, Scheme, Sizes
from lrc.compressors.methods.table import METHODS
from lrc.compressors.planning.quantization import WHOLE
from lrc.compressors.planning.weight_groups import Unit

SHOWN = 10
MAX_BYTES = 10**8
"""Half a kilobyte a matrix: what is larger than this is another file, named by mistake."""


@dataclass(frozen=True)
class Entry:
    """What a plan file says of one matrix."""

    shape: tuple[int, int]
    form: str
    sizes: Sizes | None
    scheme: str | None


@dataclass(frozen=True)
class GivenPlan:
    """A plan file: its name, its text, and an entry a matrix."""

    path: str
    text: str
    entries: dict[str, Entry]


def read_given(path: str, where: str, problems: list[str]) -> GivenPlan | None:
    """Read a plan file; None if it is none, with the reason among the problems."""
    remedy = "name the plan.json that an earlier run of lrc compress wrote"
    try:
        with Path(path).expanduser().open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        problems.append(f"{where}.plan: {path} cannot be read: {reason}; {remedy}")
        return None
    try:
        if len(data) > MAX_BYTES:
            raise ValueError(f"larger than {MAX_BYTES:,} bytes")
        text = data.decode("utf-8")
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        problems.append(f"{where}.plan: {path} is not JSON ({error}); {remedy}")
        return None
    matrices = value.get("matrices") if isinstance(value, dict) else None
    if not isinstance(matrices, list):
        problems.append(f"{where}.plan: {path} holds no list 'matrices'; {remedy}")
        return None
    entries: dict[str, Entry] = {}
    found: list[str] = []
    for number, record in enumerate(matrices):
        name = record.get("name") if isinstance(record, dict) else None
        if not isinstance(name, str):
            found.append(f"{path}, matrices[{number}]: has no 'name'; {remedy}")
        elif name in entries:
            found.append(f"{path}, {name}: is there twice; delete one of the two")
        else:
            entry = _entry(record, f"{path}, {name}", found)
            if entry is not None:
                entries[name] = entry
    outside = value.get("outside", [])
    if not isinstance(outside, list) or not all(
        isinstance(each, dict) and {"name", "scheme", "form"} <= each.keys() for each in outside
    ):
        found.append(f"{path}, outside: must be as lrc wrote it, got {outside!r:.60}; {remedy}")
    problems += _first(found, path)
    return None if found else GivenPlan(path, text, entries)


def refuse_strangers(
    plan: GivenPlan, targeted: Collection[str], names: Collection[str], problems: list[str]
) -> None:
    """Refuse matrices that no stage targets, or that the model does not have."""
    found = []
    for name in plan.entries:
        if name not in names:
            found.append(
                f"{plan.path}, {name}: is no linear of a decoder layer of this model; give the "
                "plan of a run on the same architecture"
            )
        elif name not in targeted:
            found.append(
                f"{plan.path}, {name}: is targeted by no stage; delete it there, or change "
                "'targets' and 'ignore'"
            )
    problems += _first(found, plan.path)


def apply_given(plan: GivenPlan, units: Iterable[Unit], problems: list[str]) -> list[Unit]:
    """Give units the forms and ranks of a plan file; those with a problem stay dense."""
    decided: list[Unit] = []
    found: list[str] = []
    for unit in units:
        before = len(found)
        asked = [_checked(plan, unit, number, found) for number in range(len(unit.members))]
        entries = [entry for entry in asked if entry is not None]
        if any(entry.sizes != entries[0].sizes for entry in entries):
            form = FORMS[unit.first.form]
            got = [form.written(*e.shape, e.sizes) if e.sizes else "dense" for e in entries]
            found.append(
                f"{plan.path}, {unit.first.name}: must have the same {' and '.join(form.SIZES)} as "
                f"the {len(entries) - 1} that share its factor, got {', '.join(got)}; make them "
                "equal"
            )
        if len(found) > before:
            decided.append(unit.dense())
        elif entries[0].sizes is None:
            decided.append(unit.dense(note="dense in the given plan"))
        elif len(entries) == 1:
            decided.append(_as_given(unit, entries[0]).at(entries[0].sizes))
        else:
            decided.append(unit.at(entries[0].sizes))
    problems += _first(found, plan.path)
    return decided


def _as_given(unit: Unit, entry: Entry) -> Unit:
    """Return a unit in the form of an entry, its numbers as integers where the entry says so.

    The scheme of what a `quantize` rounds is in plan files too: that stage has the last word on it.
    """
    there = unit.in_form(entry.form)
    own = METHODS[unit.first.method].chooses_schemes
    return there.in_scheme(entry.scheme) if own and entry.scheme is not None else there


def _entry(record: dict[str, Any], where: str, found: list[str]) -> Entry | None:
    shape, form, rank, scheme = (record.get(key) for key in ("shape", "form", "rank", "scheme"))
    if form in WHOLE and record.get("rounded") != record.get("stage"):
        form, rank, scheme = "dense", None, None  # as the stage left it whose plan this is
    sides = shape if isinstance(shape, list) else []
    names = FORMS[form].SIZES if isinstance(form, str) and form in FORMS else ()
    sizes: dict[str, Any] = {name: record.get(name) for name in names}
    wrong = next((name for name, size in sizes.items() if not _whole(size)), None)
    problem = None
    if len(sides) != 2 or not all(_whole(side) for side in sides):
        problem = f"shape must be [d_out, d_in], got {shape!r:.60}; copy it from an unedited plan"
    elif form not in ("dense", *FORMS):
        problem = f"form must be one of dense, {', '.join(FORMS)}, got {form!r:.60}; correct it"
    elif form == "dense" and rank is not None:
        problem = f"a dense matrix has the rank null, got {rank!r:.60}; correct form or rank"
    elif wrong is not None:
        got = f"{record.get(wrong)!r:.60}"
        problem = f"{wrong} must be a whole number for {form}, got {got}; give one, or dense"
    elif form in WHOLE and scheme is None:
        problem = f"scheme must be written like int8 or int4-g64 for {form}, got null; correct it"
    elif form == "dense" and scheme is not None:
        problem = f"a dense matrix has the scheme null, got {scheme!r:.60}; correct form or scheme"
    elif record.get("scheme") is not None:
        problem = _unlike_scheme(record["scheme"])
    if problem:
        found.append(f"{where}: {problem}")
        return None
    return Entry((sides[0], sides[1]), str(form), None if form == "dense" else sizes, scheme)


def _unlike_scheme(scheme: Any) -> str | None:
    if not isinstance(scheme, str):
        return f"scheme must be written like int8 or int4-g64, got {scheme!r:.60}; correct it"
    try:
        Scheme.read(scheme)
    except ValueError as error:
        return f"scheme {scheme}: {error}; correct it, or make it null"
    return None


def _checked(plan: GivenPlan, unit: Unit, number: int, found: list[str]) -> Entry | None:
    """Return what the plan says of one member, if that can be."""
    m = unit.members[number]
    entry, where = plan.entries.get(m.name), f"{plan.path}, {m.name}"
    if entry is None:
        found.append(f"{where}: is targeted but not there; add it, or list it under 'ignore'")
        return None
    if entry.shape != m.shape:
        found.append(
            f"{where}: must have the shape {list(m.shape)} of the model, got {list(entry.shape)}; "
            "give the plan of a run on the same model"
        )
        return None
    if entry.sizes is None:
        return entry
    method = METHODS[m.method]
    allowed = [m.form] if len(unit.members) > 1 else method.forms
    allowed = [*allowed, *(["integers"] if method.chooses_schemes else [])]
    if entry.form not in allowed:
        found.append(
            f"{where}: form must be dense or {' or '.join(allowed)} here, got {entry.form}; "
            "correct it, or change the method"
        )
        return None
    as_asked = unit if len(unit.members) > 1 else _as_given(unit, entry)
    problem = _beyond(as_asked, entry)
    if problem is not None:
        found.append(f"{where}: {problem}")
        return None
    return entry


def _beyond(unit: Unit, entry: Entry) -> str | None:
    """Say why a unit cannot have the sizes of an entry, or gains nothing by them."""
    assert entry.sizes is not None
    if not entry.sizes:  # integers: there is but their scheme
        return _beyond_scheme(unit)
    shape, last = [*unit.first.shape], list(entry.sizes)[-1]
    try:
        spec = {**entry.sizes, "pattern": unit.first.pattern}
        FORMS[entry.form].check_pattern(*unit.first.shape, spec)
    except ValueError as error:
        return f"{error}; correct it, or make it dense"
    largest = unit.sizes_at(unit.largest_step)
    for name, size in entry.sizes.items():
        if not 1 <= size <= largest[name]:
            return (
                f"{name} must be in [1, {largest[name]}] for {shape}, got {size}; lower it, or "
                "make it dense"
            )
    try:
        bits = unit.bits(entry.sizes)
    except ValueError as error:  # sizes that do not go together
        remedy = "correct it" if unit.first.scheme is None else "correct sizes or scheme"
        return f"{error}; {remedy}, or make it dense"
    if bits < unit.source_bits:
        return None
    sizes = entry.sizes
    group = None if unit.first.scheme is None else Scheme.read(unit.first.scheme).group_size
    step = group if group is not None and last == "rank" else 1
    fits = step * bisect_left(
        range(step, sizes[last], step),
        unit.source_bits,
        key=lambda size: unit.bits({**sizes, last: size}),
    )
    remedy = f"lower {last} to at most {fits}, or " if fits else ""
    if not fits and len(sizes) > 1:  # the other sizes alone cost too much
        remedy = f"lower {' and '.join(sizes)}, or "
    return (
        f"{entry.form} of {last} {sizes[last]} takes as much as the dense matrix; {remedy}"
        "make it dense"
    )


def _beyond_scheme(unit: Unit) -> str | None:
    try:
        smaller = unit.bits({}) < unit.source_bits
    except ValueError as error:
        return f"{error}; correct the scheme, or make it dense"
    if smaller:
        return None
    return (
        f"integers of {unit.first.scheme} take as much as the dense matrix; give another scheme, "
        "or make it dense"
    )


def _first(found: list[str], path: str) -> list[str]:
    """Keep a page of problems, and count the rest: a plan of another model is wrong everywhere."""
    if len(found) <= SHOWN:
        return found
    return [*found[:SHOWN], f"{path}: and {len(found) - SHOWN} problems more"]


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
