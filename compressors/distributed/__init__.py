"""Several processes that execute one run together, started by ``torchrun`` or another launcher."""
