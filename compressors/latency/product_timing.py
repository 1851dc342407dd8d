"""Measure the times of products on a device, and put them into a table.

Every product is computed by the layer that a loaded model has, with its fast path, if there is one,
and without gradients. While a model generates, its weights come from memory, not from a cache. So
products are timed on several copies in turn, which together exceed every cache.

On a CPU calls of different products take turns, and every time is taken relative to that of the
dense matrix in the same round, so that a machine that changes its speed affects both. Several calls
of the same product in a row would be faster than in a model, where other operations come in
between. The linear layers of SmolLM2-135M on two threads took 27.0 ms per token inside the model
(16.0 ms with some of them in int8); calls in turn predict 26.0 ms (15.6 ms), and four calls in a
row 17 to 23 ms. On a GPU one CUDA graph multiplies by all copies of one matrix.
"""

import copy
import time
from collections.abc import Callable, Iterable, Sequence
from statistics import median

import torch
from torch import Tensor, nn

from lrc.compressors.io.machine import OnStep, no_progress, release_memory
from lrc.compressors.io.versions import versions
from lrc.compressors.kernels import FastPath
from lrc.compressors.latency.latency_table import DENSE, Key, LatencyTable, Product, Shape
from lrc.compressors.latency.random_layers import random_layer
from lrc.compressors.latency.time_curve import TimeCurve
from lrc.compressors.layers.component import Component
from lrc.compressors.solvers.cuda_graphs import record

CACHES = {"cpu": 128 << 20, "cuda": 128 << 20}
"""Bytes of all copies in turn: several times a cache of 32 MiB, and one of 50 MiB."""
MOST_COPIES = 128
"""So that preparing small matrices does not take long."""
BATCH = 512 << 20
"""Bytes of the matrices, one copy each, that are in memory at the same time."""
ROUNDS, SECONDS = 40, 4.0
"""Rounds per batch, and the time after which no further one starts; at least `FEWEST`."""
FEWEST = 7
HOPELESS = 1.5
"""Larger sizes of a form are not measured if the smallest takes so many times as long as dense."""

Clock = Callable[[], int]


def measure_table(
    products: Iterable[Product],
    *,
    device: str,
    dtype: torch.dtype,
    rows: int,
    on_step: OnStep = no_progress,
    seed: int = 0,
) -> LatencyTable:
    """Measure products, and the dense products of the same shapes.

    Parameters
    ----------
    device : str
        ``cpu``, ``cuda`` or ``cuda:N``.
    dtype : torch.dtype
        Of inputs, outputs and everything that is not stored as integers or indices.
    rows : int
        Of the input.
    """
    runner = _Runner(dtype, rows, torch.Generator(device).manual_seed(seed))
    by_shape: dict[Shape, dict[tuple[str, int], Product]] = {}
    for product in products:
        found = by_shape.setdefault(product.shape, {(DENSE, 0): Product(product.shape)})
        found[product.form, product.size] = product
    total, done = sum(map(len, by_shape.values())), 0
    times: dict[Key, dict[int, int]] = {}
    for shape, found in by_shape.items():
        ordered = sorted(found.values(), key=lambda p: (p.form != DENSE, p.form, p.size))
        for product, nanoseconds in runner.times(ordered):
            times.setdefault(product.key, {})[product.size] = max(round(nanoseconds), 1)
        done += len(found)
        on_step(f"latency {shape[0]} x {shape[1]}", done, total)
        release_memory()
    curves = {key: TimeCurve(tuple(each), tuple(each.values())) for key, each in times.items()}
    on_gpu, installed = device.startswith("cuda"), versions()
    return LatencyTable(
        device=device_name(device),
        dtype=str(dtype).removeprefix("torch."),
        rows=rows,
        threads=None if on_gpu else torch.get_num_threads(),
        versions={name: installed[name] for name in ("lrc", "torch")},
        curves=curves,
    )


def device_name(device: str) -> str:
    """Return the name of a GPU, or ``cpu`` with that of the processor if the system says it."""
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
            names = [line.partition(":")[2] for line in file if line.startswith("model name")]
    except OSError:
        names = []
    return f"cpu, {names[0].strip()}" if names else "cpu"


class _Runner:
    """Times products of one shape."""

    def __init__(self, dtype: torch.dtype, rows: int, generator: torch.Generator) -> None:
        self.device, self.generator = generator.device, generator
        self.dtype, self.rows = dtype, rows

    @torch.no_grad()
    def times(self, products: Sequence[Product]) -> list[tuple[Product, float]]:
        """Return nanoseconds by product; the first one is dense, and sizes ascend in each form.

        The smallest size of every form is measured first. Larger ones of a form that is certain to
        be slower than dense are left out.
        """
        x = torch.empty(
            self.rows, 1, products[0].shape[1], device=self.device, dtype=self.dtype
        ).normal_(generator=self.generator)
        dense, *others = products
        smallest = {product.form: product for product in reversed(others)}
        relative, references = self._relative(dense, [*smallest.values()], x)
        hopeless = {product.form for product, ratio in relative if ratio > HOPELESS}
        larger = [p for p in others if p.form not in hopeless and p is not smallest[p.form]]
        if larger:
            more, again = self._relative(dense, larger, x)
            relative, references = [*relative, *more], [*references, *again]
        reference = median(references)
        found = [(dense, reference), *((each, ratio * reference) for each, ratio in relative)]
        return sorted(found, key=lambda each: products.index(each[0]))

    def _relative(
        self, dense: Product, products: Sequence[Product], x: Tensor
    ) -> tuple[list[tuple[Product, float]], list[float]]:
        """Return times relative to dense, and the nanoseconds of dense in every batch."""
        reference = self._layer(dense)
        if self.device.type == "cuda":
            time_of_dense = self._graph_time(reference, x)
            times = [self._graph_time(self._layer(each), x) for each in products]
            ratios = [each / time_of_dense for each in times]
            return list(zip(products, ratios, strict=True)), [time_of_dense]
        found: list[tuple[Product, float]] = []
        references: list[float] = []
        batch: list[tuple[Product, nn.Module]] = []
        for number, product in enumerate(products):
            batch.append((product, self._layer(product)))
            full = sum(_bytes(layer) for _, layer in batch) > BATCH
            if full or number == len(products) - 1:
                taken, nanoseconds = self._in_turn([reference, *(each for _, each in batch)], x)
                found += [(each, t) for (each, _), t in zip(batch, taken[1:], strict=True)]
                references.append(nanoseconds)
                batch = []
        return found, references or [self._in_turn([reference], x)[1]]

    def _layer(self, product: Product) -> nn.Module:
        """Return a layer with its fast path, as after loading."""
        layer = random_layer(product, dtype=self.dtype, generator=self.generator)
        for module in layer.modules():
            if isinstance(module, FastPath):
                module.optimize()
            if isinstance(module, Component):
                module.prepare()
        return layer

    def _copies(self, layers: Sequence[nn.Module]) -> list[Sequence[nn.Module]]:
        """Return as many copies of some layers as exceed the caches."""
        needed = -(-CACHES[self.device.type] // max(sum(map(_bytes, layers)), 1))
        number = min(max(needed, 2), MOST_COPIES)
        return [layers, *([copy.deepcopy(each) for each in layers] for _ in range(number - 1))]

    def _in_turn(self, layers: Sequence[nn.Module], x: Tensor) -> tuple[list[float], float]:
        """Return times relative to the first layer's, and its nanoseconds; medians of rounds."""
        copies = self._copies(layers)
        clock: Clock = time.perf_counter_ns
        rounds: list[list[int]] = []
        end = clock() + round(SECONDS * 1e9)
        while len(rounds) < FEWEST or (len(rounds) < ROUNDS and clock() < end):
            taken = []
            for layer in copies[len(rounds) % len(copies)]:
                start = clock()
                layer(x)
                taken.append(clock() - start)
            rounds.append(taken)
        each = list(zip(*rounds, strict=True))
        ratios = [median(t / d for t, d in zip(one, each[0], strict=True)) for one in each]
        return ratios, median(each[0])

    def _graph_time(self, layer: nn.Module, x: Tensor) -> float:
        """Return nanoseconds per call of a layer, the median over replays of a CUDA graph."""
        copies = [each for (each,) in self._copies([layer])]

        def step() -> None:
            for layer in copies:
                layer(x)

        try:
            repeat = record(step, self.device)
        except RuntimeError:  # something that cannot be recorded is launched call by call
            torch.cuda.synchronize(self.device)
            repeat = step
        taken: list[float] = []
        for _ in range(FEWEST + 1):  # the first replay is not counted
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            repeat()
            stop.record()
            stop.synchronize()
            taken.append(1e6 * start.elapsed_time(stop) / len(copies))
        return median(taken[1:])


def _bytes(layer: nn.Module) -> int:
    tensors = [*layer.parameters(), *layer.buffers()]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
