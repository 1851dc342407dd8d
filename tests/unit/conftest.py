"""What tolerances of the unit tests are derived from."""

from collections.abc import Callable

import pytest
import torch


@pytest.fixture(scope="session")
def rounding() -> Callable[..., float]:
    """Bound the relative error of a result that another order of its sums rounds differently.

    `size` is the number of products in the longest sum, `condition` the condition number of what is
    solved or inverted, 1 for products alone.

    Notes
    -----
    A sum of n products is off by at most ``n eps`` times the sum of their absolute values, in
    whichever order and with whichever instructions a processor adds them (Higham, "Accuracy and
    Stability of Numerical Algorithms", section 3.1); stable algorithms solve a problem that differs
    by that much, and the condition number says what that changes. The factor 4 stands for the few
    steps that follow each other in a test. Relative to the largest entry of the result, as
    ``atol=rounding(n) * scale``: small entries are sums of large ones that cancel.
    """

    def bound(size: int, dtype: torch.dtype = torch.float64, *, condition: float = 1.0) -> float:
        return 4 * size * torch.finfo(dtype).eps * condition

    return bound
