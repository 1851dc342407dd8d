"""The model, the stages and the speed of the machine in tests of estimates."""

from lrc.compressors.estimates.machine_rates import MachineRates

WIDTH, INNER, LAYERS, SAMPLES, LENGTH = 128, 320, 3, 4, 64
KFAC = [{"decompose": {"method": "kfac", "keep": 0.6, "allocation": "uniform"}}]
MIXED = [{"decompose": {"method": "mixed", "keep": 0.6}}]
COMPENSATED = [{"decompose": {"method": "svd-llm", "keep": 0.6, "compensate": {}}}]
RATES = MachineRates(1e9, 1e9, 1e9, ((100, 1e-2), (200, 8e-2)), 1e9, 1e9)
