"""Models in: where they lie, what they are made of, and their weights one layer at a time.

The only part of the library that knows the classes of transformers.
"""
