"""A checkpoint that is damaged, tampered with or too new is refused by name, never half loaded."""

import math
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.damaged_checkpoints import (
    change_tensor,
    cut,
    edit,
    edit_block,
    edit_first_component,
    edit_manifest,
    first_module,
    flip_a_bit,
    forget_weights,
    index_names,
    link_outside,
    list_in_manifest,
    lose_a_shard,
    remove,
    rename_tensor,
    replace_text,
    write,
)
from transformers import AutoModelForCausalLM, AutoTokenizer

from lrc.compressors.checkpoint.lrc_config import LrcConfig
from lrc.compressors.checkpoint.manifest import write_manifest
from lrc.compressors.checkpoint.quantizer import LrcQuantizer
from lrc.configs.errors import CheckpointError

EVAL = ("--perplexity", "python-docs", "--window", 32, "--windows", 1, "-q")


@pytest.fixture(scope="module")
def sound(
    tiny_model_folder: Path,
    tiny_recipe: Callable[..., Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """Return a sound checkpoint. Shared: copy it before changing anything."""
    from lrc.compressors.io.machine import Machine
    from lrc.compressors.pipeline import compress
    from lrc.configs.load import load_recipe

    output = tmp_path_factory.mktemp("sound") / "out"
    compress(load_recipe(tiny_recipe(tiny_model_folder, output)), Machine(device="cpu"))
    return output / "checkpoint"


@pytest.fixture
def checkpoint(sound: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(sound, tmp_path / "checkpoint"))


LAYER = "model.layers.0.mlp.up_proj"
DAMAGED: dict[str, tuple[Callable[[Path], object], str, tuple[str, ...]]] = {
    "truncated": (
        cut(50_000),
        "invalid-checkpoint",
        ("model.safetensors: not a whole safetensors file", "again"),
    ),
    "empty": (
        cut(0),
        "invalid-checkpoint",
        ("model.safetensors: not a whole safetensors file",),
    ),
    "no weights": (remove("model.safetensors"), "invalid-checkpoint", ("holds no weights",)),
    "a shard missing": (
        lose_a_shard,
        "invalid-checkpoint",
        ("model-00002-of-00002.safetensors: missing",),
    ),
    "no config": (
        remove("config.json"),
        "invalid-checkpoint",
        ("no config.json", "OUTPUT/checkpoint"),
    ),
    "config not JSON": (
        write("config.json", "{"),
        "invalid-checkpoint",
        ("config.json: not a readable JSON file",),
    ),
    "config a list": (
        write("config.json", "[1]"),
        "invalid-checkpoint",
        ("config.json: must be a JSON object",),
    ),
    "older": (edit_block(format_version=1), "old-version", ("format_version is 1", "recipe")),
    "newer": (edit_block(format_version=9), "newer-version", ("format_version is 9", "upgrade")),
    "no version": (edit_block(format_version="a"), "invalid-version", ("got 'a'",)),
    "rank edited": (edit_first_component(rank=3), "tensor-mismatch", ("config.json",)),
    "rank no number": (edit_first_component(rank="3"), "invalid-config", ("'rank'", "got '3'")),
    "component unknown": (
        edit_first_component(type="butterfly"),
        "invalid-config",
        ("low_rank, pivoted_low_rank", "got 'butterfly'", "newer lrc", "upgrade"),
    ),
    "modules a list": (edit_block(modules=[1]), "invalid-config", ("modules must map names",)),
    "a table of another version": (
        edit_block(offsets={}),
        "invalid-config",
        ("unknown key 'offsets'", "upgrade"),
    ),
    "components empty": (
        edit(lambda c: first_module(c).update(components=[])),
        "invalid-config",
        ("'components' must not be empty",),
    ),
    "block lost": (
        edit(lambda config: config.pop("quantization_config")),
        "invalid-checkpoint",
        ("config.json: has lost its quantization_config", "again"),
    ),
    "tensor renamed": (
        rename_tensor(f"{LAYER}.low_rank.a.weight", "other"),
        "tensor-mismatch",
        (LAYER, "low_rank.a.weight"),
    ),
    "integers as weights": (
        change_tensor(f"{LAYER}.low_rank.a.weight", lambda tensor: tensor.to(torch.int16)),
        "tensor-mismatch",
        (f"{LAYER}.low_rank.a.weight: expected floating-point numbers", "I16"),
    ),
    "a key twice": (
        replace_text("config.json", '"model_type"', '"model_type": "gpt2", "model_type"'),
        "invalid-checkpoint",
        ("config.json: not a readable JSON", "'model_type' occurs more than once"),
    ),
    "not a number": (
        edit(lambda config: config.update(rms_norm_eps=math.nan)),
        "invalid-checkpoint",
        ("config.json: not a readable JSON", "NaN is not a finite number"),
    ),
    "infinite": (
        replace_text("config.json", '"rms_norm_eps": 1e-06', '"rms_norm_eps": 1e600'),
        "invalid-checkpoint",
        ("config.json: not a readable JSON", "1e600 is not a finite number"),
    ),
    "nested without end": (
        write("config.json", "[" * 200_000),
        "invalid-checkpoint",
        ("config.json: not a readable JSON",),
    ),
    "architectures no names": (
        edit(lambda config: config.update(architectures={"0": 1})),
        "invalid-checkpoint",
        ("architectures must be a list of class names",),
    ),
    "a shard outside": (
        index_names("../model.safetensors"),
        "invalid-checkpoint",
        ("model.safetensors.index.json", "'../model.safetensors' must be", "in the folder"),
    ),
    "a shard by its absolute path": (
        index_names("/tmp/model.safetensors"),
        "invalid-checkpoint",
        ("'/tmp/model.safetensors' must be",),
    ),
    "a shard without a name": (index_names(""), "invalid-checkpoint", ("'' must be",)),
    "a tensor twice": (
        index_names("model-1.safetensors", "model-2.safetensors"),
        "invalid-checkpoint",
        ("model-2.safetensors: ", "model-1.safetensors"),
    ),
    "no tensors": (
        index_names(),
        "invalid-checkpoint",
        ("holds no weights",),
    ),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_a_damaged_checkpoint_is_refused_by_name(lrc, checkpoint: Path, case: str) -> None:
    spoil, code, words = DAMAGED[case]
    spoil(checkpoint)
    lrc("inspect", checkpoint).refuses(1, str(checkpoint), *words, code=code)
    lrc("eval", checkpoint, *EVAL).refuses(1, str(checkpoint), *words, code=code)


def test_a_missing_tensor_is_not_replaced_by_random_numbers(lrc, checkpoint: Path) -> None:
    shutil.rmtree(checkpoint / "lrc")  # the hashes
    rename_tensor("model.norm.weight", None)(checkpoint)
    words = (str(checkpoint), "model.norm.weight: expected [32], found nothing", "again")
    lrc("eval", checkpoint, *EVAL).refuses(1, *words, code="tensor-mismatch")
    rename_tensor("lm_head.weight", None)(checkpoint)
    with pytest.raises(CheckpointError, match=r"lm_head\.weight: expected"):
        AutoModelForCausalLM.from_pretrained(checkpoint)


def test_a_tensor_without_a_place_is_refused(lrc, checkpoint: Path) -> None:
    shutil.rmtree(checkpoint / "lrc")
    tensors = load_file(checkpoint / "model.safetensors")
    tensors["model.layers.0.mlp.bias"] = torch.zeros(2)
    save_file(tensors, checkpoint / "model.safetensors", metadata={"format": "pt"})
    words = (str(checkpoint), "no place for model.layers.0.mlp.bias", "again")
    lrc("eval", checkpoint, *EVAL).refuses(1, *words, code="tensor-mismatch")


def test_no_tokenizer(lrc, checkpoint: Path) -> None:
    shutil.rmtree(checkpoint / "lrc")
    for file in checkpoint.glob("token*"):
        file.unlink()
    lrc("eval", checkpoint, *EVAL).refuses(1, str(checkpoint), "no tokenizer", "tokenizer.json")


MANIFEST = "lrc/manifest.json"
Spoil = Callable[[Path], object]
# What loading notices too, unlike changes of the recipe and the plan.
TAMPERED: dict[str, tuple[Spoil, str, tuple[str, ...]]] = {
    "weights": (
        flip_a_bit("model.safetensors"),
        "changed-file",
        ("model.safetensors has changed",),
    ),
    "tokenizer": (flip_a_bit("tokenizer.json"), "changed-file", ("tokenizer.json has changed",)),
    "config": (
        edit(lambda c: c.update(rope_theta=1.0)),
        "changed-file",
        ("config.json has changed", "if the change was intended, remove the folder lrc/"),
    ),
    "a file missing": (
        remove("generation_config.json"),
        "changed-file",
        ("generation_config.json is missing",),
    ),
    "a link": (link_outside, "changed-file", ("tokenizer.json is a link to", "elsewhere.json")),
    "manifest missing": (remove(MANIFEST), "invalid-checkpoint", (f"has no {MANIFEST}", "again")),
    "manifest damaged": (
        write(MANIFEST, "{"),
        "invalid-checkpoint",
        ("manifest.json: not a readable JSON",),
    ),
    "manifest without hashes": (
        write(MANIFEST, "{}"),
        "invalid-checkpoint",
        ("manifest.json: holds no hashes",),
    ),
    "manifest with an empty list": (
        edit_manifest(lambda manifest: manifest.update(sha256={})),
        "invalid-checkpoint",
        ("manifest.json: holds no hashes",),
    ),
    "manifest of a newer format": (
        edit_manifest(lambda manifest: manifest.update(format_version=3)),
        "newer-version",
        ("manifest.json: format_version is 3",),
    ),
    "plain no truth value": (
        edit_manifest(lambda manifest: manifest.update(plain="false")),
        "invalid-manifest",
        ("plain must be true or false, got 'false'",),
    ),
    "weights not listed": (
        edit_manifest(forget_weights),
        "invalid-manifest",
        ("files of weights must be listed",),
    ),
    "a hash that is none": (
        list_in_manifest("config.json", "abc"),
        "invalid-manifest",
        ("config.json must have a SHA-256, got 'abc'",),
    ),
    "a name outside": (
        list_in_manifest("../secret.json"),
        "invalid-manifest",
        ("'../secret.json' must be", "in the folder"),
    ),
    "an absolute name": (
        list_in_manifest("/etc/passwd"),
        "invalid-manifest",
        ("'/etc/passwd' must be",),
    ),
    "a name with a line break": (
        list_in_manifest("a\nb"),
        "invalid-manifest",
        ("'a\\nb' must be",),
    ),
    "half a character in a name": (
        list_in_manifest("\ud800"),
        "invalid-manifest",
        ("'\\ud800' must be",),
    ),
    "pickled weights": (write("pytorch_model.bin", ""), "unlisted-file", ("pytorch_model.bin",)),
    "code": (
        write("modeling_llama.py", ""),
        "unlisted-file",
        ("modeling_llama.py must be listed",),
    ),
    "an adapter": (write("adapter_config.json", "{}"), "unlisted-file", ("adapter_config.json",)),
    "a template": (write("chat_template.jinja", ""), "unlisted-file", ("chat_template.jinja",)),
    "other weights": (
        lambda checkpoint: shutil.copy(
            checkpoint / "model.safetensors", checkpoint / "consolidated.safetensors"
        ),
        "unlisted-file",
        ("consolidated.safetensors",),
    ),
}
UNREAD: dict[str, tuple[Spoil, tuple[str, ...]]] = {
    "recipe": (flip_a_bit("lrc/recipe.yaml"), ("lrc/recipe.yaml has changed",)),
    "plan": (write("lrc/plan.json", "{"), ("lrc/plan.json has changed",)),
    "report": (
        replace_text("lrc/report.json", '"seed": 0', '"seed": 1'),
        ("lrc/report.json: has changed",),
    ),
    "report damaged": (write("lrc/report.json", "{"), ("report.json: not a readable JSON",)),
    "report without checksum": (write("lrc/report.json", '{"size": 1}'), ("has changed",)),
    "unlisted": (write("lrc/more.json", "{}"), ("lrc/more.json must be listed",)),
}


@pytest.mark.parametrize("case", TAMPERED)
def test_every_command_refuses_changed_files(lrc, checkpoint: Path, case: str) -> None:
    spoil, code, words = TAMPERED[case]
    spoil(checkpoint)
    words = (str(checkpoint), *words)
    lrc("inspect", checkpoint, "--verify").refuses(1, *words, code=code)
    lrc("eval", checkpoint, *EVAL).refuses(1, *words, code=code)
    lrc("generate", checkpoint, "--prompt", "The").refuses(1, *words, code=code)
    if case != "tokenizer":
        with pytest.raises(CheckpointError) as caught:
            AutoModelForCausalLM.from_pretrained(checkpoint)
        assert caught.value.code == code


@pytest.mark.parametrize("case", UNREAD)
def test_verify_also_compares_what_loading_does_not_read(lrc, checkpoint: Path, case: str) -> None:
    assert lrc("inspect", checkpoint, "--verify").code == 0
    spoil, words = UNREAD[case]
    spoil(checkpoint)
    lrc("inspect", checkpoint, "--verify").refuses(1, str(checkpoint), *words, "again")
    if case not in ("recipe", "unlisted"):  # what `inspect` prints is always compared
        lrc("inspect", checkpoint).refuses(1, str(checkpoint), *words, "again")
    assert lrc("eval", checkpoint, *EVAL).code == 0


def test_an_unlisted_file_is_not_preferred_to_shards(lrc, sound: Path, tmp_path: Path) -> None:
    """Transformers reads ``model.safetensors`` if there is one, whatever the index says."""
    for hashes in (True, False):
        checkpoint = Path(shutil.copytree(sound, tmp_path / f"hashes-{hashes}"))
        index_names("model-00001-of-00001.safetensors")(checkpoint)
        shutil.rmtree(checkpoint / "lrc")
        if hashes:
            (checkpoint / "lrc").mkdir()
            write_manifest(checkpoint, plain=False)
        assert lrc("eval", checkpoint, *EVAL).code == 0
        shutil.copy(sound / "model.safetensors", checkpoint)
        for command in (("eval", checkpoint, *EVAL), ("inspect", checkpoint)):
            lrc(*command).refuses(1, ".safetensors", "remove it", code="unlisted-file")


def test_the_model_card_may_be_edited(lrc, checkpoint: Path) -> None:
    write("README.md", "edited")(checkpoint)
    write("LICENSE", "added")(checkpoint)
    assert lrc("inspect", checkpoint, "--verify").code == 0


def test_links_into_the_cache_of_the_hub_are_followed(lrc, sound: Path, tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots/abc"
    shutil.copytree(sound, snapshot)
    blobs.mkdir()
    for number, file in enumerate(path for path in [*snapshot.rglob("*")] if path.is_file()):
        file.rename(blobs / str(number))
        file.symlink_to(blobs / str(number))
    assert lrc("inspect", snapshot, "--verify").code == 0


def test_a_skeleton_reads_no_weights(checkpoint: Path) -> None:
    flip_a_bit("model.safetensors")(checkpoint)
    model = AutoModelForCausalLM.from_pretrained(checkpoint, device_map="meta")
    assert all(parameter.is_meta for parameter in model.parameters())


def test_a_saved_copy_has_no_hashes_and_loads(lrc, sound: Path, tmp_path: Path) -> None:
    for name in ("model", "tokenizer"):
        loader = AutoModelForCausalLM if name == "model" else AutoTokenizer
        loader.from_pretrained(sound).save_pretrained(tmp_path)
    assert lrc("eval", tmp_path, *EVAL).code == 0
    assert lrc("inspect", tmp_path).code == 0
    lrc("inspect", tmp_path, "--verify").refuses(1, "has no lrc/manifest.json")


def test_values_are_checked_without_hashes(lrc, checkpoint: Path) -> None:
    shutil.rmtree(checkpoint / "lrc")
    for name in ("model.norm.weight", f"{LAYER}.low_rank.b.weight"):
        change_tensor(name, lambda tensor: tensor.fill_(math.inf))(checkpoint)
        words = (str(checkpoint), name.replace(".b.w", ": b.w"), "is not finite in float32")
        lrc("eval", checkpoint, *EVAL).refuses(1, *words, code="damaged-weights")
        change_tensor(name, lambda tensor: tensor.fill_(1))(checkpoint)


def test_files_that_transformers_does_not_name_are_not_taken_on_trust() -> None:
    quantizer = LrcQuantizer(LrcConfig({}))
    for files in ({}, {"checkpoint_files": None}, {"checkpoint_files": []}):
        with pytest.raises(CheckpointError, match="did not say which files it loads"):
            quantizer._process_model_before_weight_loading(torch.nn.Module(), **files)


def test_a_folder_without_a_checkpoint(lrc, tiny_model_folder: Path, tmp_path: Path) -> None:
    lrc("inspect", tmp_path / "no").refuses(2, "no such folder", "OUTPUT/checkpoint")
    lrc("inspect", tiny_model_folder).refuses(1, "not one that lrc compressed", "`lrc eval`")
    lrc("inspect", tmp_path).refuses(1, "no checkpoint here (no config.json)")


def test_a_bad_checkpoint_is_found_before_a_good_one_is_measured(
    lrc, sound: Path, checkpoint: Path
) -> None:
    cut(50_000)(checkpoint)
    ended = lrc("eval", sound, checkpoint, *EVAL[:-1])
    ended.refuses(1, str(checkpoint), "not a whole safetensors file")
    assert "perplexity" not in ended.err
