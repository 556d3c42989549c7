"""Text to token ids and back, from the vocabulary in a GGUF file (byte-level BPE).

Merging is done by the `tokenizers` library; this module owns what lies around it: special tokens, BOS, which tokens end a
generation, and decoding that never cuts a character. How text is cut before merging is data, in pretokenizers.py.
"""

import codecs
import re
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from .errors import TokenizerError
from .gguf.reader import GGUFFile
from .pretokenizers import PRETOKENIZERS, PreTokenizer

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # tokenizer.ggml.token_type, as llama.cpp counts

GUARD = "\ufdd0"  # a code point that is no character (Unicode, section 23.7); see Tokenizer.guard

# Texts at which a generation ends, whatever the metadata names (llama.cpp's list).
END_TEXTS = frozenset((
    "<|im_end|>", "<|endoftext|>", "<|end_of_text|>", "<|eot_id|>", "<|eom_id|>", "<|end|>", "<|return|>", "<|call|>",
    "<|calls|>", "<|flush|>", "<end_of_turn>", "<end_of_utterance>", "<turn|>", "<|tool_response>", "<EOT>", "_<EOT>", "[EOT]",
    "[EOS]", "<eos>", "</s>", "[e~[", "<｜end▁of▁sentence｜>", "<|fim_pad|>", "<fim-pad>", "<fim_pad>", "<PAD>", "[PAD]",
    "<|repo_name|>", "<|fim_repo|>", "<fim-repo>", "<REPO>", "<reponame>", "<|file_sep|>",
))  # fmt: skip
# gpt-oss speaks in channels: these control tokens are part of its answer's syntax and must reach the reader of the output.
HARMONY_TEXTS = frozenset(("<|start|>", "<|channel|>", "<|message|>", "<|constrain|>", "<|end|>"))


def byte_letters() -> dict[int, str]:
    """The letter that stands for each byte in a byte-level vocabulary (GPT-2's table): itself where printable."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + n) for n, byte in enumerate(others)}


LETTERS = byte_letters()
BYTE_OF = {letter: byte for byte, letter in LETTERS.items()}


class Tokenizer:
    """A vocabulary: `encode`, `decode`, `stream`, and the ids that mean something.

    `bos_id` and `eos_id` are None where the file names none; `add_bos` says whether a prompt of this model begins with BOS;
    `eog` are the ids that end a generation; `hidden` those that are not part of the text that a reader sees.
    """

    def __init__(self, tokens: Sequence[str], types: Sequence[int] | None, merges: Sequence[str], pre: str, special: dict):
        """The values of `tokenizer.ggml.*` keys; `special`: those like `eos_token_id`, by name. Raises TokenizerError."""
        rules = _rules(pre)
        self.pre = pre
        self._tokens = list(tokens)
        self._types = [NORMAL] * len(tokens) if types is None else np.asarray(types).tolist()
        if len(self._types) != len(self._tokens):
            raise TokenizerError(f"the vocabulary has {len(self._tokens)} tokens but {len(self._types)} token types")
        self._vocabulary = _by_text(self._tokens)  # from here on only what merging may yield: see _take_apart
        ends = {id for id in map(self._vocabulary.get, END_TEXTS) if id is not None and self._marks(id)}
        for id in ends:  # converters leave some of them user-defined, even normal
            self._types[id] = CONTROL
        self._added = self._take_apart()
        self._cut_all = _cut(self._added)
        self._cut_plain = _cut(text for text, id in self._added.items() if self._types[id] == USER_DEFINED)
        self._control = _cut(text for text, id in self._added.items() if self._types[id] == CONTROL)
        self._bpe = _build(self._vocabulary, merges, rules)

        self.n_vocab = len(self._tokens)
        self.bos_id = self._special_id(special, "bos_token_id")
        self.eos_id = self._special_id(special, "eos_token_id")
        self.add_bos = self._adds_bos(special, rules)
        named = (self._special_id(special, f"{name}_token_id") for name in ("eos", "eot", "eom", "fim_pad", "fim_rep", "fim_sep"))
        ends |= {id for id in named if id is not None}
        shown = set()
        if {self._added.get("<|return|>"), self._added.get("<|call|>")} <= ends:
            shown = {self._added[text] for text in HARMONY_TEXTS if text in self._added}
            ends -= shown
        self.eog = frozenset(ends)
        self.hidden = frozenset(id for id, kind in enumerate(self._types) if kind == CONTROL) - shown

    @classmethod
    def from_gguf(cls, file: GGUFFile) -> "Tokenizer":
        """The tokenizer of an open GGUF file. Raises TokenizerError if there is none or it is of an unsupported kind."""
        metadata = file.metadata
        kind = metadata.get("tokenizer.ggml.model")
        if kind is None:
            raise TokenizerError(f"{file.path}: no tokenizer in this file (key tokenizer.ggml.model): convert the model again")
        if kind != "gpt2":
            raise TokenizerError(f"{file.path}: tokenizer model {kind!r} is not supported, only 'gpt2' (byte-level BPE)")
        prefix = "tokenizer.ggml."
        for key, needed in (("tokens", list), ("merges", list), ("pre", str), ("token_type", np.ndarray)):
            value = metadata.get(prefix + key)
            if value is None and key != "token_type":
                raise TokenizerError(f"{file.path}: the key {prefix}{key} is missing: convert the model again")
            if value is not None and not isinstance(value, needed):
                raise TokenizerError(f"{file.path}: the key {prefix}{key} is of the wrong type ({type(value).__name__})")
        names = [key for key in metadata if key.startswith(prefix) and key.endswith(("_token_id", "add_bos_token"))]
        try:
            return cls(
                metadata["tokenizer.ggml.tokens"],
                metadata.get("tokenizer.ggml.token_type"),
                metadata["tokenizer.ggml.merges"],
                metadata["tokenizer.ggml.pre"],
                {key.removeprefix(prefix): metadata[key] for key in names},
            )
        except TokenizerError as error:
            raise TokenizerError(f"{file.path}: {error}") from error

    def guard(self, value):
        """Messages (or any nest of lists, dicts and texts) in which no text can become a control token when it is encoded.

        A mark that is no character goes into each control token's text; `encode` takes it out again. For what comes from
        outside, before a chat template puts real control tokens around it.
        """
        if isinstance(value, str):
            return self._control.sub(lambda found: found[0][0] + GUARD + found[0][1:], value.replace(GUARD, ""))
        if isinstance(value, Mapping):
            return {key: self.guard(entry) for key, entry in value.items()}
        return [self.guard(entry) for entry in value] if isinstance(value, list | tuple) else value

    def encode(self, text: str, special: bool = True, bos: bool = False) -> list[int]:
        """Token ids of a text.

        `special`: control tokens in the text become their ids, as a rendered chat template needs; False for text from
        outside, which then can't yield one. `bos`: begin with BOS if the model wants one (`add_bos`) and the text has none.
        """
        text = _scalar(text)
        ids = []
        for index, part in enumerate((self._cut_all if special else self._cut_plain).split(text)):
            if index % 2:
                ids.append(self._added[part])
            elif part := part.replace(GUARD, ""):
                ids += self._bpe.encode(part, add_special_tokens=False).ids
        if bos and self.add_bos and ids[:1] != [self.bos_id]:
            ids.insert(0, self.bos_id)
        return ids

    def decode(self, ids: Iterable[int], skip_special: bool = False) -> str:
        """The text of some ids; bytes that are no UTF-8 become U+FFFD. `skip_special` leaves out `hidden` tokens."""
        kept = (id for id in ids if not (skip_special and id in self.hidden))
        return b"".join(map(self.token_bytes, kept)).decode("utf-8", "replace")

    def stream(self, skip_special: bool = True) -> "StreamDecoder":
        """A decoder for ids that arrive one by one."""
        return StreamDecoder(self, skip_special)

    def token_bytes(self, id: int) -> bytes:
        """The bytes that a token stands for, which may be part of a character. Raises TokenizerError outside the vocabulary."""
        if not 0 <= id < self.n_vocab:
            raise TokenizerError(f"token id {id} is outside the vocabulary of {self.n_vocab} tokens")
        text, kind = self._tokens[id], self._types[id]
        if kind == UNUSED:
            return b""
        if kind == BYTE:
            return bytes([int(text[3:5], 16)])  # "<0x0A>"
        if kind in (CONTROL, USER_DEFINED, UNKNOWN):
            return text.encode()
        try:
            return bytes([BYTE_OF[letter] for letter in text])
        except KeyError:  # not written in the byte alphabet: it stands for itself
            return text.encode()

    def id_of(self, text: str) -> int | None:
        """The id of the one token that stands for exactly this text, or None."""
        if text in self._added:
            return self._added[text]
        return self._vocabulary.get("".join(LETTERS[byte] for byte in _scalar(text).encode()))

    def _take_apart(self) -> dict[str, int]:
        """The tokens that are cut out of a text before merging, text → id; merging never yields a control token."""
        added = {}
        for id, (text, kind) in enumerate(zip(self._tokens, self._types, strict=True)):
            if kind == NORMAL or not text:
                continue
            if kind in (CONTROL, UNKNOWN, UNUSED):
                del self._vocabulary[text]
            if kind in (CONTROL, UNKNOWN, USER_DEFINED):
                added[text] = id
        possible = [byte for byte in range(0xF5) if byte not in (0xC0, 0xC1)]  # in UTF-8
        missing = [f"{byte:02X}" for byte in possible if LETTERS[byte] not in self._vocabulary]
        if missing:
            raise TokenizerError(f"the vocabulary has no token for {len(missing)} of the byte values (first: {missing[0]} hex)")
        return added

    def _marks(self, id: int) -> bool:
        """Can this token be a mark that no ordinary text yields? A normal "</s>" may well be HTML."""
        kind, text = self._types[id], self._tokens[id]
        return kind in (CONTROL, USER_DEFINED) or (kind == NORMAL and text.startswith(("<|", "<｜")))

    def _special_id(self, special: dict, key: str) -> int | None:
        id = special.get(key)
        if id is not None and not (isinstance(id, int) and 0 <= id < len(self._tokens)):
            raise TokenizerError(f"{key} is {id!r}, no id of the vocabulary of {len(self._tokens)} tokens")
        return id

    def _adds_bos(self, special: dict, rules: PreTokenizer) -> bool:
        if special.get("add_bos_token") and self.bos_id is None:
            raise TokenizerError("add_bos_token is true, but there is no bos_token_id")
        return bool(special.get("add_bos_token", rules.add_bos and self.bos_id is not None))


class StreamDecoder:
    """Turns ids into text as they come: whole characters only, U+FFFD as soon as bytes are certainly no UTF-8."""

    def __init__(self, tokenizer: Tokenizer, skip_special: bool = True):
        self._tokenizer = tokenizer
        self._skipped = tokenizer.hidden if skip_special else frozenset()
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, id: int) -> str:
        """The text that this id completes; may be empty."""
        return "" if id in self._skipped else self._decoder.decode(self._tokenizer.token_bytes(id))

    def flush(self) -> str:
        """What is left at the end: U+FFFD for a character that was never completed."""
        text = self._decoder.decode(b"", final=True)
        self._decoder.reset()
        return text


def _rules(pre: str) -> PreTokenizer:
    if pre not in PRETOKENIZERS:
        known = ", ".join(sorted(PRETOKENIZERS))
        raise TokenizerError(f"the pre-tokeniser {pre!r} is not known; a wrong one would spoil the answers. Known: {known}")
    return PRETOKENIZERS[pre]


def _cut(texts: Iterable[str]) -> re.Pattern:
    """A pattern whose split() yields text, token, text, …: at each place the longest token wins."""
    longest_first = sorted(texts, key=len, reverse=True)
    return re.compile(f"({'|'.join(map(re.escape, longest_first)) or '(?!)'})")


def _by_text(tokens: list[str]) -> dict[str, int]:
    """Text → id of all tokens that have a text. Raises TokenizerError if two are the same."""
    ids = {text: id for id, text in enumerate(tokens)}
    if len(ids) != len(tokens):
        for id, text in enumerate(tokens):
            if text and ids[text] != id:
                raise TokenizerError(f"the token {text!r} is in the vocabulary twice, as {id} and {ids[text]}")
    ids.pop("", None)
    return ids


def _build(vocabulary: dict[str, int], merges: Sequence[str], rules: PreTokenizer):
    """The library's tokenizer over these tables; about 1.2 s for 248,000 tokens, nearly all of it in the library."""
    import tokenizers
    from tokenizers.pre_tokenizers import ByteLevel, Split

    pairs = [tuple(merge.split(" ", 1)) for merge in merges]
    if set(map(len, pairs)) - {2}:
        odd = next(index for index, pair in enumerate(pairs) if len(pair) != 2)
        raise TokenizerError(f"merge {odd} is {merges[odd]!r}, not two tokens with a space between")
    try:
        bpe = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, pairs, ignore_merges=rules.ignore_merges))
    except Exception as error:  # the library raises nothing narrower: a merge names a token that is not there
        raise TokenizerError(f"the merges don't fit the vocabulary: {error}") from error
    splits = [Split(tokenizers.Regex(regex), "isolated") for regex in rules.regexes]
    bytes_only = ByteLevel(add_prefix_space=False, use_regex=False)
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([*splits, bytes_only])
    return bpe


def _scalar(text: str) -> str:
    """The text with surrogates paired, or replaced where alone (a terminal's undecodable bytes): UTF-8 has none."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text
