"""What orbax's manager is given: which checkpoints stay, and how one gets its name."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import orbax.checkpoint as ocp

from jaxllm.data.durable import sync_tree


class NewestAndBest(ocp.checkpoint_managers.PreservationPolicy):
    """Keeps the newest `keep` checkpoints and the one of the lowest loss."""

    def __init__(self, keep: int, losses: Mapping[int, float]) -> None:
        self._keep, self._losses = keep, losses

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> Sequence[bool]:
        """Which of the checkpoints, oldest first, stay."""
        del context
        steps = [checkpoint.step for checkpoint in checkpoints]
        best = min((step for step in steps if step in self._losses), key=self._losses.__getitem__, default=None)
        return [step == best or step in steps[-self._keep :] for step in steps]


class Durable(ocp.path.atomicity.AtomicRenameTemporaryPath):
    """A checkpoint, or an item of one, until it has its name."""

    async def finalize(self) -> None:
        """Renames it when its files are on disk; older checkpoints are deleted when its name is, too."""
        sync_tree(Path(self.get()))
        await super().finalize()
        sync_tree(Path(self.get_final()))  # again: orbax writes small files just before it renames
