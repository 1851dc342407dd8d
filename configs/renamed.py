"""Keys and values of recipes that have a new name; errors about the old one give the new one."""

RENAMED_KEYS = {
    "alternatives": "baselines",
    "branch": "low_rank_correction",
    "forms": "components",
    "gauge": "balance",
    "group_size": "layers_per_group",
    "head": "lm_head",
    "max_loss": "max_relative_error",
    "multiple": "width_multiple",
    "order": "act_order",
    "rounder": "quantizer",
    "skip": "ignore",
    "storage": "components",
    "verify": "criterion",
}
"""Old key -> new key, for mappings that allow the new key and not the old one."""

RENAMED_VALUES = {
    "factors": "low_rank",
    "low-rank": "pivoted_low_rank",
    "pivot": "pivoted_low_rank",
    "sum": "pivoted_low_rank+sparse",
}
"""Old value -> new value, for keys that allow the new value and not the old one."""
