"""How much of the calibration text reaches the experts of a model, expected and measured."""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

from lrc.compressors.models.architecture import Architecture
from lrc.compressors.planning.plan import Experts, Plan
from lrc.compressors.planning.problems import Problems
from lrc.compressors.planning.tasks import LayerTask
from lrc.compressors.solvers.moments import needed_tokens
from lrc.configs.errors import DataError

MOST = 0.5
"""Fraction of starved experts above which a run is refused."""


@dataclass(frozen=True)
class Coverage:
    """Calibration tokens of the experts of all layers."""

    experts: int
    """Number of experts whose tokens were counted."""
    tokens_min: int
    tokens_median: int
    needed: int
    """Tokens below which an expert is starved, see `needed_tokens`."""
    starved: int

    @property
    def text(self) -> str:
        """The numbers in words."""
        return (
            f"calibration tokens of an expert: at least {self.tokens_min:,}, median "
            f"{self.tokens_median:,}; {self.starved} of {self.experts} received fewer than the "
            f"{self.needed:,} needed, and use a fallback"
        )


def measured_coverage(counts: Mapping[str, tuple[int, int]]) -> Coverage | None:
    """Summarize how many tokens each linear of an expert received, and how many it needs."""
    received: dict[str, int] = {}
    needed: dict[str, int] = {}
    for name, (tokens, enough) in counts.items():
        expert = name.rpartition(".")[0]
        received[expert] = tokens
        needed[expert] = max(needed.get(expert, 0), enough)
    if not received:
        return None
    return Coverage(
        experts=len(received),
        tokens_min=min(received.values()),
        tokens_median=int(median(received.values())),
        needed=max(needed.values()),
        starved=sum(received[expert] < needed[expert] for expert in received),
    )


def plan_coverage(plan: Plan) -> Coverage | None:
    """Return the coverage that the results of a plan record; None if no statistics were needed."""
    counts = {}
    for task in plan.tasks:
        result = plan.results.get(task.name)
        if result is not None and result.n_tokens is not None:
            received = result.n_tokens
            each = received if isinstance(received, tuple) else (received,)
            for weight, count in zip(task.weights, each, strict=True):
                counts[weight.name] = count, needed_tokens(task.shape[1])
    return measured_coverage(counts)


def refuse_starved(coverage: Coverage | None, tokens: int) -> None:
    """Raise a `DataError` if most experts received too few of the calibration tokens."""
    if coverage is None or coverage.starved <= MOST * coverage.experts:
        return
    raise DataError(
        f"calibration: {coverage.starved} of {coverage.experts} experts received fewer than "
        f"{coverage.needed:,} of {tokens:,} tokens (median {coverage.tokens_median:,}), and would "
        "not be compressed as planned; raise calibration.samples or calibration.length, use a "
        "text that resembles the use of the model, or a method without statistics (svd, or "
        "quantize with method: rtn)",
        code="starved-experts",
    )


def describe_experts(architecture: Architecture, tasks: Iterable[LayerTask]) -> Experts | None:
    """Return the experts of a model; None if it has none."""
    layers = architecture.experts
    if not layers:
        return None
    of_experts = {linear.name for linear in architecture.linears if linear.expert is not None}
    needed = [
        needed_tokens(task.shape[1])
        for task in tasks
        if task.statistics and task.name in of_experts
    ]
    numbers, selected = zip(*layers.values(), strict=True)
    return Experts(len(layers), max(numbers), min(selected), max(needed, default=0))


def check_expected(experts: Experts | None, tokens: int, problems: Problems) -> None:
    """Report a calibration text with too few tokens even if all experts receive the same number."""
    if experts is None or experts.expected(tokens) >= experts.needed:
        return
    wanted = -(-experts.needed * experts.experts // experts.per_token)
    problems.add(
        "starved-experts",
        "calibration",
        f"must have {wanted:,} tokens or more, got {tokens:,} (samples x length): each expert "
        f"receives {experts.expected(tokens):,.0f} of them on average, and its statistics need "
        f"{experts.needed:,}; raise samples or length, or use a method without statistics (svd, "
        "or quantize with method: rtn)",
    )


def coverage_json(plan: Plan) -> dict[str, Any] | None:
    """Return the record of the report; None for a model without experts."""
    if plan.experts is None:
        return None
    found = plan_coverage(plan)
    return {
        "layers": plan.experts.layers,
        "per_layer": plan.experts.experts,
        "per_token": plan.experts.per_token,
        "coverage": None if found is None else asdict(found),
    }
