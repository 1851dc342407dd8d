"""What all tests share: no network, few threads, a tiny tokenizer and tiny models."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before huggingface_hub reads it
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# Before torch reads it. Processes of pytest-xdist share the cores among themselves. They inherit
# the environment of the first process, so the number that the user has set is kept apart.
os.environ["LRC_TEST_THREADS"] = os.environ.get(
    "LRC_TEST_THREADS", os.environ.get("OMP_NUM_THREADS", "")
)
os.environ["OMP_NUM_THREADS"] = os.environ["LRC_TEST_THREADS"] or (
    "1" if "PYTEST_XDIST_WORKER" in os.environ else "2"
)

import gc
import re
import signal
import sys
import threading
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from types import MappingProxyType
from typing import Any, NoReturn

import gguf
import pytest
import torch
import tqdm
import yaml
from tests.checked_architectures import once_each
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from lrc.cli.console import WITH_RECIPE
from lrc.compressors.corpus.documents import read_documents
from lrc.compressors.estimates.machine_rates import measure_rates
from lrc.configs.recipe import Evaluate, Model

torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
# By default tqdm, which torch.compile uses, has a lock that processes share: a child that a test
# kills while it holds the lock would stop all later tests.
tqdm.tqdm.set_lock(threading.RLock())


RECIPE_KEY = re.compile(
    rf"\b(model\.({'|'.join(Model.model_fields)})|evaluate\.({'|'.join(Evaluate.model_fields)}))\b"
)
"""What commands without a recipe must not name."""


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Two would mostly wait for each other over matrices this small."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module", autouse=True)
def frozen_heap() -> None:
    """Hide what imports and earlier modules made from the garbage collector.

    The pipeline collects garbage after every stage: half a second with the objects of all tests.
    """
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def no_pages() -> Iterator[None]:
    """Draw no page after a run: half a second each. Its tests restore the function."""
    from lrc.compressors import pipeline

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "write_page", lambda *arguments: True)
        yield


@pytest.fixture(scope="session", autouse=True)
def checked_once() -> Iterator[None]:
    """Check an architecture once: a tenth of every run. Tests of the check call it directly."""
    from lrc.compressors import prepare

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prepare, "check_layers", once_each(prepare.check_layers))
        yield


@pytest.fixture(scope="session")
def make_tokenizer() -> Callable[..., PreTrainedTokenizerFast]:
    """Byte-level BPE of 512 tokens; `bos=True` makes it start every text with <s>."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=512,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(islice(read_documents("python-docs", part="calibration"), 20), trainer)
    plain = bpe.to_str()

    def make(*, bos: bool = False, chat_template: str | None = None) -> PreTrainedTokenizerFast:
        tokenizer = Tokenizer.from_str(plain)
        if bos:
            tokenizer.post_processor = processors.TemplateProcessing(
                single="<s> $A", special_tokens=[("<s>", 0)]
            )
        return PreTrainedTokenizerFast(
            tokenizer_object=tokenizer,
            bos_token="<s>",
            eos_token="</s>",
            model_max_length=256,
            chat_template=chat_template,
        )

    return make


@pytest.fixture
def tiny_tokenizer(
    make_tokenizer: Callable[..., PreTrainedTokenizerFast],
) -> PreTrainedTokenizerFast:
    return make_tokenizer()


@pytest.fixture(scope="session")
def tiny_llama() -> Callable[..., LlamaForCausalLM]:
    """Random Llama of 512 tokens and two layers, in eval mode; keywords go to its configuration."""

    def make(*, seed: int = 0, **changes: object) -> LlamaForCausalLM:
        config = LlamaConfig(
            **{
                "vocab_size": 512,
                "hidden_size": 32,
                "intermediate_size": 48,
                "num_hidden_layers": 2,
                "num_attention_heads": 4,
                "num_key_value_heads": 2,
                "max_position_embeddings": 256,
                "initializer_range": 0.2,  # large enough that predictions differ from uniform
                "bos_token_id": 0,
                "eos_token_id": 1,
                **changes,
            }
        )
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return LlamaForCausalLM(config).eval()

    return make


@pytest.fixture(scope="session")
def tiny_gemma() -> Callable[..., Gemma2ForCausalLM]:
    """Random Gemma 2, which caps its logits after the head unless `cap` is None, in eval mode."""

    def make(*, seed: int = 0, cap: float | None = 2.0) -> Gemma2ForCausalLM:
        config = Gemma2Config(
            vocab_size=512,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=8,
            max_position_embeddings=256,
            final_logit_softcapping=cap,
            initializer_range=0.5,
        )
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return Gemma2ForCausalLM(config).eval()

    return make


@pytest.fixture(scope="session")
def tiny_model_folder(
    tiny_llama: Callable[..., LlamaForCausalLM],
    make_tokenizer: Callable[..., PreTrainedTokenizerFast],
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """Folder with the tiny Llama and its tokenizer. Shared: copy it before changing anything."""
    folder = tmp_path_factory.mktemp("models") / "tiny-llama"
    tiny_llama().save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def write_gguf() -> Callable[..., Path]:
    """Write a tiny Llama as llama.cpp's converter does, without a tokenizer."""
    names = {
        "model.embed_tokens": "token_embd",
        "model.norm": "output_norm",
        "lm_head": "output",
        "model.layers": "blk",
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
    }

    def write(
        path: Path,
        model: LlamaForCausalLM,
        *,
        leave_out: Collection[str] = (),
        tensors: Mapping[str, torch.Tensor] = MappingProxyType({}),
        metadata: Mapping[str, object] = MappingProxyType({}),
    ) -> Path:
        """Write a file; `metadata` is added, `leave_out` and `tensors` are names in the file."""
        config, stored = model.config, {}
        for name, tensor in model.state_dict().items():
            if name == "lm_head.weight" and config.tie_word_embeddings:
                continue
            for old, new in names.items():
                name = name.replace(old, new)
            for part, heads in (
                ("q", config.num_attention_heads),
                ("k", config.num_key_value_heads),
            ):
                if f"attn_{part}." in name:
                    tensor = tensor.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)
            stored[name] = tensor
        values = {
            "general.type": "model",
            "llama.block_count": config.num_hidden_layers,
            "llama.context_length": config.max_position_embeddings,
            "llama.embedding_length": config.hidden_size,
            "llama.feed_forward_length": config.intermediate_size,
            "llama.attention.head_count": config.num_attention_heads,
            "llama.attention.head_count_kv": config.num_key_value_heads,
            "llama.attention.layer_norm_rms_epsilon": config.rms_norm_eps,
            "llama.rope.freq_base": 10000.0,
            "llama.rope.dimension_count": config.head_dim,
            "llama.vocab_size": config.vocab_size,
            **metadata,
        }
        writer = gguf.GGUFWriter(path, "llama")
        for key, value in values.items():
            kind = {bool: "BOOL", int: "UINT32", float: "FLOAT32", str: "STRING"}[type(value)]
            writer.add_key_value(key, value, gguf.GGUFValueType[kind])
        for name, tensor in {**stored, **tensors}.items():
            if name not in leave_out:
                writer.add_tensor(name, tensor.detach().contiguous().numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path

    return write


@pytest.fixture(scope="session")
def tiny_text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """File of a few thousand tokens of English: quicker to read than all of python-docs."""
    path = tmp_path_factory.mktemp("texts") / "english.txt"
    text = "\n\n".join(map(str, read_documents("python-docs", part="evaluation")))
    path.write_text(text[:20_000], encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def tiny_recipe(tiny_text: Path) -> Callable[..., Path]:
    """Write a recipe for a tiny model beside its output folder; keywords replace top-level keys."""

    def write(folder: Path, output: Path, **changes: Any) -> Path:
        recipe = {
            "model": str(folder),
            "calibration": {"source": str(tiny_text), "samples": 4, "length": 64},
            "stages": [{"decompose": {"method": "svd-llm", "keep": 0.6}}],
            "output": str(output),
            **changes,
        }
        path = output.with_name(f"{output.name}.yaml")
        path.write_text(yaml.safe_dump(recipe, sort_keys=False), encoding="utf-8")
        return path

    return write


@dataclass(frozen=True)
class Ended:
    """How a command ended."""

    code: int
    out: str
    err: str

    @property
    def errors(self) -> list[str]:
        """Lines of stderr that start with ``error[CODE]:``."""
        return [line for line in self.err.splitlines() if line.startswith("error[")]

    def refuses(
        self, exit_code: int, *words: str, count: int = 1, code: str = "", where: str = ""
    ) -> None:
        """Demand this exit code, nothing on stdout, no traceback, and `count` errors.

        One of the errors must have this `code` and be about this `where` (a key path or file);
        each of the `words` must be in one of the errors.
        """
        assert (self.code, self.out) == (exit_code, ""), self.err
        assert "Traceback" not in self.err
        assert "bug in lrc" not in self.err
        assert len(self.errors) == count, self.err
        about = [e for e in self.errors if e.startswith(f"error[{code}" + "]: " * bool(code))]
        about = [e for e in about if f": {where}: " in e or not where]
        assert about, self.err
        for word in words:
            assert any(word in error for error in self.errors), self.err


@pytest.fixture
def lrc(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Iterator[Callable[..., Ended]]:
    """Run the command line in this process: starting one of its own takes seconds.

    On one thread, because two would mostly wait for each other over matrices this small.
    """
    from transformers.utils import logging

    from lrc.cli import console
    from lrc.cli.main import main

    gc.freeze()  # the pipeline collects garbage after every stage: leave out what imports made
    monkeypatch.setattr(console, "quiet_libraries", nullcontext)  # warnings stay errors
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)

    def run(*arguments: object) -> Ended:
        monkeypatch.setattr("sys.argv", ["lrc", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main()
        captured = capsys.readouterr()
        code = ended.value.code
        assert isinstance(code, int)
        if not WITH_RECIPE.intersection(map(str, arguments[:2])):
            assert not RECIPE_KEY.search(captured.err), captured.err
        return Ended(code, captured.out, captured.err)

    yield run
    torch.set_num_threads(threads)
    logging.set_verbosity(verbosity)
    if bars:
        logging.enable_progress_bar()
    for number, handler in handlers.items():
        signal.signal(number, handler)


class Child:
    """The command line in a process forked from this one, which has paid for the imports."""

    def __init__(self, folder: Path, arguments: tuple[object, ...], before: Callable[[], None]):
        self.out, self.err = folder / "child.out", folder / "child.err"
        self.id = os.fork() or self._run([str(a) for a in arguments], before)

    def _run(self, arguments: list[str], before: Callable[[], None]) -> NoReturn:
        code = 70
        try:
            for stream, path in ((1, self.out), (2, self.err)):
                os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), stream)
            sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)  # noqa: SIM115
            sys.argv = ["lrc", *arguments]
            from lrc.cli.main import main

            # A shell starts what it puts in the background with this signal ignored.
            signal.signal(signal.SIGINT, signal.default_int_handler)
            torch.set_num_threads(
                1
            )  # makes torch's pool anew, before threads that load race for it
            before()
            main()
        except SystemExit as ended:
            code = ended.code if isinstance(ended.code, int) else 70
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)  # past every handler of pytest's

    def ended(self) -> Ended:
        """Wait for the end; code 70 stands for an exception, -N for a signal."""
        _, status = os.waitpid(self.id, 0)
        self.id = 0
        return Ended(os.waitstatus_to_exitcode(status), self.out.read_text(), self.err.read_text())


@pytest.fixture
def fork_lrc(tmp_path: Path) -> Iterator[Callable[..., Child]]:
    """Start the command line in a child; `before` runs there first.

    Parent and child calculate on one thread: a forked OpenMP would hang on two.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    measure_rates("cpu", torch.float32, tmp_path)  # once, and not in every child

    children: list[Child] = []

    def start(*arguments: object, before: Callable[[], None] = lambda: None) -> Child:
        children.append(Child(tmp_path, arguments, before))
        return children[-1]

    yield start
    for child in children:
        if child.id:  # of a test that failed
            os.kill(child.id, signal.SIGKILL)
            os.waitpid(child.id, 0)
    torch.set_num_threads(threads)
