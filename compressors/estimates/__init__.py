"""What a run will need of a machine: memory, disk space and time, by stage."""
