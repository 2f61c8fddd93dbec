"""The machine under a run: its processes, devices and signals."""
