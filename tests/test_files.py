import json
import os

import pytest

from grpo import files
from grpo.files import temporary_name, write_json, write_text


def test_a_file_is_replaced_whole_or_kept(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    write_json(path, {"text": "\u00e9t\u00e9"})
    write_json(path, {"text": "\u00e9", "two": [1]})
    text = path.read_text(encoding="utf-8")
    assert json.loads(text) == {"text": "\u00e9", "two": [1]} and "\u00e9" in text
    assert os.listdir(tmp_path) == ["a.json"]
    monkeypatch.setattr(files, "flush", lambda path: 1 / 0)  # the power fails before all is on disk
    with pytest.raises(ZeroDivisionError):
        write_text(path, "half")
    assert json.loads(path.read_text())["two"] == [1]


def test_two_writers_of_one_process_id_take_different_names(tmp_path):
    first, second = temporary_name(tmp_path / "a"), temporary_name(tmp_path / "a")
    assert first != second and first.parent == tmp_path and first.name.startswith(".a.")
