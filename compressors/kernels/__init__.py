"""Fast paths: functions on tensors, with kernels for devices and plain PyTorch elsewhere."""
