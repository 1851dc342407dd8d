"""Recipes that ship with lrc; data only."""
