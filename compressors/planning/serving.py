"""Which weights of a plan serving engines cannot read without lrc, or have no kernels for."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from torch import nn

from lrc.compressors.io.shortened import shortened
from lrc.compressors.models.architecture import Architecture
from lrc.compressors.planning.fused_layers import fused_groups
from lrc.compressors.planning.measures import Latency
from lrc.compressors.planning.plan import Allocation, SliceRecord, TrainingRecord
from lrc.compressors.planning.problems import Problems
from lrc.compressors.planning.tasks import LayerTask
from lrc.configs.engines import ENGINES, Engine


@dataclass(frozen=True)
class PlannedWeights:
    """What of a plan decides who can read its checkpoint.

    Parameters
    ----------
    architecture : Architecture
    tasks, embeddings : sequence of LayerTask
    allocations : sequence of Allocation
        Of the pending tasks.
    """

    architecture: Architecture
    tasks: Sequence[LayerTask]
    embeddings: Sequence[LayerTask]
    allocations: Sequence[Allocation]

    @property
    def plain_integers(self) -> bool:
        """Whether the checkpoint has integers, and engines may read it without lrc."""
        model = self.architecture.model
        heads = (model.get_submodule(task.name) for task in self.embeddings)
        return (
            any(task.compressed for task in self.tasks)
            and all(isinstance(head, nn.Linear) for head in heads)
            and not any(self.other_forms)
        )

    @property
    def other_forms(self) -> dict[str, list[LayerTask]]:
        """Component types that only lrc reads, or may be chosen, and the tasks that have them."""
        found: dict[str, list[LayerTask]] = {}
        for task in self.tasks:
            if task.compressed and not self._is_plain(task):
                found.setdefault(self._form(task), []).append(task)
        return found

    @cached_property
    def _of_experts(self) -> frozenset[str]:
        """Weights that the file of a dense model has for all experts of a layer at once."""
        return frozenset(each.name for each in self.architecture.linears if each.expert is not None)

    def _is_plain(self, task: LayerTask) -> bool:
        if task.name in self._of_experts:
            return False
        if task.allocation is not None:
            allocation = self.allocations[task.allocation]
            schemes = allocation.quantization
            return bool(schemes) and not allocation.types and all(s.symmetric for s in schemes)
        return task.config.plain_integers

    def _form(self, task: LayerTask) -> str:
        if task.name in self._of_experts:
            return "compressed experts"
        if task.allocation is not None:
            return " or ".join(self.allocations[task.allocation].types) or "integers"
        scheme = task.config.quantization
        return f"{scheme} {task.config.types}" if scheme else task.config.types

    @property
    def schemes(self) -> dict[str, list[str]]:
        """Integer formats, or those that may be chosen, and the weights that may have them."""
        found: dict[str, list[str]] = {}
        for task in self.tasks:
            if task.allocation is not None:
                schemes = [str(each) for each in self.allocations[task.allocation].quantization]
            else:
                scheme = task.config.quantization
                schemes = [] if scheme is None else [str(scheme)]
            for each in schemes:
                found.setdefault(each, []).extend(w.name for w in task.weights)
        return found

    @property
    def unequal_groups(self) -> list[list[str]]:
        """Groups of fused layers with different formats, or of which only some are integers.

        Within one allocation, fused layers get the same format.
        """
        formats = {
            weight.name: f"allocation {task.allocation}"
            if task.pending
            else task.config.quantization
            for task in self.tasks
            for weight in task.weights
        }
        names = [each.name for each in self.architecture.linears]
        return [
            group for group in fused_groups(names) if len({formats.get(name) for name in group}) > 1
        ]

    def odd_shapes(self, multiple: int) -> list[str]:
        """Return layers of integers whose inputs, or outputs with those fused, are no multiple."""
        shapes = {w.name: t.shape for t in self.tasks if t.compressed for w in t.weights}
        groups = fused_groups(shapes)
        single = {*shapes} - {name for group in groups for name in group}
        return [
            f"{group[0]} {list(shapes[group[0]])}"
            for group in [*groups, *([name] for name in shapes if name in single)]
            if sum(shapes[name][0] for name in group) % multiple or shapes[group[0]][1] % multiple
        ]


def serving_warnings(weights: PlannedWeights) -> list[str]:
    """Return what serving engines refuse of a plain checkpoint of integers.

    Formats are those of vLLM on GPUs; on CPUs it has fewer kernels, see `serve`.
    """
    warnings = []
    if groups := weights.unequal_groups:
        warnings.append(
            f"stages: {_leaves(groups[0])} do not all get the same integer format ({len(groups)} "
            "such groups); serving engines that fuse these layers refuse the checkpoint: target "
            "all of a group with the same 'bits', or none"
        )
    engine = ENGINES["vllm"]
    wrong = {s: names for s, names in weights.schemes.items() if s not in engine.schemes}
    if wrong:
        names = [*dict.fromkeys(name for each in wrong.values() for name in each)]
        warnings.append(
            f"stages: {engine.title} has no kernel for {', '.join(wrong)} and will not load "
            f"{shortened(names, ', ')} without lrc; 'serve: vllm' allows only what it loads"
        )
    return warnings


def check_served(
    served: Mapping[str, str],
    weights: PlannedWeights,
    slices: Iterable[SliceRecord],
    training: Iterable[TrainingRecord],
    problems: Problems,
) -> None:
    """Report what the engine that a stage names in `serve` cannot read.

    Parameters
    ----------
    served : mapping of str to str
        Path of a key `serve` -> its value.
    weights : PlannedWeights
    slices, training : iterable
        Records of the plan.
    problems : Problems
        Which the function adds to.
    """
    for where, key in served.items():
        engine = ENGINES[key]
        for text in [*_whole_model(slices, training, weights), *_layers(engine, weights)]:
            problems.add("not-servable", where, f"{text}, or remove 'serve: {key}'")


def _whole_model(
    slices: Iterable[SliceRecord], training: Iterable[TrainingRecord], weights: PlannedWeights
) -> list[str]:
    """Return what gives a checkpoint that only lrc reads, apart from layers."""
    found = [
        f"needs a model that config.json describes, got {key}: {value} in stages[{each.stage}]"
        ".slice; remove that key"
        for each in slices
        for key, value in (("uniform", False), ("rotations", "block"))
        if each.options.get(key) == value
    ]
    found += [
        f"needs whole matrices, got low-rank components that stages[{each.stage}].heal adds; "
        "remove 'merge: false' there"
        for each in training
        if each.added_bytes
    ]
    # Times of different formats need not order those of fused layers alike, so these are not tied.
    found += [
        f"needs a budget in bits, got measure: latency in stages[{each.stage}].decompose; change it"
        for each in weights.allocations
        if isinstance(each.measure, Latency)
    ]
    found += [
        f"needs a dense embedding and head, got {task.name} quantized by stages[{task.stage}]; "
        "leave out 'embeddings' and 'lm_head' there"
        for task in weights.embeddings
    ]
    return found


def _layers(engine: Engine, weights: PlannedWeights) -> list[str]:
    """Return what an engine cannot read of the layers."""
    found = [
        f"needs dense weights or whole matrices of symmetric integers, got {form} of "
        f"{shortened([task.name for task in tasks], ', ')} from stages[{tasks[0].stage}]; list "
        "them under 'ignore' there"
        for form, tasks in weights.other_forms.items()
    ]
    if found:
        return found
    found += [
        f"needs formats for which {engine.title} has a kernel, {', '.join(engine.schemes)}, got "
        f"{scheme} of {shortened(names, ', ')}; choose one of them"
        for scheme, names in weights.schemes.items()
        if scheme not in engine.schemes
    ]
    if groups := weights.unequal_groups:
        found.append(
            f"needs the same format for all layers that {engine.title} fuses, got "
            f"{_leaves(groups[0])} with different ones, or integers and dense weights "
            f"({len(groups)} such groups); target all of a group with the same stage and the same "
            "'bits' and 'group_size', or none"
        )
    if odd := weights.odd_shapes(engine.multiple):
        found.append(
            f"needs integers with inputs and outputs that are multiples of {engine.multiple}, got "
            f"{shortened(odd, ', ')}; list them under 'ignore'"
        )
    return found


def _leaves(group: list[str]) -> str:
    """Return the names of fused layers and of the module that they are in."""
    parent = group[0].rpartition(".")[0]
    return f"{', '.join(name.rpartition('.')[2] for name in group)} of {parent}"
