"""What calibration has to know of a matrix for all that is planned for it."""

from lrc.compressors.methods.table import METHODS
from lrc.compressors.planning.plan import Matrix
from lrc.compressors.planning.quantization import WHOLE
from lrc.configs.decompose import Compensate
from lrc.configs.decompose_methods import Mixed
from lrc.configs.quantize import Quantize
from lrc.configs.recipe import Recipe


def compensation(matrix: Matrix, recipe: Recipe) -> Compensate | None:
    """Return how a matrix makes up for those before it: as its stage says, or the one rounding."""
    stages = [matrix.stage] if matrix.rounded is None else [matrix.stage, matrix.rounded]
    asked = [recipe.works[stage].compensate for stage in stages]
    return next((each for each in asked if each is not None), None)


def _sees_inputs(matrix: Matrix, recipe: Recipe) -> bool:
    """Say whether what rounds a matrix looks at its inputs."""
    if matrix.rounded is None:
        return False
    options = recipe.works[matrix.rounded]
    if isinstance(options, Quantize):
        return options.method != "rtn" or options.low_rank_correction is not None
    assert isinstance(options, Mixed)
    return options.quantizer == "gptq"


def method_needs(matrix: Matrix, recipe: Recipe) -> frozenset[str]:
    """Return the fields of `Statistics` that the solvers of a matrix read."""
    if not matrix.factored:
        return frozenset()
    rounds = frozenset({"inputs"} if _sees_inputs(matrix, recipe) else ())
    return METHODS[matrix.method].needs | rounds


def collected(matrix: Matrix, recipe: Recipe) -> frozenset[str]:
    """Return what has to be collected beforehand, and what of it whole.

    A matrix that is only rounded, behind what is rounded before it, is measured on the way.
    """
    needs = method_needs(matrix, recipe)
    if matrix.form in WHOLE and compensation(matrix, recipe) is not None:
        return frozenset()
    method = METHODS[matrix.method]
    if method.whole or matrix.rounded is not None:  # rounding leaves the span of the weight
        needs |= {f"whole_{side}" for side in ("inputs", "gradients") if side in needs}
    return needs
