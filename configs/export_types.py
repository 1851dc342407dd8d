"""Names that `lrc export` accepts."""

FORMATS = ("dense", "gguf", "int-quantized", "remote-code", "drafter")
FLOAT_TYPES = ("f32", "f16", "bf16")
GGUF_TYPES = (*FLOAT_TYPES, "q8_0", "q4_0")
"""Types of GGUF that a dense matrix can be stored in."""
SETTINGS = ("llama.cpp", "llm-compressor", "auto-round")
"""Programs whose settings `lrc plan --format` prints."""
