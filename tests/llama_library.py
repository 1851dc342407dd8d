"""llama.cpp as a shared library, for comparisons: fetch a prebuilt one, load it, run GGUF files.

``python tests/llama_library.py`` fetches it into ``.cache/llama.cpp`` (10 MB, for Linux on x86-64)
and prints why if it cannot. The npm package of node-llama-cpp contains llama.cpp v0.4.0 with CPU
code for all generations; its content is compared with the hash that the registry publishes.
"""

import base64
import ctypes
import hashlib
import io
import platform
import sys
import tarfile
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np

URL = "https://registry.npmjs.org/@node-llama-cpp/linux-x64/-/linux-x64-3.21.1.tgz"
SHA512 = "Totj6RTDMGo3FoK2yNUaz/oGmZD0olAqTrRluFUWmu0kW2i9TOzHSW0OWCAiGkzRCVX0WsU2CyUQo/W2NYtdPA=="
FOLDER = Path(__file__).parents[1] / ".cache/llama.cpp/3.21.1"
LIBRARIES = ("libggml-base.so", "libggml.v0.4.0.so", "libllama.v0.4.0.so")
CPU = "libggml-cpu-"
SECONDS = 60


def why_missing(folder: Path = FOLDER) -> str | None:
    """Return why the library cannot be used; None if it can."""
    if (sys.platform, platform.machine()) != ("linux", "x86_64"):
        return f"there is no prebuilt llama.cpp for {sys.platform} on {platform.machine()}"
    if not all((folder / name).is_file() for name in LIBRARIES):
        return f"llama.cpp is not in {folder}: run `make llama`"
    return None


def variants(folder: Path = FOLDER) -> list[str]:
    """Return the names of the CPU code in the library, such as ``icelake``."""
    return sorted(path.stem.removeprefix(CPU) for path in folder.glob(f"{CPU}*.so"))


def fetch(folder: Path = FOLDER) -> None:
    """Download the package, check its hash, and unpack its libraries.

    Raises
    ------
    OSError
        If it cannot be downloaded.
    ValueError
        If it is not the expected file.
    """
    with urllib.request.urlopen(URL, timeout=SECONDS) as answer:
        data = answer.read()
    if base64.b64encode(hashlib.sha512(data).digest()).decode() != SHA512:
        raise ValueError(f"{URL} has another hash than expected")
    folder.mkdir(parents=True, exist_ok=True)
    with tarfile.open(fileobj=io.BytesIO(data)) as package:
        for member in package:
            name = Path(member.name).name
            content = package.extractfile(member) if member.isfile() else None
            if content is not None and name.startswith("lib") and name.endswith(".so"):
                (folder / name).write_bytes(content.read())


class _ModelParameters(ctypes.Structure):
    """Parameters that are only passed on; larger than the real structure."""

    _fields_ = (("rest", ctypes.c_uint64 * 64),)


class _ContextParameters(ctypes.Structure):
    """The first fields of the parameters; larger than the real structure."""

    _fields_ = (
        ("n_ctx", ctypes.c_uint32),
        ("n_batch", ctypes.c_uint32),
        ("n_ubatch", ctypes.c_uint32),
        ("rest", ctypes.c_uint32 * 253),
    )


class _Importance(ctypes.Structure):
    _fields_ = (("name", ctypes.c_char_p), ("data", ctypes.c_void_p), ("size", ctypes.c_size_t))


class _QuantizeParameters(ctypes.Structure):
    """The parameters up to the importance matrix; larger than the real structure."""

    _fields_ = (
        ("nthread", ctypes.c_int32),
        ("ftype", ctypes.c_int32),
        ("types", ctypes.c_int32 * 2),
        ("flags", ctypes.c_bool * 6),
        ("imatrix", ctypes.POINTER(_Importance)),
        ("rest", ctypes.c_uint64 * 61),
    )


class _Batch(ctypes.Structure):
    _fields_ = (
        ("n_tokens", ctypes.c_int32),
        ("token", ctypes.POINTER(ctypes.c_int32)),
        ("embd", ctypes.c_void_p),
        ("pos", ctypes.POINTER(ctypes.c_int32)),
        ("n_seq_id", ctypes.POINTER(ctypes.c_int32)),
        ("seq_id", ctypes.POINTER(ctypes.POINTER(ctypes.c_int32))),
        ("logits", ctypes.POINTER(ctypes.c_int8)),
    )


class LlamaCpp:
    """The functions of llama.cpp that comparisons need.

    Parameters
    ----------
    folder : Path
        Where `fetch` has put the library.
    variant : str, optional
        CPU code, one of `variants`. llama.cpp chooses the latest that the processor supports.

    Raises
    ------
    ValueError
        If there is no such variant, or the processor does not support it.
    """

    def __init__(self, folder: Path = FOLDER, variant: str | None = None) -> None:
        _, ggml, llama = (
            ctypes.CDLL(str(folder / name), mode=ctypes.RTLD_GLOBAL) for name in LIBRARIES
        )
        self._llama = llama
        pointer, integer, text = ctypes.c_void_p, ctypes.c_int32, ctypes.c_char_p
        flag = ctypes.c_bool
        declarations = {
            "llama_model_default_params": (_ModelParameters, []),
            "llama_context_default_params": (_ContextParameters, []),
            "llama_model_load_from_file": (pointer, [text, _ModelParameters]),
            "llama_model_get_vocab": (pointer, [pointer]),
            "llama_vocab_n_tokens": (integer, [pointer]),
            "llama_model_free": (None, [pointer]),
            "llama_init_from_model": (pointer, [pointer, _ContextParameters]),
            "llama_set_n_threads": (None, [pointer, integer, integer]),
            "llama_free": (None, [pointer]),
            "llama_batch_init": (_Batch, [integer, integer, integer]),
            "llama_batch_free": (None, [_Batch]),
            "llama_decode": (integer, [pointer, _Batch]),
            "llama_synchronize": (None, [pointer]),
            "llama_get_logits": (ctypes.POINTER(ctypes.c_float), [pointer]),
            "llama_model_quantize_default_params": (_QuantizeParameters, []),
            "llama_model_quantize": (
                ctypes.c_uint32,
                [text, text, ctypes.POINTER(_QuantizeParameters)],
            ),
            "llama_tokenize": (
                integer,
                [pointer, text, integer, ctypes.POINTER(integer), integer, flag, flag],
            ),
        }
        for name, (result, arguments) in declarations.items():
            function = getattr(llama, name)
            function.restype, function.argtypes = result, arguments
        self._log: list[str] = []
        kind = ctypes.CFUNCTYPE(None, ctypes.c_int, text, pointer)
        self._on_log = kind(lambda level, line, data: self._log.append(line.decode()))
        llama.llama_log_set(self._on_log, None)
        if variant is None:
            ggml.ggml_backend_load_all_from_path.argtypes = [text]
            ggml.ggml_backend_load_all_from_path(str(folder).encode())
        else:
            load = ggml.ggml_backend_load
            load.restype, load.argtypes = pointer, [text]
            if variant not in variants(folder):
                raise ValueError(f"no CPU code {variant!r}; there is {', '.join(variants(folder))}")
            if not load(str(folder / f"{CPU}{variant}.so").encode()):
                raise ValueError(f"this processor does not support the CPU code {variant!r}")

    def quantize(
        self,
        source: Path,
        target: Path,
        file_type: int,
        importance: Mapping[str, np.ndarray] | None = None,
        *,
        threads: int = 1,
    ) -> None:
        """Quantize a file as ``llama-quantize`` does.

        Parameters
        ----------
        source, target : Path
        file_type : int
            Number of the mixture of block types, see `gguf.LlamaFileType`.
        importance : mapping of str to ndarray, optional
            Importance matrix: tensor -> mean square of each of its inputs.
        threads : int, default 1

        Raises
        ------
        RuntimeError
            With the end of the log.
        """
        self._log.clear()
        parameters = self._llama.llama_model_quantize_default_params()
        parameters.nthread, parameters.ftype = threads, file_type
        kept = [np.ascontiguousarray(each, np.float32) for each in (importance or {}).values()]
        if importance is not None:
            entries = zip((name.encode() for name in importance), kept, strict=True)
            rows = [_Importance(name, each.ctypes.data, each.size) for name, each in entries]
            parameters.imatrix = (_Importance * (len(rows) + 1))(*rows)  # ends with a null name
        names = str(source).encode(), str(target).encode()
        if self._llama.llama_model_quantize(*names, ctypes.byref(parameters)):
            raise RuntimeError("".join(self._log[-5:]))

    def open(self, path: Path) -> "LlamaModel":
        """Load a model.

        Raises
        ------
        RuntimeError
            With the end of the log.
        """
        self._log.clear()
        parameters = self._llama.llama_model_default_params()
        model = self._llama.llama_model_load_from_file(str(path).encode(), parameters)
        if not model:
            raise RuntimeError("".join(self._log[-5:]))
        return LlamaModel(self._llama, model)


class LlamaModel:
    """A model that llama.cpp has loaded; a context manager that frees it."""

    def __init__(self, library: ctypes.CDLL, model: int) -> None:
        self._llama, self._model = library, model
        self._vocabulary = library.llama_model_get_vocab(model)
        self.n_tokens: int = library.llama_vocab_n_tokens(self._vocabulary)

    def __enter__(self) -> "LlamaModel":
        return self

    def __exit__(self, *_: object) -> None:
        self._llama.llama_model_free(self._model)

    def tokenize(self, text: str, *, special: bool = True) -> list[int]:
        """Return the tokens of a text; `special` adds those of begin and end."""
        data = text.encode()
        room = len(data) + 8
        found = (ctypes.c_int32 * room)()
        n = self._llama.llama_tokenize(
            self._vocabulary, data, len(data), found, room, special, False
        )
        return list(found[:n])

    def logits(self, tokens: Sequence[int], *, threads: int = 1) -> np.ndarray:
        """Return the logits [n_tokens, n_vocabulary] after every token, from an empty context."""
        with self._context(len(tokens), threads) as decode:
            decode(tokens, 0, len(tokens))
            found = self._llama.llama_get_logits(decode.context)
            return np.ctypeslib.as_array(found, (len(tokens), self.n_tokens)).copy()

    def speed(self, prompt: Sequence[int], count: int, *, threads: int = 1) -> tuple[float, float]:
        """Return tokens per second of a prompt, and of `count` tokens, one at a time, after it."""
        with self._context(len(prompt) + count, threads) as decode:
            start = time.perf_counter()
            decode(prompt, 0, 1)
            middle = time.perf_counter()
            for i in range(count):
                decode([prompt[i % len(prompt)]], len(prompt) + i, 1)
            end = time.perf_counter()
        return len(prompt) / (middle - start), count / (end - middle)

    @contextmanager
    def _context(self, length: int, threads: int) -> Iterator["_Decoder"]:
        parameters = self._llama.llama_context_default_params()
        parameters.n_ctx = parameters.n_batch = parameters.n_ubatch = length
        context = self._llama.llama_init_from_model(self._model, parameters)
        if not context:
            raise RuntimeError(f"llama.cpp has no room for {length} tokens")
        try:
            self._llama.llama_set_n_threads(context, threads, threads)
            yield _Decoder(self._llama, context)
        finally:
            self._llama.llama_free(context)


class _Decoder:
    """Adds tokens to a context."""

    def __init__(self, library: ctypes.CDLL, context: int) -> None:
        self._llama, self.context = library, context

    def __call__(self, tokens: Sequence[int], first: int, n_logits: int) -> None:
        """Run tokens from the position `first` on; compute the logits of the last `n_logits`."""
        count = len(tokens)
        batch = self._llama.llama_batch_init(count, 0, 1)
        batch.n_tokens = count
        for i, token in enumerate(tokens):
            batch.token[i], batch.pos[i], batch.n_seq_id[i] = token, first + i, 1
            batch.seq_id[i][0], batch.logits[i] = 0, i >= count - n_logits
        try:
            if status := self._llama.llama_decode(self.context, batch):
                raise RuntimeError(f"llama_decode returned {status}")
            self._llama.llama_synchronize(self.context)
        finally:
            self._llama.llama_batch_free(batch)


def main() -> int:
    """Fetch the library, if it is missing, and say what went wrong."""
    if (reason := why_missing()) is None:
        return 0
    try:
        if "make llama" in reason:
            fetch()
            return 0
    except (OSError, ValueError, tarfile.TarError) as error:
        reason = f"llama.cpp could not be fetched ({error})"
    print(f"{reason}; the tests that compare with it are skipped", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
