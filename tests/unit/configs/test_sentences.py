# ruff: noqa: E501  a sentence is one line here, as it is for its reader
"""Every sentence below is what a user reads; a change of wording is a change of these tables."""

import random
from typing import Annotated, Any, Literal

import pytest
from pydantic import Field, PositiveInt, ValidationError

from lrc.configs import shipped
from lrc.configs.decompose import Compensate
from lrc.configs.errors import RecipeError
from lrc.configs.explain import Finding, explain
from lrc.configs.load import parse_recipe
from lrc.configs.recipe import DecomposeStage, Recipe
from lrc.configs.schema import recipe_schema
from lrc.configs.shape import Shape
from lrc.configs.strict import Strict
from lrc.configs.yaml_text import read_yaml

GOOD = """\
model: org/name
stages:
  - decompose: {method: svd-llm, keep: 0.8}
output: out
"""
TOP = "Allowed: model, calibration, stages, evaluate, output, seed"
STAGE = "Allowed: method, keep, size, measure, allocation, rank_multiple, min_keep, max_loss, plan, storage, compensate, targets, skip, overrides"
SVD_LLM = f"{STAGE}, damp"
METHODS = "asvd, basis-sharing, compot, cospadi, dictionary, fwsvd, kfac, lord, magnitude, mixed, rocket, sparse, svd, svd-llm, wanda"
UNITS = "write a number and a unit, one of B, kB, MB, GB, KiB, MiB, GiB"
PLAIN = "an alternative such as int8, int4-g64 or sparse"
PLAIN_REMEDY = "write int2 to int8, if wanted with -g64 (a scale for 64 numbers) and -asymmetric behind, or sparse"
REFIT = ".decompose.compensate: must be null or a mapping with the keys mix, residual, damp, got"


def problems(text: str, *overrides: str) -> list[str]:
    with pytest.raises(RecipeError) as caught:
        parse_recipe(text, name="recipe.yaml", overrides=overrides)
    assert caught.value.exit_code == 2
    assert str(caught.value) == "\n".join(caught.value.problems)
    return caught.value.problems


# What is written in line 5, after GOOD, and the sentence about it, without "recipe.yaml:5: ".
BAD_LINES = [
    ("sead: 1", f"sead: unknown key; did you mean 'seed'? {TOP}"),
    ("xyz: 1", f"xyz: unknown key; remove it. {TOP}"),
    ("tasks: [piqa]", f"tasks: unknown key here; move it under 'evaluate'. {TOP}"),
    ("1: 2", f"1: unknown key; remove it. {TOP}"),
    ("seed: -1", "seed: must be in [0, 9223372036854775807], got -1; raise it"),
    ("seed: 1e3", "seed: must be a whole number in [0, 9223372036854775807], got 1000.0; write 1000"),
    ("seed: true", "seed: must be a whole number in [0, 9223372036854775807], got true"),
    ("calibration: {samples: 0}", "calibration.samples: must be >= 1, got 0; raise it"),
    ("calibration: {samples: 1_000}", "calibration.samples: must be a whole number >= 1, got '1_000'; write 1000"),
    ("calibration: {samples: 2.5}", "calibration.samples: must be a whole number >= 1, got 2.5"),
    ("calibration: {samples: '64'}", "calibration.samples: must be a whole number >= 1, got '64'; write 64"),
    ("calibration: {source: ''}", "calibration.source: must be a string that is not empty, got ''; write it out"),
    ("calibration: ''", "calibration: must be a string that is not empty or a mapping with the keys source, samples, length, field, chat_template, labels, memory_limit_gib, got ''; write it out"),
    ("calibration: {field: [text]}", "calibration.field: must be a string, got a list of 1 entry"),
    ("calibration: {chat_template: yes}", "calibration.chat_template: must be true or false, got 'yes'; write true"),
    ("calibration: {chat_template: off}", "calibration.chat_template: must be true or false, got 'off'; write false"),
    ("calibration: {chat_template: 1}", "calibration.chat_template: must be true or false, got 1; write true or false"),
    ("calibration: {labels: reel}", "calibration.labels: must be one of model, sampled, real, got 'reel'; did you mean 'real'?"),
    ("calibration: {memory_limit_gib: 0}", "calibration.memory_limit_gib: must be > 0, got 0; raise it"),
    ("calibration: {memory_limit_gib: .inf}", "calibration.memory_limit_gib: must be finite, got inf; write a number > 0"),
    ("evaluate:", "evaluate: must be a mapping with the keys perplexity, tasks, gates, dense, alternatives, got nothing; write a value or remove the key"),
    ("evaluate: [tasks: [piqa]]", "evaluate: must be a mapping with the keys perplexity, tasks, gates, dense, alternatives, got a list of 1 entry; remove the '- ' in front of the keys"),
    ("evaluate: {perplexity: c4}", "evaluate.perplexity: must be a list of entries, each a string that is not empty or a mapping with the keys source, name, window, windows, tokens, field, got 'c4'; write a list: [c4]"),
    ("evaluate: {perplexity: [c4, c4]}", "evaluate: the names of the 'perplexity' entries must differ, got twice: ['c4']; give one of each pair another 'name'"),
    ("evaluate: {perplexity: [{window: 9}]}", "evaluate.perplexity[0].source: missing; add a string that is not empty (`python-docs`, `wikitext2`, `c4`, or a path to a `.jsonl` or `.txt` file)"),
    ("evaluate: {tasks: [piqa, 3]}", "evaluate.tasks[1]: must be a string, got 3; put it in quotes"),
    ("evaluate: {tasks: {limit: 0}}", "evaluate.tasks.limit: must be >= 1, got 0; raise it"),
    ("evaluate: {tasks: {limit: all}}", "evaluate.tasks.limit: must be a whole number >= 1 or null, got 'all'"),
    ("evaluate: {gates: [{metric: perplexity.c4}]}", "evaluate.gates[0]: give 'at_most', 'at_least' or both, got neither"),
    ("evaluate: {gates: {metric: a}}", "evaluate.gates: must be a list of entries, each a mapping with the keys metric, at_most, at_least, relative, got a mapping with the key metric; start every entry of the list with '- '"),
    ("evaluate: {alternatives: int8}", "evaluate.alternatives: must be a list of strings, got 'int8'; write a list: [int8]"),
    ("evaluate: {alternatives: [int9]}", f"evaluate.alternatives[0]: must be {PLAIN}, got 'int9'; {PLAIN_REMEDY}"),
    ("evaluate: {alternatives: [int8, int4-g0]}", f"evaluate.alternatives[1]: must be {PLAIN}, got 'int4-g0'; {PLAIN_REMEDY}"),
    ("evaluate: {alternatives: [4]}", f"evaluate.alternatives[0]: must be {PLAIN}, got 4; {PLAIN_REMEDY}"),
    ("evaluate: {alternatives: [int8, int8]}", "evaluate: the 'alternatives' must differ, got twice: ['int8']; remove one"),
    ("seed: 1\nseed: 2", "seed: given twice, first in line 5; remove one of the two"),
    ("calibration: {field: !!python/name:os.system x}", "calibration.field: the tag '!!python/name:os.system' is not allowed; remove it"),
    ('"a\\ud800": 1', "a key holds half of a surrogate pair; remove it"),
    ('"a\\e[31m": 1', f"a?[31m: unknown key; remove it. {TOP}"),
    ("? [a]\n: 1", "a key must be a word, not a list or a mapping"),
    ("<<: 3", "<<: only a mapping can be merged in, as in <<: *name"),
    ('evaluate: {tasks: {include_path: "\\ud800"}}', "evaluate.tasks.include_path: half of a surrogate pair is no character; remove it"),
]  # fmt: skip

# The options of the one stage of a recipe, and the sentence, without "recipe.yaml:3: stages[0]".
BAD_STAGES = [
    ("{decompose: {method: svd-llm, keep: 0.8, kep: 1}}", f".decompose.kep: unknown key; did you mean 'keep'? {SVD_LLM}"),
    ("{decompose: {method: svd-llm, kep: 0.8}}", f".decompose.kep: unknown key; did you mean 'keep'? {SVD_LLM}"),
    ("{decompose: {method: svd-llm, keep: 1.3}}", ".decompose.keep: must be in (0, 1], got 1.3; lower it"),
    ("{decompose: {method: svd-llm, keep: 0}}", ".decompose.keep: must be in (0, 1], got 0; raise it"),
    ("{decompose: {method: svd-llm, keep: 80}}", ".decompose.keep: must be in (0, 1], got 80; for 80 % write 0.8"),
    ("{decompose: {method: svd-llm, keep: 80%}}", ".decompose.keep: must be a number in (0, 1] or null, got '80%'; write 0.8"),
    ("{decompose: {method: svd-llm, keep: '0,8'}}", ".decompose.keep: must be a number in (0, 1] or null, got '0,8'; write 0.8"),
    ("{decompose: {method: svd-llm, keep: true}}", ".decompose.keep: must be a number in (0, 1] or null, got true"),
    ("{decompose: {method: svd-llm, keep: .nan}}", ".decompose.keep: must be finite, got nan; write a number in (0, 1] or null"),
    ("{decompose: {method: svd-llm}}", ".decompose: give exactly one of 'keep' and 'size', or a 'plan' that has the ranks; got none of them"),
    ("{decompose: {method: svd-llm, keep: 0.8, size: 1GB}}", ".decompose: give exactly one of 'keep' and 'size', or a 'plan' that has the ranks; got keep and size"),
    ("{decompose: {method: svd-llm, size: '180'}}", f".decompose.size: must be a size such as 180MiB or null, got '180'; {UNITS}"),
    ("{decompose: {method: svd-llm, size: 180M}}", f".decompose.size: must be a size such as 180MiB or null, got '180M'; {UNITS}"),
    ("{decompose: {method: svd-llm, size: -1MiB}}", f".decompose.size: must be a size such as 180MiB or null, got '-1MiB'; {UNITS}"),
    ("{decompose: {method: svd-llm, size: 180}}", f".decompose.size: must be a size such as 180MiB or null, got 180; {UNITS}"),
    ("{decompose: {method: svd, size: 1GB, measure: macs}}", ".decompose: 'size' counts bytes and cannot be measured in 'macs'; give 'keep' instead"),
    ("{decompose: {method: svd, keep: 0.5, measure: flops}}", ".decompose.measure: must be one of bits, macs, got 'flops'"),
    ("{decompose: {method: svd, keep: 0.5, min_keep: 0.6}}", ".decompose: 'min_keep' must be at most 'keep', 0.5, got 0.6; lower min_keep or raise keep"),
    ("{decompose: {method: svd, keep: 0.5, allocation: lagrangean}}", ".decompose.allocation: must be one of uniform, heavy-tail, lagrangian, got 'lagrangean'; did you mean 'lagrangian'?"),
    ("{decompose: {method: svd, keep: 0.5, rank_multiple: 0}}", ".decompose.rank_multiple: must be >= 1, got 0; raise it"),
    ("{decompose: {method: svd, plan: ''}}", ".decompose.plan: must be a string that is not empty or null, got ''; write it out"),
    ("{decompose: {method: svd, keep: 0.5, compensate: true}}", f"{REFIT} true; write {{}} for the defaults"),
    ("{decompose: {method: svd, keep: 0.5, compensate: yes}}", f"{REFIT} 'yes'; write {{}} for the defaults"),
    ("{decompose: {method: svd, keep: 0.5, compensate: off}}", f"{REFIT} 'off'; remove the key"),
    ("{decompose: {method: svd, keep: 0.5, compensate: 0.3}}", f"{REFIT} 0.3"),
    ("{decompose: {method: svd, keep: 0.5, compensate: {mix: -1}}}", ".decompose.compensate.mix: must be in [0, 1], got -1; raise it"),
    ("{decompose: {method: svd, keep: 0.5, compensate: {mx: 1}}}", ".decompose.compensate.mx: unknown key; did you mean 'mix'? Allowed: mix, residual, damp"),
    ("{decompose: {method: basis-sharing, keep: 0.5, compensate: {}}}", ".decompose.compensate: must be null, got {}; remove the key (Not with this method: its layers are solved together)"),
    ("{decompose: {method: basis-sharing, keep: 0.5, storage: pivot}}", ".decompose.storage: must be 'factors', got 'pivot'; remove the key (Two factors, of which the shared one is stored once: pivot rows cannot be shared)"),
    ("{decompose: {method: cospadi, keep: 0.5, group_size: 0}}", ".decompose.group_size: must be >= 1, got 0; raise it"),
    ("{decompose: {method: cospadi, keep: 0.5, group_size: 2, compensate: {}}}", ".decompose: 'compensate' needs group_size: 1, got 2, because layers that share are solved together; leave compensate out or set group_size: 1"),
    ("{decompose: {method: svdllm, keep: 0.8}}", f".decompose.method: must be one of {METHODS}, got 'svdllm'; did you mean 'svd-llm'?"),
    ("{decompose: {method: kfca, keep: 0.8}}", f".decompose.method: must be one of {METHODS}, got 'kfca'; did you mean 'kfac'?"),
    ("{decompose: {method: zzz, keep: 0.8, damp: 0.1}}", f".decompose.method: must be one of {METHODS}, got 'zzz'"),
    ("{decompose: {keep: 0.8}}", f".decompose.method: missing; add one of {METHODS}"),
    ("{decompose: {method: svd, keep: 0.8, damp: 0.1}}", f".decompose.damp: not a key of method 'svd'; remove it. {STAGE}"),
    ("{decompose: {method: svd, keep: 0.8, targets: '*'}}", ".decompose.targets: must be a list of strings, got '*'; write a list: ['*']"),
    ("{decompose: {method: svd, keep: 0.8, overrides: [{match: a, keep: 0.1, rank: 2}]}}", ".decompose.overrides[0]: give exactly one of 'keep' and 'rank', got both"),
    ("{decompose: {method: dictionary, keep: 0.8, ratio: 0.5}}", ".decompose.ratio: must be >= 1, got 0.5; raise it"),
    ("{decompose: {method: dictionary, keep: 0.8, ratio: [2, 0]}}", ".decompose.ratio[1]: must be >= 1, got 0; raise it"),
    ("{decompose: {method: mixed, keep: 0.8, ratio: []}}", ".decompose.ratio: must have at least 1 entry, got []; add one"),
    ("{decompose: {method: cospadi, keep: 0.8, ratio: two}}", ".decompose.ratio: must be a number >= 1 or a list of numbers >= 1, got 'two'"),
    ("{decompose: {method: cospadi, keep: 0.8, ratio: '3'}}", ".decompose.ratio: must be a number >= 1 or a list of numbers >= 1, got '3'; write 3"),
    ("{decompose: {method: cospadi, keep: 0.8, ratio: .inf}}", ".decompose.ratio: must be finite, got inf; write a number >= 1 or a list of numbers >= 1"),
    ("{decompose: {method: cospadi, keep: 0.8, ratio: [2, 3]}}", ".decompose: 'ratio' must be one number with allocation: uniform, got a list; write the one, or take allocation: lagrangian, which chooses for every matrix"),
    ("{decompose: {method: svd, keep: 0.8, ratio: 2}}", f".decompose.ratio: not a key of method 'svd'; remove it. {STAGE}"),
    ("{quantize: {method: gqsa}}", ".quantize: method: gqsa removes groups of numbers and needs a 'group_size', got none; give one, such as 16"),
    ("{quantize: {method: gqsa, group_size: 16, symmetric: false}}", ".quantize: method: gqsa stores no zero points, got symmetric: false; remove the key, or take gptq"),
    ("{quantize: {method: gqsa, group_size: 16, branch: {}}}", ".quantize: a 'branch' stands beside whole weights only, got it with method: gqsa; remove it, or take gptq"),
    ("{quantize: {method: gqsa, group_size: 16, sparsity: 1}}", ".quantize.sparsity: must be in [0, 1), got 1; lower it"),
    ("{quantize: {method: gptq, group_size: 16, sparsity: 0.5}}", ".quantize: 'sparsity' is the share of groups that method: gqsa removes, got it with method: gptq; remove the key, or take gqsa"),
    ("{quantize: {method: gqas, group_size: 16}}", ".quantize.method: must be one of gptq, rtn, gqsa, got 'gqas'; did you mean 'gqsa'?"),
    ("{decompse: {method: svd, keep: 0.8}}", ".decompse: unknown key; did you mean 'decompose'? Allowed: slice, decompose, quantize"),
    ("decompose:svd", ": must be a mapping with the keys slice, decompose, quantize, got 'decompose:svd'; put a space after the colon"),
    ("svd", ": must be a mapping with the keys slice, decompose, quantize, got 'svd'"),
    ("{}", ": is empty; write one of the keys slice, decompose, quantize"),
    ('{decompose: "a\\n\\eb' + "x" * 80 + '"}', ".decompose: must be a mapping with the keys method, keep, size and others, got 'a\\n?b" + "x" * 52 + "...'"),
    ("{decompose: {method: svd, keep: 0.8, overrides: [{keep: 0.1}]}}", ".decompose.overrides[0].match: missing; add a string that is not empty (Shell pattern over full module names, e.g. `*.down_proj` or `model.layers.0.*`)"),
]  # fmt: skip

# A whole text that cannot be read at all, and the sentence, without "recipe.yaml".
BAD_YAML = [
    ("", ": is empty; `lrc recipes show svd-llm` prints a recipe"),
    ("# nothing\n", ": is empty; `lrc recipes show svd-llm` prints a recipe"),
    ("[a]", ": must be a mapping with the keys model, stages, output and others, got a list of 1 entry; start it with 'model: ...'"),
    ("svd", ": must be a mapping with the keys model, stages, output and others, got 'svd'; start it with 'model: ...'"),
    ("a: [1, 2\nb: 3\n", ":2:2: not valid YAML: expected ',' or ']', but got ':' (while parsing a flow sequence, which starts in line 1); a ',' or the closing ']' is missing"),
    ("a: {b: 1\nc: 3\n", ":2:2: not valid YAML: expected ',' or '}', but got ':' (while parsing a flow mapping, which starts in line 1); a ',' or the closing '}' is missing"),
    ("a: b: c", ":1:5: not valid YAML: mapping values are not allowed here; indent this line like its neighbours, and put a value that contains ': ' in quotes"),
    ('a: "x\n', ":2:1: not valid YAML: found unexpected end of stream (while scanning a quoted scalar, which starts in line 1); close the quote"),
    ("a:\n\tb: 1", ":2:1: not valid YAML: found character '\\t' that cannot start any token; indent with spaces, not tabs"),
    ("a: [*.down_proj]", ":1:6: not valid YAML: expected alphabetic or numeric character, but found '.'; put a value that starts with '*' in quotes: '*.down_proj'"),
    ("a: *down_proj", ":1:4: not valid YAML: found undefined alias 'down_proj'; put a value that starts with '*' in quotes: '*.down_proj'"),
    ("a: @b", ":1:4: not valid YAML: found character '@' that cannot start any token; put a value that starts with '%', '@' or '`' in quotes"),
    ('a: "C:\\data"', ":1:8: not valid YAML: found unknown escape character 'd'; use single quotes, in which a backslash is a backslash"),
    ("a: 'it's'", ":1:8: not valid YAML: expected <block end>, but found '<scalar>'; put the whole value in one pair of quotes"),
    ("- a\nb: 1", ":2:1: not valid YAML: expected <block end>, but found '?' (while parsing a block collection, which starts in line 1); start every entry of the list with '- ', equally indented"),
    ("a:\n  b: 1\n c: 2", ":3:2: not valid YAML: expected <block end>, but found '<block mapping start>' (while parsing a block mapping, which starts in line 1); indent this line like its neighbours"),
    ("a: 1\n---\nb: 2", ":2:1: not valid YAML: but found another document (expected a single document in the stream, which starts in line 1); remove the line '---' and what follows it"),
    ("a: b\nc: \0", ":2:4: not valid YAML: the control character U+0000 is not allowed; remove it"),
    ("a: &a [*a]", ":1:1: not valid YAML: an alias stands for a value that contains it; remove it"),
    ("[" * 600, ":1:1: not valid YAML: too deeply nested; a recipe has at most about 10 levels"),
]  # fmt: skip

# An override of GOOD, and the sentence, without "override '...': ".
BAD_OVERRIDES = [
    ("seed", "must be key.path=value, as in stages.0.decompose.keep=0.6"),
    ("=1", "must be key.path=value, as in stages.0.decompose.keep=0.6"),
    ("a b=1", "must be key.path=value, as in stages.0.decompose.keep=0.6"),
    ("stages.0.decompose.kep=0.6", f"stages[0].decompose.kep: unknown key; did you mean 'keep'? {SVD_LLM}"),
    ("stages[0].decompose.keep=2", "stages[0].decompose.keep: must be in (0, 1], got 2; lower it"),
    ("stages.0.decompse.keep=1", "stages[0].decompse: unknown key; did you mean 'decompose'? Allowed: decompose"),
    ("stages.1.decompose.keep=1", "stages has 1 entry, counted from 0; there is no stages[1]; override stages as a whole"),
    ("stages.decompose.keep=1", "stages is a list; number the entry, as in stages[0]"),
    ("model.dtyp=float32", "model.dtyp: unknown key; did you mean 'dtype'? Allowed: path, file, revision, dtype, tokenizer, trust_remote_code"),
    ("model.dtype=bf16", "model.dtype: must be one of bfloat16, float16, float32, got 'bf16'; did you mean 'bfloat16'?"),
    ("stages.0.1=a", "stages[0] is a mapping, not a list; name one of its keys"),
    ("output.folder=a", "output is 'out', nothing can be set inside it; override output itself"),
    ("evaluate.gates.0.metric=a", "there is no list at evaluate.gates; write it whole, evaluate.gates=[...]"),
    ("calibration.samples=1e-6", "calibration.samples: must be a whole number >= 1, got 1e-06"),
    ("evaluate.tasks=[a", "the value is not valid YAML: expected ',' or ']', but got '<stream end>'; a ',' or the closing ']' is missing"),
    ("evaluate.tasks=*.a", "the value is not valid YAML: expected alphabetic or numeric character, but found '.'; put a value that starts with '*' in quotes: '*.down_proj'"),
    ("model={path: a, path: b}", "given twice, first in line 1; remove one of the two"),
]  # fmt: skip


@pytest.mark.parametrize(("line", "sentence"), BAD_LINES)
def test_a_bad_line_gets_its_sentence(line: str, sentence: str) -> None:
    number = 6 if "given twice" in sentence else 5
    assert problems(GOOD + line) == [f"recipe.yaml:{number}: {sentence}"]


@pytest.mark.parametrize(("stage", "sentence"), BAD_STAGES)
def test_a_bad_stage_gets_its_sentence(stage: str, sentence: str) -> None:
    text = f"model: a\nstages:\n  - {stage}\noutput: b\n"
    assert problems(text) == [f"recipe.yaml:3: stages[0]{sentence}"]


@pytest.mark.parametrize(("text", "sentence"), BAD_YAML)
def test_text_that_is_no_recipe_gets_its_sentence(text: str, sentence: str) -> None:
    assert problems(text) == [f"recipe.yaml{sentence}"]


@pytest.mark.parametrize(("override", "sentence"), BAD_OVERRIDES)
def test_a_bad_override_gets_its_sentence(override: str, sentence: str) -> None:
    assert problems(GOOD, override) == [f"override '{override}': {sentence}"]


def test_the_empty_mapping_asks_for_compensation_with_its_defaults() -> None:
    text = GOOD.replace("0.8", "0.8, compensate: {}")
    assert parse_recipe(text, name="recipe.yaml").stages[0].decompose.compensate == Compensate()
    assert parse_recipe(GOOD, name="recipe.yaml").stages[0].decompose.compensate is None


def test_half_of_the_groups_is_removed_where_nothing_else_is_said() -> None:
    text = GOOD.replace("decompose: {method: svd-llm, keep: 0.8}", "quantize: {METHOD}")
    for method, sparsity in (("gqsa, group_size: 8", 0.5), ("gptq", None)):
        stage = parse_recipe(text.replace("METHOD", f"method: {method}"), name="recipe.yaml").stages
        assert stage[0].quantize.sparsity == sparsity


def test_a_budget_can_come_from_a_plan_alone_or_beside_a_share() -> None:
    for budget in ("plan: a.json", "keep: 0.8, plan: a.json", "size: 1.5 GiB"):
        text = GOOD.replace("keep: 0.8", budget)
        parse_recipe(text, name="recipe.yaml")


class QuantizeForTest(Strict):
    bits: int


class QuantizeStageForTest(Strict):
    quantize: QuantizeForTest


class TwoKinds(Strict):
    stages: list[DecomposeStage | QuantizeStageForTest]


def test_a_second_kind_of_stage_needs_no_change_here() -> None:
    text = """
    stages:
    - {decompose: {method: svd, keep: 0.8}}
    - {quantize: {bits: 4}}
    - {quantise: {bits: x}}
    - {quantize: {bit: 4}}
    - {decompose: {method: svd, keep: 0.8}, quantize: {bits: 4}}
    - {}
    - 3
    """
    value = read_yaml(text).value
    with pytest.raises(ValidationError) as caught:
        TwoKinds.model_validate(value, strict=True)
    assert explain(caught.value, value, Shape(TwoKinds.model_json_schema())) == [
        (
            ("stages", 2, "quantise"),
            "unknown key; did you mean 'quantize'? Allowed: decompose, quantize",
        ),
        (("stages", 2, "quantise", "bits"), "must be a whole number, got 'x'"),
        (("stages", 3, "quantize", "bit"), "unknown key; did you mean 'bits'? Allowed: bits"),
        (
            ("stages", 4, "quantize"),
            "cannot stand beside 'decompose'; make it an entry of its own, with '- ' in front",
        ),
        (("stages", 5), "is empty; write one of the keys decompose, quantize"),
        (("stages", 6), "must be a mapping with the keys decompose, quantize, got 3"),
    ]


class Patterned(Strict):
    color: Annotated[str, Field(pattern="^#")]
    other: int


def test_a_rule_unknown_here_still_gets_a_sentence() -> None:
    value = {"color": "red", "other": "x"}
    with pytest.raises(ValidationError) as caught:
        Patterned.model_validate(value, strict=True)
    assert explain(caught.value, value, Shape(Patterned.model_json_schema())) == [
        (("other",), "must be a whole number, got 'x'"),
        (("color",), "this value is not allowed, got 'red'; write another"),
    ]


class Choices(Strict):
    bits: Literal[3, 4, 8]
    rank: Literal["auto"] | PositiveInt = "auto"
    budgets: dict[str, float]


def test_numbers_to_choose_from_and_free_keys_have_their_sentences() -> None:
    shape = Shape(Choices.model_json_schema())
    good: dict[str, Any] = {"bits": 4, "rank": 8, "budgets": {"a": 0.5}}
    Choices.model_validate(good, strict=True)
    changes: list[tuple[dict[str, Any], Finding]] = [
        ({"bits": 5}, (("bits",), "must be one of 3, 4, 8, got 5")),
        ({"bits": "4"}, (("bits",), "must be one of 3, 4, 8, got '4'; did you mean 4?")),
        (
            {"rank": "autp"},
            (("rank",), "must be 'auto' or a whole number >= 1, got 'autp'; did you mean 'auto'?"),
        ),
        ({"rank": 0}, (("rank",), "must be >= 1, got 0; raise it")),
        ({"budgets": {"a": "b"}}, (("budgets", "a"), "must be a number, got 'b'")),
        ({"budgets": 1}, (("budgets",), "must be a mapping, got 1")),
    ]
    for change, expected in changes:
        value = good | change
        with pytest.raises(ValidationError) as caught:
            Choices.model_validate(value, strict=True)
        assert explain(caught.value, value, shape) == [expected]


def spoilt(value: Any, random_: random.Random) -> Any:
    """Replace, rename or remove something, somewhere."""
    junk: list[Any] = [
        None,
        True,
        0,
        -1,
        1.5,
        float("nan"),
        "",
        "svd",
        "x",
        [],
        ["a"],
        [{}],
        {},
        {"keep": 2},
    ]
    if random_.random() < 0.1 or not isinstance(value, (dict, list)) or not value:
        return random_.choice(junk)
    if isinstance(value, list):
        at = random_.randrange(len(value))
        return [spoilt(each, random_) if i == at else each for i, each in enumerate(value)]
    key = random_.choice(list(value))
    rest = {other: each for other, each in value.items() if other != key}
    if random_.random() < 0.2:
        return rest
    new = key[:-1] if random_.random() < 0.2 else key
    return rest | {new: spoilt(value[key], random_)}


def test_every_refusal_has_a_sentence_of_its_own() -> None:
    random_ = random.Random(0)
    shape = Shape(recipe_schema())
    starts = [
        parse_recipe(shipped.read(name), name=name).model_dump(mode="json")
        for name in ("svd-llm", "kfac", "basis-sharing")
    ]
    refused = 0
    for _ in range(2000):
        value = spoilt(random_.choice(starts), random_)
        if random_.random() < 0.5 and isinstance(value, dict):
            value = spoilt(value, random_)
        try:
            Recipe.model_validate(value, strict=True)
        except ValidationError as error:
            refused += 1
            found = [text for _, text in explain(error, value, shape)]
            assert found, value
            assert not [text for text in found if "this value is not allowed" in text], value
    assert refused > 1000
