import pickle
import subprocess
import sys

import numpy as np
import pytest
import torch

from grpo.sources import read_documents
from grpo.tokenizer import Tokenizer, Vocabulary, build_tokenizer

TEXTS = ["", "plain words", "na\u00efve caf\u00e9", "\U0001f468\u200d\U0001f469 \U0001f44d\U0001f3fd", "<|endoftext|>",
         "\x00\x01\uffff\U0010ffff", "a\r\n\n\n  b\t \u2028c", "\u05e9\u05dc\u4f60\u597d", " " * 50, "x" * 5000]


@pytest.fixture(scope="module")
def documents():
    return list(read_documents("python-docs"))[:30]


@pytest.fixture(scope="module", params=["bytes", "bpe:400"])
def tokenizer(request, documents):
    return build_tokenizer(request.param, documents)


def random_texts(count):
    rng = np.random.default_rng(0)
    scalars = np.concatenate([np.arange(0xD800), np.arange(0xE000, 0x110000)])
    return ["".join(map(chr, rng.choice(scalars, 200))) for _ in range(count)]


@pytest.mark.parametrize("texts", [TEXTS, random_texts(20)], ids=["chosen", "random"])
def test_every_string_of_scalar_values_round_trips(tokenizer, texts):
    for text in texts:
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert all(0 <= i < tokenizer.vocabulary.base_size for i in ids)
        assert b"".join(map(tokenizer.token_bytes, ids)) == text.encode()


def test_lone_surrogates_become_replacement_characters(tokenizer):
    assert tokenizer.decode(tokenizer.encode("a\ud800b")) == "a\ufffdb"
    assert tokenizer.encode("\ud83d\ude00") == tokenizer.encode("\U0001f600")


def test_bpe_encoding_equals_merging_the_lowest_rank_first(documents):
    tokenizer = build_tokenizer("bpe:400", documents)
    ranks = {tokenizer.token_bytes(i): i for i in range(tokenizer.vocabulary.base_size)}
    for word in ("expressions", "xqzstatement", "theother", "\u00e9l\u00e9ment"):
        pieces = [bytes([byte]) for byte in word.encode()]
        while pairs := [(ranks[pieces[i] + pieces[i + 1]], i) for i in range(len(pieces) - 1)
                        if pieces[i] + pieces[i + 1] in ranks]:
            i = min(pairs)[1]
            pieces[i:i + 2] = [pieces[i] + pieces[i + 1]]
        assert tokenizer.encode(word) == [ranks[piece] for piece in pieces]


def test_bpe_learns_the_most_frequent_pair_first_and_shortens_text(documents):
    assert build_tokenizer("bpe:257", ["abab abab zab"] * 3).token_bytes(256) == b"ab"
    tokenizer, corpus = build_tokenizer("bpe:400", documents), "\n".join(documents).encode()
    assert all(corpus.count(tokenizer.token_bytes(i)) > 1 for i in range(256, 400))
    text = documents[3]
    assert len(tokenizer.encode(text)) < 0.7 * len(text.encode())


def test_bpe_training_is_the_same_in_another_process(documents):
    code = ("from grpo.sources import read_documents; from grpo.tokenizer import build_tokenizer; "
            "print(build_tokenizer('bpe:400', list(read_documents('python-docs'))[:30]).fingerprint)")
    root = __file__.rsplit("/tests/", 1)[0]
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=root).stdout
    assert other.strip() == build_tokenizer("bpe:400", documents).fingerprint


def test_bpe_reads_no_more_than_its_training_bytes(monkeypatch):
    monkeypatch.setattr("grpo.tokenizer.TRAINING_BYTES", 1000)
    read = []
    build_tokenizer("bpe:260", (read.append(i) or "word " * 50 for i in range(100)))
    assert len(read) == 4


def test_special_ids_lie_above_the_base_and_the_size_is_a_multiple_of_64():
    for base_size, size in ((256, 320), (318, 320), (319, 384), (50257, 50304)):
        vocabulary = Vocabulary(base_size)
        assert (vocabulary.mask_id, vocabulary.pad_id, vocabulary.size) == (base_size, base_size + 1, size)


def test_decode_drops_padding_shows_masks_and_survives_half_characters(tokenizer):
    mask, pad = tokenizer.vocabulary.mask_id, tokenizer.vocabulary.pad_id
    ids = [*tokenizer.encode("ab"), mask, pad, *tokenizer.encode("c")]
    assert tokenizer.decode(torch.tensor(ids)) == "ab\u2588c" and tokenizer.decode(ids, mask_text="_") == "ab_c"
    assert tokenizer.decode([0xE2, 0x96]) == "\ufffd"


def test_saved_and_pickled_tokenizers_are_the_same(tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    for other in (Tokenizer.load(tmp_path), pickle.loads(pickle.dumps(tokenizer))):
        assert other.fingerprint == tokenizer.fingerprint and other.encode(TEXTS[3]) == tokenizer.encode(TEXTS[3])


def test_rank_file_gives_the_same_ids_and_damage_is_named(documents, tmp_path):
    tokenizer = build_tokenizer("bpe:300", documents)
    tokenizer.save(tmp_path)
    path = tmp_path / "tokenizer.tiktoken"
    assert build_tokenizer(str(path)).encode(documents[0]) == tokenizer.encode(documents[0])
    lines = path.read_bytes().splitlines(keepends=True)
    for damaged, message in ((lines[:-1], "does not match"), (lines[:-5] + lines[-1:], "ranks are not 0 to"),
                             ([b"%%% 0\n"], "is not a rank file"), ([b"YWE= 0\n"], "lacks some of the 256")):
        path.write_bytes(b"".join(damaged))
        with pytest.raises(ValueError, match=message) as error:
            Tokenizer.load(tmp_path)
        assert "\n" not in str(error.value) and str(path) in str(error.value)
    path.unlink()
    with pytest.raises(ValueError, match=r"cannot read .*tokenizer\.tiktoken: give the path"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match=r"tokenizer\.json is missing, damaged"):
        Tokenizer.load(tmp_path)


def test_a_saved_folder_brings_its_pattern_and_a_rank_file_alone_gets_that_of_gpt2(tmp_path, monkeypatch):
    ranks = {bytes([byte]): byte for byte in range(256)} | {b"12": 256, b"123": 257}
    mine = Tokenizer("mine", ranks, r"\p{N}{1,2}|\P{N}+")
    mine.save(tmp_path / "mine")
    monkeypatch.chdir(tmp_path)
    loaded = build_tokenizer("mine")
    assert loaded.fingerprint == mine.fingerprint and loaded.encode("123") == [256, ord("3")]
    assert build_tokenizer("mine/tokenizer.tiktoken").encode("123") == [257]
    (tmp_path / "bytes").mkdir()
    assert build_tokenizer("bytes").kind == "bytes"
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "tokenizer.json").write_text('{"version": "1.0", "model": {"type": "BPE"}}')
    with pytest.raises(ValueError, match=r"other/tokenizer\.json is missing, damaged or no tokenizer of this project"):
        build_tokenizer("other")
    with pytest.raises(ValueError, match=r"cannot read ~nobody-here/a\.tiktoken"):
        build_tokenizer("~nobody-here/a.tiktoken")


def test_unknown_kinds_get_one_line_with_the_remedy(tmp_path, monkeypatch):
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    for proxy in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY"):
        monkeypatch.setenv(proxy, "http://127.0.0.1:9")  # a closed port: the network is away, whatever the machine
    for kind, message in (("gpt2", "cannot be fetched.*TIKTOKEN_CACHE_DIR"), ("gpt22", "must be bytes, bpe:<size>"),
                          ("bpe:100", "from 256"), ("bpe:", "from 256"), ("bpe:9999999", "to 1048576"),
                          ("bpe:500", "pipelines/prepare.py")):
        with pytest.raises(ValueError, match=message) as error:
            build_tokenizer(kind)
        assert "\n" not in str(error.value)


def test_ids_are_consecutive_where_ranks_leave_one_out():
    ranks = {bytes([b]): b for b in range(256)} | {b"ab": 257}  # as in p50k_base
    tokenizer = Tokenizer("gap", ranks, r"\w+|\s+")
    assert tokenizer.encode("ab c") == [256, 32, 99] and tokenizer.vocabulary.mask_id == 257
    assert tokenizer.decode([256, 32, 99]) == "ab c"
    assert pickle.loads(pickle.dumps(tokenizer)).encode("ab c") == [256, 32, 99]
