"""Statistics of a tuned model: what is refused before they are collected."""

import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from lrc.compressors.deltas.calibrated_moments import refuse_full_disk
from lrc.compressors.models.architecture import Architecture, Linear
from lrc.configs.errors import DeltaError

LINEARS = [
    Linear("q", 0, d_out=8, d_in=16, bias=False),
    Linear("k", 0, d_out=4, d_in=16, bias=False),
    Linear("o", 0, d_out=16, d_in=8, bias=False),
]
INPUTS = 4 * (16**2 + 8**2)  # q and k share theirs
GRADIENTS = 4 * (8**2 + 4**2 + 16**2)


@pytest.mark.parametrize(
    ("gradients", "needed"), [(False, INPUTS), (True, INPUTS + GRADIENTS)], ids=str
)
def test_statistics_that_do_not_fit_on_the_disk_are_refused(
    gradients: bool, needed: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    architecture = Architecture(None, ["layer"], LINEARS, {}, groups=[[["q", "k"], ["o"]]])
    free = needed
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=free))
    refuse_full_disk(architecture, tmp_path, gradients=gradients)
    free -= 1
    with pytest.raises(DeltaError, match="write the delta to another disk") as refused:
        refuse_full_disk(architecture, tmp_path, gradients=gradients)
    assert refused.value.code == "does-not-fit"
