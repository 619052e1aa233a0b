"""Files that are replaced."""

import pytest

from crevnet.machine.files import remove_unfinished, replace_file


def test_replaced_file_is_the_old_one_or_the_new_one(tmp_path):
    path = tmp_path / "file"
    replace_file(path, lambda file: file.write(b"old"))

    def fails(file):
        file.write(b"new")
        raise ValueError("halfway")

    with pytest.raises(ValueError, match="halfway"):
        replace_file(path, fails)
    assert [(p.name, p.read_bytes()) for p in tmp_path.iterdir()] == [("file", b"old")]
    replace_file(path, lambda file: file.write(b"new"))
    assert path.read_bytes() == b"new"
    (tmp_path / "file.1.unfinished").write_bytes(b"half")
    remove_unfinished(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
