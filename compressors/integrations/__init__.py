"""Compressed layers in other libraries: adapters of PEFT, and serving with vLLM.

Each module imports the library that it is named after, and is imported only together with it.
"""
