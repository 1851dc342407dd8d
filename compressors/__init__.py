"""The library, in the order data flows; `pipeline.py` is its table of contents."""
