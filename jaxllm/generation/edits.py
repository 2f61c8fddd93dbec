"""Decoding with values replaced inside the model: parameters with edits, which every function here takes as parameters.

One more adapter, around a family's own: what it compiles is the family's functions under `jaxllm.study.edit`, in the
prompt and in every step after it. The cache then holds what the edits made of keys and values.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from jax.tree_util import Partial
from jaxtyping import Array, Float

from jaxllm.jaxprs.hooks import Edit, edit
from jaxllm.models import Model, decoder_of
from jaxllm.models.cache import KVCache
from jaxllm.models.decoder import Decoder, Plan


class Edited(NamedTuple):
    """Parameters with edits, as `edited` makes them.

    Attributes:
        params: stacked as in training, or prepared.
        edits: by name, each a `jax.tree_util.Partial`, whose arrays are arguments of what is compiled.
    """

    params: Any
    edits: OrderedDict[str, Any]


def edited(params: Any, edits: Mapping[str, Edit]) -> Edited:
    """Parameters for `generate` and its siblings, under which the model runs with values replaced.

    >>> steer = lambda vector, x, layer: jnp.where(layer == 12, x + vector, x)
    >>> generate(model, edited(params, {"after_mlp": Partial(steer, vector)}), prompts, max_new_tokens=50)

    Args:
        params: as they would be passed without edits.
        edits: as `jaxllm.study.edit`; a value is [B, T, ...], T being 1 while new tokens are decoded. Each other
            function compiles again, so define it once, and give arrays that change by `jax.tree_util.Partial`.

    Raises:
        ValueError: for attention weights, which decoding never holds: edit `heads` or `query` instead; for parameters
            that are edited already.
    """
    if isinstance(params, Edited):
        raise ValueError("the parameters are edited already: give all edits at once")
    for name in edits:
        if name.split("/")[-1] == "attention_weights":
            raise ValueError(f"{name} can't be edited while decoding, which never holds them: edit heads or query")
    # A partial of a partial would be another function each time.
    made = [(name, change if isinstance(change, Partial) else Partial(change)) for name, change in edits.items()]
    # Of one site edits apply in their order, which jit would sort in a dict.
    return Edited(params, OrderedDict(made))


def without_edits(params: Any) -> Any:
    """The parameters themselves."""
    return params.params if isinstance(params, Edited) else params


def adapter(model: Model, params: Any) -> Decoder:
    """The decoder for a model with these parameters."""
    return EditedDecoder(decoder_of(model)) if isinstance(params, Edited) else decoder_of(model)


@dataclass(frozen=True)
class EditedDecoder:
    """A family's adapter with edits in its parameters."""

    decoder: Decoder

    @property
    def model(self) -> Model:
        """See `Decoder`."""
        return self.decoder.model

    def without_cudnn(self) -> EditedDecoder:
        """See `Decoder`."""
        return EditedDecoder(self.decoder.without_cudnn())

    def prepare(self, params: Edited, *, int8: bool = False) -> Edited:
        """See `Decoder`."""
        return params._replace(params=self.decoder.prepare(params.params, int8=int8))

    def check(self, prompts: Sequence[Sequence[int]], *, new: int, pad_id: int) -> None:
        """See `Decoder`."""
        self.decoder.check(prompts, new=new, pad_id=pad_id)

    def plan(self, *, prompt: int, new: int, needed: int, cache_dtype: str | None, wraps: bool) -> Plan:
        """See `Decoder`."""
        return self.decoder.plan(prompt=prompt, new=new, needed=needed, cache_dtype=cache_dtype, wraps=wraps)

    def start(self, params: Edited, tokens: Array, lengths: Array, plan: Plan) -> tuple[Any, Array, KVCache, Array]:
        """See `Decoder`; here every site is passed, so that a name which is none is an error."""

        def run(inner: Any, tokens: Array, lengths: Array) -> tuple[Any, Array, KVCache, Array]:
            return self.decoder.start(inner, tokens, lengths, plan)

        return edit(run, params.edits)(params.params, tokens, lengths)

    def step(
        self, params: Edited, context: Any, cache: KVCache, tokens: Array, positions: Array, plan: Plan, attended: int
    ) -> tuple[Array, KVCache]:
        """See `Decoder`."""

        def run(inner: Any, context: Any, cache: KVCache, tokens: Array, positions: Array) -> tuple[Array, KVCache]:
            return self.decoder.step(inner, context, cache, tokens, positions, plan, attended)

        # An encoder's sites are gone by now.
        return edit(run, params.edits, strict=False)(params.params, context, cache, tokens, positions)

    def extend(
        self, params: Edited, context: Any, cache: KVCache, tokens: Array, positions: Array, plan: Plan
    ) -> tuple[Array, KVCache]:
        """See `Decoder`."""

        def run(inner: Any, context: Any, cache: KVCache, tokens: Array, positions: Array) -> tuple[Array, KVCache]:
            return self.decoder.extend(inner, context, cache, tokens, positions, plan)

        return edit(run, params.edits, strict=False)(params.params, context, cache, tokens, positions)

    def history(self, tokens: Array, lengths: Array) -> tuple[Array, Array]:
        """See `Decoder`."""
        return self.decoder.history(tokens, lengths)

    def lookup(self, tokens: Array, lengths: Array, new: Array, counts: Array) -> tuple[Array, Array, Array, Array]:
        """See `Decoder`."""
        return self.decoder.lookup(tokens, lengths, new, counts)

    def full_logits(
        self, params: Edited, tokens: Array, lengths: Array, new: Array, *, length: int | None = None
    ) -> Float[Array, "B N V"]:
        """See `Decoder`."""

        def run(inner: Any, tokens: Array, lengths: Array, new: Array) -> Float[Array, "B N V"]:
            return self.decoder.full_logits(inner, tokens, lengths, new, length=length)

        return edit(run, params.edits)(params.params, tokens, lengths, new)
