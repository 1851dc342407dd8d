"""Generate text with a checkpoint: `python -m lrc.cli.generate FOLDER PROMPT`."""

import sys
from pathlib import Path

from lrc.cli import console


def main(folder: str, prompt: str) -> None:
    """Print the prompt and its greedy continuation."""
    with console.quiet_libraries():
        import torch

        from lrc.compressors.checkpoint.reader import load_checkpoint, load_tokenizer

        console.quiet_transformers()
        tokenizer = load_tokenizer(Path(folder))
        model = load_checkpoint(Path(folder), dtype=torch.float32)
        inputs = tokenizer(prompt, return_tensors="pt")
        tokens = model.generate(**inputs, max_new_tokens=40, do_sample=False)
        print(tokenizer.decode(tokens[0], skip_special_tokens=True))


if __name__ == "__main__":
    main(*sys.argv[1:])
