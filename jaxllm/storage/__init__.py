"""What a run keeps on disk: its folder, and checkpoints by orbax."""
