"""Read the weights of a module in a thread, while the device computes with those of another."""

from collections.abc import Callable, Collection
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

DEVICE_TYPES = {"cuda"}
"""Devices that compute while the host reads. A CPU would only share its cores and its memory."""
_THREAD = ThreadPoolExecutor(max_workers=1, thread_name_prefix="read-ahead")


class ReadAhead:
    """Values of parameters that are being read; on a GPU, they are copied on a separate stream.

    Parameters
    ----------
    names : collection of str
    read : callable
        Returns the value of a name, on `device`.
    device : str or torch.device
    """

    def __init__(
        self, names: Collection[str], read: Callable[[str], Tensor], device: str | torch.device
    ) -> None:
        on_gpu = torch.device(device).type == "cuda"
        self._stream = torch.cuda.Stream(device) if on_gpu else None

        def read_all() -> dict[str, Tensor]:
            with torch.cuda.stream(self._stream):  # of this thread alone; None is no stream
                return {name: read(name) for name in names}

        self._values = _THREAD.submit(read_all)

    def take(self) -> dict[str, Tensor]:
        """Return the values as soon as they are read; raises what reading raised."""
        values = self._values.result()
        if self._stream is not None:
            current = torch.cuda.current_stream(self._stream.device)
            current.wait_stream(self._stream)
            for value in values.values():
                value.record_stream(current)
        return values
