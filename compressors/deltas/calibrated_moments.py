"""Second moments of a tuned model on calibration text, the metric of low-rank deltas."""

import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor
from transformers.conversion_mapping import get_model_conversion_mapping

from lrc.compressors.calibrate import statistics
from lrc.compressors.calibrate.calibration_context import CalibrationContext
from lrc.compressors.calibrate.calibration_windows import counted_tokens, take_windows
from lrc.compressors.calibrate.layer_check import build_checked
from lrc.compressors.calibrate.sampled_windows import sample_windows
from lrc.compressors.corpus.documents import check_source
from lrc.compressors.corpus.tokens import default_bos
from lrc.compressors.evaluate.perplexity import check_window
from lrc.compressors.io.journal import Journal
from lrc.compressors.io.machine import Machine
from lrc.compressors.models.architecture import Architecture
from lrc.compressors.models.contents import renamed
from lrc.compressors.models.model_kinds import kind_of
from lrc.compressors.models.source import Source, load_dense, load_tokenizer
from lrc.compressors.models.weights import WeightReader
from lrc.compressors.solvers.linalg import whitening_factor
from lrc.compressors.solvers.metric import weighted_energy
from lrc.compressors.solvers.moments import Moment
from lrc.compressors.solvers.spectrum import Spectrum, energies_only, spectrum
from lrc.configs.errors import DeltaError, UsageError
from lrc.configs.recipe import Calibration
from lrc.configs.size import GIB
from lrc.configs.sources import fractions

DAMPING = {"damp": 1e-6, "gradient_damp": 0.1}
"""The defaults of `kfac`."""
SEED = 0


@dataclass(frozen=True)
class Moments:
    """Second moments of the inputs of a matrix and of the gradients at its outputs.

    A moment that is None is the identity.
    """

    inputs: Moment | None = None
    gradients: Moment | None = None

    @property
    def known(self) -> bool:
        """Whether there are any."""
        return self.inputs is not None or self.gradients is not None

    def spectrum(self, change: Tensor) -> Spectrum:
        """Return the spectrum of a difference [d_out, d_in]."""
        return spectrum(change, self.inputs, self.gradients, **DAMPING)

    def energies(self, change: Tensor) -> Tensor:
        """Return the squared singular values of `spectrum`."""
        return energies_only(change, self.inputs, self.gradients, **DAMPING)

    def energy(self, change: Tensor) -> float:
        """Return the weighted sum of squares of a difference [d_out, d_in]."""
        return weighted_energy(change, self.inputs, self.gradients, **DAMPING)

    def roots(self, d_out: int, d_in: int) -> tuple[Tensor, Tensor]:
        """Return the lower triangular K [d_out, d_out] and L [d_in, d_in].

        The energy of a difference E is the squared norm of ``K^T E L``.
        """
        sides = (
            (self.gradients, d_out, DAMPING["gradient_damp"]),
            (self.inputs, d_in, DAMPING["damp"]),
        )
        K, L = (
            torch.eye(size, dtype=torch.float64)
            if moment is None or moment.empty
            else whitening_factor(moment.whole(), damp)[0]
            for moment, size, damp in sides
        )
        return K, L


MomentsOf = Callable[[str], Moments]
"""A function of the name of a matrix in the files of the base model."""


def no_moments(name: str) -> Moments:
    """Return the metric without calibration."""
    return Moments()


@contextmanager
def collected_moments(
    source: Source,
    calibration: Calibration,
    folder: Path,
    machine: Machine,
    *,
    gradients: bool,
    base: Source,
    names: Iterable[str],
) -> Iterator[MomentsOf]:
    """Calibrate a model, and yield a function that returns the moments of its matrices.

    Parameters
    ----------
    source : Source
        The tuned model.
    folder : Path
        For temporary files.
    gradients : bool
        Whether to collect moments of gradients too.
    base : Source
        The base model, whose tokenizer is used if the tuned model has none.
    names : iterable of str
        Of the tensors in the files of both.

    Raises
    ------
    UsageError, DeltaError, ModelError, DataError
        If the model or the text cannot be used, or the statistics do not fit on the disk.
    """
    _check(source, base, calibration)
    architecture = build_checked(source)
    needs = {"inputs", "whole_inputs"} | ({"gradients", "whole_gradients"} if gradients else set())
    with TemporaryDirectory(prefix="calibration-", dir=folder) as work, machine.current():
        journal = Journal(Path(work))
        journal.work.mkdir(parents=True)
        refuse_full_disk(architecture, journal.work, gradients=gradients)
        context = _context(source, base, architecture, calibration, journal, machine)
        statistics.collect(context, {linear.name: needs for linear in architecture.linears})
        yield _reading(architecture, journal, names)


def _check(source: Source, base: Source, calibration: Calibration) -> None:
    if kind_of(source.config).encoder or calibration.task is not None:
        raise UsageError(
            "calibration: must be a text for a model that generates text, got "
            f"{'a task' if calibration.task is not None else 'a model of another kind'}; leave it "
            "out, which uses the plain SVD"
        )
    if not (_has_tokenizer(source) or _has_tokenizer(base)):
        raise UsageError(
            f"calibration: needs a tokenizer, and there is none in {source.folder} or "
            f"{base.folder}; put tokenizer.json into one of them, or leave the calibration out, "
            "which uses the plain SVD"
        )
    for name in fractions(calibration.source):
        check_source(name, part="calibration")
    check_window(source.config, calibration.length, "calibration.length")


def _has_tokenizer(source: Source) -> bool:
    return any(source.folder.glob("tokenizer*")) or any(source.folder.glob("vocab*"))


def refuse_full_disk(architecture: Architecture, folder: Path, *, gradients: bool) -> None:
    """Raise a `DeltaError` if the statistics do not fit on the disk."""
    shared = {
        member: group[0] for layer in architecture.groups for group in layer for member in group
    }
    leaders = {shared.get(linear.name, linear.name) for linear in architecture.linears}
    numbers = sum(
        (linear.d_in**2 if linear.name in leaders else 0) + (linear.d_out**2 if gradients else 0)
        for linear in architecture.linears
    )
    free = shutil.disk_usage(folder).free
    if 4 * numbers > free:
        raise DeltaError(
            f"calibration: the statistics take {4 * numbers / GIB:.1f} GiB in {folder}, where "
            f"{free / GIB:.1f} GiB are free; write the delta to another disk, set "
            "gradients=false, or leave the calibration out",
            code="does-not-fit",
        )


def _context(
    source: Source,
    base: Source,
    architecture: Architecture,
    calibration: Calibration,
    journal: Journal,
    machine: Machine,
) -> CalibrationContext:
    tokenizer = load_tokenizer(source if _has_tokenizer(source) else base)

    def sample(shape: tuple[int, int], generator: torch.Generator) -> Tensor:
        dtype = torch.float32 if machine.chosen == "cpu" else source.dtype
        model = load_dense(source, source.folder, dtype=dtype, device=machine.chosen)
        bos = default_bos(tokenizer)
        return sample_windows(model, shape, bos=bos, generator=generator, on_step=machine.on_step)

    windows = take_windows(
        calibration,
        tokenizer,
        journal,
        seed=SEED,
        embedding=architecture.model.get_input_embeddings(),
        sample=sample,
    )
    return CalibrationContext(
        architecture,
        WeightReader(source.folder, architecture),
        lambda: windows,
        journal,
        machine.chosen,
        calibration.memory_limit_gib,
        SEED,
        machine.on_step,
        calibration.labels,
        counted=lambda: counted_tokens(journal),
    )


def _reading(architecture: Architecture, journal: Journal, names: Iterable[str]) -> MomentsOf:
    linears = {f"{linear.name}.weight": linear for linear in architecture.linears}
    conversions = get_model_conversion_mapping(architecture.model)
    in_tree = renamed(names, conversions, architecture.model)

    def read(name: str) -> Moments:
        found, changed = in_tree[name]
        linear = None if changed else linears.get(found)
        if linear is None:
            return Moments()
        known = statistics.load(journal, linear.layer, linear.name)
        return Moments(known.inputs, known.gradients)

    return read
