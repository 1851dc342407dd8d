"""Stages of tests of healing."""

DISTILL = {"method": "distill", "steps": 30, "batch": 4, "rate": 1e-2, "held_out": 512}
BLOCK = {"method": "block", "steps": 20, "batch": 4, "rate": 1e-2, "held_out": 512, "samples": 16}
INT4 = {"quantize": {"method": "rtn", "bits": 4, "group_size": 16}}
