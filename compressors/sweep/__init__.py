"""Several runs of one recipe with different values, which share what they have in common."""
