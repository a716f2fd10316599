import pickle

import numpy as np
import pytest
import torch

from grpo.config import DataSection
from grpo.data import Batch, Cursor, completion_mask, make_dataset, window_places, windows

CORPUS = "".join(f"{i:08d}" for i in range(20_000))
torch.set_num_threads(1)


@pytest.fixture(scope="module")
def blocks(tmp_path_factory):
    return make_dataset([CORPUS], DataSection(block_size=32), tmp_path_factory.mktemp("data") / "blocks")


@pytest.fixture(scope="module")
def documents(tmp_path_factory):
    texts = [f"{i:03d} " + "x" * (i % 90) for i in range(100)]
    section = DataSection(layout="documents", block_size=64)
    return make_dataset(texts, section, tmp_path_factory.mktemp("data") / "documents")


def places(batch):
    """Where each window lies in the corpus; -1 when it does not."""
    return np.array([(CORPUS + "\n\n").find(bytes(row).decode()) for row in batch.tokens.tolist()])


def covered(start, block_size=32):
    return {byte for place in start.tolist() for byte in range(place, place + block_size)}


def test_windows_are_corpus_text_that_no_other_split_has(blocks):
    seen = {}
    for split in ("train", "judge", "validation"):
        cursor = Cursor(blocks, split, 50, 32, 0)
        start = places(windows(blocks, split, 100, 32, seed=0))
        drawn = np.concatenate([places(cursor.batch(step)) for step in range(4 * cursor.num_windows // 50)])
        assert min(start.min(), drawn.min()) >= 0
        assert len(covered(start)) == 100 * 32
        seen[split] = covered(start) | covered(drawn)
    assert sum(map(len, seen.values())) == len(set.union(*seen.values()))
    assert len(seen["train"]) > 0.95 * blocks.num_tokens("train")


def test_batches_of_ranks_are_together_the_batch_of_one(blocks, documents):
    for dataset in (blocks, documents):
        cursor = Cursor(dataset, "train", 12, 32, seed=5)
        whole = cursor.batch(7)
        for rows in ([slice(0, 6), slice(6, 12)], [range(0, 4), range(4, 12)]):
            parts = [Cursor(dataset, "train", 12, 32, seed=5).batch(7, rows=share) for share in rows]
            assert torch.equal(torch.cat([part.tokens for part in parts]), whole.tokens)
            assert torch.equal(torch.cat([part.attention_mask for part in parts]), whole.attention_mask)
        assert torch.equal(cursor.batch(7, rows=slice(1, 12, 2)).tokens, whole.tokens[1::2])


def test_a_batch_depends_on_seed_and_step_alone(blocks):
    walked = Cursor(blocks, "train", 64, 32, seed=0)
    batches = [walked.batch(step).tokens for step in range(200)]  # several epochs
    assert walked.num_windows < 64 * 200 / 3
    for step in (0, 199, 41, 42, 123):
        assert torch.equal(Cursor(blocks, "train", 64, 32, seed=0).batch(step).tokens, batches[step])
        assert torch.equal(walked.batch(step).tokens, batches[step])
    assert not torch.equal(Cursor(blocks, "train", 64, 32, seed=1).batch(0).tokens, batches[0])
    assert not torch.equal(batches[0], batches[1])


def test_an_epoch_does_not_repeat_and_the_next_has_another_phase_and_order(blocks):
    cursor = Cursor(blocks, "train", 1, 32, seed=0)
    epochs = [places(Cursor(blocks, "train", cursor.num_windows, 32, seed=0).batch(step)) for step in (0, 1)]
    for start in epochs:
        assert len(covered(start)) == 32 * cursor.num_windows
        assert not np.array_equal(start, np.sort(start))
    assert len(covered(epochs[0])) > 0.85 * blocks.num_tokens("train")
    assert len(set(epochs[0].tolist()) & set(epochs[1].tolist())) < 0.2 * cursor.num_windows
    straddling = Cursor(blocks, "train", cursor.num_windows + 3, 32, seed=0).batch(0)
    assert np.array_equal(places(straddling), np.concatenate([epochs[0], epochs[1][:3]]))


def test_a_batch_may_hold_many_epochs_of_a_tiny_corpus(tmp_path):
    dataset = make_dataset([CORPUS[:700]], DataSection(block_size=64), tmp_path / "d")
    cursor = Cursor(dataset, "validation", 10, 64, seed=0)
    assert cursor.num_windows == 1 and cursor.batch(3).tokens.shape == (10, 64)
    assert (places(cursor.batch(0)) >= 0).all()


@pytest.mark.parametrize("length", [1, 31, 32, 33, 62, 63, 64, 95, 96, 100, 257])
def test_phases_keep_the_number_of_windows_and_stay_inside_the_run(blocks, length):
    split = blocks.splits["train"]
    one_run = type(split)((np.arange(1000, dtype=np.uint16),), np.array([0]), np.array([500]), np.array([length]))
    dataset = type(blocks)(blocks.folder, blocks.meta, blocks.tokenizer, {"train": one_run})
    if length < 32:
        with pytest.raises(ValueError, match="train split holds 0 windows"):
            Cursor(dataset, "train", 8, 32, 0)
        return
    cursor = Cursor(dataset, "train", 8, 32, 0)
    tokens = torch.cat([cursor.batch(step).tokens for step in range(200)])
    assert tokens.min() >= 500 and tokens.max() < 500 + length
    assert cursor.num_windows == max(1, (length - 31) // 32)
    first = set((tokens[:, 0] - 500).tolist())
    assert max(first) == length - 32 and (length < 64 or len(first) > 30)


def test_fixed_windows_extend_and_follow_their_seed(blocks):
    many = windows(blocks, "judge", 100, 32, seed=3)
    assert torch.equal(windows(blocks, "judge", 40, 32, seed=3).tokens, many.tokens[:40])
    assert not torch.equal(windows(blocks, "judge", 40, 32, seed=4).tokens, many.tokens[:40])
    assert many.tokens.dtype == torch.int64 and many.attention_mask.all()


def test_window_places_follow_the_order_of_the_corpus(blocks, documents):
    start, place = places(windows(blocks, "judge", 100, 32, seed=3)), window_places(blocks, "judge", 100, 32, seed=3)
    assert np.array_equal(start.argsort(), place.argsort()) and len(place.unique()) == 100
    numbers = windows(documents, "validation", 10, 64, seed=3).tokens[:, :3].tolist()
    assert np.array_equal(np.argsort([int(bytes(row)) for row in numbers]),
                          window_places(documents, "validation", 10, 64, seed=3).argsort())


def test_too_many_windows_are_refused_with_the_remedy(blocks, documents):
    remedy = "9999 needed: use more text, another data.validation_fraction or a smaller"
    for dataset, message in ((blocks, f"windows of 32 tokens, {remedy} data.block_size or a smaller some.key$"),
                             (documents, f"holds 10 documents, {remedy} some.key$")):
        with pytest.raises(ValueError, match=message) as error:
            windows(dataset, "validation", 9999, 32, 0, key="some.key")
        assert "\n" not in str(error.value) and str(dataset.folder) in str(error.value)


def test_documents_are_padded_and_masked(documents):
    texts = {f"{i:03d} " + "x" * (i % 90) for i in range(100)}
    pad, train = documents.vocabulary.pad_id, Cursor(documents, "train", 65, 64, seed=0)
    assert train.num_windows == 65
    for batch in (train.batch(0), windows(documents, "judge", 25, 64, 0), windows(documents, "validation", 10, 64, 0)):
        assert batch.tokens.shape == batch.attention_mask.shape == (len(batch.tokens), 64)
        for tokens, mask in zip(batch.tokens.tolist(), batch.attention_mask.tolist(), strict=True):
            length = sum(mask)
            assert mask == [True] * length + [False] * (64 - length) and tokens[length:] == [pad] * (64 - length)
            matching = {text for text in texts if text[:64] == bytes(tokens[:length]).decode()}
            assert len(matching) == 1
            texts -= matching
    assert not texts


def test_rows_of_a_batch_keep_their_masks_and_completions_begin_after_the_prompt():
    batch = Batch(torch.arange(12).view(3, 4), torch.arange(4) < torch.tensor([[4], [3], [1]]))
    chosen = batch[::2]
    assert chosen.tokens.tolist() == [[0, 1, 2, 3], [8, 9, 10, 11]]
    assert completion_mask(chosen.attention_mask, 2).tolist() == [[False, False, True, True], [False] * 4]
    assert completion_mask(batch[torch.tensor([1])].attention_mask, 2).tolist() == [[False, False, True, False]]


def test_batches_gather_from_many_shards(tmp_path, monkeypatch):
    monkeypatch.setattr("grpo.shards.SEGMENT_BYTES", 8000)
    dataset = make_dataset([CORPUS[i:i + 800] for i in range(0, 80_000, 800)],
                           DataSection(block_size=32, separator=""), tmp_path / "d")
    assert len(dataset.splits["train"].values) == 10
    cursor = Cursor(dataset, "train", 1, 32, 0)
    start = places(Cursor(dataset, "train", cursor.num_windows, 32, 0).batch(0))
    assert start.min() >= 0 and len(covered(start)) == 32 * cursor.num_windows and np.ptp(start) > 60_000


def test_tokens_are_views_of_the_mapped_file_and_a_dataset_pickles_as_its_folder(blocks):
    assert not any(values.flags.owndata or values.flags.writeable for values in blocks.splits["train"].values)
    assert len(pickle.dumps(blocks)) < 1000
    copy = pickle.loads(pickle.dumps(blocks))
    assert torch.equal(windows(copy, "judge", 5, 32, 0).tokens, windows(blocks, "judge", 5, 32, 0).tokens)
    batch = windows(blocks, "judge", 5, 32, 0)
    batch.tokens.zero_()  # a batch is a copy: writing to it must not reach the file
    assert windows(blocks, "judge", 5, 32, 0).tokens.min() > 0
    assert batch.to("cpu").tokens.device.type == "cpu"
