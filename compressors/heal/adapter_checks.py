"""Checks of the options of adapters before anything runs, and the bytes that adapters add."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from lrc.compressors.heal.adapted_matrices import FloatMatrix
from lrc.compressors.heal.adapter_kinds import ADAPTERS
from lrc.compressors.heal.added_components import takes_component, with_component
from lrc.compressors.methods.base import LOW_RANK_TYPES
from lrc.compressors.planning.compile import Draft
from lrc.compressors.planning.tasks import LayerTask

MATRIX_TYPES = {"dense", "dictionary", "tensor_train", *LOW_RANK_TYPES}
"""Component types with a matrix whose entries are all stored."""


def added_bytes(draft: Draft, options: Any) -> int:
    """Return how many bytes the low-rank components add that are stored with `merge: false`.

    While an allocation is pending, that is an upper limit.
    """
    if getattr(options, "merge", True):
        return 0
    bits = 0
    for task in _taking(draft):
        m, n = task.shape
        bits += min(options.adapter_rank, m, n) * (m + n) * draft.number_bits
    return bits // 8


def check_merge(draft: Draft, where: str, options: Any) -> None:
    """Report `merge: false` where no component can be added, or one saves nothing."""
    if getattr(options, "merge", True):
        return
    taking = _taking(draft)
    if draft.timed:
        draft.problems.add(
            "conflicting-keys",
            f"{where}.merge",
            "must be true in a recipe with a budget in time, which added components would exceed, "
            "got false; remove it",
        )
    elif not taking:
        draft.problems.add(
            "nothing-to-train",
            f"{where}.merge",
            "must be true without integers that a component can be added to, got false; remove it",
        )
    for task in [] if draft.timed else taking:
        bits = task.bits_of(with_component(task.config, options.adapter_rank))
        if task.pending or bits < task.dense_bits:
            continue
        draft.problems.add(
            "no-saving",
            f"{where}.rank",
            f"must leave {task.name} {list(task.shape)} smaller than its {task.dense_bits // 8:,} "
            f"bytes, got {options.adapter_rank}, which results in {bits // 8:,} bytes; lower it, "
            "or remove 'merge'",
        )


def check_elastic(draft: Draft, where: str, options: Any) -> None:
    """Report adapters of factors that have several budgets, of which training cuts some."""
    if draft.elastic:
        draft.problems.add(
            "contradiction",
            f"{where}.train",
            f"must not train adapters after a stage with 'elastic', got {options.train}; use "
            "another value, such as factors, or replace elastic by 'keep'",
        )


def _taking(draft: Draft) -> list[LayerTask]:
    """Return the tasks whose weight gets a component, or may get one while it is pending."""
    tasks = {id(task): task for task in draft.tasks.values() if len(task.weights) == 1}
    return [
        task
        for task in tasks.values()
        if (_may_have_integers(draft, task) if task.pending else takes_component(task.config))
    ]


def _may_have_integers(draft: Draft, task: LayerTask) -> bool:
    assert task.allocation is not None
    later = task.quantize is not None and task.quantize.args is not None
    return later or bool(draft.allocations[task.allocation].quantization)


@dataclass(frozen=True)
class Form:
    """What a compressed weight may become."""

    shape: tuple[int, int]
    types: set[str]
    """Component types that it may have."""
    quantized: bool
    """Whether it may be quantized."""


def _any_form(form: Form, options: Any) -> bool:
    """Return whether a form has a matrix, or values of masks in 16 bits."""
    return not form.quantized or not form.types.isdisjoint(MATRIX_TYPES)


def _divisible_matrix(form: Form, options: Any) -> bool:
    """Return whether a form has a 16-bit matrix with a side that the number of terms divides.

    The other side may be a rank that is not known yet.
    """
    exact = not (form.quantized or form.types.isdisjoint(MATRIX_TYPES))
    return exact and any(side % options.terms == 0 for side in form.shape)


ABSORBING: dict[str, Callable[[Form, Any], bool]] = {
    "lora": _any_form,
    "compacter": _divisible_matrix,
}
"""Value of `train` -> whether compressed weights of some form may get its adapters."""


def finds_adaptable(draft: Draft, options: Any, compressed: Iterable[Form]) -> bool:
    """Return whether a value of `train` that trains adapters may find matrices.

    `compressed` are the forms of the compressed weights.
    """
    of = draft.architecture.model.get_submodule
    dense = {
        f"{linear.name}.weight": FloatMatrix(of(linear.name))
        for linear in draft.architecture.linears
        if _may_stay_dense(draft, draft.tasks.get(linear.name))
    }
    if ADAPTERS[options.train](draft.architecture.model, dense, options):
        return True
    absorbs = ABSORBING.get(options.train)
    return absorbs is not None and any(absorbs(form, options) for form in compressed)


def _may_stay_dense(draft: Draft, task: LayerTask | None) -> bool:
    if task is None or not task.pending:
        return task is None or not task.compressed
    return not _may_have_integers(draft, task)
