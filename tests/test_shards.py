import json
import os
import time

import numpy as np
import pyarrow as pa
import pytest

from grpo.config import DataSection
from grpo.data import make_dataset, open_dataset
from grpo.shards import SPLITS, _write_shard, partial_folder

NUMBERS = ["".join(f"{i:08d}" for i in range(20_000))]  # 160 kB in which every eight bytes are unique


def rows_of(folder, split):
    """Rows read with pyarrow alone, as lists of ids."""
    rows = []
    for path in sorted(folder.glob(f"{split}-*.arrow")):
        for batch in pa.ipc.open_file(path.read_bytes()).get_batch(0).to_pylist():
            rows.append(batch["tokens"])
    return rows


@pytest.mark.parametrize("segment_bytes", [2**25, 8000 * 8])
def test_splits_of_blocks_do_not_overlap_and_together_are_the_corpus(tmp_path, monkeypatch, segment_bytes):
    monkeypatch.setattr("grpo.shards.SEGMENT_BYTES", segment_bytes)
    documents = [NUMBERS[0][i:i + 80] for i in range(0, 160_000, 80)]
    dataset = make_dataset(documents, DataSection(block_size=8, separator=""), tmp_path / "d")
    seen = []
    for split in SPLITS:
        text = b"".join(map(bytes, rows_of(tmp_path / "d", split)))
        assert len(text) == dataset.num_bytes(split) == dataset.num_tokens(split)
        seen += [int(text[i:i + 8]) for i in range(0, len(text), 8)]
    assert sorted(seen) == list(range(20_000))


def test_every_row_is_a_run_of_the_corpus_and_shares_are_as_asked(tmp_path):
    section = DataSection(block_size=16, validation_fraction=0.2, judge_fraction=0.3)
    dataset = make_dataset(NUMBERS, section, tmp_path / "d")
    corpus = (NUMBERS[0] + section.separator).encode()
    assert all(bytes(row) in corpus for split in SPLITS for row in rows_of(tmp_path / "d", split))
    for split, share in (("train", 0.5), ("judge", 0.3), ("validation", 0.2)):
        assert abs(dataset.num_tokens(split) / len(corpus) - share) < 1.5 * 4096 / len(corpus)
    assert sum(map(dataset.num_bytes, SPLITS)) == len(corpus)


def test_splits_are_interleaved_over_the_corpus(tmp_path):
    make_dataset(NUMBERS, DataSection(block_size=8), tmp_path / "d")
    for split in SPLITS:
        places = [NUMBERS[0].encode().find(bytes(row)) / 160_000 for row in rows_of(tmp_path / "d", split)]
        assert min(places) < 0.35 and max(places) > 0.65


def test_whole_documents_go_to_one_split_and_equal_ones_together(tmp_path):
    documents = [f"document {i % 150}" for i in range(300)]
    section = DataSection(layout="documents", block_size=32)
    dataset = make_dataset(documents, section, tmp_path / "d")
    texts = {split: [bytes(row).decode() for row in rows_of(tmp_path / "d", split)] for split in SPLITS}
    assert sorted(sum(texts.values(), [])) == sorted(documents)
    assert sum(len(set(texts[split])) for split in SPLITS) == len(set(documents))
    assert [len(texts[split]) for split in SPLITS] == [dataset.meta["splits"][split]["rows"] for split in SPLITS]
    assert abs(len(texts["validation"]) - 30) <= 1 and abs(len(texts["judge"]) - 75) <= 1


def test_long_documents_are_cut_and_counted(tmp_path):
    documents = ["short"] + [f"{i} " * 40 for i in range(9)]
    dataset = make_dataset(documents, DataSection(layout="documents", block_size=16), tmp_path / "d")
    rows = [row for split in SPLITS for row in rows_of(tmp_path / "d", split)]
    assert sorted(map(len, rows)) == [5] + [16] * 9
    assert sum(dataset.meta["splits"][split]["truncated"] for split in SPLITS) == 9
    assert sum(map(dataset.num_bytes, SPLITS)) == 5 + 9 * 16


def test_the_split_seed_moves_chunks_and_judge_fraction_leaves_validation_alone(tmp_path):
    options = [{}, {}, {"split_seed": 1}, {"judge_fraction": 0.0}, {"split_seed": -3}]
    rows = []
    for i, option in enumerate(options):
        make_dataset(NUMBERS, DataSection(block_size=8, **option), tmp_path / str(i))
        rows.append({split: rows_of(tmp_path / str(i), split) for split in SPLITS})
    assert rows[0] == rows[1] and rows[0]["validation"] not in (rows[2]["validation"], rows[4]["validation"])
    assert rows[3]["validation"] == rows[0]["validation"] and rows[3]["judge"] == []


@pytest.mark.parametrize("kind,bits", [("bytes", 8), ("bpe:300", 16)])
def test_ids_take_the_narrowest_type_and_counts_are_of_bytes(tmp_path, kind, bits):
    documents = ["h\u00e9llo w\u00f6rld " * 300]
    dataset = make_dataset(documents, DataSection(tokenizer=kind, block_size=8), tmp_path / "d")
    assert dataset.splits["train"].values[0].dtype.itemsize * 8 == bits
    assert sum(map(dataset.num_bytes, SPLITS)) == len((documents[0] + "\n\n").encode())
    meta = json.loads((tmp_path / "d" / "meta.json").read_text())
    assert meta["tokenizer"]["fingerprint"] == dataset.tokenizer.fingerprint and meta["split_seed"] == 0


@pytest.mark.parametrize("num_bytes", [500, 1000, 3000, 20_000])
def test_small_corpora_give_every_split_a_block(tmp_path, num_bytes):
    dataset = make_dataset([NUMBERS[0][:num_bytes]], DataSection(block_size=64), tmp_path / "d")
    assert all(dataset.meta["splits"][split]["blocks"] for split in SPLITS)


def test_too_little_text_is_named_with_the_remedy_and_leaves_no_folder(tmp_path):
    for documents, message in (([], "holds no text"), (["", ""], "no text"), (["short"], r"too short \(7 tokens\)"),
                               ([NUMBERS[0][:150]], r"too short \(152 tokens\).*3 blocks of data.block_size=64")):
        with pytest.raises(ValueError, match=f"data.source: documents .*{message}") as error:
            make_dataset(documents, DataSection(block_size=64), tmp_path / "d")
        assert "\n" not in str(error.value) and not os.listdir(tmp_path)
    with pytest.raises(ValueError, match="too short.*3 different documents or more"):
        make_dataset(["one", "two"], DataSection(layout="documents"), tmp_path / "d")


def test_a_folder_takes_its_name_only_when_it_is_whole(tmp_path):
    with pytest.raises(KeyError), partial_folder(tmp_path / "d") as partial:
        (partial / "half").write_text("x")
        assert not (tmp_path / "d").exists()
        raise KeyError
    assert not os.listdir(tmp_path)
    with partial_folder(tmp_path / "d") as slow:
        (slow / "file").write_text("slow")
        with partial_folder(tmp_path / "d") as fast:
            (fast / "file").write_text("fast")
    assert os.listdir(tmp_path) == ["d"] and (tmp_path / "d" / "file").read_text() == "fast"
    for name, days in ((".d-killed", 2), (".d-living", 0), (".e-killed", 2)):
        (tmp_path / name).mkdir()
        os.utime(tmp_path / name, (0, time.time() - days * 86_400))
    with partial_folder(tmp_path / "d"):
        pass
    assert sorted(os.listdir(tmp_path)) == [".d-living", ".e-killed", "d"]


def corrupt_truncated(folder, shard):
    shard.write_bytes(shard.read_bytes()[:-100])
    return "is truncated or missing"


def corrupt_missing(folder, shard):
    shard.unlink()
    return "is truncated or missing"


def corrupt_metadata(folder, shard):
    shard.write_bytes(b"\x55" * shard.stat().st_size)
    return "is damaged"


def corrupt_token(folder, shard):
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    return "is damaged \\(its sha256 differs"


def corrupt_tokenizer(folder, shard):
    other = make_dataset(["some words " * 999], DataSection(tokenizer="bpe:260"), folder.parent / "other")
    meta = json.loads((folder / "meta.json").read_text())
    entry = next(entry for entry in meta["shards"] if entry["file"] == shard.name)
    entry |= _write_shard(shard, np.zeros(entry["tokens"], np.uint8), np.array([entry["tokens"]]), other.tokenizer)
    (folder / "meta.json").write_text(json.dumps(meta))
    return "was written with another tokenizer"


@pytest.mark.parametrize(
    "corrupt", [corrupt_truncated, corrupt_missing, corrupt_metadata, corrupt_token, corrupt_tokenizer])
def test_bad_shards_are_named_with_the_remedy(tmp_path, corrupt):
    folder = tmp_path / "d"
    make_dataset(NUMBERS, DataSection(), folder)
    shard = next(folder.glob("train-*.arrow"))
    message = corrupt(folder, shard)
    with pytest.raises(ValueError, match=f"{shard} {message}.*: delete {folder} and prepare the data again") as error:
        open_dataset(folder, verify=True)
    assert "\n" not in str(error.value)


def test_bad_folders_are_named_with_the_remedy(tmp_path):
    folder = tmp_path / "d"
    with pytest.raises(ValueError, match=r"d/meta.json is missing: prepare the data with pipelines/prepare.py"):
        open_dataset(folder)
    make_dataset(NUMBERS, DataSection(), folder)
    make_dataset(["some words " * 999], DataSection(tokenizer="bpe:260"), tmp_path / "other").tokenizer.save(folder)
    with pytest.raises(ValueError, match=f"{folder}: its tokenizer is not the one.*delete"):
        open_dataset(folder)
    (folder / "meta.json").write_text('{"format": 0, "shards": [], "section": {"layout": "blocks"}, '
                                      '"tokenizer": {"fingerprint": ""}}')
    with pytest.raises(ValueError, match="meta.json has format 0, this code reads 1: delete"):
        open_dataset(folder)
    (folder / "meta.json").write_text("{")
    with pytest.raises(ValueError, match="meta.json is damaged: delete"):
        open_dataset(folder)
