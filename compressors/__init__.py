"""The library: planning, calibration, compression, checkpoints and evaluation of models.

`pipeline` runs these phases in order.
"""
