"""Compress language models after training.

`import lrc` is all that stock `transformers` needs to load a compressed checkpoint::

    import lrc
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained("runs/demo/checkpoint")
"""

from importlib import metadata

from lrc._register import register_with_transformers

__version__ = metadata.version("lrc-compress")

register_with_transformers()
