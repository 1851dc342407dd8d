"""Make a small Qwen2 whose rows are multiples of 256 from a Llama, to compare GGUF files on it.

usage: python -m tests.benchmarks.second_family MODEL FOLDER --train TEXT ... --test TEXT
           [--seconds 220] [--own-text 45] [--tokens N] [--width 512] [--heads 8] ...

The K-quants of llama.cpp need rows that are multiples of 256. MODEL is a Llama, such as
SmolLM2-135M with rows of 576; a folder, or a GGUF file, which is converted. The result is not a
published model. Its quality is below that of MODEL and depends on the time of training.

1. The residual stream is projected onto its principal axes, of which there are `--width`, as in
   SliceGPT with one rotation (`lrc.compressors.slicing.slicegpt`); the head is untied.
2. Every layer keeps the `--heads` attention heads with the largest outputs, each with keys and
   values of its own. llama.cpp loads a Qwen2 only if its heads together are as wide as the stream.
3. All parameters, with biases of queries, keys and values, are trained to predict what MODEL
   predicts (the KL divergence), on `--train` and on text that MODEL writes in `--own-text` seconds.

FOLDER is written at every report and at the end, in bfloat16 with the tokenizer; training.json
there has the options and the perplexities on disjoint windows of `--test`. Training ends after
`--seconds` in total or `--tokens`; as the learning rate follows the clock, two runs differ.
"""

import argparse
import copy
import inspect
import json
import math
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from itertools import islice, takewhile
from pathlib import Path
from typing import Any

import torch
from tests.benchmarks.model_folder import as_folder
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

from lrc.compressors.corpus.documents import SEPARATOR, read_documents
from lrc.compressors.evaluate.agreement import kl_divergence, log_probabilities
from lrc.compressors.slicing.stream_bases import principal_axes

START = 32
"""Tokens of the text that MODEL continues."""
WARM_UP = 0.03
"""Fraction of the training in which the learning rate rises."""


def main() -> None:
    """Convert, train, save."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--train", nargs="+", required=True)
    parser.add_argument("--test", required=True)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=220, help="of the whole command")
    parser.add_argument("--own-text", type=float, default=45, help="seconds of writing text")
    parser.add_argument("--tokens", type=float, default=math.inf, help="of the training")
    parser.add_argument("--length", type=int, default=512, help="tokens of a window")
    parser.add_argument("--batch", type=int, default=16, help="windows of a step")
    parser.add_argument("--together", type=int, default=2048, help="texts written at a time")
    parser.add_argument("--rate", type=float, default=6e-4, help="highest learning rate")
    parser.add_argument("--samples", type=int, default=64, help="windows of both statistics")
    parser.add_argument("--every", type=float, default=40, help="seconds between reports")
    asked = parser.parse_args()
    run = Run(asked)
    run.train()


class Run:
    """The model, the text, and the clock."""

    def __init__(self, asked: argparse.Namespace) -> None:
        self.asked, self.started = asked, time.monotonic()
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.random = torch.Generator().manual_seed(0)
        source = as_folder(asked.model, asked.folder.with_name(f"{asked.folder.name}-source"))
        self.tokenizer = AutoTokenizer.from_pretrained(source)
        precision = torch.bfloat16 if self.device == "cuda" else torch.float32
        self.dense: Any = AutoModelForCausalLM.from_pretrained(source, dtype=precision)
        self.dense.eval().requires_grad_(requires_grad=False).to(self.device)
        text = torch.cat([self._tokens(path, "calibration") for path in asked.train])
        self.text = text.to(self.device)
        test, length = self._tokens(asked.test, "evaluation"), asked.length
        self.test = test[: len(test) // length * length].view(-1, length)[: asked.samples]
        self.facts: dict[str, Any] = {"options": vars(asked)}
        self.facts |= {"text_tokens": len(self.text), "own_tokens": 0, "perplexity": {}}

    def _tokens(self, path: str, part: Any) -> Tensor:
        text = SEPARATOR.join(str(each) for each in read_documents(path, part=part))
        ids = self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return torch.tensor(ids)

    def elapsed(self) -> float:
        """Return the seconds since the start."""
        return time.monotonic() - self.started

    def precision(self) -> AbstractContextManager[object]:
        """Return the context to compute in."""
        on_gpu = self.device == "cuda"
        return torch.autocast("cuda", torch.bfloat16) if on_gpu else nullcontext()

    def windows(self, count: int, length: int) -> Tensor:
        """Draw windows [count, length] of the text."""
        starts = torch.randint(len(self.text) - length, (count,), generator=self.random)
        return self.text[(starts[:, None] + torch.arange(length)).to(self.device)]

    def report(self, model: Any, name: str) -> None:
        """Measure the perplexity on the test text, and record it."""
        value = perplexity(model, self.test.to(self.device), self.precision)
        self.facts["perplexity"][name] = round(value, 3)
        print(f"{self.elapsed():.0f} s, {name}: perplexity {value:.3f}", flush=True)

    def train(self) -> None:
        """Make the model, train it, and save it at every report."""
        asked = self.asked
        self.report(self.dense, "dense")
        windows = self.windows(asked.samples, asked.length)
        moment, energies = statistics(self.dense, windows)
        model = converted(self.dense, moment, energies, width=asked.width, heads=asked.heads)
        self.report(model.to(self.device), "converted")
        self._write_text()
        optimizer = torch.optim.AdamW(groups(model), betas=(0.9, 0.95), fused=True)
        began, done, steps, reported = self.elapsed(), 0, 0, self.elapsed()
        while (progress := self._progress(began, done)) < 1:
            loss = self._step(model, optimizer, asked.rate * rate(progress))
            done, steps = done + asked.batch * asked.length, steps + 1
            if steps == 1 or self.elapsed() - reported > asked.every:
                # The value of the last batch; reading it at every step would wait for the GPU.
                print(f"step {steps}, {done:,} tokens: divergence {loss.item():.3f}", flush=True)
            if self.elapsed() - reported > asked.every:
                self.report(model, f"{done} tokens")
                self._save(model, done)
                reported = self.elapsed()
        self.report(model, f"{done} tokens")
        self._save(model, done)
        seconds = self.elapsed() - began
        print(f"{done:,} tokens in {seconds:.0f} s, {done / seconds:,.0f} a second", flush=True)

    def _progress(self, began: float, done: int) -> float:
        left = max(self.asked.seconds - began, 1e-9)
        return max((self.elapsed() - began) / left, done / self.asked.tokens)

    def _step(self, model: Any, optimizer: torch.optim.Optimizer, now: float) -> Tensor:
        for group in optimizer.param_groups:
            group["lr"] = now
        ids = self.windows(self.asked.batch, self.asked.length)
        with torch.no_grad(), self.precision():
            expected = self.dense(ids, use_cache=False).logits
        with self.precision():
            found = model(ids, use_cache=False).logits
        log_p, log_q = log_probabilities(expected), log_probabilities(found)
        loss = kl_divergence(log_p, log_q).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    def _write_text(self) -> None:
        """Let the dense model continue pieces of the text until the time for it is up."""
        until, found = self.elapsed() + self.asked.own_text, []
        while self.elapsed() < until:
            start = self.windows(self.asked.together, START)
            more = islice(written(self.dense, start), self.asked.length - START)
            pieces = [start, *takewhile(lambda _: self.elapsed() < until, more)]
            found.append(torch.cat(pieces, dim=1).flatten())
        if found:
            self.facts["own_tokens"] = sum(map(len, found))
            self.text = torch.cat([self.text, *found])
            print(f"{self.elapsed():.0f} s: wrote {self.facts['own_tokens']:,} tokens", flush=True)

    def _save(self, model: Any, done: int) -> None:
        """Replace the folder by the model as it is."""
        folder, new = (
            self.asked.folder,
            self.asked.folder.with_name(f"{self.asked.folder.name}-new"),
        )
        shutil.rmtree(new, ignore_errors=True)
        copy.deepcopy(model).to(torch.bfloat16).save_pretrained(new)
        self.tokenizer.save_pretrained(new)
        facts = {**self.facts, "trained_tokens": done, "seconds": round(self.elapsed())}
        (new / "training.json").write_text(
            json.dumps(facts, indent=1, default=str), encoding="utf-8"
        )
        shutil.rmtree(folder, ignore_errors=True)
        new.rename(folder)


@torch.no_grad()
def statistics(model: Any, windows: Tensor) -> tuple[Tensor, Tensor]:
    """Return what the conversion is based on.

    Returns
    -------
    moment : Tensor, shape [D, D]
        Second moment of the inputs of all norms, each token divided by its root mean square.
    energies : Tensor, shape [n_layers, n_heads]
        Sum over tokens of the squared norm of what each head adds to the stream.
    """
    layers, D = model.model.layers, model.config.hidden_size
    moment = torch.zeros(D, D, dtype=torch.float64, device=windows.device)
    heads = model.config.num_attention_heads
    energies = torch.zeros(len(layers), heads, dtype=torch.float64, device=windows.device)

    def add(x: Tensor) -> None:
        x = x.flatten(0, -2).float()
        x = x * x.square().mean(-1, keepdim=True).rsqrt()
        moment.add_((x.T @ x).double())

    def add_heads(index: int, x: Tensor, W: Tensor) -> None:
        x = x.flatten(0, -2).float().unflatten(-1, (heads, -1))  # [n, heads, d]
        W = W.float().unflatten(-1, (heads, -1))  # [D, heads, d]
        out = torch.einsum("nhd,Dhd->hnD", x, W)
        energies[index] += out.square().sum((1, 2)).double()

    handles = [model.model.norm.register_forward_pre_hook(lambda _, x: add(x[0]))]
    for index, layer in enumerate(layers):
        for norm in (layer.input_layernorm, layer.post_attention_layernorm):
            handles.append(norm.register_forward_pre_hook(lambda _, x: add(x[0])))
        o_proj = layer.self_attn.o_proj
        handles.append(
            o_proj.register_forward_pre_hook(lambda m, x, i=index: add_heads(i, x[0], m.weight))
        )
    for each in windows.split(4):
        model(each, use_cache=False, logits_to_keep=1)
    for handle in handles:
        handle.remove()
    return moment.cpu(), energies.cpu()


@torch.no_grad()
def converted(model: Any, moment: Tensor, energies: Tensor, *, width: int, heads: int) -> Any:
    """Return a Qwen2 in float32 on the CPU that computes what a Llama computes, or nearly.

    With the width and the number of heads of the Llama both compute the same: norms are fused into
    the matrices after them, and a norm gives the same in every orthogonal basis of the stream. A
    smaller width scales the stream and what reads it, as described in
    `lrc.compressors.slicing.slicegpt`.

    Parameters
    ----------
    model : LlamaForCausalLM
        Without biases.
    moment, energies : Tensor
        From `statistics`.
    width : int
        Of the stream: `heads` times the dimension of a head.
    heads : int
        Of every layer.

    Raises
    ------
    ValueError
        If `width` is not that of the heads together.
    """
    old, size = model.config, model.model.layers[0].self_attn.head_dim
    if width != heads * size:
        raise ValueError(f"--width: must be --heads times {size}, {heads * size}, got {width}")
    new: Any = Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=old.vocab_size,
            hidden_size=width,
            intermediate_size=old.intermediate_size,
            num_hidden_layers=old.num_hidden_layers,
            num_attention_heads=heads,
            num_key_value_heads=heads,
            hidden_act=old.hidden_act,
            max_position_embeddings=old.max_position_embeddings,
            rms_norm_eps=old.rms_norm_eps,
            rope_parameters=old.rope_parameters,
            tie_word_embeddings=False,
            bos_token_id=old.bos_token_id,
            eos_token_id=old.eos_token_id,
            pad_token_id=old.pad_token_id,
            dtype="float32",
        )
    ).float()
    scale = math.sqrt(width / old.hidden_size)
    Q = principal_axes(moment)[0][:, :width]  # [D, width]

    def read(module: Any) -> Tensor:
        found: Tensor = module.weight.cpu().double()
        return found

    def reader(module: Any, norm: Any) -> Tensor:
        return read(module) @ (read(norm)[:, None] * Q / scale)

    def writer(module: Any) -> Tensor:
        return (read(module).T @ Q * scale).T

    new.model.embed_tokens.weight.copy_(read(model.model.embed_tokens) @ Q * scale)
    new.lm_head.weight.copy_(reader(model.get_output_embeddings(), model.model.norm))
    shared = old.num_attention_heads // old.num_key_value_heads
    for to, layer, energy in zip(new.model.layers, model.model.layers, energies, strict=True):
        a, norm = layer.self_attn, layer.input_layernorm
        kept = energy.argsort(descending=True)[:heads].sort().values
        for name, source in (
            ("q_proj", kept),
            ("k_proj", kept // shared),
            ("v_proj", kept // shared),
        ):
            W = reader(getattr(a, name), norm).unflatten(0, (-1, size))[source]
            target = getattr(to.self_attn, name)
            target.weight.copy_(W.flatten(0, 1))
            target.bias.zero_()
        W = writer(a.o_proj).unflatten(1, (-1, size))[:, kept]
        to.self_attn.o_proj.weight.copy_(W.flatten(1))
        for name in ("gate_proj", "up_proj"):
            W = reader(getattr(layer.mlp, name), layer.post_attention_layernorm)
            getattr(to.mlp, name).weight.copy_(W)
        to.mlp.down_proj.weight.copy_(writer(layer.mlp.down_proj))
    return new


@torch.inference_mode()
def written(model: Any, start: Tensor) -> Iterator[Tensor]:
    """Yield one token [n, 1] after another that a model samples after `start` [n, n_tokens]."""
    # transformers 5.24 calls it `cache` and warns about the name that it had before.
    parameters = inspect.signature(type(model).forward).parameters
    key = "cache" if "cache" in parameters else "past_key_values"
    ids, cache = start, None
    while True:
        out = model(ids, use_cache=True, logits_to_keep=1, **{key: cache})
        cache, logits = out.past_key_values, out.logits[:, -1].float()
        # The largest of logits with Gumbel noise is a sample of the softmax.
        noise = torch.empty_like(logits).exponential_().log_()
        ids = (logits - noise).argmax(-1, keepdim=True)
        yield ids


def groups(model: Any) -> list[dict[str, Any]]:
    """Return the parameters for the optimizer; norms and biases do not decay."""
    every = [*model.parameters()]
    matrices = [p for p in every if p.ndim > 1]
    return [
        {"params": matrices, "weight_decay": 0.01},
        {"params": [p for p in every if p.ndim == 1], "weight_decay": 0.0},
    ]


def rate(progress: float) -> float:
    """Return the fraction of the highest learning rate at a progress in [0, 1]."""
    cosine = 0.5 + 0.5 * math.cos(math.pi * progress)
    return min(1.0, progress / WARM_UP) * cosine


@torch.no_grad()
def perplexity(
    model: Any, windows: Tensor, precision: Callable[[], AbstractContextManager[object]]
) -> float:
    """Return the perplexity of all tokens but the first of each window."""
    total = 0.0
    for ids in windows.split(8):
        with precision():
            logits = model(ids, use_cache=False).logits[:, :-1]
        total += float(
            cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten(), reduction="sum")
        )
    return math.exp(total / (windows.numel() - len(windows)))


if __name__ == "__main__":
    main()
