"""What rounding a weight to integers would lose, in the unit in which forms are compared."""

from torch import Tensor

from lrc.compressors.layers import Scheme
from lrc.compressors.planning.quantization import fits
from lrc.compressors.planning.weight_groups import Unit
from lrc.compressors.solvers.moments import Statistics
from lrc.compressors.solvers.pruning import weighted_energy
from lrc.compressors.solvers.round_to_nearest import rtn
from lrc.configs.decompose_methods import Mixed

SHARE_LEFT = {"rtn": 1.0, "gptq": 0.4}
"""Of the energy that rounding to the nearest loses: on SmolLM2-135M's matrices 0.33 to 0.46."""


def rounding_noise(
    unit: Unit, options: Mixed, W: Tensor, known: Statistics
) -> tuple[dict[str, float], float]:
    """Return what rounding a weight to every scheme loses, and the energy of the whole."""
    assert known.inputs is not None
    damping = {"damp": options.damp, "gradient_damp": options.gradient_damp}
    H, dtype = known.inputs.whole(), W.dtype

    def energy(E: Tensor) -> float:
        return weighted_energy(E, known.inputs, known.gradients, **damping)

    found = {}
    for written in options.schemes:
        if all(fits(written, m) for m in unit.members):
            scheme = Scheme.read(written)
            W_hat = rtn(W, scheme, dtype=dtype, H=H).weight()
            found[written] = energy(W.double() - W_hat) * SHARE_LEFT[options.quantizer]
    return found, energy(W.double())
