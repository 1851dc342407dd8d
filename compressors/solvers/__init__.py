"""Numerical solvers: functions of tensors without knowledge of recipes or models."""
