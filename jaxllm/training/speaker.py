"""A trained model with its tokenizer, ready to be talked to: from a run folder or a Hugging Face directory.

Text in, text out; everything between is `jaxllm.generation`. How a prompt begins and ends is the family's: a decoder
starts a document, an encoder-decoder reads one that ends, in which `<extra_id_0>` and so on are written out on purpose
and so become the sentinels that the tokenizer never reads from text.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp

from jaxllm.config_file import ConfigError
from jaxllm.data.tokenizer import Tokenizer, encode_blanks, load_tokenizer, tokenizers_in
from jaxllm.interop.hf import load_hf, special_ids
from jaxllm.models import Model, build, decoder_of
from jaxllm.training.initial_params import load_run


class Speaker(NamedTuple):
    """What text generation needs.

    Attributes:
        model: of either family, in the dtype it computes in.
        params: prepared for decoding.
        tokenizer: text and ids.
        begin: ids before a decoder's prompt.
        eos_ids: ids that end an output.
        pad_id: padding.
    """

    model: Model
    params: Any
    tokenizer: Tokenizer
    begin: tuple[int, ...]
    eos_ids: tuple[int, ...]
    pad_id: int

    def encode(self, text: str) -> list[int]:
        """Ids of a prompt.

        Raises:
            ValueError: for a sentinel that the tokenizer doesn't have, or bytes that are no UTF-8 text.
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:  # Python reads such bytes, of an argument or standard input, as surrogates
            byte = ord(text[error.start]) & 0xFF
            raise ValueError(f"the prompt is not UTF-8 text (byte 0x{byte:x} at character {error.start})") from None
        if not self.model.config.encoder_decoder:
            return [*self.begin, *map(int, self.tokenizer.encode(text))]
        return encode_blanks(text, self.tokenizer).tolist()

    def decode(self, ids: Iterable[int]) -> str:
        """Text of new tokens, without end tokens and padding; sentinels are spelled out."""
        dropped = {*self.eos_ids, self.pad_id}
        return self.tokenizer.decode([i for i in ids if i not in dropped])

    def pieces(self, stream: Iterable[list[list[int]]]) -> Iterator[str]:
        """Text of the first row as it comes, holding back characters of which a byte is still missing."""
        ids: list[int] = []
        sent = ""
        for chunk in stream:
            ids.extend(chunk[0])
            text = self.decode(ids)
            whole = text.rstrip("\ufffd")
            if whole.startswith(sent):
                yield whole[len(sent) :]
                sent = whole
        yield self.decode(ids)[len(sent) :]


def load_speaker(path: str | Path, *, dtype: str = "float32", int8: bool = False) -> Speaker:
    """The newest model of a run folder, or that of a Hugging Face directory with its tokenizer.

    Args:
        path: folder.
        dtype: of the computation.
        int8: store the matrices as int8.

    Raises:
        ConfigError: when the folder is neither.
        CheckpointError, InteropError, DataError: when what is in it cannot be read.
    """
    folder = Path(path).expanduser()
    if (folder / "config.yaml").is_file():
        config, params = load_run(folder)
        model = build(config.model, dtype=jnp.dtype(dtype))
        tokenizer = _tokenizer(folder)
        begin, ends, pad = (tokenizer.eos_id,), (tokenizer.eos_id,), tokenizer.pad_id
    elif (folder / "config.json").is_file():
        loaded, params = load_hf(folder)
        model, tokenizer, ids = build(loaded.config, dtype=jnp.dtype(dtype)), _tokenizer(folder), special_ids(folder)
        begin, ends = () if ids.bos is None else (ids.bos,), ids.eos or (tokenizer.eos_id,)
        pad = tokenizer.pad_id if ids.pad is None else ids.pad
    else:
        raise ConfigError(f"{folder} is neither a run folder (config.yaml) nor a Hugging Face directory (config.json)")
    return Speaker(model, decoder_of(model).prepare(params, int8=int8), tokenizer, begin, ends, pad)


def _tokenizer(folder: Path) -> Tokenizer:
    return load_tokenizer(next(iter(tokenizers_in(folder)), folder / "tokenizer.json"))
