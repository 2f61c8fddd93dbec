"""Pure functions on arrays: the mathematics of the models, without parameters, Flax or configuration of runs.

Axes in signatures (jaxtyping) and docstrings of the whole package; the first seven are jax.nn.dot_product_attention's:

    B  rows of a batch
    T  queries, or target length
    S  keys, or source length, or cache slots
    N  query heads; in generation also new tokens
    K  key/value heads; in beam search also beams
    G  query heads per key/value head, N / K
    H  width of a head
    D  width of the model
    F  width of the MLP; in a matmul its outputs
    V  vocabulary
    L  layers
    A  cache slots that are read
    I  inputs of a module; width of a head together with its document code
    O  outputs of a module
    P  pairs of a rotary head, H / 2
    R  rows: B * K of a cache, buckets of a relative bias, tokens so far of a text
    W  another width, named where it is used
"""
