"""Estimates of the memory, disk space and time of a run, by stage."""
