"""From parameters and batches to trained parameters: step, optimizer, precision, checkpoints and the host loop."""
