"""Text to token ids: byte-pair encoding by Hugging Face `tokenizers`, trained on captions or loaded from a file."""

import functools
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Int32

from repkit.checks import InputError

try:
    import tokenizers
    from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers
except ImportError as error:
    raise InputError('tokenizers are missing: pip install "repkit[data]"') from error

PAD, BOS, EOS, UNK = "<pad>", "<bos>", "<eos>", "<unk>"

SPECIAL_TOKENS = {
    "pad": (PAD, "[PAD]", "<|endoftext|>"),
    "bos": (BOS, "<s>", "[CLS]", "<|startoftext|>", "<|endoftext|>"),
    "eos": (EOS, "</s>", "[SEP]", "<|endoftext|>"),
    "unk": (UNK, "[UNK]", "<|endoftext|>"),
}
"""What each special token may be called in a file, the most specific name first: ours, BERT's, T5's, CLIP's."""

MOST_CACHED_TEXTS = 2**16


class Tokenizer:
    """Encodes texts as rows of equal length: begin, tokens, end, padding.

    `vocab_size` is the number of ids; `pad_id`, `bos_id`, `eos_id`, `unk_id` are those of the special tokens.
    """

    def __init__(self, tokenizer: tokenizers.Tokenizer):
        """Takes a `tokenizers.Tokenizer` that knows a name from each row of `SPECIAL_TOKENS`.

        Raises:
            InputError: a special token is missing.
        """
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self._tokenizer = tokenizer
        # Captions come back every epoch; looking one up costs a tenth of encoding it.
        self._ids = functools.lru_cache(maxsize=MOST_CACHED_TEXTS)(self._encode_text)
        self.vocab_size = tokenizer.get_vocab_size()
        self.pad_id, self.bos_id, self.eos_id, self.unk_id = (
            self._special_id(role, names) for role, names in SPECIAL_TOKENS.items()
        )

    def _special_id(self, role: str, names: Sequence[str]) -> int:
        for name in names:
            token_id = self._tokenizer.token_to_id(name)
            if token_id is not None:
                return token_id
        raise InputError(f"the tokenizer has no {role} token; expected one of {', '.join(names)}")

    def _encode_text(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def encode(self, texts: Sequence[str], max_length: int) -> tuple[Int32[np.ndarray, "b l"], Bool[np.ndarray, "b l"]]:
        """Token ids and their mask.

        Args:
            texts: b texts.
            max_length: l >= 3. A longer text loses its last tokens, never the end token.

        Returns:
            `token_ids` int32 [b l] and `token_mask` bool [b l], True for begin, text and end. Every row has at least
            two real tokens, even that of an empty text.

        Raises:
            InputError: max_length below 3.

        Example:
            >>> tokenizer = train_tokenizer(["a red seven", "a blue three"], vocab_size=100)
            >>> token_ids, token_mask = tokenizer.encode(["a red three", ""], max_length=8)
            >>> token_ids.shape, token_mask.sum(axis=1).tolist()
            ((2, 8), [5, 2])
        """
        if max_length < 3:
            raise InputError(f"expected max_length of at least 3 (begin, one token, end), got {max_length}")
        token_ids = np.full((len(texts), max_length), self.pad_id, np.int32)
        token_mask = np.zeros((len(texts), max_length), bool)
        for row, text in enumerate(texts):
            tokens = [self.bos_id, *self._ids(text)[: max_length - 2], self.eos_id]
            token_ids[row, : len(tokens)] = tokens
            token_mask[row, : len(tokens)] = True
        return token_ids, token_mask

    def decode(self, token_ids: Int32[np.ndarray, "b l"]) -> list[str]:
        """The texts of rows of token ids, without special tokens.

        Example:
            >>> tokenizer = train_tokenizer(["a red seven on white, top left"], vocab_size=100)
            >>> tokenizer.decode(tokenizer.encode(["a red seven, left"], max_length=12)[0])
            ['a red seven, left']
        """
        special = {self.pad_id, self.bos_id, self.eos_id}
        rows = [[int(i) for i in row if int(i) not in special] for row in token_ids]
        return self._tokenizer.decode_batch(rows, skip_special_tokens=False)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes one JSON file, which `load_tokenizer` and Hugging Face's libraries read."""
        Path(path).write_text(self._tokenizer.to_str(), encoding="utf-8")


def train_tokenizer(captions: Iterable[str], *, vocab_size: int) -> Tokenizer:
    """Byte-pair encoding learned from captions; equal captions give an equal tokenizer.

    Texts are lower-cased (after Unicode NFKC); words and punctuation marks are never merged with one another. A
    character that the captions lack becomes the unknown token.

    Args:
        captions: the texts to learn from; with text augmentation also its synonyms.
        vocab_size: most ids there may be, the four special ones and all characters included. Fewer come out when all
            words of the captions are whole already.

    Returns:
        The tokenizer; padding has the id 0.

    Raises:
        InputError: there is no text in the captions, or `vocab_size` is too small for their characters.

    References:
        Sennrich, Haddow, Birch: Neural Machine Translation of Rare Words with Subword Units, ACL 2016.
    """
    tokenizer = tokenizers.Tokenizer(models.BPE(unk_token=UNK))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Metaspace(), pre_tokenizers.Punctuation()])
    tokenizer.decoder = decoders.Metaspace()
    texts = [tokenizer.normalizer.normalize_str(caption) for caption in captions]
    characters = set("".join(texts)) - {" "}
    if not characters:
        raise InputError("expected captions to train a tokenizer on, got none")
    special = [PAD, BOS, EOS, UNK]
    # One more for the mark that begins a word.
    least = len(special) + len(characters) + 1
    if vocab_size < least:
        raise InputError(
            f"expected vocab_size of at least {least} (special tokens and the captions' characters), got {vocab_size}"
        )
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    return Tokenizer(tokenizer)


def load_tokenizer(path: str | os.PathLike[str]) -> Tokenizer:
    """A tokenizer from a Hugging Face `tokenizer.json`.

    Raises:
        InputError: the file is missing, is no tokenizer, or lacks a special token.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read tokenizer {path}: {getattr(error, 'strerror', None) or error}") from error
    try:
        return Tokenizer(tokenizers.Tokenizer.from_str(text))
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
    # The library raises bare Exception for a file that it cannot parse.
    except Exception as error:
        raise InputError(f"{path} is no tokenizer file: {error}") from error
