"""Plans for a chain of linears, whose weights are compressed layer by layer."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.nn.functional import leaky_relu

from lrc.compressors.compress.group import stored_weight
from lrc.compressors.compress.layerwise import compress_layers, layer_file
from lrc.compressors.io.journal import Journal
from lrc.compressors.layers import ComponentConfig, WeightConfig
from lrc.compressors.methods.table import METHODS
from lrc.compressors.planning.plan import ModelInfo, Plan
from lrc.compressors.planning.tasks import Compensation, LayerTask, Weight
from lrc.compressors.solvers.error_compensation import PrefixMoments

LAYERS, WIDTH, TOKENS = 3, 12, 200
OPTIONS = {"damp": 1e-6, "gradient_damp": 0.1, "alpha": 0.5, "rounds": 15}
NAMES = [f"layers.{layer}.{leaf}" for layer in range(LAYERS) for leaf in ("in", "out")]
BOTH = Compensation(mix=0.5, residual=0.5, damp=0.0)


class Weights:
    """Replaces a `WeightReader`: weights and biases in float32, by name."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self.tensors = tensors

    def read(self, name: str, *, device: str = "cpu") -> Tensor:
        return self.tensors[name].clone()


@dataclass
class Chain:
    """A `Prefix` over layers of two linears that add to a stream, and a nonlinearity between."""

    weights: dict[str, Tensor]
    tokens: Tensor
    log: list[Any] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.dense, self.now = self.tokens.double(), self.tokens.double()
        self.replaced: dict[str, Tensor] = {}
        self.capped: set[bool] = set()

    def groups(self, layer: int) -> list[list[str]]:
        return [[f"layers.{layer}.in"], [f"layers.{layer}.out"]]

    def inputs(self, layer: int, name: str) -> tuple[Tensor, Tensor]:
        if name.endswith(".in"):
            return self.dense, self.now
        before = f"layers.{layer}.in"
        return self.dense @ self._was(before).T, self.now @ self._is(before).T

    def measure(
        self,
        layer: int,
        names: Sequence[str],
        *,
        deficit: bool,
        capped: bool,
        last: bool,
        **_: bool,
    ) -> PrefixMoments:
        assert last == names[0].endswith(".out")
        self.log.append(("measure", *names))
        self.capped.add(capped)
        X, now = self.inputs(layer, names[0])
        writes = deficit and names[0].endswith(".out")
        lacking = {names[0]: (self.dense - self.now).T @ now} if writes else {}
        return PrefixMoments(now.T @ now, X.T @ now, lacking)

    def insert(self, name: str, W_hat: Tensor) -> None:
        self.log.append(("replace", name))
        self.replaced[name] = W_hat.double()

    def advance(self, layer: int) -> None:
        self.log.append(("advance", layer))
        X, now = self.inputs(layer, f"layers.{layer}.out")
        last = f"layers.{layer}.out"
        self.dense = leaky_relu(self.dense + X @ self._was(last).T, 0.5)
        self.now = leaky_relu(self.now + now @ self._is(last).T, 0.5)

    def _was(self, name: str) -> Tensor:
        return self.weights[f"{name}.weight"].double()

    def _is(self, name: str) -> Tensor:
        return self.replaced.get(name, self._was(name))


def task_of(
    *names: str, method: str, types: str = "low_rank", rank: int | None = 4, **changes: Any
) -> LayerTask:
    """Return a task with factors of a rank; dense without one."""
    options = METHODS[method].options
    sizes = () if rank is None else (ComponentConfig(types, {"rank": rank}),)
    bias = rank is not None and METHODS[method].has_bias
    return LayerTask(
        weights=tuple(Weight(name, int(name.split(".")[1])) for name in names),
        config=WeightConfig((WIDTH, WIDTH), sizes, bias),
        number_bits=32,
        stage=0,
        method=method,
        types=types,
        options={name: OPTIONS[name] for name in options},
        statistics=tuple(METHODS[method].statistics),
        **changes,
    )


def plan_with(tasks: Sequence[LayerTask], **changes: Any) -> Plan:
    info = ModelInfo("s", "float32", "Chain", 0, 0, None, False)
    return Plan(info, 0, {}, [*tasks], **changes)


def plan_of(method: str, **changes: Any) -> Plan:
    return plan_with([task_of(name, method=method, **changes) for name in NAMES])


def run(
    plan: Plan, folder: Path, reader: Weights, statistics: Any, **options: Any
) -> tuple[Plan, Journal]:
    journal = Journal(folder)
    on_step = options.pop("on_step", lambda *_: None)
    arguments: Any = (plan, reader, journal, statistics)
    return compress_layers(*arguments, device="cpu", on_step=on_step, **options), journal


def stored(plan: Plan, journal: Journal) -> Callable[[str], Tensor]:
    owners = plan.owner_layers()

    def read(key: str) -> Tensor:
        name = next(name for name in owners if key.startswith(f"{name}."))
        return journal.read_tensor(layer_file(owners[name]), key)

    return read


def weight_of(plan: Plan, name: str, journal: Journal) -> Tensor:
    """Return the weight that the tensors in the journal represent."""
    task = next(t for t in plan.tasks if name in [w.name for w in t.weights])
    return stored_weight(task, plan.results[task.name], name, stored(plan, journal))
