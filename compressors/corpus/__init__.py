"""Text for calibration and evaluation: sources -> documents -> text -> tokens -> windows."""
