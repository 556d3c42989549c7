"""Tokenizer: llama.cpp's ids, special tokens, end of generation, decoding by pieces, and what the converter writes."""

import json
import types

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from convert.vocab import metadata_from_hub, pre_of
from rgpu.errors import TokenizerError
from rgpu.gguf.reader import GGUFFile
from rgpu.pretokenizers import GPT2, NAMES, PRETOKENIZERS, QWEN35
from rgpu.tokenizer import CONTROL, LETTERS, NORMAL, UNUSED, USER_DEFINED, Tokenizer

VOCABULARIES = ("gpt-2", "llama-bpe", "qwen2", "qwen35")
MERGES = ["h e", "l l", "he ll", "hell o", "Ġ w", "o r", "Ġw or", "l d", "Ġwor ld", "< |"]
ADDED = {
    "<|im_start|>": CONTROL,
    "<|im_end|>": CONTROL,
    "<think>": USER_DEFINED,
    "</think>": USER_DEFINED,
    "<think>!": USER_DEFINED,
    "<|fim_pad|>": USER_DEFINED,
    "[PAD9]": UNUSED,
}


def small(added=ADDED, merges=MERGES, pre="qwen2", **special) -> Tokenizer:
    tokens = [*LETTERS.values(), *(merge.replace(" ", "") for merge in merges), *added]
    kinds = [NORMAL] * (len(tokens) - len(added)) + [*added.values()]
    return Tokenizer(tokens, kinds, merges, pre, special)


def file_with(**keys):
    """Stands in for an open GGUF file with these tokenizer.ggml.* keys; None leaves one out."""
    tokens = list(LETTERS.values())
    whole = {"model": "gpt2", "pre": "qwen2", "tokens": tokens, "token_type": np.ones(len(tokens), np.int32), "merges": []}
    metadata = {f"tokenizer.ggml.{key}": value for key, value in (whole | keys).items() if value is not None}
    return types.SimpleNamespace(path="some.gguf", metadata=metadata)


@pytest.mark.parametrize("name", VOCABULARIES)
def test_every_case_of_llama_cpp(shared, name):
    path = shared / "data" / "vocab" / f"ggml-vocab-{name}.gguf"
    inputs = path.with_name(path.name + ".inp").read_bytes().decode().split("\n__ggml_vocab_test__\n")
    outputs = path.with_name(path.name + ".out").read_text().split("\n")
    with GGUFFile(path) as file:
        tokenizer = Tokenizer.from_gguf(file)
    assert len(inputs) == len(outputs) > 40
    for text, line in zip(inputs, outputs, strict=True):
        ids = [int(id) for id in line.split()]
        assert tokenizer.encode(text) == ids, text
        assert tokenizer.encode(text, special=False) == ids, text
        assert tokenizer.decode(ids) == text


@pytest.mark.parametrize(("name", "add_bos"), [("llama-bpe", True), ("qwen2", False), ("qwen35", False), ("gpt-2", False)])
def test_bos_only_where_the_vocabulary_wants_it_and_where_it_is_asked_for(shared, name, add_bos):
    with GGUFFile(shared / "data" / "vocab" / f"ggml-vocab-{name}.gguf") as file:
        tokenizer = Tokenizer.from_gguf(file)
    plain = tokenizer.encode("Hello")
    assert tokenizer.add_bos is add_bos and tokenizer.bos_id not in plain
    assert tokenizer.encode("Hello", bos=True) == [tokenizer.bos_id] * add_bos + plain


def test_a_model_as_converted_by_llama_cpp(shared):
    prompts = json.loads((shared / "data" / "tiny" / "prompts.json").read_text())
    with GGUFFile(shared / "data" / "tiny" / "models" / "tiny-F32.gguf") as file:
        tokenizer = Tokenizer.from_gguf(file)
    assert (tokenizer.eos_id, tokenizer.bos_id, tokenizer.eog) == (1023, None, {1021, 1023})
    for prompt in prompts["prompts"]:
        assert tokenizer.encode(prompt["text"]) == prompt["ids"]


def test_merges_apply_in_their_order():
    tokenizer = small()
    assert [tokenizer.decode([id]) for id in tokenizer.encode("hello world held")] == ["hello", " world", " ", "he", "ld"]


def test_special_tokens_are_cut_out_first_the_longest_wins():
    tokenizer = small()
    ids = tokenizer.encode("<think>!hello<|im_start|><think>?")
    assert [tokenizer.decode([id]) for id in ids] == ["<think>!", "hello", "<|im_start|>", "<think>", "?"]


def test_untrusted_text_never_yields_a_control_token():
    tokenizer = small()
    ids = tokenizer.encode("hello<|im_end|><think>", special=False)
    assert tokenizer.decode(ids) == "hello<|im_end|><think>"
    assert tokenizer.id_of("<|im_end|>") not in ids and ids[-1] == tokenizer.id_of("<think>")
    assert tokenizer.id_of("<|") in ids  # a piece of the vocabulary that merely looks like the beginning of one


def test_unused_tokens_are_neither_made_nor_printed():
    tokenizer = small()
    padding = tokenizer.n_vocab - 1
    assert padding not in tokenizer.encode("[PAD9]")
    assert tokenizer.decode(tokenizer.encode("[PAD9]")) == "[PAD9]" and tokenizer.decode([padding]) == ""


def test_end_of_generation_by_key_and_by_text():
    tokenizer = small(eos_token_id=260)
    assert tokenizer.eog == {260, tokenizer.id_of("<|im_end|>"), tokenizer.id_of("<|fim_pad|>")}
    html = small({"</s>": NORMAL, "<|endoftext|>": NORMAL})
    assert html.eog == {html.id_of("<|endoftext|>")}, "a normal </s> is HTML, a normal <|endoftext|> a converter's slip"
    assert small({"<|im_end|>": CONTROL}, eot_token_id=5).eog == {5, 266}


def test_harmony_channels_are_visible_and_end_does_not_end():
    texts = ("<|start|>", "<|end|>", "<|message|>", "<|channel|>", "<|return|>", "<|call|>", "<|endofprompt|>")
    tokenizer = small(dict.fromkeys(texts, CONTROL))
    text = "<|start|>assistant<|channel|>final<|message|>hello<|return|>"
    ids = tokenizer.encode(text)
    assert tokenizer.eog == {tokenizer.id_of("<|return|>"), tokenizer.id_of("<|call|>")}
    assert tokenizer.decode(ids, skip_special=True) == text.removesuffix("<|return|>")
    assert not set(tokenizer.encode(text, special=False)) & set(map(tokenizer.id_of, texts))


def test_id_of_finds_what_stands_for_a_text():
    tokenizer = small()
    assert tokenizer.token_bytes(tokenizer.id_of(" world")) == b" world"
    assert tokenizer.id_of("\n") == [*LETTERS].index(10) and tokenizer.id_of("nothing like it") is None


@given(st.text(max_size=40), st.booleans())
def test_what_is_encoded_decodes_to_itself(tokenizer, text, special):
    assert tokenizer.decode(tokenizer.encode(text, special)) == text


@given(st.lists(st.integers(0, 272), max_size=30), st.booleans())
def test_streaming_gives_what_decoding_at_once_gives(tokenizer, ids, skip):
    stream = tokenizer.stream(skip_special=skip)
    pieces = [stream.push(id) for id in ids] + [stream.flush()]
    assert "".join(pieces) == tokenizer.decode(ids, skip_special=skip)


@given(st.text(min_size=1, max_size=20))
def test_streaming_prints_whole_characters_as_soon_as_they_are_whole(tokenizer, text):
    stream, seen = tokenizer.stream(), ""
    data = text.encode()
    for position, byte in enumerate(data):  # one token per byte
        seen += stream.push([*LETTERS].index(byte))
        assert seen == data[: position + 1].decode("utf-8", "ignore")
    assert stream.flush() == ""


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return small()


def test_broken_bytes_are_replaced_once_that_is_certain():
    tokenizer = small()
    of = {byte: id for id, byte in enumerate(LETTERS)}
    stream = tokenizer.stream()
    assert [stream.push(of[byte]) for byte in b"\xf0\x9f\x98A\xff"] == ["", "", "", "\ufffdA", "\ufffd"]
    assert [stream.push(of[byte]) for byte in b"\xe2\x82"] == ["", ""] and stream.flush() == "\ufffd"


def test_surrogates_from_a_terminal_do_not_stop_encoding():
    tokenizer = small()
    assert tokenizer.decode(tokenizer.encode("a\udcffb\ud83d\ude00")) == "a\ufffdb😀"


def test_deepseek_cuts_in_passes():
    tokenizer = small(pre="deepseek-llm", merges=["1 2", "Ġ 1", "a b", "b ,"])
    assert [tokenizer.decode([id]) for id in tokenizer.encode("ab,12 1")] == ["ab", ",", "12", " ", "1"]
    v3 = small(pre="deepseek-v3", merges=["1 2", "12 3", "123 4", "Ġ a"])
    assert [v3.decode([id]) for id in v3.encode("1234 a")] == ["123", "4", " a"]


@pytest.mark.parametrize("pre", sorted(PRETOKENIZERS))
def test_every_pretokeniser_compiles_and_loses_nothing(pre):
    text = "It's 12345 o'clock, DON'T  wait…\r\n\n  naïve Straße 東京タワー 한국 \u0928\u093e ½ 😀\t x_y(z); ' end  "
    tokenizer = small(pre=pre)
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_whole_pieces_are_looked_up_first_where_the_name_says_so():
    merges = ["a b", "c d"]
    added = {"abcd": NORMAL}
    assert len(small(added, merges, "llama-bpe").encode("abcd")) == 1
    assert len(small(added, merges, "glm4").encode("abcd")) == 2


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"model": None}, "no tokenizer in this file"),
        ({"model": "llama"}, "'llama' is not supported, only 'gpt2'"),
        ({"model": "bert"}, "'bert' is not supported"),
        ({"pre": None}, "tokenizer.ggml.pre is missing"),
        ({"merges": None}, "tokenizer.ggml.merges is missing"),
        ({"tokens": 3}, "tokenizer.ggml.tokens is of the wrong type"),
        ({"pre": "klingon"}, "'klingon' is not known.* qwen35"),
        ({"token_type": np.ones(3, np.int32)}, "256 tokens but 3 token types"),
        ({"merges": ["ab"]}, "merge 0 is 'ab'"),
        ({"merges": ["a b"]}, "merges don't fit"),
        ({"tokens": ["b", "a", "a"], "token_type": None}, "'a' is in the vocabulary twice, as 1 and 2"),
        ({"tokens": ["a"], "token_type": None}, "no token for 242 of the byte values"),
        ({"eos_token_id": 256}, "eos_token_id is 256, no id of the vocabulary"),
        ({"eos_token_id": "7"}, "eos_token_id is '7'"),
        ({"add_bos_token": True}, "there is no bos_token_id"),
    ],
)
def test_a_bad_vocabulary_is_one_clear_error(keys, message):
    with pytest.raises(TokenizerError, match=message) as caught:
        Tokenizer.from_gguf(file_with(**keys))
    assert "some.gguf" in str(caught.value)


def test_ids_outside_the_vocabulary_are_an_error():
    for id in (-1, 10_000):
        with pytest.raises(TokenizerError, match="outside the vocabulary"):
            small().decode([id])


# What the converter writes.


def test_hub_folder_gives_the_keys_that_llama_cpp_wrote(shared):
    tiny = shared / "data" / "tiny"
    got = metadata_from_hub(tiny / "hub-tiny", 1024)
    with GGUFFile(tiny / "models" / "tiny-F32.gguf") as file:
        keys = [key for key in file.metadata if key.startswith("tokenizer.")]
        assert list(got) == keys
        codes = {str: 8, bool: 7, np.uint32: 4, np.ndarray: 9, list: 9}
        for key in keys:
            assert np.array_equal(got[key], file.metadata[key]), key
            assert file.metadata.type_of(key)[0] == codes[type(got[key])], key
        assert got["tokenizer.ggml.token_type"].dtype == np.int32


def hub(folder, **changes):
    """A small checkpoint folder's tokenizer files."""
    merges = ["h e", "l l"]
    texts = [*LETTERS.values(), "he", "ll"]
    added = {"<|end|>": False, "<s>": True, "<note>": False, "a\u2581b": False}
    tokenizer = {
        "added_tokens": [{"id": 258 + n, "content": text, "special": flag} for n, (text, flag) in enumerate(added.items())],
        "pre_tokenizer": split(QWEN35),
        "decoder": {"type": "ByteLevel"},
        "model": {"type": "BPE", "vocab": {text: id for id, text in enumerate(texts)}, "merges": merges},
    }
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer | changes))
    config = {"bos_token": "<s>", "eos_token": {"content": "<|end|>"}, "added_tokens_decoder": {"270": {"content": "<late>"}}}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    return folder


def split(*regexes, **model):
    parts = [{"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False} for regex in regexes]
    parts.append({"type": "ByteLevel", "add_prefix_space": False, "use_regex": False})
    return {"type": "Sequence", "pretokenizers": parts}


def test_token_types_padding_and_ids_from_a_hub_folder(tmp_path):
    keys = metadata_from_hub(hub(tmp_path), 272)
    tokens, kinds = keys["tokenizer.ggml.tokens"], keys["tokenizer.ggml.token_type"]
    assert tokens[258:] == ["<|end|>", "<s>", "<note>", "a b", *(f"[PAD{id}]" for id in range(262, 270)), "<late>", "[PAD271]"]
    assert kinds[258:].tolist() == [CONTROL, CONTROL, USER_DEFINED, USER_DEFINED, *[UNUSED] * 8, USER_DEFINED, UNUSED]
    assert set(kinds[:258]) == {NORMAL}
    assert keys["tokenizer.ggml.merges"] == ["h e", "l l"]
    assert (keys["tokenizer.ggml.bos_token_id"], keys["tokenizer.ggml.eos_token_id"]) == (259, 258)
    assert keys["tokenizer.chat_template"] == "{{ messages }}"
    names = {key.removeprefix("tokenizer.ggml."): value for key, value in keys.items()}
    tokenizer = Tokenizer.from_gguf(file_with(**names | {"eos_token_id": 258, "bos_token_id": 259}))
    assert tokenizer.decode(tokenizer.encode("<note>hello<|end|>")) == "<note>hello<|end|>"


def test_merges_may_be_pairs(tmp_path):
    hub(tmp_path)
    path = tmp_path / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    tokenizer["model"]["merges"] = [["h", "e"], ["l", "l"]]
    path.write_text(json.dumps(tokenizer))
    assert metadata_from_hub(tmp_path, 271)["tokenizer.ggml.merges"] == ["h e", "l l"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": {"type": "Unigram"}}, "not supported: model 'Unigram'"),
        ({"decoder": {"type": "Metaspace"}}, "without a ByteLevel decoder"),
        ({"pre_tokenizer": split(r"\w+")}, r"not known: .*\\w.* qwen35"),
        ({"added_tokens": [{"id": 900, "content": "x"}]}, "the id 900, but the model only 271 rows"),
        ({"added_tokens": [{"id": 3}]}, "malformed"),
        ({"model": {"type": "BPE", "vocab": {"a": 0}, "merges": []}, "added_tokens": []}, "no merges"),
    ],
)
def test_a_bad_hub_tokenizer_is_one_clear_error(tmp_path, changes, message):
    with pytest.raises(TokenizerError, match=message):
        metadata_from_hub(hub(tmp_path, **changes), 271)


def test_missing_and_broken_tokenizer_files(tmp_path):
    with pytest.raises(TokenizerError, match="has no tokenizer.json"):
        metadata_from_hub(tmp_path, 10)
    (tmp_path / "tokenizer.json").write_text('{"model": ')
    with pytest.raises(TokenizerError, match="can't be read"):
        metadata_from_hub(tmp_path, 10)


@pytest.mark.parametrize("names", NAMES, ids=lambda names: names[0])
def test_pre_of_recognises_every_known_pretokeniser(names):
    rules = NAMES[names]
    model = {"type": "BPE", "ignore_merges": rules.ignore_merges}
    tokenizer = {"model": model, "decoder": {"type": "ByteLevel"}, "pre_tokenizer": split(*rules.regexes)}
    assert pre_of(tokenizer) == names[0]


def test_pre_of_knows_other_spellings():
    base = {"model": {"type": "BPE"}, "decoder": {"type": "ByteLevel"}}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
    assert pre_of(base | {"pre_tokenizer": byte_level}) == "gpt-2"
    digits = {"type": "Digits", "individual_digits": True}
    assert pre_of(base | {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [digits, byte_level]}}) == "starcoder"
    literal = PRETOKENIZERS["qwen2"].regexes[0].replace(r"\r", "\r").replace(r"\n", "\n")
    assert pre_of(base | {"pre_tokenizer": split(literal)}) == "qwen2"
    with pytest.raises(TokenizerError, match="not known"):
        pre_of(base | {"pre_tokenizer": byte_level | {"add_prefix_space": True}})
    with pytest.raises(TokenizerError, match="not known"):
        pre_of(base | {"pre_tokenizer": split(GPT2, GPT2)})
