"""Files of a run: journal, shards, memory and progress reporting."""
