import json
import os
import time

import pyarrow as pa
import pyarrow.fs
import pyarrow.parquet
import pytest

from grpo import sources
from grpo.sources import plan_parts, read_documents, source_digests

DOCUMENTS = ["first \u00e9t\u00e9", "second,\nwith \"quotes\"", "third\tand \U0001f600", "fourth", "fifth " * 20]


def write(path, documents=DOCUMENTS, column="text"):
    table = pa.table({"id": range(len(documents)), column: documents})
    match path.suffix:
        case ".txt":
            path.write_text("\n\n".join(documents), encoding="utf-8")
        case ".jsonl":
            path.write_text("".join(json.dumps({"id": i, column: d}) + "\n" for i, d in enumerate(documents)))
        case ".csv":
            pa.csv.write_csv(table, path)
        case ".tsv":
            pa.csv.write_csv(table, path, pa.csv.WriteOptions(delimiter="\t"))
        case ".parquet":
            pa.parquet.write_table(table, path, row_group_size=2)
        case ".arrow":
            with pa.ipc.new_file(path, table.schema) as writer:
                writer.write_table(table, max_chunksize=2)
        case ".ipc":
            with pa.ipc.new_stream(path, table.schema) as writer:
                writer.write_table(table)
    return path


def one_line_error(source, message, **options):
    with pytest.raises(ValueError, match=message) as error:
        list(read_documents(str(source), **options))
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("suffix", [".txt", ".jsonl", ".csv", ".tsv", ".parquet", ".arrow", ".ipc"])
def test_every_kind_gives_the_same_documents(tmp_path, suffix):
    path = write(tmp_path / f"corpus{suffix}")
    assert list(read_documents(str(path))) == DOCUMENTS
    assert list(read_documents(path.as_uri())) == DOCUMENTS


@pytest.mark.parametrize("suffix", [".txt", ".jsonl"])
@pytest.mark.parametrize("part_bytes", [1, 7, 64, 150])
def test_ranges_read_every_document_once(tmp_path, monkeypatch, suffix, part_bytes):
    path = write(tmp_path / f"corpus{suffix}")
    monkeypatch.setattr("grpo.sources.PART_BYTES", part_bytes)
    monkeypatch.setattr("grpo.sources._READ_BYTES", 3)
    assert len(plan_parts(str(path), "\n\n")) == -(-path.stat().st_size // part_bytes)
    assert list(read_documents(str(path))) == DOCUMENTS


@pytest.mark.parametrize("separator", ["\n\n", "<end>"])
@pytest.mark.parametrize("part_bytes", range(1, 12))
def test_ranges_cut_a_separator_anywhere(tmp_path, monkeypatch, separator, part_bytes):
    documents = [letter * length for letter, length in zip("abcdefg", (1, 9, 2, 30, 3, 1, 12), strict=True)]
    (tmp_path / "a.txt").write_text(separator.join(documents) + separator)
    monkeypatch.setattr("grpo.sources.PART_BYTES", part_bytes)
    monkeypatch.setattr("grpo.sources._READ_BYTES", 2)
    assert list(read_documents(str(tmp_path / "a.txt"), separator=separator)) == documents


@pytest.mark.parametrize("suffix", [".txt", ".jsonl"])
def test_text_without_a_separator_is_read_twice_at_most(tmp_path, monkeypatch, suffix):
    text, plain, read = json.dumps({"text": "one line " * 1000}), sources._open, []
    (tmp_path / f"a{suffix}").write_text(text)
    monkeypatch.setattr("grpo.sources.PART_BYTES", 100)
    monkeypatch.setattr("grpo.sources._READ_BYTES", 10)

    class Counted:
        def __init__(self, part):
            self.file = plain(part)
            self.seek = self.file.seek

        def __enter__(self):
            return self

        def __exit__(self, *_):
            self.file.close()

        def read(self, size):
            read.append(len(block := self.file.read(size)))
            return block

    monkeypatch.setattr(sources, "_open", Counted)
    assert len(list(read_documents(str(tmp_path / f"a{suffix}")))) == 1
    assert sum(read) < 2.1 * len(text)


@pytest.mark.parametrize("name, options, remedy", [
    ("a.txt", {}, r"set data.separator, now '\\n\\n', to what .*, for example 'data.separator=\"\\n\"', or cut"),
    ("a.txt", {"separator": ""}, "set data.separator, now '', to"),
    ("a.jsonl", {}, "write one object per line"),
])
def test_a_document_without_end_is_refused(tmp_path, monkeypatch, name, options, remedy):
    monkeypatch.setattr("grpo.sources.PART_BYTES", 2**18)
    monkeypatch.setattr("grpo.sources.DOCUMENT_BYTES", 2**20)
    (tmp_path / name).write_text(json.dumps({"text": "one line " * 150_000}))
    told = one_line_error(tmp_path / name, f"a document of more than 1 MB: {remedy}", **options)
    assert told.startswith(str(tmp_path / name))


def test_files_globs_folders_and_uris_choose_files(tmp_path, monkeypatch):
    (tmp_path / "deep").mkdir()
    for name in ("b.txt", "a.txt", "c1.md", "deep/d.txt", ".hidden", "_meta"):
        (tmp_path / name).write_text(name)
    for source, expected in (("b.txt", ["b.txt"]), ("*.txt", ["a.txt", "b.txt"]), ("c[0-9].??", ["c1.md"]),
                             ("**/*.txt", ["a.txt", "b.txt", "deep/d.txt"]), ("*/d.txt", ["deep/d.txt"]),
                             ("", ["a.txt", "b.txt", "c1.md", "deep/d.txt"])):
        assert list(read_documents(f"{tmp_path}/{source}")) == expected
        assert list(read_documents(f"{tmp_path.as_uri()}/{source}")) == expected
    monkeypatch.chdir(tmp_path)
    assert list(read_documents("*.md")) == list(read_documents("./c1.md")) == ["c1.md"]
    (tmp_path / "odd[1].txt").write_text("odd")
    assert list(read_documents("odd[1].txt")) == ["odd"]


def test_embedded_corpus_is_there_and_hashed():
    documents = list(read_documents("python-docs"))
    assert len(documents) > 50 and sum(map(len, documents)) > 300_000
    paragraphs = [" ".join(text.split()) for document in documents for text in document.split("\n\n")]
    assert len(set(paragraphs)) == len(paragraphs)  # or splits would share text
    assert source_digests("python-docs") == source_digests("python-docs")


def test_empty_documents_nulls_and_byte_order_marks_are_dropped(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone\n\n\n\ntwo\n\n")
    assert list(read_documents(str(tmp_path / "a.txt"))) == ["one", "two"]
    (tmp_path / "b.jsonl").write_text('{"text": null}\n\n{"text": ""}\n{"text": "x"}')
    assert list(read_documents(str(tmp_path / "b.jsonl"))) == ["x"]
    assert list(read_documents(str(write(tmp_path / "c.parquet", ["x", None, ""])))) == ["x"]


def test_digests_change_with_content_only(tmp_path):
    path = write(tmp_path / "a.txt")
    first = source_digests(str(path))
    path.write_text(path.read_text())
    assert source_digests(str(path)) == first
    path.write_text("other")
    assert source_digests(str(path)) != first


def test_text_beside_tables_is_refused_with_a_glob_that_takes_the_larger(tmp_path, monkeypatch):
    (tmp_path / "data").mkdir()
    (tmp_path / "README.md").write_text("about the data")
    write(tmp_path / "data" / "train.parquet")
    for source, glob in ((f"{tmp_path}", f"{tmp_path}/**/*.parquet"), (f"{tmp_path}/**", f"{tmp_path}/**/*.parquet"),
                         (tmp_path.as_uri(), f"{tmp_path.as_uri()}/**/*.parquet")):
        told = one_line_error(source, r"holds text \(.*README.md\) and tables \(.*train.parquet\): choose one sort")
        assert told.endswith(f"for example by {glob}")
        assert list(read_documents(glob)) == DOCUMENTS
    monkeypatch.chdir(tmp_path)
    assert one_line_error("**/*", "holds text").endswith("by **/*.parquet")
    (tmp_path / "README.md").write_text("about the data " * 1000)
    monkeypatch.chdir(tmp_path / "data")
    assert one_line_error("../**", "holds text").endswith("by ../**/*.md")
    monkeypatch.chdir(tmp_path)
    assert list(read_documents("**/*.parquet")) == list(read_documents("data")) == DOCUMENTS


def test_a_folder_that_hugging_face_saved_is_its_arrow_files(tmp_path):
    (tmp_path / "train").mkdir()
    stream = write(tmp_path / "train" / "data.ipc")
    stream.rename(tmp_path / "train" / "data-00000-of-00001.arrow")
    for name in ("dataset_dict.json", "train/dataset_info.json", "train/state.json"):
        (tmp_path / name).write_text('{\n  "splits": ["train"]\n}')
    for source in (tmp_path, tmp_path / "train", f"{tmp_path}/**"):
        assert list(read_documents(str(source))) == DOCUMENTS
    (tmp_path / "alone").mkdir()
    (tmp_path / "alone" / "state.json").write_text('{"text": "a corpus"}')
    assert list(read_documents(f"{tmp_path}/alone")) == ["a corpus"]


def aged(path, seconds):
    then = time.time() - seconds
    os.utime(path, (then, then))


@pytest.fixture
def reads(monkeypatch):
    """Files that were opened, by name."""
    opened, plain = [], sources._open
    monkeypatch.setattr(sources, "_open", lambda part: opened.append(os.path.basename(part.path)) or plain(part))
    return opened


def test_an_unchanged_source_is_not_read_twice_and_a_changed_one_is(tmp_path, reads):
    folder, memory = tmp_path / "corpus", tmp_path / "memory"
    folder.mkdir()
    for number, name in enumerate(("a.txt", "b.txt")):
        (folder / name).write_text(f"{number} words")
        aged(folder / name, 100)
    first = source_digests(str(folder), memory)
    assert first == source_digests(str(folder)) and reads == ["a.txt", "b.txt"] * 2
    reads.clear()
    assert source_digests(str(folder), memory) == source_digests(f"{folder}/", memory) == first and not reads
    (folder / "b.txt").write_text("2 words")  # of the same size
    aged(folder / "b.txt", 50)
    assert source_digests(str(folder), memory) == source_digests(str(folder)) != first
    assert reads == ["b.txt", "a.txt", "b.txt"]  # the second call has no memory
    (next(memory.glob("source-*.json"))).write_text("not JSON")
    reads.clear()
    assert source_digests(str(folder), memory) == source_digests(str(folder), memory) and reads == ["a.txt", "b.txt"]


def test_a_file_that_changed_moments_ago_is_read_again(tmp_path, reads):
    path = tmp_path / "a.txt"
    path.write_text("one")
    assert source_digests(str(path), tmp_path) == source_digests(str(path), tmp_path) and reads == ["a.txt"] * 2


def test_a_filesystem_without_times_of_change_is_read(tmp_path, reads, monkeypatch):
    path = tmp_path / "a.txt"
    path.write_text("one")
    without = pa.fs.FileInfo(str(path), pa.fs.FileType.File, size=3)
    assert without.mtime_ns is None
    monkeypatch.setattr(sources, "list_files", lambda source: [(without, pa.fs.LocalFileSystem())])
    assert source_digests(str(path), tmp_path) == source_digests(str(path), tmp_path) and reads == ["a.txt"] * 2


@pytest.mark.parametrize("source", ["missing.txt", "none*.txt", "missing/", "", "s3x://bucket/file"])
def test_missing_sources_are_named(tmp_path, monkeypatch, source):
    (tmp_path / "present.md").write_text("not asked for")
    monkeypatch.chdir(tmp_path)
    one_line_error(source, "data.source: (no file at|cannot open)")


@pytest.mark.parametrize(
    "source, message",
    [("x[z-a].txt", "is no glob"), ("~nosuchuser/x.txt", "begins with the name of no user"),
     ("deep.jsonl", "line 1 is not JSON")],
)
def test_sources_that_cannot_be_read_are_one_line(tmp_path, monkeypatch, source, message):
    (tmp_path / "deep.jsonl").write_text("[" * 200_000)
    monkeypatch.chdir(tmp_path)
    one_line_error(source, message)


@pytest.mark.parametrize(
    "suffix, program",
    [(".gz", "gunzip"), (".bz2", "bunzip2"), (".XZ", "unxz"), (".zst", "unzstd"), (".zip", "unzip")],
)
def test_a_compressed_file_is_to_be_decompressed(tmp_path, suffix, program):
    path = tmp_path / f"a.txt{suffix}"
    path.write_bytes(b"\x1f\x8b\x08\x00\xff")
    for source in (path, tmp_path):
        message = f"data.source: {path} is compressed \\({suffix.lower()}\\): decompress it, .*`{program}`"
        one_line_error(source, message)


def test_a_row_of_a_csv_may_be_long_but_not_without_end(tmp_path, monkeypatch):
    path = tmp_path / "long.csv"
    path.write_text("id,text\n1," + "a" * 3_000_000 + "\n")
    assert [len(text) for text in read_documents(str(path))] == [3_000_000]
    monkeypatch.setattr("grpo.sources.PART_BYTES", 2**20)
    one_line_error(path, "holds a row of more than 1 MB: cut it into several")


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".parquet", ".arrow", ".ipc"])
def test_wrong_column_lists_those_that_exist(tmp_path, suffix):
    path = write(tmp_path / f"corpus{suffix}", column="content")
    message = one_line_error(path, "has no column 'text': set data.text_column to one of id, content")
    assert str(path) in message
    assert list(read_documents(str(path), text_column="content")) == DOCUMENTS


@pytest.mark.parametrize("suffix", [".csv", ".parquet", ".arrow"])
def test_a_column_that_is_there_twice_is_refused(tmp_path, suffix):
    path, table = tmp_path / f"corpus{suffix}", pa.table([pa.array(["one"]), pa.array(["two"])], names=["text", "text"])
    if suffix == ".csv":
        path.write_text("text,text\none,two\n")
    elif suffix == ".parquet":
        pa.parquet.write_table(table, path)
    else:
        with pa.ipc.new_file(path, table.schema) as file:
            file.write_table(table)
    assert str(path) in one_line_error(path, "has 2 columns 'text': rename all but one")


def test_text_of_another_coding_is_refused_with_its_name(tmp_path):
    path = tmp_path / "corpus.txt"
    for coding, name in (("utf-16", "utf-16"), ("latin1", "latin1")):
        path.write_bytes("caf\u00e9\n\ntea".encode(coding))
        one_line_error(path, f"is not UTF-8 text .byte .*iconv -f {name} -t utf-8")


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet", ".arrow"])
def test_a_column_without_text_is_refused(tmp_path, suffix):
    one_line_error(write(tmp_path / f"corpus{suffix}"), "corpus.* not text: set data.text_column", text_column="id")


@pytest.mark.parametrize("suffix", [".txt", ".jsonl", ".csv"])
def test_text_that_is_not_utf8_is_named(tmp_path, suffix):
    path = tmp_path / f"latin{suffix}"
    path.write_bytes(write(path).read_bytes().replace(b"fourth", "f\u00f6urth".encode("latin1")))
    assert str(path) in one_line_error(path, "(?i)utf-?8")


def test_the_byte_that_is_not_utf8_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr("grpo.sources.PART_BYTES", 10)
    (tmp_path / "a.txt").write_bytes(b"abc\n\ndef\n\nghi\n\nj\xffk")
    one_line_error(tmp_path / "a.txt", r"a\.txt is not UTF-8 text \(byte 16\): convert it")


@pytest.mark.parametrize("suffix", [".parquet", ".arrow", ".ipc"])
def test_truncated_files_are_named(tmp_path, suffix):
    path = write(tmp_path / f"corpus{suffix}", DOCUMENTS * 50)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    assert str(path) in one_line_error(path, "is not a readable (Parquet|Arrow) file .*write or fetch it again")


def test_lines_that_are_not_json_objects_are_numbered(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "x"}\n{"text": \n')
    one_line_error(path, r"a\.jsonl, line 2 is not JSON")
    path.write_text('["x"]')
    one_line_error(path, r"a\.jsonl, line 1 holds a JSON list")


@pytest.mark.parametrize("source, named", [
    ("s3://bucket/corpus/a.txt?region=eu-west-1", "s3://bucket/corpus/a.txt?region=eu-west-1"),
    ("s3://bucket/corpus/?.txt?region=eu-west-1&scheme=http", "s3://bucket/corpus/?region=eu-west-1&scheme=http"),
])
def test_the_query_of_a_uri_goes_to_its_file_system_and_is_no_glob(tmp_path, monkeypatch, source, named):
    (tmp_path / "a.txt").write_text("one\n\ntwo")
    asked = []

    class FileSystem:
        @staticmethod
        def from_uri(uri):
            asked.append(uri)
            return pa.fs.LocalFileSystem(), str(tmp_path / "a.txt" if "a.txt" in uri else tmp_path)

    monkeypatch.setattr("grpo.sources.pa.fs.FileSystem", FileSystem)
    assert list(read_documents(source)) == ["one", "two"] and asked == [named]
