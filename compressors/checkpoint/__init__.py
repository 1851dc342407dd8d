"""Write compressed checkpoints, and load them with transformers."""
