"""Carry out the decomposition stages of a plan: weights in, factors on disk, layer by layer."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from lrc.compressors.compress.finalize import Done, product
from lrc.compressors.compress.quantize_parts import Rounding
from lrc.compressors.compress.solve import factor, refitted
from lrc.compressors.io.journal import Journal
from lrc.compressors.io.machine import OnStep
from lrc.compressors.models.weights import WeightReader
from lrc.compressors.planning.plan import Matrix, Plan, read_matrices, record_of
from lrc.compressors.planning.required_statistics import collected, compensation, method_needs
from lrc.compressors.planning.weight_groups import Unit, units_of
from lrc.compressors.solvers.error_compensation import PrefixMoments, refit_target
from lrc.compressors.solvers.moments import Moment, Statistics
from lrc.configs.decompose import Compensate
from lrc.configs.recipe import Recipe


class Prefix(Protocol):
    """The model up to a layer, twice: as it was, and as it has become."""

    def groups(self, layer: int) -> list[list[str]]:
        """Return the linears of a decoder layer that share an input, in the order of use."""

    def measure(self, layer: int, names: Sequence[str], *, deficit: bool) -> PrefixMoments:
        """Return the moments of a group's input, and what the residual stream lacks if asked."""

    def replace(self, name: str, W_hat: Tensor) -> None:
        """Put `W_hat` [d_out, d_in] in the place of a weight of the present layer."""

    def advance(self, layer: int) -> None:
        """Run a layer as it has become over X', and as it was over X."""


def decompose(
    plan: Plan,
    recipe: Recipe,
    reader: WeightReader,
    journal: Journal,
    statistics: Callable[[Matrix], Statistics],
    *,
    device: str,
    on_step: OnStep,
    prefix: Prefix | None = None,
    finished: Callable[[int], None] = lambda layer: None,
) -> Plan:
    """Factor every matrix of the plan and return the plan as it was executed.

    Parameters
    ----------
    plan : Plan
        With nothing pending.
    statistics : callable
        Returns what calibration knows of a matrix.
    on_step : callable
        Told (stage, layers done, layers) after each layer; what it raises stops the work there.
    prefix : Prefix, optional
        Needed where a stage compensates.
    finished : callable
        Told a layer whose statistics nobody will ask for again.

    Returns
    -------
    Plan
        With loss, rank and fallback of every matrix. The factors are in the journal, at the
        precision of the reference model, under the names the checkpoint will give them; those of
        matrices that share a factor in the file of the first one's layer.
    """
    work = _Work(plan, recipe, reader, journal, statistics, device)
    layers = sorted({m.layer for m in plan.matrices})
    compensated = [m.layer for m in plan.matrices if work.compensate(m) is not None]
    # What lies behind the last layer that has still to be refitted need not be known.
    last = max((i for i in compensated if not journal.has(factors_file(i))), default=-1)
    assert prefix is not None or last < 0
    records: list[Matrix] = []
    for index in range(max(layers[-1], last) + 1):
        follows = prefix if index <= last else None
        if index in layers:
            if not journal.has(factors_file(index)):
                work.write_layer(index, follows)
            elif follows is not None:
                work.restore(index, follows)
            finished(index)
            records += executed(journal, index)
            on_step("decompose", layers.index(index) + 1, len(layers))
        if follows is not None and index < last:
            follows.advance(index)
    return plan.with_matrices(records)


def factors_file(layer: int) -> str:
    """Return the journal's name for the factors of one decoder layer."""
    return f"factors/layer-{layer:04d}.safetensors"


def executed(journal: Journal, layer: int) -> list[Matrix]:
    """Read what came of the units that begin in a decoder layer, once its factors are there."""
    return read_matrices(journal.read_facts(factors_file(layer))["matrices"])


def factor_unit(
    unit: Unit,
    plan: Plan,
    recipe: Recipe,
    reader: WeightReader,
    journal: Journal,
    statistics: Callable[[Matrix], Statistics],
    *,
    device: str,
) -> Done:
    """Factor a unit by what the dense model's calibration knows of it; nothing is written."""
    return _Work(plan, recipe, reader, journal, statistics, device).unit(unit)


@dataclass(frozen=True)
class _Work:
    plan: Plan
    recipe: Recipe
    reader: WeightReader
    journal: Journal
    statistics: Callable[[Matrix], Statistics]
    device: str

    def compensate(self, matrix: Matrix) -> Compensate | None:
        return compensation(matrix, self.recipe)

    def write_layer(self, layer: int, prefix: Prefix | None) -> None:
        """Factor what begins in a layer, and finish its file."""
        records: list[Matrix] = []
        tensors: dict[str, Tensor] = {}

        def note(done: Done) -> None:
            records.extend(done.unit.members)
            tensors.update(done.tensors)

        units = units_of(self.plan.matrices)
        begins = [u for u in units if u.first.layer == layer]
        alone = {
            u.first.name: u.first for u in begins if self.compensate(u.first) and prefix is not None
        }
        for unit in begins:
            if unit.first.name not in alone:
                note(self.unit(unit))
        if prefix is not None:
            # What is solved already belongs to the prefix of what is measured now.
            for group in prefix.groups(layer):
                targets = [alone.pop(name) for name in group if name in alone]
                if targets:
                    asked = [self.compensate(m) for m in targets]
                    deficit = any(c is not None and c.residual > 0 for c in asked)
                    measured = prefix.measure(layer, group, deficit=deficit)
                    for matrix in targets:
                        note(self._refit(matrix, measured))
                self._replace(group, records, tensors, prefix)
            for matrix in alone.values():  # no input ever came to them
                note(self.unit(Unit((matrix,))))
        # A safetensors file wants at least one tensor, and a layer may stay dense as a whole.
        self.journal.write_tensors(
            factors_file(layer),
            tensors or {"none": torch.zeros(1)},
            {"matrices": [record_of(r) for r in records]},
        )

    def restore(self, layer: int, prefix: Prefix) -> None:
        """Show the prefix a layer that an earlier run has finished."""
        names = [name for group in prefix.groups(layer) for name in group]
        self._replace(names, executed(self.journal, layer), {}, prefix)

    def _replace(
        self,
        names: Sequence[str],
        records: list[Matrix],
        tensors: dict[str, Tensor],
        prefix: Prefix,
    ) -> None:
        """Show the prefix what became of some matrices: of this layer, or begun in an earlier."""
        present = {m.name: m for m in records}
        homes = self.plan.homes()
        for name in names:
            if name not in homes:
                continue
            file = factors_file(homes[name])
            matrix = present.get(name) or next(
                m for m in executed(self.journal, homes[name]) if m.name == name
            )

            def read(key: str, file: str = file) -> Tensor:
                known = tensors[key] if key in tensors else self.journal.read_tensor(file, key)
                return known.to(self.device)

            if matrix.form != "dense" or matrix.refit:
                prefix.replace(name, product(matrix, read))

    def unit(self, unit: Unit) -> Done:
        """Factor a unit by what the dense model's calibration knows of it."""
        if unit.sizes is None:
            return Done(unit, {})
        known = [self._known(m) for m in unit.members]
        weights = [self._weight(m) for m in unit.members]
        return self._factor(unit, weights, known, weights[0].dtype)

    def _refit(self, matrix: Matrix, measured: PrefixMoments) -> Done:
        """Factor what brings a layer closest to the dense outputs, on the inputs it will see."""
        compensate = self.compensate(matrix)
        assert compensate is not None
        W = self._weight(matrix)
        V, note = refit_target(
            W,
            measured.H,
            measured.cross,
            mix=compensate.mix,
            damp=compensate.damp,
            deficit=measured.deficit.get(matrix.name),
            residual=compensate.residual,
        )
        if matrix.sizes is None:
            return refitted(matrix, V, W.dtype, note)
        known = self._known(matrix, behind=Moment.of(measured.H))
        done = self._factor(Unit((matrix,)), [V], [known], W.dtype)
        record = done.unit.first
        fallback = "; ".join(filter(None, [note, record.fallback])) or None
        if record.sizes is None:
            return refitted(record, V, W.dtype, fallback)
        return Done(Unit((replace(record, refit=True, fallback=fallback),)), done.tensors)

    def _factor(
        self, unit: Unit, weights: list[Tensor], known: list[Statistics], dtype: torch.dtype
    ) -> Done:
        m, bias = unit.first, None
        if m.bias == "replaced":
            bias = self.reader.read(f"{m.name}.bias", device=self.device)
        return factor(
            unit,
            self.recipe.works[m.stage],
            weights,
            known,
            dtype=dtype,
            bias=bias,
            rounding=Rounding.of(m, self.recipe),
            seed=self.recipe.seed,
        )

    def _known(self, matrix: Matrix, *, behind: Moment | None = None) -> Statistics:
        """Return what the method asked for; inputs as they are `behind` the compressed prefix."""
        needs = method_needs(matrix, self.recipe)
        known = self.statistics(matrix) if collected(matrix, self.recipe) else Statistics()
        if behind is not None and "inputs" in needs:
            known = replace(known, inputs=behind)
        return known.to(self.device)

    def _weight(self, matrix: Matrix) -> Tensor:
        return self.reader.read(f"{matrix.name}.weight", device=self.device)
