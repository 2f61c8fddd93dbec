"""The trainer: the loop over compiled steps with its data, records, console and reports; loading a run."""
