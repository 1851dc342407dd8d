"""Collect statistics of linear layers on calibration windows: layer by layer, resumable."""
