"""Serving engines: the integers for which they have kernels."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field


@dataclass(frozen=True)
class Engine:
    """What a serving engine reads without lrc: dense weights, and symmetric integers."""

    title: str
    """For messages."""
    schemes: tuple[str, ...]
    """Integer formats that it multiplies by."""
    multiple: int = 1
    """Inputs and outputs of a layer of integers must be multiples of it."""


_GROUPS = ("", "-g32", "-g64", "-g128")
ENGINES = {
    # Marlin for compute capability 7.5 and later, which pads other shapes.
    "vllm": Engine("vLLM", tuple(f"int{bits}{group}" for bits in (4, 8) for group in _GROUPS)),
    # CPUWNA16, on x86-64.
    "vllm-cpu": Engine("vLLM on CPUs", tuple(f"int4{group}" for group in _GROUPS), 32),
}
"""Value of `serve` -> engine, in version 0.32 of vLLM; whatever loads in a later row loads in all
earlier ones."""

Serve = Annotated[
    Literal["vllm", "vllm-cpu"] | None,
    Field(
        description="Plan a checkpoint that vLLM loads without lrc: integers for which it has "
        "kernels, and the same format for layers that it fuses, such as q, k and v. `vllm`: on "
        "NVIDIA GPUs, 4 or 8 bits per row or in groups of 32, 64 or 128; `vllm-cpu`: 4 bits only."
    ),
]


def engine_problem(
    serve: str, schemes: Sequence[str], unsupported: Mapping[str, bool]
) -> str | None:
    """Return why options contradict `serve`; None if they do not.

    Parameters
    ----------
    serve : str
        Key of `ENGINES`.
    schemes : sequence of str
        Integer formats that the options request.
    unsupported : mapping of str to bool
        Other options, as a message shows them, and whether they give weights that only lrc reads.
    """
    engine = ENGINES[serve]
    other = next((words for words, given in unsupported.items() if given), None)
    if other is not None:
        return (
            f"serve: {serve} needs dense weights or whole matrices of symmetric integers, which "
            f"{engine.title} reads without lrc, got {other}; change it, or remove 'serve'"
        )
    wrong = [scheme for scheme in schemes if scheme not in engine.schemes]
    if wrong:
        return (
            f"serve: {serve} needs integer formats for which {engine.title} has a kernel, "
            f"{', '.join(engine.schemes)}, got {', '.join(wrong)}; choose among them, or remove "
            "'serve'"
        )
    return None
