"""Checkpoints of other libraries, both ways, without their code."""

"""Checkpoints of other libraries, both ways, without their code."""
