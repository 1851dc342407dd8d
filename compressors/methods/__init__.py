"""Compression methods: one table row per published method."""
