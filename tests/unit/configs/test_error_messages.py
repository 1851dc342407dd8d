# ruff: noqa: E501  a message is one line here, as it is for its reader
"""The wording of every error about a recipe. Other tests assert codes and key paths only."""

from pathlib import Path

import pytest

from lrc.configs.errors import RecipeError
from lrc.configs.load import load_recipe, parse_recipe

GOOD = """\
model: org/name
stages:
  - decompose: {method: svd-llm, keep: 0.8}
output: out
"""
ALLOWED_AT_TOP = "Allowed: model, calibration, stages, evaluate, output, seed"
ALLOWED_ANYWHERE = "Allowed: method, keep, size, elastic, drafter, measure, allocation, rank_multiple, min_keep, max_relative_error, plan, compensate, targets, ignore, overrides, rows, latency_table"
METHODS = "asvd, basis-sharing, compot, cospadi, dictionary, fwsvd, kfac, lord, magnitude, mixed, rocket, sparse, svd, svd-llm, tensor-train, wanda"
UNITS = "write a number and a unit, one of B, kB, MB, GB, KiB, MiB, GiB"
BASELINE = "a baseline such as int8, int4-g64 or sparse"
BASELINE_REMEDY = "write int2 to int8, optionally followed by -gSIZE (SIZE numbers of a row share a scale) and -asymmetric, or sparse"
PLAIN = "dense weights or whole matrices of symmetric integers, which"
KERNELS = "int4, int4-g32, int4-g64, int4-g128, int8, int8-g32, int8-g64, int8-g128"
COMPENSATE = "must be null or a mapping with the keys mix, residual, damp"

# A line after GOOD, the code of its error and the message after `recipe.yaml:5: `.
LINES = [
    ("sead: 1", "unknown-key", f"sead: unknown key; did you mean 'seed'? {ALLOWED_AT_TOP}"),
    ("xyz: 1", "unknown-key", f"xyz: unknown key; remove it. {ALLOWED_AT_TOP}"),
    ("tasks: [piqa]", "misplaced-key", f"tasks: unknown key here; move it under 'evaluate'. {ALLOWED_AT_TOP}"),
    ("decompose: {keep: 0.5}", "misplaced-key", f"decompose: unknown key here; move it under 'stages'. {ALLOWED_AT_TOP}"),
    ("calibration: {sampels: 4}", "unknown-key", "calibration.sampels: unknown key; did you mean 'samples'? Allowed: source, task, samples, length, field, chat_template, labels, loss, memory_limit_gib, disk_limit_gib"),
    ("1: 2", "unknown-key", f"1: unknown key; remove it. {ALLOWED_AT_TOP}"),
    ("seed: -1", "out-of-range", "seed: must be a whole number >= 0 and < 9223372036854775808, got -1; raise it"),
    ("seed: 1e3", "wrong-type", "seed: must be a whole number >= 0 and < 9223372036854775808, got 1000.0; write 1000"),
    ("seed: true", "wrong-type", "seed: must be a whole number >= 0 and < 9223372036854775808, got true"),
    ("calibration: {samples: 0}", "out-of-range", "calibration.samples: must be a whole number > 0, got 0; raise it"),
    ("calibration: {samples: 1_000}", "wrong-type", "calibration.samples: must be a whole number > 0, got '1_000'; write 1000"),
    ("calibration: {samples: 2.5}", "wrong-type", "calibration.samples: must be a whole number > 0, got 2.5"),
    ("calibration: {samples: '64'}", "wrong-type", "calibration.samples: must be a whole number > 0, got '64'; write 64"),
    ("calibration: {source: ''}", "out-of-range", "calibration.source: must be a string that is not empty or a mapping of sources to fractions, got ''; write it out"),
    ("calibration: {source: {c4: 50, self: 0.5}}", "out-of-range", "calibration.source.c4: must be a number > 0 and <= 1, got 50; for 50 % write 0.5"),
    ("calibration: {source: {c4: 0.5, self: most}}", "wrong-type", "calibration.source.self: must be a number > 0 and <= 1, got 'most'"),
    ("calibration: {source: {c4: 0.5, self: 0.4}}", "conflicting-keys", "calibration.source: fractions of sources must add up to 1, got 0.9; change them, as in {c4: 0.5, self: 0.5}"),
    ("calibration: {source: {}}", "conflicting-keys", "calibration.source: fractions of sources must add up to 1, got 0; change them, as in {c4: 0.5, self: 0.5}"),
    ("calibration: {source: [c4, self]}", "wrong-type", "calibration.source: must be a string that is not empty or a mapping of sources to fractions, got a list of 2 entries; write one name, or every source with its fraction: {c4: 0.5, self: 0.5}"),
    ("calibration: {source: {c4: 0.9, self: 0.1}, samples: 4}", "conflicting-keys", "calibration: 'samples' must give every source a window, got 4 and none for self; raise it"),
    ("calibration: ''", "out-of-range", "calibration: must be a string that is not empty or a mapping with the keys source, task, samples, length, field, chat_template, labels, loss and others, got ''; write it out"),
    ("calibration: {field: [text]}", "wrong-type", "calibration.field: must be a string, got a list of 1 entry"),
    ("calibration: {chat_template: yes}", "wrong-type", "calibration.chat_template: must be true or false, got 'yes'; write true"),
    ("calibration: {chat_template: off}", "wrong-type", "calibration.chat_template: must be true or false, got 'off'; write false"),
    ("calibration: {chat_template: 1}", "wrong-type", "calibration.chat_template: must be true or false, got 1; write true or false"),
    ("calibration: {labels: reel}", "unknown-value", "calibration.labels: must be one of model, sampled, real, got 'reel'; did you mean 'real'?"),
    ("calibration: {memory_limit_gib: 0}", "out-of-range", "calibration.memory_limit_gib: must be a number > 0, got 0; raise it"),
    ("calibration: {memory_limit_gib: .inf}", "out-of-range", "calibration.memory_limit_gib: must be a number > 0, got inf; write a finite number"),
    ("evaluate:", "wrong-type", "evaluate: must be a mapping with the keys perplexity, tasks, task, gates, dense, kl_tokens, streaming, generations and others, got nothing; write a value or remove the key"),
    ("evaluate: [tasks: [piqa]]", "wrong-type", "evaluate: must be a mapping with the keys perplexity, tasks, task, gates, dense, kl_tokens, streaming, generations and others, got a list of 1 entry; remove the '- ' in front of the keys"),
    ("evaluate: {perplexity: c4}", "wrong-type", "evaluate.perplexity: must be a list of entries, each a string that is not empty or a mapping with the keys source, name, window, windows, tokens, field, got 'c4'; write a list: [c4]"),
    ("evaluate: {perplexity: [c4, c4]}", "conflicting-keys", "evaluate: the names of the 'perplexity' entries must differ, got twice: ['c4']; give one of each pair another 'name'"),
    ("evaluate: {perplexity: [{window: 9}]}", "missing-key", "evaluate.perplexity[0].source: missing; add a string that is not empty (`python-docs`, `wikitext2`, `c4`, or a path to a `.jsonl` or `.txt` file)"),
    ("evaluate: {tasks: [piqa, 3]}", "wrong-type", "evaluate.tasks[1]: must be a string, got 3; put it in quotes"),
    ("evaluate: {tasks: {limit: 0}}", "out-of-range", "evaluate.tasks.limit: must be null or a whole number > 0, got 0; raise it"),
    ("evaluate: {tasks: {limit: all}}", "wrong-type", "evaluate.tasks.limit: must be null or a whole number > 0, got 'all'"),
    ("evaluate: {gates: [{metric: perplexity.c4}]}", "conflicting-keys", "evaluate.gates[0]: give 'at_most', 'at_least' or both, got neither"),
    ("evaluate: {kl_tokens: -1}", "out-of-range", "evaluate.kl_tokens: must be a whole number >= 0, got -1; raise it"),
    ("evaluate: {generations: [a], dense: false}", "conflicting-keys", "evaluate: 'generations' compares with the dense model, but 'dense' is false; set 'dense' to true or remove 'generations'"),
    ("evaluate: {gates: {metric: a}}", "wrong-type", "evaluate.gates: must be a list of entries, each a string that is not empty or a mapping with the keys metric, at_most, at_least, relative, got a mapping with the key metric; start every entry of the list with '- '"),
    ("evaluate: {baselines: int8}", "wrong-type", "evaluate.baselines: must be a list of entries, each a baseline such as int8, int4-g64 or sparse, got 'int8'; write a list: [int8]"),
    ("evaluate: {baselines: [int9]}", "unknown-value", f"evaluate.baselines[0]: must be {BASELINE}, got 'int9'; {BASELINE_REMEDY}"),
    ("evaluate: {baselines: [int8, int4-g0]}", "unknown-value", f"evaluate.baselines[1]: must be {BASELINE}, got 'int4-g0'; {BASELINE_REMEDY}"),
    ("evaluate: {baselines: [4]}", "wrong-type", f"evaluate.baselines[0]: must be {BASELINE}, got 4; {BASELINE_REMEDY}"),
    ("evaluate: {baselines: [int8, int8]}", "conflicting-keys", "evaluate: the 'baselines' must differ, got twice: ['int8']; remove one"),
    ("seed: 1\nseed: 2", "duplicate-key", "seed: given twice, again in line 6; remove one of the two"),
    ('"a\\e[31m": 1', "unknown-key", f"a?[31m: unknown key; remove it. {ALLOWED_AT_TOP}"),
    ("evaluate: {alternatives: [int8]}", "renamed-key", "evaluate.alternatives: this key is now called 'baselines'; rename it"),
    ("evaluate: {baselines: [int8], alternatives: [int8]}", "renamed-key", "evaluate.alternatives: this key is now called 'baselines'; rename it"),
]  # fmt: skip

# The only stage of a recipe, the code and the message after `recipe.yaml:3: stages[0]`.
STAGES = [
    ("{decompose: {method: svd-llm, keep: 0.8, kep: 1}}", "unknown-key", f".decompose.kep: unknown key; did you mean 'keep'? {ALLOWED_ANYWHERE}, storage, damp"),
    ("{decompose: {method: svd-llm, kep: 0.8}}", "unknown-key", f".decompose.kep: unknown key; did you mean 'keep'? {ALLOWED_ANYWHERE}, storage, damp"),
    ("{decompose: {method: svd-llm, keep: 1.3}}", "out-of-range", ".decompose.keep: must be null or a number > 0 and <= 1, got 1.3; lower it"),
    ("{decompose: {method: svd-llm, keep: 0}}", "out-of-range", ".decompose.keep: must be null or a number > 0 and <= 1, got 0; raise it"),
    ("{decompose: {method: svd-llm, keep: 80}}", "out-of-range", ".decompose.keep: must be null or a number > 0 and <= 1, got 80; for 80 % write 0.8"),
    ("{decompose: {method: svd-llm, keep: 80%}}", "wrong-type", ".decompose.keep: must be null or a number > 0 and <= 1, got '80%'; write 0.8"),
    ("{decompose: {method: svd-llm, keep: '0,8'}}", "wrong-type", ".decompose.keep: must be null or a number > 0 and <= 1, got '0,8'; write 0.8"),
    ("{decompose: {method: svd-llm, keep: true}}", "wrong-type", ".decompose.keep: must be null or a number > 0 and <= 1, got true"),
    ("{decompose: {method: svd-llm, keep: .nan}}", "out-of-range", ".decompose.keep: must be null or a number > 0 and <= 1, got nan; write a finite number"),
    ("{decompose: {method: svd-llm}}", "conflicting-keys", ".decompose: give exactly one of 'keep', 'size', 'elastic' and 'drafter', or a 'plan' with the ranks; got none of them"),
    ("{decompose: {method: svd-llm, keep: 0.8, size: 1GB}}", "conflicting-keys", ".decompose: give exactly one of 'keep', 'size', 'elastic' and 'drafter', or a 'plan' with the ranks; got keep and size"),
    ("{decompose: {method: svd-llm, size: '180'}}", "unknown-value", f".decompose.size: must be null or a size such as 180MiB, got '180'; {UNITS}"),
    ("{decompose: {method: svd-llm, size: 180M}}", "unknown-value", f".decompose.size: must be null or a size such as 180MiB, got '180M'; {UNITS}"),
    ("{decompose: {method: svd-llm, size: -1MiB}}", "unknown-value", f".decompose.size: must be null or a size such as 180MiB, got '-1MiB'; {UNITS}"),
    ("{decompose: {method: svd-llm, size: 180}}", "wrong-type", f".decompose.size: must be null or a size such as 180MiB, got 180; {UNITS}"),
    ("{decompose: {method: svd, size: 1GB, measure: macs}}", "conflicting-keys", ".decompose: 'size' counts bytes and cannot be measured in 'macs'; give 'keep' instead"),
    ("{decompose: {method: svd, size: 1GB, measure: latency}}", "conflicting-keys", ".decompose: 'size' counts bytes and cannot be measured in 'latency'; give 'keep' instead"),
    ("{decompose: {method: svd, keep: 0.5, rows: 4}}", "conflicting-keys", ".decompose: 'rows' has no effect with measure: bits; remove it, or choose measure: latency"),
    ("{decompose: {method: svd, keep: 0.5, measure: macs, latency_table: a.json}}", "conflicting-keys", ".decompose: 'latency_table' has no effect with measure: macs; remove it, or choose measure: latency"),
    ("{decompose: {method: svd, keep: 0.5, measure: latency, rows: 0}}", "out-of-range", ".decompose.rows: must be a whole number > 0, got 0; raise it"),
    ("{decompose: {method: svd, keep: 0.5, measure: flops}}", "unknown-value", ".decompose.measure: must be one of bits, macs, latency, gguf, got 'flops'; choose one of them"),
    ("{decompose: {method: svd, keep: 0.5, min_keep: 0.6}}", "conflicting-keys", ".decompose: 'min_keep' must be at most 'keep', 0.5, got 0.6; lower min_keep or raise keep"),
    ("{decompose: {method: svd, keep: 0.5, allocation: lagrangean}}", "unknown-value", ".decompose.allocation: must be one of uniform, heavy-tail, lagrangian, got 'lagrangean'; did you mean 'lagrangian'?"),
    ("{decompose: {method: svd, keep: 0.5, rank_multiple: 0}}", "out-of-range", ".decompose.rank_multiple: must be a whole number > 0, got 0; raise it"),
    ("{decompose: {method: svd, plan: ''}}", "out-of-range", ".decompose.plan: must be null or a string that is not empty, got ''; write it out"),
    ("{decompose: {method: svd, keep: 0.5, compensate: true}}", "wrong-type", f".decompose.compensate: {COMPENSATE}, got true; write {{}} for the defaults"),
    ("{decompose: {method: svd, keep: 0.5, compensate: yes}}", "wrong-type", f".decompose.compensate: {COMPENSATE}, got 'yes'; write {{}} for the defaults"),
    ("{decompose: {method: svd, keep: 0.5, compensate: off}}", "wrong-type", f".decompose.compensate: {COMPENSATE}, got 'off'; remove the key"),
    ("{decompose: {method: svd, keep: 0.5, compensate: 0.3}}", "wrong-type", f".decompose.compensate: {COMPENSATE}, got 0.3"),
    ("{decompose: {method: svd, keep: 0.5, compensate: {mix: -1}}}", "out-of-range", ".decompose.compensate.mix: must be a number >= 0 and <= 1, got -1; raise it"),
    ("{decompose: {method: svd, keep: 0.5, compensate: {mx: 1}}}", "unknown-key", ".decompose.compensate.mx: unknown key; did you mean 'mix'? Allowed: mix, residual, damp"),
    ("{decompose: {method: basis-sharing, keep: 0.5, compensate: {}}}", "wrong-type", ".decompose.compensate: must be null, got {}; remove the key (Not available with this method, which solves several layers together)"),
    ("{decompose: {method: basis-sharing, keep: 0.5, storage: pivoted_low_rank}}", "misplaced-key", f".decompose.storage: not a key of method 'basis-sharing'; remove it. {ALLOWED_ANYWHERE}, damp, layers_per_group, experts_per_group"),
    ("{decompose: {method: cospadi, keep: 0.5, layers_per_group: 0}}", "out-of-range", ".decompose.layers_per_group: must be a whole number > 0, got 0; raise it"),
    ("{decompose: {method: cospadi, keep: 0.5, layers_per_group: 2, compensate: {}}}", "conflicting-keys", ".decompose: 'compensate' needs layers_per_group: 1, got 2, because layers that share a dictionary are solved together; remove compensate or set layers_per_group: 1"),
    ("{decompose: {method: svdllm, keep: 0.8}}", "unknown-value", f".decompose.method: must be one of {METHODS}, got 'svdllm'; did you mean 'svd-llm'?"),
    ("{decompose: {method: kfca, keep: 0.8}}", "unknown-value", f".decompose.method: must be one of {METHODS}, got 'kfca'; did you mean 'kfac'?"),
    ("{decompose: {method: zzz, keep: 0.8, damp: 0.1}}", "unknown-value", f".decompose.method: must be one of {METHODS}, got 'zzz'; choose one of them"),
    ("{decompose: {keep: 0.8}}", "missing-key", f".decompose.method: missing; add one of {METHODS}"),
    ("{decompose: {method: svd, keep: 0.8, damp: 0.1}}", "misplaced-key", f".decompose.damp: not a key of method 'svd'; remove it. {ALLOWED_ANYWHERE}, storage"),
    ("{decompose: {method: svd, keep: 0.8, targets: '*'}}", "wrong-type", ".decompose.targets: must be a list of entries, each a string, got '*'; write a list: ['*']"),
    ("{decompose: {method: svd, keep: 0.8, overrides: [{match: a, keep: 0.1, rank: 2}]}}", "conflicting-keys", ".decompose.overrides[0]: give exactly one of 'keep' and 'rank', got both"),
    ("{decompose: {method: dictionary, keep: 0.8, ratio: 0.5}}", "out-of-range", ".decompose.ratio: must be a number >= 1 or a list of entries, each a number >= 1, got 0.5; raise it"),
    ("{decompose: {method: dictionary, keep: 0.8, ratio: [2, 0]}}", "out-of-range", ".decompose.ratio[1]: must be a number >= 1, got 0; raise it"),
    ("{decompose: {method: mixed, keep: 0.8, ratio: []}}", "out-of-range", ".decompose.ratio: must be a number >= 1 or a list of entries, each a number >= 1, got []; add at least 1 entry"),
    ("{decompose: {method: cospadi, keep: 0.8, ratio: two}}", "wrong-type", ".decompose.ratio: must be a number >= 1 or a list of entries, each a number >= 1, got 'two'"),
    ("{decompose: {method: cospadi, keep: 0.8, ratio: '3'}}", "wrong-type", ".decompose.ratio: must be a number >= 1 or a list of entries, each a number >= 1, got '3'; write 3"),
    ("{decompose: {method: cospadi, keep: 0.8, ratio: .inf}}", "out-of-range", ".decompose.ratio: must be a number >= 1 or a list of entries, each a number >= 1, got inf; write a finite number"),
    ("{decompose: {method: cospadi, keep: 0.8, ratio: [2, 3]}}", "conflicting-keys", ".decompose: 'ratio' must be one number with allocation: uniform, got a list; give one number, or allocation: lagrangian, which chooses for every matrix"),
    ("{decompose: {method: svd, keep: 0.8, ratio: 2}}", "misplaced-key", f".decompose.ratio: not a key of method 'svd'; remove it. {ALLOWED_ANYWHERE}, storage"),
    ("{quantize: {method: gqsa}}", "conflicting-keys", ".quantize: method: gqsa removes groups of numbers and needs a 'group_size', got none; add one, such as 16"),
    ("{quantize: {method: gqsa, group_size: 16, symmetric: false}}", "conflicting-keys", ".quantize: method: gqsa stores no zero points, got symmetric: false; remove the key, or choose gptq"),
    ("{quantize: {method: gqsa, group_size: 16, low_rank_correction: {}}}", "conflicting-keys", ".quantize: 'low_rank_correction' needs whole weights, got it with method: gqsa; remove it, or choose gptq"),
    ("{quantize: {method: gqsa, group_size: 16, sparsity: 1}}", "out-of-range", ".quantize.sparsity: must be null or a number >= 0 and < 1, got 1; lower it"),
    ("{quantize: {method: gptq, group_size: 16, sparsity: 0.5}}", "conflicting-keys", ".quantize: 'sparsity' is the fraction of groups that method: gqsa removes, got it with method: gptq; remove the key, or choose gqsa"),
    ("{quantize: {method: gqas, group_size: 16}}", "unknown-value", ".quantize.method: must be one of gptq, rtn, gqsa, got 'gqas'; did you mean 'gqsa'?"),
    ("{decompse: {method: svd, keep: 0.8}}", "unknown-key", ".decompse: unknown key; did you mean 'decompose'? Allowed: slice, decompose, quantize, heal"),
    ("decompose:svd", "wrong-type", ": must be a mapping with the keys slice, decompose, quantize, heal, got 'decompose:svd'; put a space after the colon"),
    ("svd", "wrong-type", ": must be a mapping with the keys slice, decompose, quantize, heal, got 'svd'"),
    ("{}", "missing-key", ": is empty; write one of the keys slice, decompose, quantize, heal"),
    ('{decompose: "a\\n\\ebxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx"}', "wrong-type", ".decompose: must be a mapping with the keys method, keep, size, elastic, drafter, measure, allocation, rank_multiple and others, got 'a\\n?bxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx...'"),
    ("{decompose: {method: svd, keep: 0.8, overrides: [{keep: 0.1}]}}", "missing-key", ".decompose.overrides[0].match: missing; add a string that is not empty (Shell pattern of full module names, such as `*.down_proj` or `model.layers.0.*`)"),
    ("{decompose: {method: svd, keep: 0.5, skip: [a]}}", "renamed-key", ".decompose.skip: this key is now called 'ignore'; rename it"),
    ("{decompose: {method: svd, keep: 0.5, storage: pivot}}", "renamed-value", ".decompose.storage: must be one of low_rank, pivoted_low_rank, got 'pivot'; this value is now called 'pivoted_low_rank'"),
    ("{decompose: {method: wanda, keep: 0.5, storage: mask}}", "misplaced-key", f".decompose.storage: not a key of method 'wanda'; remove it. {ALLOWED_ANYWHERE}, pattern, damp"),
    ("{decompose: {method: basis-sharing, keep: 0.5, group_size: 2}}", "renamed-key", ".decompose.group_size: this key is now called 'layers_per_group'; rename it"),
    ("{decompose: {method: mixed, keep: 0.5, storage: pivot}}", "renamed-key", ".decompose.storage: this key is now called 'components'; rename it"),
    ("{decompose: {method: mixed, keep: 0.5, components: [sum]}}", "renamed-value", ".decompose.components[0]: must be one of low_rank, pivoted_low_rank, sparse, semi_structured, pivoted_low_rank+sparse, dictionary, dense, got 'sum'; this value is now called 'pivoted_low_rank+sparse'"),
    ("{decompose: {method: mixed, keep: 0.5, forms: [sparse]}}", "renamed-key", ".decompose.forms: this key is now called 'components'; rename it"),
    ("{decompose: {method: mixed, keep: 0.5, rounder: rtn}}", "renamed-key", ".decompose.rounder: this key is now called 'quantizer'; rename it"),
    ("{decompose: {method: mixed, keep: 0.5, components: [low_rank, pivoted_low_rank]}}", "conflicting-keys", ".decompose: 'components' may list low_rank or pivoted_low_rank, got both; keep pivoted_low_rank, which stores the same product in fewer bits"),
    ("{decompose: {method: mixed, keep: 0.5, components: [dense]}}", "conflicting-keys", ".decompose: components: [dense] needs 'schemes' to make anything smaller, got none; add some, such as [int8, int4-g64], or list other components"),
    ("{decompose: {method: mixed, keep: 0.5, schemes: [int9]}}", "unknown-value", ".decompose.schemes[0]: must be an integer format such as int8, int4-g64 or int3-g32-asymmetric, got 'int9'; write int2 to int8, optionally followed by -gSIZE (SIZE numbers of a row share a scale) and -asymmetric, or -s256 for super-blocks of 256 as in K-quants"),
    ("{decompose: {method: mixed, keep: 0.5, schemes: [int4, int4]}}", "conflicting-keys", ".decompose: the 'schemes' must differ, got twice: ['int4']; remove one"),
    ("{decompose: {method: kfac, keep: 0.5, measure: gguf}}", "conflicting-keys", ".decompose: 'measure' can only be gguf with method: mixed, of whose integers GGUF has blocks, got method: kfac; choose measure: bits"),
    ("{decompose: {method: mixed, keep: 0.5, schemes: [int4], measure: gguf, components: [sparse]}}", "conflicting-keys", ".decompose: measure: gguf counts matrices of integers only, got components: [sparse]; write components: [dense], or choose measure: bits"),
    ("{decompose: {method: mixed, keep: 0.5, schemes: [int4], measure: macs}}", "conflicting-keys", ".decompose: 'schemes' save bits and no multiply-adds, got measure: macs; choose measure: bits or latency, or remove 'schemes'"),
    ("{decompose: {method: mixed, keep: 0.5, schemes: [int4], serve: vllm}}", "conflicting-keys", f".decompose: serve: vllm needs {PLAIN} vLLM reads without lrc, got components: [pivoted_low_rank, sparse] instead of [dense]; change it, or remove 'serve'"),
    ("{decompose: {method: mixed, keep: 0.5, components: [dense], schemes: [int8, int3], serve: vllm}}", "conflicting-keys", f".decompose: serve: vllm needs integer formats for which vLLM has a kernel, {KERNELS}, got int3; choose among them, or remove 'serve'"),
    ("{decompose: {method: mixed, keep: 0.5, components: [dense], schemes: [int8], measure: latency, serve: vllm}}", "conflicting-keys", f".decompose: serve: vllm needs {PLAIN} vLLM reads without lrc, got measure: latency instead of bits; change it, or remove 'serve'"),
    ("{quantize: {method: gptq, serve: vllm-cpu}}", "conflicting-keys", ".quantize: serve: vllm-cpu needs integer formats for which vLLM on CPUs has a kernel, int4, int4-g32, int4-g64, int4-g128, got int8; choose among them, or remove 'serve'"),
    ("{quantize: {method: rtn, symmetric: false, serve: vllm}}", "conflicting-keys", f".quantize: serve: vllm needs {PLAIN} vLLM reads without lrc, got symmetric: false; change it, or remove 'serve'"),
    ("{quantize: {method: rtn, embeddings: int8, serve: vllm}}", "conflicting-keys", f".quantize: serve: vllm needs {PLAIN} vLLM reads without lrc, got 'embeddings'; change it, or remove 'serve'"),
    ("{quantize: {method: rtn, serve: sglang}}", "unknown-value", ".quantize.serve: must be null or one of vllm, vllm-cpu, got 'sglang'"),
    ("{slice: {method: drop}}", "conflicting-keys", ".slice: give exactly one of 'keep' and 'size', got neither"),
    ("{quantize: {method: gptq, targets: [], embeddings: int8, bits: 4}}", "conflicting-keys", ".quantize: targets: [] selects no linear layer, so that 'bits' has no effect; remove what has no effect, or list 'targets'"),
    ("{quantize: {method: gptq, order: false}}", "renamed-key", ".quantize.order: this key is now called 'act_order'; rename it"),
    ("{quantize: {method: gptq, branch: {}}}", "renamed-key", ".quantize.branch: this key is now called 'low_rank_correction'; rename it"),
    ("{quantize: {method: gptq, head: int8}}", "renamed-key", ".quantize.head: this key is now called 'lm_head'; rename it"),
    ("{quantize: {method: gptq, gauge: even}}", "renamed-key", ".quantize.gauge: this key is now called 'balance'; rename it"),
    ("{slice: {method: drop, keep: 0.5, verify: perplexity}}", "renamed-key", ".slice.verify: this key is now called 'criterion'; rename it"),
    ("{slice: {method: modegpt, keep: 0.5, multiple: 4}}", "renamed-key", ".slice.multiple: this key is now called 'width_multiple'; rename it"),
]  # fmt: skip

# A text that is not a recipe, the code and the message after `recipe.yaml`.
TEXTS = [
    ("", "empty-recipe", ": is empty; `lrc recipes show svd-llm` prints a recipe"),
    ("# nothing\n", "empty-recipe", ": is empty; `lrc recipes show svd-llm` prints a recipe"),
    ("[a]", "wrong-type", ": must be a mapping with the keys model, calibration, stages, evaluate, output, seed, got a list of 1 entry; remove the '- ' in front of the keys"),
    ("svd", "wrong-type", ": must be a mapping with the keys model, calibration, stages, evaluate, output, seed, got 'svd'"),
    ("a: [1, 2\nb: 3\n", "invalid-yaml", ":2:2: not valid YAML: expected ',' or ']', but got ':' (while parsing a flow sequence, which starts in line 1); a ',' or the closing ']' is missing"),
    ("a: {b: 1\nc: 3\n", "invalid-yaml", ":2:2: not valid YAML: expected ',' or '}', but got ':' (while parsing a flow mapping, which starts in line 1); a ',' or the closing '}' is missing"),
    ("a: b: c", "invalid-yaml", ":1:5: not valid YAML: mapping values are not allowed here; indent this line like its neighbours, and put a value that contains ': ' in quotes"),
    ('a: "x\n', "invalid-yaml", ":2:1: not valid YAML: found unexpected end of stream (while scanning a quoted scalar, which starts in line 1); close the quote"),
    ("a:\n\tb: 1", "invalid-yaml", ":2:1: not valid YAML: found character '\\t' that cannot start any token; indent with spaces, not tabs"),
    ("a: [*.down_proj]", "invalid-yaml", ":1:6: not valid YAML: expected alphabetic or numeric character, but found '.'; put a value that starts with '*' in quotes: '*.down_proj'"),
    ("a: *down_proj", "invalid-yaml", ":1:4: not valid YAML: found undefined alias 'down_proj'; put a value that starts with '*' in quotes: '*.down_proj'"),
    ("a: @b", "invalid-yaml", ":1:4: not valid YAML: found character '@' that cannot start any token; put a value that starts with '%', '@' or '`' in quotes"),
    ('a: "C:\\data"', "invalid-yaml", ":1:8: not valid YAML: found unknown escape character 'd'; use single quotes, in which a backslash is a backslash"),
    ("a: 'it's'", "invalid-yaml", ":1:8: not valid YAML: expected <block end>, but found '<scalar>'; put the whole value in one pair of quotes"),
    ("- a\nb: 1", "invalid-yaml", ":2:1: not valid YAML: expected <block end>, but found '?' (while parsing a block collection, which starts in line 1); start every entry of the list with '- ', equally indented"),
    ("a:\n  b: 1\n c: 2", "invalid-yaml", ":3:2: not valid YAML: expected <block end>, but found '<block mapping start>' (while parsing a block mapping, which starts in line 1); indent this line like its neighbours"),
    ("a: 1\n---\nb: 2", "invalid-yaml", ":2:1: not valid YAML: but found another document (expected a single document in the stream, which starts in line 1); remove the line '---' and what follows it"),
    ("a: b\nc: \0", "invalid-yaml", ":2:4: not valid YAML: the control character U+0000 is not allowed; remove it"),
    ("a: &a [*a]", "invalid-yaml", ":1:1: not valid YAML: too deeply nested, or an alias inside the value that it stands for; flatten it"),
    ("calibration: {field: !!python/name:os.system x}", "invalid-yaml", ":1:22: not valid YAML: the tag '!!python/name:os.system' is not allowed; remove it"),
    ('"a\\ud800": 1', "invalid-yaml", ":1:1: not valid YAML: half of a surrogate pair is no character; remove it"),
    ("? [a]\n: 1", "invalid-yaml", ":1:3: not valid YAML: a key must be a word, not a list or a mapping"),
    ("<<: 3", "invalid-yaml", ":1:5: not valid YAML: only a mapping can be merged in, as in <<: *name"),
    ('evaluate: {tasks: {include_path: "\\ud800"}}', "invalid-yaml", ":1:34: not valid YAML: half of a surrogate pair is no character; remove it"),
    ("[" * 600, "invalid-yaml", ":1:1: not valid YAML: too deeply nested, or an alias inside the value that it stands for; flatten it"),
]  # fmt: skip

# An override of GOOD, the code and the message after `override '...': `.
OVERRIDES = [
    ("seed", "invalid-override", "must be key.path=value, as in stages.0.decompose.keep=0.6"),
    ("=1", "invalid-override", "must be key.path=value, as in stages.0.decompose.keep=0.6"),
    ("a b=1", "invalid-override", "must be key.path=value, as in stages.0.decompose.keep=0.6"),
    ("stages.0.decompose.kep=0.6", "unknown-key", f"stages[0].decompose.kep: unknown key; did you mean 'keep'? {ALLOWED_ANYWHERE}, storage, damp"),
    ("stages[0].decompose.keep=2", "out-of-range", "stages[0].decompose.keep: must be null or a number > 0 and <= 1, got 2; lower it"),
    ("stages.0.decompse.keep=1", "unknown-key", "stages[0].decompse: unknown key; did you mean 'decompose'? Allowed: decompose"),
    ("stages.1.decompose.keep=1", "invalid-override", "stages is a list of 1 entry, counted from 0; there is no stages[1]; override stages as a whole"),
    ("stages.decompose.keep=1", "invalid-override", "stages is a list; number the entry, as in stages[0]"),
    ("model.dtyp=float32", "unknown-key", "model.dtyp: unknown key; did you mean 'dtype'? Allowed: path, file, revision, dtype, tokenizer, trust_remote_code"),
    ("model.dtype=bf16", "unknown-value", "model.dtype: must be one of bfloat16, float16, float32, got 'bf16'; did you mean 'bfloat16'?"),
    ("stages.0.1=a", "invalid-override", "stages[0] is a mapping, not a list; name one of its keys"),
    ("output.folder=a", "invalid-override", "output is 'out', nothing can be set inside it; override output itself"),
    ("evaluate.gates.0.metric=a", "invalid-override", "there is no list at evaluate.gates; write it whole, evaluate.gates=[...]"),
    ("calibration.samples=1e-6", "wrong-type", "calibration.samples: must be a whole number > 0, got 1e-06"),
    ("evaluate.tasks=[a", "invalid-yaml", "the value is not valid YAML: expected ',' or ']', but got '<stream end>'; a ',' or the closing ']' is missing"),
    ("evaluate.tasks=*.a", "invalid-yaml", "the value is not valid YAML: expected alphabetic or numeric character, but found '.'; put a value that starts with '*' in quotes: '*.down_proj'"),
    ("model={path: a, path: b}", "duplicate-key", "path: given twice, again in line 1; remove one of the two"),
    ("stages.0.decompose.skip=[a]", "renamed-key", "stages[0].decompose.skip: this key is now called 'ignore'; rename it"),
]  # fmt: skip

# A path and the message after it.
PATHS = {
    "svd-llm": "no such file; 'svd-llm' is a shipped recipe, `lrc recipes copy svd-llm` puts it here",
    "svd.yaml": "no such file; 'svd' is a shipped recipe, `lrc recipes copy svd` puts it here",
    "mine.yml": "no such file; did you mean 'mine.yaml'?",
    "empty/mine.yaml": "no such file; check the path, or start from a shipped one: `lrc recipes list`",
    ".": "is a folder; name one of those inside: big.yaml, loop.yaml, mine.yaml, utf16.yaml",
    "empty": "is a folder; name a recipe file",
    "utf16.yaml": "is not UTF-8 text (byte 0); a recipe is a YAML text, save it as UTF-8",
    "big.yaml": "is larger than 1,000,000 bytes; name the recipe, a short YAML text",
    "loop.yaml": "cannot be read: too many levels of symbolic links; check the path and its permissions",
    "mine.yaml/x": "cannot be read: not a directory; check the path and its permissions",
}


def lines(text: str, *overrides: str) -> list[tuple[str, str]]:
    """Return the code and the printed line of every problem of a recipe."""
    with pytest.raises(RecipeError) as caught:
        parse_recipe(text, name="recipe.yaml", overrides=overrides)
    return [(problem.code, str(problem)) for problem in caught.value.problems]


@pytest.mark.parametrize(("line", "code", "message"), LINES)
def test_a_wrong_line(line: str, code: str, message: str) -> None:
    assert lines(GOOD + line) == [(code, f"recipe.yaml:5: {message}")]


@pytest.mark.parametrize(("stage", "code", "message"), STAGES)
def test_a_wrong_stage(stage: str, code: str, message: str) -> None:
    text = f"model: a\nstages:\n  - {stage}\noutput: b\n"
    assert lines(text) == [(code, f"recipe.yaml:3: stages[0]{message}")]


@pytest.mark.parametrize(("text", "code", "message"), TEXTS)
def test_a_text_that_is_not_a_recipe(text: str, code: str, message: str) -> None:
    assert lines(text) == [(code, f"recipe.yaml{message}")]


@pytest.mark.parametrize(("override", "code", "message"), OVERRIDES)
def test_a_wrong_override(override: str, code: str, message: str) -> None:
    assert lines(GOOD, override) == [(code, f"override '{override}': {message}")]


def test_stages_in_the_wrong_order() -> None:
    text = (
        "model: a\nstages: [quantize: {method: rtn}, slice: {method: drop, keep: 0.5}]\noutput: b"
    )
    message = "every 'slice' must come before every 'quantize', got stages[1] after one; move it to the front"
    assert lines(text) == [("conflicting-keys", f"recipe.yaml: {message}")]


def test_a_path_that_is_not_a_recipe_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("mine.yaml").write_text(GOOD)
    Path("empty").mkdir()
    Path("utf16.yaml").write_text(GOOD, encoding="utf-16")
    Path("big.yaml").write_bytes(b"#" * 1_000_001)
    Path("loop.yaml").symlink_to("loop.yaml")
    for path, message in PATHS.items():
        with pytest.raises(RecipeError) as caught:
            load_recipe(path)
        assert str(caught.value) == f"{path}: {message}"
        (problem,) = caught.value.problems
        assert (problem.code, problem.where) == ("unreadable-recipe", path)
