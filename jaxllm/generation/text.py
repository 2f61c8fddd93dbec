"""A model with its tokenizer: text to prompt ids, new ids to text.

How a prompt begins and ends depends on the family: a decoder starts a document, an encoder-decoder reads one that
ends, in which `<extra_id_0>` and so on may be written out and become the sentinels that the tokenizer never reads from
text.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from jaxllm.data.tokenizer import Tokenizer, encode_blanks
from jaxllm.models import Model


class TextModel(NamedTuple):
    """A model, its parameters and its tokenizer.

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
