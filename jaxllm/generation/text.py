"""A model with its tokenizer, called with text: `text("def read_")`.

The prompt of a decoder starts a document; that of an encoder-decoder is a whole document. There `<extra_id_0>` and so
on become sentinels.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, overload

import numpy as np

from jaxllm.data.objectives import after_sentinels, before_end, cut_at_sentinels
from jaxllm.data.tokenizer import Tokenizer, encode_blanks
from jaxllm.generation.decoding import generate, generate_stream
from jaxllm.generation.edits import edited
from jaxllm.jaxprs.hooks import Edit
from jaxllm.models import Model, decoder_of


class TextModel(NamedTuple):
    """A model, its parameters and its tokenizer: text in, text out.

    `TextModel.of` makes one in memory, `jaxllm.run.load.load_text_model` from a folder. Options of a call are those of
    `jaxllm.generate`, such as `sampling`, `seed` and `stop`, and `edits` as for `jaxllm.generation.edited`.

    Attributes:
        model: a model of any family.
        params: prepared for decoding.
        tokenizer: text to ids and back.
        begin: ids before a decoder's prompt.
        eos_ids: ids that end an output.
        pad_id: padding.

    Example:
        >>> import jax, jaxllm
        >>> from jaxllm.data.tokenizer import train_tokenizer
        >>> tokenizer = train_tokenizer(["def read(path): return path"], vocab_size=400)
        >>> config = jaxllm.LlamaConfig(vocab_size=400, d_model=8, d_ff=8, num_layers=1, num_heads=2)
        >>> model = jaxllm.build(config)
        >>> params = jaxllm.init_params(model, jax.random.key(0))
        >>> text = jaxllm.TextModel.of(model, params, tokenizer)
        >>> completion = text("def read_", max_new_tokens=8)
        >>> completion == "".join(text.stream("def read_", max_new_tokens=8))
        True
    """

    model: Model
    params: Any
    tokenizer: Tokenizer
    begin: tuple[int, ...]
    eos_ids: tuple[int, ...]
    pad_id: int

    @classmethod
    def of(cls, model: Model, params: Any, tokenizer: Tokenizer, *, int8: bool = False) -> "TextModel":
        """A model in memory with the special ids of its tokenizer; `int8` quantizes the matrices.

        Raises:
            ValueError: for parameters of another model.
        """
        ends = (tokenizer.eos_id,)
        return cls(model, decoder_of(model).prepare(params, int8=int8), tokenizer, ends, ends, tokenizer.pad_id)

    @overload
    def __call__(self, prompts: str, *, max_new_tokens: int = 128, **options: Any) -> str: ...

    @overload
    def __call__(self, prompts: Sequence[str], *, max_new_tokens: int = 128, **options: Any) -> list[str]: ...

    def __call__(self, prompts: str | Sequence[str], *, max_new_tokens: int = 128, **options: Any) -> str | list[str]:
        """The continuation of a prompt, or the answer of an encoder-decoder with its sentinels spelled out.

        One text gives one text; several give a list.

        Raises:
            ValueError: as `encode` and `jaxllm.generate`, or for several samples of a prompt outside a list.
        """
        if not isinstance(prompts, str):
            rows = self.generate([self.encode(each) for each in prompts], max_new_tokens=max_new_tokens, **options)
            return [self.decode(row) for row in rows]
        if options.get("samples", 1) != 1:
            raise ValueError(f"one text cannot hold {options['samples']} samples: pass the prompt in a list")
        return self([prompts], max_new_tokens=max_new_tokens, **options)[0]

    def stream(self, prompt: str, *, max_new_tokens: int = 128, **options: Any) -> Iterator[str]:
        """The text of a call with one prompt, piece by piece."""
        ids = [self.encode(prompt)]
        return self.pieces(self.generate_stream(ids, max_new_tokens=max_new_tokens, **options))

    def fill(self, text: str, *, max_new_tokens: int = 128, **options: Any) -> str:
        """The text with the answer of an encoder-decoder in place of each `<extra_id_i>`.

        Raises:
            ValueError: as a call, or for a model without an encoder.
        """
        if not self.model.config.encoder_decoder:
            raise ValueError(f"only an encoder-decoder fills blanks; {self.model.config.family} continues its prompt")
        inputs = self.encode(text)
        (answer,) = self.generate([inputs], max_new_tokens=max_new_tokens, **options)
        return filled_in(inputs, answer, self.tokenizer)

    def generate(
        self, prompts: Sequence[Sequence[int]], *, edits: Mapping[str, Edit] | None = None, **options: Any
    ) -> list[list[int]]:
        """`jaxllm.generate` for prompts of ids, with the special ids of this model."""
        return generate(self.model, self._edited(edits), prompts, **self._special() | options)

    def generate_stream(
        self, prompts: Sequence[Sequence[int]], *, edits: Mapping[str, Edit] | None = None, **options: Any
    ) -> Iterator[list[list[int]]]:
        """`jaxllm.generation.generate_stream` for prompts of ids, with the special ids of this model."""
        return generate_stream(self.model, self._edited(edits), prompts, **self._special() | options)

    def encode(self, text: str) -> list[int]:
        """Ids of a prompt.

        Raises:
            ValueError: for a sentinel that the tokenizer doesn't have, or bytes that are not UTF-8 text.
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:  # Python reads such bytes of an argument as surrogates
            byte = ord(text[error.start]) & 0xFF
            raise ValueError(f"the prompt is not UTF-8 text (byte 0x{byte:x} at character {error.start})") from None
        if not self.model.config.encoder_decoder:
            return [*self.begin, *map(int, self.tokenizer.encode(text))]
        return encode_blanks(text, self.tokenizer).tolist()

    def decode(self, ids: Iterable[int]) -> str:
        """Text of ids, without end tokens and padding; sentinels are spelled out."""
        dropped = {*self.eos_ids, self.pad_id}
        return self.tokenizer.decode([i for i in ids if i not in dropped])

    def pieces(self, stream: Iterable[list[list[int]]]) -> Iterator[str]:
        """Text of the first row of a stream of chunks; characters appear once all their bytes are there."""
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

    def _special(self) -> dict[str, Any]:
        return {"eos_ids": self.eos_ids, "pad_id": self.pad_id, "decode": self.decode}

    def _edited(self, edits: Mapping[str, Edit] | None) -> Any:
        return edited(self.params, edits) if edits else self.params


def filled_in(
    inputs: Sequence[int] | np.ndarray,
    answer: Sequence[int] | np.ndarray,
    tokenizer: Tokenizer,
    *,
    marks: tuple[str, str] = ("", ""),
) -> str:
    """The text of `inputs`; the tokens in `answer`, between two marks, replace each sentinel."""
    sentinels = tokenizer.sentinel_ids
    answers = after_sentinels(_ids(answer, tokenizer), sentinels)
    text = ""
    for part in cut_at_sentinels(_ids(inputs, tokenizer), sentinels):
        if part[0] in sentinels:
            text += tokenizer.decode(answers.get(int(part[0]), part[:0])).join(marks)
            part = part[1:]
        text += tokenizer.decode(part)
    return text


def _ids(ids: Sequence[int] | np.ndarray, tokenizer: Tokenizer) -> np.ndarray:
    return before_end(np.asarray(ids, np.int32), tokenizer.eos_id)
