import contextlib
import dataclasses
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from grpo.config import DataSection
from grpo.data import make_dataset, open_dataset
from grpo.shards import SPLITS
from grpo.sources import read_documents
from grpo.tokenizer import Tokenizer
from pipelines.prepare import _key, prepare
from pipelines.progress import Display

ROOT = Path(__file__).resolve().parent.parent


def write_corpus(folder, files=5):
    folder.mkdir(exist_ok=True)
    for i in range(files):
        lines = [json.dumps({"text": f"file {i} line {j} " + "word " * (j % 20)}) for j in range(60)]
        (folder / f"{i}.jsonl").write_text("\n".join(lines))
    return DataSection(source=str(folder), block_size=16, tokenizer="bpe:300")


@pytest.mark.ray
@pytest.mark.parametrize("layout", ["blocks", "documents"])
def test_ray_data_writes_what_one_process_writes(ray_session, tmp_path, layout):
    section = dataclasses.replace(write_corpus(tmp_path / "corpus"), layout=layout)
    shown = io.StringIO()
    prepared = open_dataset(prepare(section, str(tmp_path / "cache"), Display(Console(file=shown))))
    assert shown.getvalue().splitlines() == ["training the tokenizer bpe:300", "tokenizing 1/1"]
    alone = make_dataset(read_documents(section.source), section, tmp_path / "alone")
    assert prepared.meta["shards"] == alone.meta["shards"] and prepared.meta["splits"] == alone.meta["splits"]
    assert prepared.tokenizer.fingerprint == alone.tokenizer.fingerprint
    assert len(prepared.meta["sources"]) == 5 and list((tmp_path / "cache").glob("data-*")) == [prepared.folder]


@pytest.mark.ray
def test_an_unchanged_source_is_prepared_once_and_a_changed_one_again(ray_session, tmp_path, monkeypatch):
    section, cache = write_corpus(tmp_path / "corpus"), str(tmp_path / "cache")
    first = prepare(section, cache)
    written = (first / "meta.json").stat().st_mtime_ns
    assert prepare(section, cache) == first and (first / "meta.json").stat().st_mtime_ns == written
    assert prepare(dataclasses.replace(section, split_seed=1), cache) != first
    with (tmp_path / "corpus" / "0.jsonl").open("a") as file:
        file.write('\n{"text": "one more"}')
    assert prepare(section, cache) != first
    shard = next(first.glob("train*"))
    shard.write_bytes(shard.read_bytes()[:-1] + b"?")
    write_corpus(tmp_path / "corpus")
    monkeypatch.setattr("pipelines.prepare._whole", set())  # as another process begins
    with pytest.raises(ValueError, match=f"{shard} is damaged.*delete {first} and prepare"):
        prepare(section, cache)


@pytest.mark.ray
def test_a_second_start_reads_neither_an_unchanged_source_nor_shards_that_it_has_verified(
    ray_session, tmp_path, monkeypatch
):
    section, cache = write_corpus(tmp_path / "corpus"), str(tmp_path / "cache")
    for path in (tmp_path / "corpus").iterdir():
        os.utime(path, (1e9, 1e9))
    folder, verified = prepare(section, cache), []
    assert (tmp_path / "cache") in {path.parent for path in (tmp_path / "cache").glob("source-*.json")}
    monkeypatch.setattr("grpo.sources._digest", None)  # a call would raise
    monkeypatch.setattr("pipelines.prepare.open_dataset", lambda folder, verify: verified.append(verify))
    monkeypatch.setattr("pipelines.prepare._whole", set())  # as another process begins
    assert [prepare(section, cache) for _ in range(3)] == [folder] * 3
    assert verified == [True, False, False]


def test_a_tokenizer_by_its_path_counts_by_what_it_holds(tmp_path):
    ranks, keys = {bytes([byte]): byte for byte in range(256)}, []
    for folder, pattern in (("a", r"."), ("b", r"."), ("a", r"..")):
        Tokenizer("mine", ranks, pattern).save(tmp_path / folder)
        keys.append(_key(DataSection(tokenizer=str(tmp_path / folder)), []))
    assert keys[0] == keys[1] != keys[2]


@pytest.mark.ray
def test_many_pieces_hold_every_document_once(ray_session, tmp_path, monkeypatch):
    monkeypatch.setattr("grpo.sources.PART_BYTES", 3000)
    monkeypatch.setattr("pipelines.prepare.PART_BYTES", 6000)
    section = write_corpus(tmp_path / "corpus")
    section = dataclasses.replace(section, layout="documents", block_size=200, tokenizer="bytes")
    dataset = open_dataset(prepare(section, str(tmp_path / "cache")))
    assert len({shard["file"].split("-")[1] for shard in dataset.meta["shards"]}) > 3
    rows = []
    for split in SPLITS:
        held = dataset.splits[split]
        rows += [bytes(held.values[shard][start:start + length].tolist()).decode()
                 for shard, start, length in zip(held.shard, held.start, held.length, strict=True)]
    assert sorted(rows) == sorted(read_documents(section.source))


@pytest.mark.ray
def test_a_mistake_met_in_a_worker_is_one_line(ray_session, tmp_path):
    section = dataclasses.replace(write_corpus(tmp_path / "corpus"), tokenizer="bytes")
    (tmp_path / "corpus" / "3.jsonl").write_bytes(b'{"text": "\xff"}')
    for options, message in (({}, "3.jsonl is not UTF-8 text .byte 10"), ({"text_column": "body"}, "no column 'body'")):
        with pytest.raises(ValueError, match=message) as error:
            prepare(dataclasses.replace(section, **options), str(tmp_path / "cache"))
        assert "\n" not in str(error.value) and not list((tmp_path / "cache").glob("*data-*"))


@pytest.mark.ray
def test_a_cache_that_a_node_does_not_see_is_one_line(ray_session, tmp_path, monkeypatch):
    section = write_corpus(tmp_path / "corpus")
    monkeypatch.setattr("pipelines.prepare.partial_folder", lambda folder: contextlib.nullcontext(tmp_path / "away"))
    with pytest.raises(ValueError, match="^run.cache: not every node sees .*/away: set run.cache to storage that all"):
        prepare(section, str(tmp_path / "cache"))


@pytest.mark.parametrize("override,message", [
    ("data.source=nowhere.txt", "error: data.source: no file at nowhere.txt"),
    ("data.tokenizer=bpe:5", "error: data.tokenizer must be bpe:<size>"),
])
def test_a_mistake_on_the_command_line_is_one_line_and_exit_code_2(tmp_path, override, message):
    command = [sys.executable, str(ROOT / "pipelines" / "prepare.py"), override, f"run.cache={tmp_path}"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=120)
    assert (done.returncode, done.stdout) == (2, "") and done.stderr.startswith(message)
    assert done.stderr.count("\n") == 1


@pytest.mark.ray
def test_the_script_runs_from_any_folder_and_is_quiet(tmp_path):
    command = [sys.executable, str(ROOT / "pipelines" / "prepare.py"), "run.cache=cache", "run.name=first"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=240)
    assert (done.returncode, done.stderr) == (0, "") and "bytes tokens, vocabulary 256" in done.stdout
    summary = json.loads((tmp_path / "runs" / "first" / "summary.json").read_text())
    assert open_dataset(summary["folder"]).num_tokens("train") == summary["splits"]["train"]["tokens"]
    assert (tmp_path / "runs" / "first" / "config.yaml").exists()
