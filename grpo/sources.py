"""Documents of a text source: text, JSONL, CSV, Parquet or Arrow; a file, a glob, a folder or any pyarrow.fs URI.

A source is planned as parts, each readable by itself, so that workers share out a corpus and none holds all of it.

1. The kind of a file is its suffix: .jsonl .ndjson .json (one object per line), .csv .tsv, .parquet .pq, .arrow .ipc
   .feather; anything else is UTF-8 text, whose documents are what stands between two `data.separator`s. A compressed
   file, which cannot be cut into ranges, is refused, and so is a document of more than `DOCUMENT_BYTES`.
2. Text and JSONL are cut into ranges of `PART_BYTES`; a range owns the documents that begin after the first delimiter
   in it (as in MapReduce), so no document is lost or read twice. Parquet is cut by row groups, the others not at all.
3. Empty documents and nulls are dropped; in folders and globs, so are files whose name begins with "." or "_", and what
   Hugging Face's `save_to_disk` notes beside its Arrow files.
4. A folder or glob holds text or tables, not both: a README beside a data set is no part of it.
5. Digests are remembered by path, size and time of change, so that an unchanged source is not read at every start. A
   file that changed moments ago, or has no such time (some object stores), is read: the clock may hide another change.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import pyarrow as pa
import pyarrow.csv
import pyarrow.fs
import pyarrow.parquet

from grpo.files import write_json

Files = list[tuple[pa.fs.FileInfo, pa.fs.FileSystem]]
EMBEDDED = "python-docs"
PART_BYTES = 32 * 2**20
DOCUMENT_BYTES = 256 * 2**20
"""Longest document of text or JSONL: one task holds it whole, several times over. text8, one line of 100 MB, fits."""
_READ_BYTES = 2**20
_BOM = b"\xef\xbb\xbf"
_KINDS = {".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "jsonl", ".csv": "csv", ".tsv": "csv", ".parquet": "parquet",
          ".pq": "parquet", ".arrow": "arrow", ".ipc": "arrow", ".feather": "arrow"}
_NOTES = ("dataset_dict.json", "dataset_info.json", "state.json")
"""What Hugging Face's `save_to_disk` writes beside its Arrow files."""
_COMPRESSED = {".gz": "gunzip", ".bz2": "bunzip2", ".xz": "unxz", ".zst": "unzstd", ".zip": "unzip"}
"""Suffixes that are refused, each with the program that takes it off."""
_SETTLED_NS = 2_000_000_000
"""Age from which a file's time of change tells one content from the next, on any filesystem."""


@dataclass(frozen=True)
class Part:
    """What one task reads of one file: bytes [start, stop) of text, row groups [start, stop) of Parquet, or all."""

    path: str
    filesystem: pa.fs.FileSystem | None = None
    start: int = 0
    stop: int = 0
    num_bytes: int = 0


def read_documents(source: str, text_column: str = "text", separator: str = "\n\n") -> Iterator[str]:
    """All documents of a source, in the order of its files' names.

    Raises:
        ValueError: missing, unreadable or not UTF-8, or without the text column; names the file and the remedy.
    """
    for part in plan_parts(source, separator):
        yield from read_part(part, text_column, separator)


def plan_parts(source: str, separator: str) -> list[Part]:
    """The parts of a source, in order; reads no more than listings and Parquet footers."""
    if source == EMBEDDED:
        return [Part(EMBEDDED)]
    parts = []
    for info, filesystem in list_files(source):
        kind = _kind(info.path)
        if kind == "parquet":
            metadata = _parquet(Part(info.path, filesystem)).metadata
            parts += [Part(info.path, filesystem, group, group + 1, metadata.row_group(group).total_byte_size)
                      for group in range(metadata.num_row_groups)]
        elif kind == "jsonl" or (kind == "text" and separator):
            for start in range(0, info.size, PART_BYTES):
                stop = min(start + PART_BYTES, info.size)
                parts.append(Part(info.path, filesystem, start, stop, stop - start))
        else:
            parts.append(Part(info.path, filesystem, 0, info.size, info.size))
    return parts


def list_files(source: str) -> Files:
    """The files that a file, glob, folder or URI names, sorted by path.

    Raises:
        ValueError: there is none, one is compressed, or some are text and others tables.
    """
    literal = "://" not in source and _expanded(source).exists()
    asked = re.search(r"\?[\w.-]+=.*", source, re.DOTALL) if "://" in source else None  # ?region=..., and no glob
    query, named = (asked.group(), source[: asked.start()]) if asked else ("", source)
    wildcard = None if literal else re.search(r"[*?\[]", named)
    base = named if wildcard is None else named[: named.rfind("/", 0, wildcard.start()) + 1]
    try:
        if "://" in source:
            filesystem, path = pa.fs.FileSystem.from_uri(base + query)
        else:
            filesystem, path = pa.fs.LocalFileSystem(), str(_expanded(base or ".").resolve())
        info = filesystem.get_file_info(path)
        if info.type == pa.fs.FileType.File:
            return _uncompressed([(info, filesystem)])
        found = filesystem.get_file_info(pa.fs.FileSelector(path, recursive=True, allow_not_found=True))
    except (OSError, pa.ArrowException) as error:
        raise ValueError(f"data.source: cannot open {source} ({_first_line(error)}): check the path or URI") from error
    try:
        pattern = re.compile(".*" if wildcard is None else _glob_regex(named[len(base):]), re.DOTALL)
    except re.error as error:
        raise ValueError(f"data.source: {source} is no glob ({error}): mend what stands in brackets") from error
    chosen = []
    for info in found:
        relative = PurePosixPath(info.path).relative_to(PurePosixPath(path))
        if info.is_file and pattern.fullmatch(str(relative)) and not any(p[0] in "._" for p in relative.parts):
            chosen.append((info, filesystem))
    if any(_kind(info.path) == "arrow" for info, _ in chosen):
        chosen = [(info, filesystem) for info, filesystem in chosen if info.base_name not in _NOTES]
    if not chosen or not source:
        raise ValueError(f"data.source: no file at {source}: give an existing file, glob, folder or URI, or {EMBEDDED}")
    files = _uncompressed(sorted(chosen, key=lambda pair: pair[0].path))
    _check_one_sort(source, base, [info for info, _ in files])
    return files


def _uncompressed(files: Files) -> Files:
    for info, _ in files:
        suffix = PurePosixPath(info.path).suffix.lower()
        if suffix in _COMPRESSED:
            raise ValueError(f"data.source: {info.path} is compressed ({suffix}): decompress it, for example with "
                             f"`{_COMPRESSED[suffix]}`")
    return files


def _check_one_sort(source: str, base: str, infos: list[pa.fs.FileInfo]) -> None:
    """Raise a ValueError where text stands beside tables; its remedy is a glob of the larger sort."""
    sorts = [[info for info in infos if (_kind(info.path) == "text") == text] for text in (True, False)]
    if all(sorts):
        texts, tables = (max(sort, key=lambda info: info.size) for sort in sorts)
        larger = PurePosixPath(max(texts, tables, key=lambda info: info.size).path)
        glob = f"{base.rstrip('/')}/" if base else ""
        raise ValueError(f"data.source: {source} holds text ({texts.path}) and tables ({tables.path}): choose "
                         f"one sort, for example by {glob}**/*{larger.suffix or larger.name}")


def _expanded(path: str) -> Path:
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise ValueError(f"data.source: {path} begins with the name of no user here: give the whole path") from error


def source_digests(source: str, memory: Path | None = None) -> list[dict[str, str]]:
    """Name and sha256 of every file of a source, read block by block.

    Args:
        memory: folder where digests are kept; a file that it knows by path, size and time of change is not read.
    """
    if source == EMBEDDED:
        digest = hashlib.sha256()
        for document in _embedded_documents():
            digest.update(document.encode() + b"\0")
        return [{"name": EMBEDDED, "sha256": digest.hexdigest()}]
    whole = source if "://" in source else str(_expanded(source).absolute())
    file = memory and memory / f"source-{hashlib.sha256(whole.encode()).hexdigest()[:12]}.json"
    settled = time.time_ns() - _SETTLED_NS
    known, kept, digests = _remembered(file), {}, []
    for info, filesystem in list_files(source):
        change = [info.size, info.mtime_ns]
        before = known.get(info.path)
        digest = before[2] if before and before[:2] == change else _digest(info.path, filesystem)
        if info.mtime_ns is not None and info.mtime_ns < settled:
            kept[info.path] = [*change, digest]
        digests.append({"name": info.path, "sha256": digest})
    if file and kept != known:
        with contextlib.suppress(OSError):  # then it is read again
            file.parent.mkdir(parents=True, exist_ok=True)
            write_json(file, kept)
    return digests


def _remembered(file: Path | None) -> dict[str, list]:
    """[size, time of change, sha256] of the files of a source, by path."""
    try:
        return json.loads(file.read_text(encoding="utf-8")) if file else {}
    except (OSError, ValueError):
        return {}


def _digest(path: str, filesystem: pa.fs.FileSystem) -> str:
    digest = hashlib.sha256()
    with _open(Part(path, filesystem)) as file:
        while block := file.read(_READ_BYTES):
            digest.update(block)
    return digest.hexdigest()


def read_part(part: Part, text_column: str, separator: str) -> Iterator[str]:
    """The documents of one part, in order."""
    if part.path == EMBEDDED:
        yield from _embedded_documents()
    else:
        yield from filter(None, _READERS[_kind(part.path)](part, text_column, separator))


@functools.cache
def _embedded_documents() -> tuple[str, ...]:
    """The language reference that `help()` shows, each paragraph once: a fifth of it stands in several topics, and so
    would stand in several splits."""
    from pydoc_data.topics import topics

    seen, documents = set(), []
    for name in sorted(topics):
        paragraphs = []
        for paragraph in topics[name].split("\n\n"):
            words = " ".join(paragraph.split())
            if words not in seen:
                seen.add(words)
                paragraphs.append(paragraph)
        documents.append("\n\n".join(paragraphs))
    return tuple(filter(None, documents))


def _kind(path: str) -> str:
    return _KINDS.get(PurePosixPath(path).suffix.lower(), "text")


def _glob_regex(glob: str) -> str:
    """`**/` any folders, `*` and `?` within one name, `[...]` a set."""
    translate = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}
    tokens = re.findall(r"\*\*/?|\*|\?|\[[^]]+\]|.", glob, re.DOTALL)
    return "".join(translate.get(t) or (t.replace("[!", "[^") if len(t) > 1 else re.escape(t)) for t in tokens)


def _open(part: Part) -> pa.NativeFile:
    try:
        return part.filesystem.open_input_file(part.path)
    except OSError as error:
        raise ValueError(f"data.source: cannot open {part.path} ({_first_line(error)}): check the path and its "
                         "permissions") from error


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0][:200]


def _read_text(part: Part, text_column: str, separator: str) -> Iterator[str]:
    remedy = (f"set data.separator, now {separator!r}, to what stands between its documents, for example "
              "'data.separator=\"\\n\"', or cut the file")
    _, text = _range_text(part, separator.encode(), remedy)
    return iter(text.split(separator) if separator else [text])


def _read_jsonl(part: Part, text_column: str, separator: str) -> Iterator[str]:
    offset, text = _range_text(part, b"\n", "write one object per line")
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        where = f"{part.path}, line {number}" + (f" after byte {offset}" if offset else "")
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{where} is not JSON ({error}): write one object per line") from error
        if not isinstance(record, dict):
            raise ValueError(f"{where} holds a JSON {type(record).__name__}: write one object per line")
        _check_column(where, text_column, list(record))
        if not isinstance(record[text_column], str | None):
            others = ", ".join(name for name, value in record.items() if isinstance(value, str)) or "(none)"
            raise ValueError(f"{where}: {text_column!r} holds a {type(record[text_column]).__name__}, not text: set "
                             f"data.text_column to one of {others}")
        yield record[text_column] or ""


def _range_text(part: Part, delimiter: bytes, remedy: str) -> tuple[int, str]:
    """Where the text of a range begins, and the text: from the end of the first delimiter in it to the first after it.

    Raises:
        ValueError: not UTF-8, or a document of more than `DOCUMENT_BYTES`, for which `remedy` is given.
    """
    size, overlap = part.stop - part.start, max(0, len(delimiter) - 1)
    too_long = ValueError(f"{part.path} holds a document of more than {DOCUMENT_BYTES >> 20} MB: {remedy}")
    if not delimiter and size > DOCUMENT_BYTES:
        raise too_long
    with _open(part) as file:
        file.seek(part.start)
        data = bytearray(file.read(size + overlap))
        begin, end, searched = 0, -1, size
        if part.start:
            first = data.find(delimiter)
            if first < 0:  # all of it belongs to a document of an earlier range
                return part.stop, ""
            begin = first + len(delimiter)
        elif data.startswith(_BOM):
            begin = len(_BOM)
        while delimiter and (end := data.find(delimiter, searched)) < 0 and (block := file.read(_READ_BYTES)):
            searched = max(size, len(data) - overlap)
            data += block
            if len(data) - size > DOCUMENT_BYTES:
                raise too_long
    try:
        return part.start + begin, data[begin : end if end >= 0 else None].decode()
    except UnicodeDecodeError as error:
        coding = "utf-16" if data.startswith((b"\xff\xfe", b"\xfe\xff")) else "latin1"
        raise ValueError(f"{part.path} is not UTF-8 text (byte {part.start + begin + error.start}): convert it, for "
                         f"example with `iconv -f {coding} -t utf-8`, or leave it out of data.source") from error


def _check_column(where: str, text_column: str, names: list[str]) -> None:
    """Raise a ValueError unless just one of the columns has that name."""
    if text_column not in names:
        raise ValueError(f"{where} has no column {text_column!r}: set data.text_column to one of "
                         f"{', '.join(names) or '(none)'}")
    if names.count(text_column) > 1:
        raise ValueError(f"{where} has {names.count(text_column)} columns {text_column!r}: rename all but one")


def _texts(part: Part, text_column: str, column: pa.Array | pa.ChunkedArray) -> list[str]:
    kind = column.type.value_type if pa.types.is_dictionary(column.type) else column.type
    if not (pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)):
        raise ValueError(f"{part.path}: column {text_column!r} holds {kind}, not text: set data.text_column to another")
    try:
        return column.drop_null().to_pylist()
    except UnicodeDecodeError as error:
        raise ValueError(f"{part.path}: column {text_column!r} holds text that is not UTF-8: write it again") from error


def _parquet(part: Part) -> pa.parquet.ParquetFile:
    try:
        return pa.parquet.ParquetFile(_open(part))
    except (OSError, pa.ArrowException) as error:
        raise ValueError(_damaged(part, "Parquet", error)) from error


def _damaged(part: Part, kind: str, error: Exception) -> str:
    return f"{part.path} is not a readable {kind} file ({_first_line(error)}): write or fetch it again"


def _read_parquet(part: Part, text_column: str, separator: str) -> Iterator[str]:
    file = _parquet(part)
    _check_column(part.path, text_column, file.schema_arrow.names)
    try:
        table = file.read_row_groups(range(part.start, part.stop), columns=[text_column])
    except (OSError, pa.ArrowException) as error:
        raise ValueError(_damaged(part, "Parquet", error)) from error
    yield from _texts(part, text_column, table.column(text_column))


def _read_arrow(part: Part, text_column: str, separator: str) -> Iterator[str]:
    """An IPC file, or the IPC stream that Hugging Face datasets are kept in."""
    try:
        with _open(part) as file:
            is_file = file.read(6) == b"ARROW1"
            file.seek(0)
            if is_file:
                reader = pa.ipc.open_file(file)
                batches = map(reader.get_batch, range(reader.num_record_batches))
            else:
                reader = batches = pa.ipc.open_stream(file)
            _check_column(part.path, text_column, reader.schema.names)
            for batch in batches:
                yield from _texts(part, text_column, batch.column(text_column))
    except (OSError, pa.ArrowException) as error:
        raise ValueError(_damaged(part, "Arrow", error)) from error


def _read_csv(part: Part, text_column: str, separator: str) -> Iterator[str]:
    read = pa.csv.ReadOptions(block_size=PART_BYTES)  # no row may be longer
    parse = pa.csv.ParseOptions(delimiter="\t" if part.path.lower().endswith(".tsv") else ",", newlines_in_values=True)
    try:
        with _open(part) as file:
            names = pa.csv.open_csv(file, read_options=read, parse_options=parse).schema.names
        _check_column(part.path, text_column, names)
        convert = pa.csv.ConvertOptions(include_columns=[text_column], column_types={text_column: pa.string()})
        with _open(part) as file:
            for batch in pa.csv.open_csv(file, read_options=read, parse_options=parse, convert_options=convert):
                yield from _texts(part, text_column, batch.column(0))
    except (OSError, pa.ArrowException) as error:
        if "straddling" in str(error):
            raise ValueError(f"{part.path} holds a row of more than {PART_BYTES >> 20} MB: cut it into several, or "
                             "write it as JSONL") from error
        raise ValueError(_damaged(part, "CSV", error)) from error


_READERS = {"text": _read_text, "jsonl": _read_jsonl, "csv": _read_csv, "parquet": _read_parquet, "arrow": _read_arrow}
