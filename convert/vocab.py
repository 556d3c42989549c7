"""A hub folder's tokenizer as the `tokenizer.*` keys of a GGUF file, the same that llama.cpp's converter writes.

Owns token types, padding and the recognition of pre-tokenisers; merges, special ids and the chat template are read by the
`gguf` package. Knows nothing of tensors.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np

from rgpu.errors import TokenizerError
from rgpu.pretokenizers import GPT2, NAMES

NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5
ODD_CONTROL = frozenset(("<pad>", "<mask>", "<2mass>", "[@BOS@]"))  # marked as ordinary by checkpoints that mean them as control


def metadata_from_hub(folder: Path, n_vocab: int) -> dict[str, Any]:
    """The `tokenizer.*` keys for a checkpoint folder, in the order of llama.cpp's converter.

    `n_vocab`: rows of the embedding; ids that the tokenizer lacks are padded with unused tokens "[PADn]". Integers come as
    NumPy scalars of the width that the file gives them. Raises TokenizerError.
    """
    import gguf

    folder = Path(folder)
    tokenizer = _read(folder / "tokenizer.json")
    if tokenizer is None:
        raise TokenizerError(f"{folder} has no tokenizer.json (a tokenizer.model or vocab.json alone is not supported)")
    writer = gguf.GGUFWriter(None, "")
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre_of(tokenizer))
    try:
        tokens, types = _tokens(tokenizer, _read(folder / "tokenizer_config.json") or {}, n_vocab)
        writer.add_token_list(tokens)
        writer.add_token_types(types)
        special = gguf.SpecialVocab(folder, load_merges=True)
        special.add_to_gguf(writer, quiet=True)
    except (LookupError, ValueError, TypeError, AttributeError) as error:
        raise TokenizerError(f"{folder}: the tokenizer's files are malformed: {error!r}") from error
    if not special.merges:
        raise TokenizerError(f"{folder / 'tokenizer.json'}: there are no merges")
    return {key: _typed(entry) for key, entry in writer.kv_data[0].items() if key.startswith("tokenizer.")}


def pre_of(tokenizer: dict) -> str:
    """The `tokenizer.ggml.pre` name of a parsed tokenizer.json, told by its regexes. Raises TokenizerError if unknown."""
    model = tokenizer.get("model") or {}
    byte_level = '"ByteLevel"' in json.dumps(tokenizer.get("decoder"))
    if model.get("type") != "BPE" or not byte_level:
        found = f"model {model.get('type')!r} with{'' if byte_level else 'out'} a ByteLevel decoder"
        raise TokenizerError(f"this kind of tokenizer is not supported: {found}; needed: byte-level BPE")
    regexes = tuple(_regexes(tokenizer.get("pre_tokenizer") or {}))
    known = [(names[0], rules) for names, rules in NAMES.items() if _same(rules.regexes, regexes)]
    # llama-bpe and glm4 cut alike; they differ in whether a whole piece is looked up before merging
    exact = [name for name, rules in known if rules.ignore_merges == bool(model.get("ignore_merges"))]
    if not known:
        supported = ", ".join(names[0] for names in NAMES)
        raise TokenizerError(f"the pre-tokeniser is not known: {list(regexes)}; supported are those of {supported}")
    return exact[0] if exact else known[0][0]


def _regexes(pre: dict) -> list[str]:
    """The regexes of a pre-tokeniser in the order in which they cut."""
    kind = pre.get("type")
    if kind == "Sequence":
        return [regex for part in pre.get("pretokenizers", []) for regex in _regexes(part)]
    if kind == "Split":
        pattern = pre.get("pattern", {})
        isolated = pre.get("behavior") == "Isolated" or (pre.get("behavior") == "Removed" and pre.get("invert"))
        if "Regex" in pattern and isolated:
            return [pattern["Regex"]]
    if kind == "Digits" and pre.get("individual_digits"):
        return [r"\p{N}"]
    if kind == "ByteLevel" and not pre.get("add_prefix_space"):
        return [GPT2] if pre.get("use_regex", True) else []
    return [f"({kind or 'none'}: {json.dumps(pre, ensure_ascii=False)})"]  # equals no known one


def _same(known: tuple[str, ...], found: tuple[str, ...]) -> bool:
    """Some files hold line ends in a regex as characters, some as escapes; some write \\p{N}+ where merges forbid two digits."""

    def plain(regex: str) -> str:
        regex = regex.replace("\r", r"\r").replace("\n", r"\n")
        return r"\p{N}" if regex == r"\p{N}+" else regex

    return [*map(plain, known)] == [*map(plain, found)]


def _tokens(tokenizer: dict, config: dict, n_vocab: int) -> tuple[list[str], list[int]]:
    """Texts and types of all n_vocab ids: normal ones of the model, added ones, padding."""
    texts = {id: text for text, id in tokenizer["model"]["vocab"].items()}
    added = {token["id"]: token for token in tokenizer.get("added_tokens") or []}
    for id, token in (config.get("added_tokens_decoder") or {}).items():
        added.setdefault(int(id), token)
    largest = max([*texts, *added])
    if largest >= n_vocab:
        raise TokenizerError(f"the tokenizer has the id {largest}, but the model only {n_vocab} rows of embeddings")
    tokens, types = [], []
    for id in range(n_vocab):
        if id in added:
            text = added[id]["content"]
            control = added[id].get("special") or _looks_special(text)
            tokens.append(text if control else text.replace("\u2581", " "))
            types.append(CONTROL if control else USER_DEFINED)
        else:
            tokens.append(texts.get(id, f"[PAD{id}]"))
            types.append(NORMAL if id in texts else UNUSED)
    return tokens, types


def _looks_special(text: str) -> bool:
    """llama.cpp's rule: what is spelled like a control token is one, whatever the checkpoint says."""
    brackets = (("<|", "|>"), ("<｜", "｜>"), ("<unused", ">"))
    return text in ODD_CONTROL or any(text.startswith(left) and text.endswith(right) for left, right in brackets)


def _read(path: Path) -> dict | None:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise TokenizerError(f"{path} can't be read: {error}") from error


def _typed(entry) -> Any:
    """A value recorded by gguf's writer, as the NumPy scalar or array of its type in the file."""
    widths = {"UINT32": np.uint32, "INT32": np.int32, "FLOAT32": np.float32}
    if entry.type.name == "ARRAY" and not isinstance(entry.value[0], str):
        return np.asarray(entry.value, np.int32)
    return widths[entry.type.name](entry.value) if entry.type.name in widths else entry.value
