"""The rows of table.py: names, stages, and changes of the calibration."""

from collections.abc import Iterator
from itertools import product
from typing import Any

METHODS = ["svd", "asvd", "fwsvd", "lord", "svd-llm", "basis-sharing", "kfac"]
Stages = list[dict[str, Any]]
DENSE_BYTES = 269_030_016
"""Of SmolLM2-135M's tensors in 16 bits."""


def rows() -> Iterator[tuple[str, dict[str, Any], dict[str, Any]]]:
    """Yield name, options and changes of the calibration; what matters most comes first."""
    for keep in (0.8, 0.6):
        best = {
            "method": "kfac",
            "keep": keep,
            "storage": "pivoted_low_rank",
            "allocation": "lagrangian",
        }
        yield f"kfac, lagrangian, pivot, {keep}", best, {}
        for mix in (0.2, 0.3, 0.4, 0.5):
            name = f"kfac, lagrangian, pivot, compensate {mix}, {keep}"
            yield name, best | {"compensate": {"mix": mix, "residual": 0}}, {}
        for mix, residual in ((0.3, 0.25), (0.3, 0.5), (0.3, 0.75), (0.5, 0.5)):
            name = f"kfac, lagrangian, pivot, compensate {mix}, residual {residual}, {keep}"
            yield name, best | {"compensate": {"mix": mix, "residual": residual}}, {}
        yield f"kfac, real labels, lagrangian, pivot, {keep}", best, {"labels": "real"}
        for method in METHODS:
            for allocation in ("uniform", "lagrangian"):
                stage = {"method": method, "keep": keep, "allocation": allocation}
                if method != "basis-sharing":
                    stage["storage"] = "low_rank"
                changes = {"labels": "real"} if method == "fwsvd" else {}
                yield f"{method}, {allocation}, factors, {keep}", stage, changes
        yield f"kfac, uniform, pivot, {keep}", best | {"allocation": "uniform"}, {}
        pivot = {
            "method": "svd-llm",
            "keep": keep,
            "storage": "pivoted_low_rank",
            "allocation": "uniform",
        }
        yield f"svd-llm, uniform, pivot, {keep}", pivot, {}
        welore = {"method": "svd", "keep": keep, "allocation": "heavy-tail"}
        yield f"svd, heavy-tail, factors, {keep}", welore, {}
    plain = {"method": "kfac", "keep": 0.8}
    for damp in (1e-4, 1e-2, 1.0):
        yield f"kfac, gradient damp {damp:g}, 0.8", plain | {"gradient_damp": damp}, {}
    for share in (0.3, 0.5):
        yield f"kfac, min_keep {share}, 0.8", plain | {"min_keep": share}, {}
    yield "kfac, max_relative_error 0.02, 0.8", plain | {"max_relative_error": 0.02}, {}
    yield "kfac, rank multiples of 8, 0.8", plain | {"rank_multiple": 8}, {}
    yield "kfac, factors, 0.8", plain | {"storage": "low_rank"}, {}
    yield "kfac, sampled labels, 0.8", plain, {"labels": "sampled"}
    for method, keep in (("svd-llm", 0.8), ("kfac", 0.8), ("svd-llm", 0.6), ("kfac", 0.6)):
        stage = {"method": method, "keep": keep}
        if method == "kfac":
            stage["compensate"] = {}
        other = {"source": "data/wikitext2/validation.jsonl"}
        yield f"{method} on WikiText-2, {keep}", stage, other
    yield from other_forms()


def other_forms() -> Iterator[tuple[str, dict[str, Any], dict[str, Any]]]:
    """Yield the rows of pruning, dictionaries and mixed plans, as `rows` does."""
    every = ["pivoted_low_rank", "sparse", "dictionary"]
    for keep in (0.8, 0.6):
        stage = {"method": "cospadi", "keep": keep, "rounds": 20}
        yield f"cospadi, 20 rounds, uniform, {keep}", stage, {}
    for keep in (0.8, 0.6, 0.5):
        mixed = {"method": "mixed", "keep": keep}
        more = mixed | {"components": every, "compensate": {}}
        yield f"mixed with dictionaries, compensate, {keep}", more, {}
        yield f"mixed, compensate, {keep}", mixed | {"compensate": {}}, {}
        yield f"mixed, {keep}", mixed, {}
        sums = mixed | {"components": ["pivoted_low_rank", "sparse", "pivoted_low_rank+sparse"]}
        yield f"mixed with sums, compensate, {keep}", sums | {"compensate": {}}, {}
        yield f"mixed with sums, {keep}", sums, {}
        sparse = {"method": "sparse", "keep": keep}
        yield f"sparse, compensate, {keep}", sparse | {"compensate": {}}, {}
        for method in ("sparse", "dictionary", "compot", "rocket"):
            for allocation in ("lagrangian", "uniform"):
                stage = {"method": method, "keep": keep, "allocation": allocation}
                yield f"{method}, {allocation}, {keep}", stage, {}
        eights = sparse | {"pattern": "n:8"}
        yield f"sparse, n:8, compensate, {keep}", eights | {"compensate": {}}, {}
        for allocation in ("lagrangian", "uniform"):
            yield f"sparse, n:8, {allocation}, {keep}", eights | {"allocation": allocation}, {}
        either = mixed | {"components": ["pivoted_low_rank", "semi_structured"]}
        yield f"mixed with n:8, compensate, {keep}", either | {"compensate": {}}, {}
        for allocation in ("lagrangian", "uniform"):
            stage = {"method": "tensor-train", "keep": keep, "allocation": allocation}
            yield f"tensor-train, {allocation}, {keep}", stage, {}
        for method in ("wanda", "magnitude"):
            yield f"{method}, uniform, {keep}", {"method": method, "keep": keep}, {}
    for method in ("sparse", "wanda", "magnitude"):
        stage = {"method": method, "keep": 0.563, "pattern": "2:4", "allocation": "uniform"}
        yield f"{method}, 2:4, 0.563", stage, {}
        if method == "sparse":
            yield "sparse, 2:4, compensate, 0.563", stage | {"compensate": {}}, {}
            for pattern in ("n:8", "unstructured"):  # the same bits
                other = stage | {"pattern": pattern}
                yield f"sparse, {pattern}, 0.563", other, {}
                yield f"sparse, {pattern}, compensate, 0.563", other | {"compensate": {}}, {}


def every_row() -> Iterator[tuple[str, Stages, dict[str, Any]]]:
    """Yield name, stages and changes of the calibration."""
    for name, options, changes in rows():
        yield name, [{"decompose": options}], changes
    for name, options, changes in slices():
        yield name, [options if "slice" in options else {"decompose": options}], changes
    for name, stages in [*integers(), *healed(), *quantized_chains()]:
        yield name, stages, {}
    for name, options in timed():
        yield name, [{"decompose": options}], {}


def healed() -> Iterator[tuple[str, Stages]]:
    """Yield rows that are trained after compression, next to those that are not."""

    def low_rank(keep: float) -> dict[str, Any]:
        return {"decompose": {"method": "kfac", "keep": keep, "compensate": {}}}

    def joint(keep: float) -> dict[str, Any]:
        schemes = ["int8", "int6-g64", "int5-g64", "int4-g64", "int3-g64", "int3-g32"]
        return {"decompose": mixed(keep)["decompose"] | {"schemes": schemes}}

    def mixed(keep: float) -> dict[str, Any]:
        return {"decompose": {"method": "mixed", "keep": keep, "compensate": {}}}

    def integer(method: str, bits: int, group: int, **options: Any) -> dict[str, Any]:
        return {"quantize": {"method": method, "bits": bits, "group_size": group, **options}}

    def chain(keep: float) -> dict[str, Any]:
        return {"decompose": {"method": "tensor-train", "keep": keep}}

    distill: dict[str, Any] = {"method": "distill", "tokens": 1_200_000}
    scales = distill | {"method": "scales"}
    for name, stage, heal in (
        ("mixed 0.5", mixed(0.5), distill),
        ("mixed 0.6", mixed(0.6), distill),
        ("joint 0.203", joint(0.203125), scales),
        ("int3-g64", integer("gptq", 3, 64, compensate={}), scales),
        ("kfac 0.8", low_rank(0.8), distill),
        ("kfac 0.6", low_rank(0.6), distill),
        ("modegpt 0.7", {"slice": {"method": "modegpt", "keep": 0.7}}, distill),
        ("dictionary 0.6", {"decompose": {"method": "dictionary", "keep": 0.6}}, distill),
        ("gqsa W4S50", integer("gqsa", 4, 16, sparsity=0.5, compensate={}), scales),
        ("int2-g32", integer("gptq", 2, 32, compensate={}), scales),
        ("tensor-train 0.8", chain(0.8), distill),
        ("tensor-train 0.6", chain(0.6), distill),
    ):
        yield f"before healing: {name}", [stage]
        yield f"healed: {name}", [stage, {"heal": heal}]
        long = heal | {"tokens": 20_000_000}
        yield f"healed with 20 million tokens: {name}", [stage, {"heal": long}]
        extended = {"extend": True, "batch": 4}
        if heal is distill:
            extended["precondition"] = True
        yield f"healed with extended text: {name}", [stage, {"heal": heal | extended}]
        labels = extended | {"cross_entropy": 0.3}
        yield f"healed with extended text, cross entropy: {name}", [stage, {"heal": heal | labels}]
        for batch in (2, 4):  # more steps for the same tokens
            yield (
                f"healed in batches of {batch}: {name}",
                [stage, {"heal": heal | {"batch": batch}}],
            )
        if "kfac" in name or "mixed" in name:
            yield from tuned(name, stage, distill)


def tuned(name: str, stage: dict[str, Any], heal: dict[str, Any]) -> Iterator[tuple[str, Stages]]:
    """Yield rows with and without preconditioning, and with other batches and rates."""
    rates = (3e-4, 5e-4, 1e-3, 2e-3, 3e-3, 5e-3)
    for precondition, batch, rate in product((False, True), (1, 2, 4, 8), rates):
        options = {"precondition": precondition, "batch": batch, "rate": rate}
        kind = "healed, precondition" if precondition else "healed"
        row = f"{kind}, batch {batch}, rate {rate:g}: {name}"
        yield row, [stage, {"heal": heal | options}]


def quantized_chains() -> Iterator[tuple[str, Stages]]:
    """Yield tensor trains with cores of 8 bits, which may hold twice the numbers in the bytes."""
    for keep in (0.8, 0.6):
        chain = {"decompose": {"method": "tensor-train", "keep": keep}}
        rounded = {"quantize": {"method": "rtn", "bits": 8, "group_size": None}}
        yield f"tensor-train, int8 cores, {keep}", [chain, rounded]


def timed() -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield rows whose products take the same time, by latency.json, which `lrc latency` writes."""
    time = {"measure": "latency", "latency_table": "latency.json", "compensate": {}}
    forms = ["pivoted_low_rank", "sparse", "semi_structured"]
    for keep in (0.77, 0.6):
        for name, options in {
            "mixed": {"method": "mixed", "components": forms},
            "pivoted low rank": {"method": "kfac", "storage": "pivoted_low_rank"},
            "low rank": {"method": "kfac", "storage": "low_rank"},
            "unstructured": {"method": "sparse"},
            "n:8": {"method": "sparse", "pattern": "n:8"},
        }.items():
            yield f"time {keep}: {name}", {**options, "keep": keep, **time}


def integers() -> Iterator[tuple[str, Stages]]:
    """Yield the rows of integers: of plain rounding, of factors and values, and of joint plans."""

    def quantize(method: str, bits: int, group: int | None, **options: Any) -> dict[str, Any]:
        return {"quantize": {"method": method, "bits": bits, "group_size": group, **options}}

    def decompose(method: str, keep: float, **options: Any) -> dict[str, Any]:
        return {"decompose": {"method": method, "keep": keep, "compensate": {}, **options}}

    every = ["int8", "int7-g64", "int6-g64", "int5-g64", "int4-g64", "int4-g32", "int3-g64"]
    every += ["int3-g32", "int2-g32"]
    for keep in (0.5, 0.35, 0.25, 0.203125, 0.2):  # the fourth is what int3-g64 takes
        for name, forms in {"any form": ["pivoted_low_rank", "sparse"], "dense": ["dense"]}.items():
            joint = decompose("mixed", keep, components=forms, schemes=every)
            yield f"integers: joint, {name}, {keep}", [joint]
    for method in ("rtn", "gptq"):
        for bits, group in ((8, None), (4, 64), (4, 32), (4, None), (3, 64), (3, 32), (3, None)):
            scheme = f"int{bits}{f'-g{group}' if group else ''}"
            yield f"integers: {method}, {scheme}", [quantize(method, bits, group)]
            if method == "gptq":
                compensated = quantize(method, bits, group, compensate={})
                yield f"integers: {method}, {scheme}, compensate", [compensated]
    for mix, residual in ((0.3, 0), (0.5, 0.5), (0.3, 1), (0.5, 1)):
        changed = {"compensate": {"mix": mix, "residual": residual}}
        name = f"integers: gptq, int3-g64, compensate {mix}, residual {residual}"
        yield name, [quantize("gptq", 3, 64, **changed)]
    for kind in ("qera", "eora", "lqer"):
        branch = quantize("gptq", 3, 64, low_rank_correction={"method": kind, "rank": 32})
        yield f"integers: gptq, int3-g64, {kind} 32", [branch]
    for rows in ("int8", "int6-g64", "int5-g64", "int4-g64", "int4-g32"):
        rounded = quantize("gptq", 4, 64, compensate={}, embeddings=rows)
        yield f"integers: gptq, int4-g64, compensate, embeddings {rows}", [rounded]
    for size, rows in (("93MiB", "int8"), ("80MiB", "int6-g64"), ("64MiB", "int5-g64")):
        joint = {"method": "mixed", "compensate": {}, "schemes": every, "size": size}
        joint |= {"embeddings": rows, "components": ["pivoted_low_rank", "sparse"]}
        yield f"integers: joint, {size}, embeddings {rows}", [{"decompose": joint}]
    yield "integers: kfac 0.8", [decompose("kfac", 0.8)]
    for method in ("rtn", "gptq"):
        stages = [decompose("kfac", 0.8), quantize(method, 8, None)]
        yield f"integers: kfac 0.8, {method}, int8", stages
    for group in (64, 32):
        stages = [decompose("kfac", 0.8), quantize("gptq", 4, group)]
        yield f"integers: kfac 0.8, int4-g{group}, pivot", stages
        for gauge in ("even", "first", "quarter", "rotated", "measured"):
            factors = decompose("kfac", 0.8, storage="low_rank")
            stages = [factors, quantize("gptq", 4, group, balance=gauge)]
            yield f"integers: kfac 0.8, int4-g{group}, factors, {gauge}", stages
        factors = decompose("kfac", 0.8, storage="low_rank", rank_multiple=group)
        yield f"integers: kfac 0.8, factors of ranks of {group}", [factors]
    # Shares before rounding that give 0.5, 0.35, 0.25 and 0.2 of the bits after it.
    for method, shares in {
        "kfac": (0.98, 0.69, 0.49, 0.39),
        "sparse": (0.93, 0.63, 0.43, 0.33),
    }.items():
        for keep, share in zip((0.5, 0.35, 0.25, 0.2), shares, strict=True):
            stages = [decompose(method, share), quantize("gptq", 8, None)]
            yield f"integers: {method} and int8, {keep}", stages


def slices() -> Iterator[tuple[str, dict[str, Any], dict[str, Any]]]:
    """Yield the rows that compare at the bytes of the whole model, as `rows` does."""
    for keep in (0.8, 0.7):
        for name, stage in {
            "modegpt": {"method": "modegpt"},
            "modegpt, by layer": {"method": "modegpt", "uniform": False},
            "slicegpt": {"method": "slicegpt", "width_multiple": 1},
            "slicegpt, by block": {"method": "slicegpt", "width_multiple": 1, "rotations": "block"},
            "drop": {"method": "drop"},
            "drop, by perplexity": {"method": "drop", "criterion": "perplexity"},
        }.items():
            # A trial a layer and a layer that goes: on fewer windows.
            changes = {"samples": 16} if "criterion" in stage else {}
            yield f"{name}, whole model {keep}", {"slice": stage | {"keep": keep}}, changes
        size = f"{int(keep * DENSE_BYTES)}B"
        for name, stage in {
            "svd-llm": {"method": "svd-llm"},
            "kfac": {"method": "kfac"},
            "kfac, compensate": {"method": "kfac", "compensate": {}},
            "mixed, compensate": {"method": "mixed", "compensate": {}},
        }.items():
            yield f"{name}, whole model {keep}", stage | {"size": size}, {}
