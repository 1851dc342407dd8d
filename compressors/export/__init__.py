"""Write checkpoints in the formats of other programs, one matrix in memory at a time."""
