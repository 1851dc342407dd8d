"""Compressed differences between a fine-tuned model, or a LoRA adapter, and its base model."""
