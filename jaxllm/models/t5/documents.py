"""Which source tokens and targets of a row belong together, as one value."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Int

from jaxllm.models.checks import check_shape
from jaxllm.ops.masks import Pattern


class Documents(NamedTuple):
    """The documents in the rows of a batch; with no field set, a row is one document without padding.

    Attributes:
        encoder_segment_ids: document of each source token, 0 = padding; None is one document, number 1.
        decoder_segment_ids: document of each decoder token, which sees the source of the same number.
        encoder_lengths: real source tokens of each row, where a row is one document and padding ends it. They replace
            segment ids and are faster on a GPU, whose fused attention supports lengths but not documents.
    """

    encoder_segment_ids: Int[Array, "#B S"] | None = None
    decoder_segment_ids: Int[Array, "B T"] | None = None
    encoder_lengths: Int[Array, "#B"] | None = None

    @classmethod
    def of(cls, batch: Mapping[str, Any]) -> "Documents":
        """Those of a training batch, from the fields that it has."""
        return cls(**{name: batch[name] for name in cls._fields if name in batch})

    def encoder(self, rows: int, length: int) -> Pattern:
        """The encoder's attention over itself."""
        check_shape(self.encoder_segment_ids, "encoder_segment_ids", (rows, length))
        segments = self.encoder_segment_ids
        return Pattern(query_segments=segments, key_segments=segments, **self._lengths(rows, rows))

    def decoder(self, rows: int, length: int) -> Pattern:
        """The decoder's attention over itself."""
        check_shape(self.decoder_segment_ids, "decoder_segment_ids", (rows, length))
        return Pattern(causal=True, query_segments=self.decoder_segment_ids, key_segments=self.decoder_segment_ids)

    def cross(self, targets: tuple[int, ...], sources: tuple[int, ...]) -> Pattern:
        """The decoder's attention over the encoder's output: one source for all rows, or one for each."""
        check_shape(self.encoder_segment_ids, "encoder_segment_ids", sources)
        lengths = self._lengths(sources[0], targets[0])
        if self.encoder_segment_ids is None and self.decoder_segment_ids is None:
            return Pattern(**lengths)
        return Pattern(
            query_segments=_or_ones(self.decoder_segment_ids, targets),
            key_segments=_or_ones(self.encoder_segment_ids, sources),
        )

    def _lengths(self, sources: int, rows: int) -> dict[str, Any]:
        """Real keys of each row, at least one: the output of an empty row has no meaning."""
        lengths = self.encoder_lengths
        if lengths is None:
            return {}
        if self.encoder_segment_ids is not None or self.decoder_segment_ids is not None:
            raise ValueError("encoder_lengths make each row one document: give them or segment ids, not both")
        check_shape(lengths, "encoder_lengths", (sources,))
        if not jnp.issubdtype(lengths.dtype, jnp.integer):
            raise ValueError(f"encoder_lengths must be integers, got {lengths.dtype}")
        return {"key_lengths": jnp.broadcast_to(jnp.maximum(lengths, 1).astype(jnp.int32), (rows,)), "some_keys": True}


ONE_A_ROW = Documents()


def _or_ones(segments: Array | None, shape: tuple[int, ...]) -> Array:
    return jnp.ones(shape, jnp.int32) if segments is None else segments
