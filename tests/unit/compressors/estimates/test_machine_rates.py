"""Speeds of the machine are measured once, and not for every run of a process."""

from pathlib import Path

import pytest
import torch

from lrc.compressors.estimates import machine_rates
from lrc.compressors.estimates.machine_rates import WRITTEN, MachineRates, measure_rates


def test_a_disk_is_measured_once_for_all_its_folders(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    measured: list[Path] = []

    def seconds(folder: Path) -> float:
        measured.append(folder)
        return 2.0

    device = MachineRates(1, 2, 3, ((1, 1.0), (2, 4.0)), 4, 0)
    monkeypatch.setattr(machine_rates, "_DISKS", {})
    monkeypatch.setattr(machine_rates, "_writing_seconds", seconds)
    monkeypatch.setattr(machine_rates, "_measure_device", lambda device_, dtype: device)
    folders = [tmp_path / "a", tmp_path / "b"]
    for folder in folders:
        folder.mkdir()
        rates = measure_rates("cpu", torch.float32, folder)
        assert (rates.products, rates.disk) == (1, WRITTEN / 2)
    assert measured == folders[:1]
