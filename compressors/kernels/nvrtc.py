"""Compile CUDA C++ at run time, and launch it on the current stream.

PyTorch ships NVRTC, NVIDIA's compiler library; neither the CUDA toolkit nor a C compiler is needed.
Sources include no headers but those in the same folder. A kernel takes about half a second to
compile, once per process and combination of macros.
"""

import ctypes
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

FOLDER = Path(__file__).parent / "cuda"
INVALID_CONTEXT = 201
Macros = tuple[tuple[str, int | str], ...]


class CompilationError(RuntimeError):
    """A kernel could not be compiled or loaded."""


class Kernel:
    """A compiled kernel.

    Parameters
    ----------
    source : str
        Name of a file in the folder `cuda`.
    name : str
        The function in it, declared ``extern "C"``.
    macros : tuple of (str, int or str)
        Its compile-time constants.
    device : int
        Index of the CUDA device.

    Raises
    ------
    CompilationError
        With the compiler's messages.
    """

    def __init__(self, source: str, name: str, macros: Macros, device: int):
        self.name, self.device = name, device
        major, minor = torch.cuda.get_device_capability(device)
        image = compiled(source, macros, f"sm_{major}{minor}")
        with torch.cuda.device(device):
            _make_current(device)
            module, self._function = ctypes.c_void_p(), ctypes.c_void_p()
            _check(_driver().cuModuleLoadData(ctypes.byref(module), image), source)
            found = _driver().cuModuleGetFunction(
                ctypes.byref(self._function), module, name.encode()
            )
            _check(found, name)

    def __call__(self, grid: Sequence[int], threads: int, *arguments: Tensor | int) -> None:
        """Launch on the current stream of the device, which must be the current device.

        Parameters
        ----------
        grid : sequence of 3 ints
            Blocks.
        threads : int
            Per block.
        *arguments : Tensor or int
            Pointers and 32-bit integers, which must not be negative.
        """
        # A 32-bit integer is the lower half of 64 bits.
        words = [a.data_ptr() if isinstance(a, Tensor) else a for a in arguments]
        count = len(words)
        values = (ctypes.c_uint64 * count)(*words)
        first = ctypes.addressof(values)
        pointers = (ctypes.c_void_p * count)(*range(first, first + 8 * count, 8))
        stream = ctypes.c_void_p(torch.cuda.current_stream(self.device).cuda_stream)
        launch = (self._function, *grid, threads, 1, 1, 0, stream, pointers, None)
        status = _driver().cuLaunchKernel(*launch)
        if status == INVALID_CONTEXT:  # in a thread that has not used the device yet
            _make_current(self.device)
            status = _driver().cuLaunchKernel(*launch)
        _check(status, self.name)


@cache
def kernel(source: str, name: str, macros: Macros, device: int) -> Kernel:
    """Return a kernel, compiled at the first call."""
    return Kernel(source, name, macros, device)


@cache
def compiled(source: str, macros: Macros, architecture: str) -> bytes:
    """Return the machine code of a source file for an architecture such as ``sm_90``."""
    library = _nvrtc()
    program = ctypes.c_void_p()
    text = (FOLDER / source).read_bytes()
    if library.nvrtcCreateProgram(ctypes.byref(program), text, source.encode(), 0, None, None):
        raise CompilationError(f"NVRTC cannot read {source}")
    options = [
        f"--gpu-architecture={architecture}",
        "--std=c++20",
        "-default-device",
        f"-I{FOLDER}",
    ]
    options += [f"-D{name}={value}" for name, value in macros]
    array = (ctypes.c_char_p * len(options))(*[option.encode() for option in options])
    try:
        failed = library.nvrtcCompileProgram(program, len(options), array)
        if failed:
            log = _bytes(library, program, "ProgramLog").decode(errors="replace")
            raise CompilationError(f"NVRTC cannot compile {source} {dict(macros)}: {log}")
        return _bytes(library, program, "CUBIN")
    finally:
        library.nvrtcDestroyProgram(ctypes.byref(program))


def _bytes(library: ctypes.CDLL, program: ctypes.c_void_p, what: str) -> bytes:
    size = ctypes.c_size_t()
    getattr(library, f"nvrtcGet{what}Size")(program, ctypes.byref(size))
    data = ctypes.create_string_buffer(size.value)
    getattr(library, f"nvrtcGet{what}")(program, data)
    return data.raw


@cache
def _nvrtc() -> ctypes.CDLL:
    major = str(torch.version.cuda).partition(".")[0]
    names = [f"libnvrtc.so.{major}", "libnvrtc.so", f"nvrtc64_{major}0_0.dll"]
    return _library(names, "NVRTC, which PyTorch for CUDA contains")


@cache
def _driver() -> ctypes.CDLL:
    return _library(["libcuda.so.1", "nvcuda.dll"], "the CUDA driver")


def _library(names: list[str], what: str) -> ctypes.CDLL:
    for name in names:
        try:
            return ctypes.CDLL(name)
        except OSError:
            continue
    raise CompilationError(f"cannot load {what}: tried {', '.join(names)}")


def _make_current(device: int) -> None:
    """Make PyTorch's context of a device the current one of this thread."""
    context = ctypes.c_void_p()
    _check(_driver().cuDevicePrimaryCtxRetain(ctypes.byref(context), device), "context")
    _check(_driver().cuCtxSetCurrent(context), "context")


def _check(status: int, what: str) -> None:
    if status:
        text = ctypes.c_char_p()
        _driver().cuGetErrorString(status, ctypes.byref(text))
        raise CompilationError(f"{what}: {(text.value or b'unknown error').decode()}")


def probe(device: int) -> bool:
    """Compile and launch a small kernel, and return whether its result is right."""
    out = torch.empty(32, dtype=torch.int32, device=f"cuda:{device}")
    with torch.cuda.device(device):
        kernel("probe.cu", "probe", (), device)((1, 1, 1), 32, out, 7)
    return torch.equal(out.cpu(), torch.arange(7, 39, dtype=torch.int32))
