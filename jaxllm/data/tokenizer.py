"""Text to ids and back, losslessly: a byte-level BPE of the `tokenizers` library, or a SentencePiece model.

Ids of a trained tokenizer: pad 0, end 1, unknown 2, then bytes and merges, then 100 sentinels, which count down from
the last id as in T5. Text that spells a special token never becomes one; pickles and files of `tokenizers` lack that
setting, so it is set again after loading.
"""

import contextlib
import functools
import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer as _Fast
from tokenizers import decoders, models, pre_tokenizers, trainers

from jaxllm.data import DataError, first_line
from jaxllm.data.durable import write_whole

NUM_SENTINELS = 100
_PAD, _EOS, _UNK = "<pad>", "</s>", "<unk>"
_SMALLEST = 256 + 3 + NUM_SENTINELS
_SENTINEL = re.compile(r"<extra_id_(\d+)>", re.ASCII)
_NOTHING = np.zeros(0, np.int32)


class Tokenizer:
    """A `tokenizers` tokenizer that never reads special tokens from text.

    Attributes:
        vocab_size: number of ids, sentinels included.
        pad_id: padding; equals `eos_id` if the tokenizer has no padding token.
        eos_id: end of a document, and the input for its first token.
        sentinel_ids: ids of the sentinels in order; empty when the tokenizer has none.
    """

    def __init__(self, fast: _Fast) -> None:
        """Finds the special ids by their usual names."""
        self._fast = fast
        self._restrict()
        self.vocab_size: int = fast.get_vocab_size(with_added_tokens=True)
        self.eos_id = self._special(_EOS, "<|end_of_text|>", "<|endoftext|>", "<eos>", default=None)
        # Id 0 may be text: it is "!" in the vocabularies of GPT-2, Llama 3 and Qwen.
        self.pad_id = self._special(_PAD, "<|finetune_right_pad_id|>", "<|pad|>", default=self.eos_id)
        found = [fast.token_to_id(f"<extra_id_{i}>") for i in range(NUM_SENTINELS)]
        self.sentinel_ids = np.array([i for i in found if i is not None], np.int32)

    def encode(self, text: str) -> np.ndarray:
        """Ids of a text, int32, without any special token."""
        with _no_panic(f"text that begins with {text[:40]!r}"):
            return np.array(self._fast.encode(text, add_special_tokens=False).ids, np.int32)

    def begins_with(self, token: int, *, add_bos_token: Any = None) -> bool:
        """Whether a text begins with this token by tokenizer.json, or by `add_bos_token` of tokenizer_config.json."""
        with _no_panic("special tokens"):
            return add_bos_token is True or self._fast.encode("a").ids[:1] == [token]

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """The text of ids; special tokens are spelled out."""
        with _no_panic("ids"):
            return self._fast.decode([int(i) for i in ids], skip_special_tokens=False)

    @functools.cached_property
    def token_bytes(self) -> np.ndarray:
        """UTF-8 bytes that each id stands for, int32 [vocab_size]; 0 for special tokens."""
        special = {int(i) for i, token in self._fast.get_added_tokens_decoder().items() if token.special}
        sizes, count = np.zeros(self.vocab_size, np.int32), _byte_counter(self._fast)
        for token, i in self._fast.get_vocab(with_added_tokens=True).items():
            if i not in special:
                sizes[i] = count(token)
        return sizes

    @functools.cached_property
    def fingerprint(self) -> str:
        """Hash of the tokenizer, for checkpoints."""
        return hashlib.sha256(self._fast.to_str().encode()).hexdigest()[:12]

    def save(self, path: str | Path) -> None:
        """Writes tokenizer.json, whole or not at all, in a folder that may be new."""
        write_whole(Path(path), self._fast.to_str(pretty=True).encode())

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._restrict()

    def _restrict(self) -> None:
        self._fast.encode_special_tokens = True
        self._fast.no_truncation()
        if any((self._fast.padding or {}).get(name) for name in ("length", "pad_to_multiple_of")):
            self._fast.no_padding()  # that of a batch adds nothing to a single text, and stays in the fingerprint

    def _special(self, *names: str, default: int | None) -> int:
        for name in names:
            found = self._fast.token_to_id(name)
            if found is not None:
                return found
        if default is None:
            raise DataError(f"the tokenizer has no end-of-text token; one of {', '.join(names)} is needed")
        return default


@contextlib.contextmanager
def _no_panic(what: str) -> Iterator[None]:
    """Turns a panic of the library, as of an endless pattern, into a DataError; it is not an `Exception`."""
    try:
        yield
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        fix = "use another, or repair the patterns in its tokenizer.json"
        raise DataError(f"the tokenizer fails on {what} ({first_line(error)}); {fix}") from None


def _byte_counter(fast: _Fast) -> Callable[[str], int]:
    """Counts the UTF-8 bytes that a token of the vocabulary stands for, by the tokenizer's decoder."""
    decoder = json.loads(fast.decoder.__getstate__()) if fast.decoder else {}
    parts = decoder.get("decoders", [decoder])
    kinds = {part.get("type") for part in parts}
    if "ByteLevel" in kinds:  # one character per byte, of these 256; an added token is its text
        alphabet = set(pre_tokenizers.ByteLevel.alphabet())
        return lambda token: len(token) if alphabet.issuperset(token) else len(token.encode())
    marks = [part["replacement"] for part in parts if part.get("type") == "Metaspace"]
    replaced = [part for part in parts if part.get("type") == "Replace" and part["content"] == " "]
    marks += [part["pattern"]["String"] for part in replaced if "String" in part["pattern"]]
    single = {f"<0x{byte:02X}>" for byte in range(256)}  # byte fallback, where all of them are there
    if any(fast.token_to_id(token) is None for token in single):
        single = set()

    def count(token: str) -> int:
        if token in single:
            return 1
        for mark in marks:  # U+2581 for a space, as in SentencePiece
            token = token.replace(mark, " ")
        return len(token.encode())

    return count


class SentencePieceTokenizer(Tokenizer):
    """A bare SentencePiece .model; the library never makes control symbols from text."""

    def __init__(self, path: Path) -> None:
        """Loads it through the optional extra `sentencepiece`."""
        try:
            import sentencepiece
        except ImportError:
            needs = "reading it needs: pip install 'jaxllm[sentencepiece]'"
            raise DataError(f"{path} is a SentencePiece model; {needs}") from None
        self._model = sentencepiece.SentencePieceProcessor()
        try:
            self._model.Load(str(path))
        except (OSError, RuntimeError) as error:
            raise DataError(f"{path} is not a SentencePiece model ({error})") from None
        self.vocab_size = self._model.GetPieceSize()
        self.eos_id = self._model.eos_id()
        if self.eos_id < 0:
            raise DataError(f"{path} has no end-of-text token, which documents need")
        self.pad_id = self._model.pad_id() if self._model.pad_id() >= 0 else self.eos_id
        found = [self._model.PieceToId(f"<extra_id_{i}>") for i in range(NUM_SENTINELS)]
        self.sentinel_ids = np.array([i for i in found if i != self._model.unk_id()], np.int32)

    def encode(self, text: str) -> np.ndarray:
        """Ids of a text, int32, without any special token."""
        return np.array(self._model.EncodeAsIds(text), np.int32)

    def begins_with(self, token: int, *, add_bos_token: Any = None) -> bool:
        """Whether a text begins with this token by `add_bos_token`, or is the model's begin token if that is None."""
        return token == self._model.bos_id() if add_bos_token is None else bool(add_bos_token)

    def piece(self, token: int) -> str:
        """The spelling of an id, also of a control symbol."""
        return self._model.IdToPiece(token)

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """The text of ids; those beyond the pieces, which a larger model may write, are skipped."""
        return self._model.DecodeIds([int(i) for i in ids if i < self.vocab_size])

    @functools.cached_property
    def token_bytes(self) -> np.ndarray:
        """UTF-8 bytes that each id stands for, int32 [vocab_size]; the piece's space mark counts as one."""
        model, sizes = self._model, np.zeros(self.vocab_size, np.int32)
        for i in range(self.vocab_size):
            if model.IsByte(i):
                sizes[i] = 1
            elif not (model.IsControl(i) or model.IsUnknown(i)):
                sizes[i] = len(model.IdToPiece(i).replace("\u2581", " ").encode())
        return sizes

    @functools.cached_property
    def fingerprint(self) -> str:
        """Hash of the model, for checkpoints."""
        return hashlib.sha256(self._model.serialized_model_proto()).hexdigest()[:12]

    def save(self, path: str | Path) -> None:
        """Writes the .model next to where a tokenizer.json would be, whole or not at all."""
        write_whole(Path(path).with_suffix(".model"), self._model.serialized_model_proto())

    def _restrict(self) -> None:
        """SentencePiece needs no restriction."""


def train_tokenizer(texts: Iterable[str], *, vocab_size: int) -> Tokenizer:
    """A byte-level BPE of at most `vocab_size` ids; any text round-trips exactly.

    Raises:
        DataError: when the vocabulary has no room for bytes, specials and sentinels, or `texts` is one str.
    """
    if isinstance(texts, str):  # its letters would be the texts
        raise DataError("texts must be many texts, got one str; put it into a list")
    if vocab_size < _SMALLEST:
        needed = f"256 bytes, 3 special tokens and {NUM_SENTINELS} sentinels; use at least {_SMALLEST}"
        raise DataError(f"model.vocab_size {vocab_size} is too small for {needed}")
    fast = _Fast(models.BPE(unk_token=_UNK))
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - NUM_SENTINELS,
        special_tokens=[_PAD, _EOS, _UNK],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    fast.train_from_iterator(texts, trainer)
    fast.add_special_tokens([f"<extra_id_{i}>" for i in reversed(range(NUM_SENTINELS))])
    return Tokenizer(fast)


def encode_blanks(text: str, tokenizer: Tokenizer) -> np.ndarray:
    """Ids of an encoder input, int32: each <extra_id_i> of the text is sentinel i, and the end token is last.

    Text of spaces alone before, between or after sentinels adds no token.

    Raises:
        ValueError: for a sentinel that the tokenizer doesn't have.
    """
    parts = _SENTINEL.split(text)  # text, number, text, ..., number, text
    ids = [tokenizer.encode(parts[0]) if len(parts) == 1 or parts[0].strip(" ") else _NOTHING]
    for number, words in zip(parts[1::2], parts[2::2], strict=True):
        if int(number) >= len(tokenizer.sentinel_ids):
            known = f"the tokenizer has {len(tokenizer.sentinel_ids)} sentinels, numbered from 0"
            raise ValueError(f"the prompt has <extra_id_{number}>, {known}")
        ids += [tokenizer.sentinel_ids[[int(number)]], tokenizer.encode(words) if words.strip(" ") else _NOTHING]
    return np.concatenate([*ids, [tokenizer.eos_id]]).astype(np.int32)


def tokenizers_in(folder: Path) -> list[Path]:
    """Tokenizer files of a run folder or a Hugging Face directory, the one to take first."""
    names = ("tokenizer.json", "tokenizer.model", "spiece.model")
    return [folder / name for name in names if (folder / name).is_file()]


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Reads a tokenizer.json, a SentencePiece .model, or the one that a run folder or Hugging Face directory has.

    Raises:
        DataError: when the file is missing, cannot be read or is neither.
    """
    path = Path(path).expanduser()
    path = next(iter(tokenizers_in(path)), path)
    if not path.is_file():
        fix = "give a tokenizer.json, a SentencePiece .model or a folder that has one (nothing is downloaded)"
        problem = f"no tokenizer in {path}; put one there, or" if path.is_dir() else f"no tokenizer file {path};"
        raise DataError(f"{problem} {fix}")
    try:
        path.open("rb").close()
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}; check its permissions and its disk") from None
    if path.suffix == ".model":
        return SentencePieceTokenizer(path)
    try:
        with _no_panic(str(path)):
            return Tokenizer(_Fast.from_file(str(path)))
    except DataError:
        raise
    except Exception as error:  # the library raises bare Exception for malformed files
        raise DataError(f"{path} is not a tokenizer.json ({error})") from None
