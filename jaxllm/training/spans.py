"""How many masked spans an encoder-decoder predicts whole, under teacher forcing.

A span counts when each of its tokens, and the sentinel or end after it, is the most likely one given the true tokens
before it. Where nothing is masked by sentinels, a whole answer is one span.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from jaxllm.models import family_of
from jaxllm.models.layers import apply
from jaxllm.ops import backend
from jaxllm.training.loss import Batch
from jaxllm.training.program import Program
from jaxllm.training.sharding import map_rows, with_ends


def make_predict_step(program: Program, mesh: Mesh | None) -> Callable[[Any, Batch], Int[Array, "B T"]]:
    """The most likely token at every decoder position, given the true ones before; logits exist row by row."""
    model = program.model

    def predict(cast: Any, batch: Batch) -> Int[Array, "B T"]:
        head = apply(model, cast, method="head")
        hidden = family_of(model).hidden(model, cast, batch)

        def most_likely(row: Float[Array, "T D"]) -> Int[Array, " T"]:
            # Float32 logits, as in decoding: of 16-bit ones the largest is another at every hundredth position.
            return backend.fast_argmax(jnp.einsum("td,vd->tv", row, head, preferred_element_type=jnp.float32))

        return jax.lax.map(most_likely, hidden)

    return map_rows(with_ends(predict), mesh, dtype=program.dtype, combine=None)


def count_spans(
    predicted: np.ndarray, targets: np.ndarray, segment_ids: np.ndarray, sentinels: np.ndarray
) -> tuple[int, int]:
    """Spans of rows [B, T] that were predicted whole, and all of them.

    A span begins after a sentinel, or with an answer that does not begin with one.
    """
    inside = segment_ids.ravel() > 0
    row = np.repeat(np.arange(len(targets)), targets.shape[1])
    owner = (row * (1 + segment_ids.max(initial=0)) + segment_ids.ravel())[inside]
    tokens, right = targets.ravel()[inside], (predicted == targets).ravel()[inside]
    marks = np.isin(tokens, sentinels)
    first = np.diff(owner, prepend=-1) != 0
    begins = first | np.roll(marks, 1)
    number = np.cumsum(begins) - 1
    # The sentinel before the first span of an answer is not a span.
    real = ~(first & marks)[begins]
    whole = np.bincount(number, weights=~right, minlength=len(real)) == 0
    return int((whole & real).sum()), int(real.sum())
