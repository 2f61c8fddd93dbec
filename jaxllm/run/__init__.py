"""The host side of a run: its folder, checkpoints and records, its devices, and the loop over compiled steps."""
