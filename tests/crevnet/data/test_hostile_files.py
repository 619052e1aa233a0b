"""Files from strangers, in the place of every HDF5 file that is read: refused in one line, before any value is, within 10 seconds
and 500 MB."""

import shutil
import zipfile

import h5py
import numpy as np
import pytest
from apart import refused, run_apart
from hostile_h5 import (
    H5,
    NO_FILES,
    SECRET,
    big_endian,
    deep_groups,
    device,
    external,
    external_beside,
    external_link,
    fifo,
    group,
    many_objects,
    many_slots,
    never_written,
    null_dataspace,
    put,
    small_chunk_bomb,
    text,
    virtual,
)

from crevnet.cli import main

EVERY = {**H5, **NO_FILES}
SOME = (virtual, external, big_endian, null_dataspace, group, text, never_written, many_slots)
"""One of each sort, for readers that come through the same door as others."""
SLOTS = ("--slots", "[16,34]")
HERE = "Here/Here_test/20180103_100m_bins.h5"


def named(kind):
    return kind.__name__


@pytest.fixture(scope="module")
def practice(tmp_path_factory, write_day, points):
    """Test cases of 2019 with the truth, and a submission of zeros, in a folder."""
    root = tmp_path_factory.mktemp("practice")
    write_day(root, points(0, 40), "Here", "20180101", "training")
    write_day(root, points(2, 40), "Here", "20180103", "validation")
    main([str(a) for a in ("data", "holdout", "--data.root", root, "--out", root, *SLOTS)])
    answer = root / "submission" / HERE
    answer.parent.mkdir(parents=True)
    with h5py.File(answer, "w") as file:
        file.create_dataset("array", data=np.zeros((2, 3, 21, 14, 3), np.uint8), compression="gzip")
    return root


@pytest.fixture
def own(practice, tmp_path):
    return shutil.copytree(practice, tmp_path / "practice")


def listed(root, submission):
    """What `score` lists of a submission that it refuses."""
    status, ended = run_apart("score", submission, "--truth", root, "--data.root", root, *SLOTS)
    lines = ended.err.splitlines()
    assert status == 2 and len(lines) == 1, ended
    assert f"{submission} cannot be scored: " in lines[0] and "write it again with crevnet submit" in lines[0]
    return ended.out.splitlines()


def test_an_honest_submission_is_scored(practice):
    status, ended = run_apart("score", practice / "submission", "--truth", practice, "--data.root", practice, *SLOTS)
    assert status == 0, ended


@pytest.mark.parametrize("kind", EVERY, ids=named)
def test_submissions(kind, own):
    put(kind, own / "submission" / HERE)
    said = {deep_groups: "no dataset 'array'", device: "is a symbolic link"}.get(kind, EVERY[kind])
    [line] = listed(own, own / "submission")
    assert line.startswith(f"{HERE}: ") and said in line
    if kind in H5 and kind not in (many_objects, deep_groups):  # which are larger than what is expected
        archive = shutil.make_archive(str(own / "submission"), "zip", own / "submission")
        [line] = listed(own, archive)
        assert line.startswith(f"{HERE}: ") and said in line


def test_chunks_of_a_submission_that_unpack_to_more(own):
    put(small_chunk_bomb, own / "submission" / HERE)
    [line] = listed(own, own / "submission")
    assert line.startswith(f"{HERE}: cannot be read (a chunk of ") and "decompresses to more than 5296 bytes" in line


@pytest.mark.parametrize("kind", EVERY, ids=named)
def test_days(kind, own):
    path = own / "Here" / "Here_training" / "20180101_100m_bins.h5"
    put(kind, path)
    line = refused("show", path)
    assert str(path) in line and EVERY[kind] in line


@pytest.mark.parametrize("kind", (virtual, big_endian, never_written, fifo), ids=named)
def test_days_to_train_on(kind, own):
    path = own / "Here" / "Here_training" / "20180101_100m_bins.h5"
    put(kind, path)
    line = refused("fit", "--data.root", own, "--out", own / "run")
    assert str(path) in line and EVERY[kind] in line and not (own / "run").exists()


def zipped(path, *entries, method=zipfile.ZIP_DEFLATED):
    """A zip of entries of a name and as many mebibytes of zeros."""
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, mebibytes in entries:
            with archive.open(name, "w") as file:
                for _ in range(mebibytes):
                    file.write(bytes(2**20))
    return path


def test_a_zip_bomb(own):
    [line] = listed(own, zipped(own / "bomb.zip", (HERE, 300)))
    assert line.startswith(f"{HERE}: cannot be read (it decompresses to 314572800 bytes or more, expected at most ")


def test_a_zip_entry_that_says_too_little_of_its_size(own):
    path = zipped(own / "bomb.zip", (HERE, 64))
    content = path.read_bytes()
    path.write_bytes(content.replace((64 * 2**20).to_bytes(4, "little"), (100).to_bytes(4, "little")))
    [line] = listed(own, path)
    assert line.startswith(f"{HERE}: cannot be read (") and "CRC" in line


@pytest.mark.parametrize("method", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_a_zip_that_unpacks_all_at_once(method, own):
    [line] = listed(own, zipped(own / "bomb.zip", (HERE, 60), method=method))
    assert f"it is compressed by method {method}, expected stored or deflated: zip it again" in line


def test_names_in_a_zip(own):
    """Line breaks, terminals' control sequences, and thousands of them."""
    names = ["a\nHere: \x1b[2J", *(f"{number:04d}" for number in range(1000))]
    *listed_first, more, missing = listed(own, zipped(own / "many.zip", *((name, 0) for name in names)))
    assert len(listed_first) == 20 and more == "981 more files: unexpected" and missing == f"{HERE}: missing"
    lines = listed(own, zipped(own / "one.zip", (names[0], 0)))
    assert lines[0] == r"'a\nHere: \x1b[2J': unexpected"


@pytest.mark.parametrize("kind", NO_FILES, ids=named)
def test_what_is_no_file_in_the_place_of_a_zip(kind, own):
    kind(own / "submission.zip")
    line = refused("score", own / "submission.zip", "--truth", own, *SLOTS)
    assert f"{own / 'submission.zip'} is neither a folder nor a zip (it {NO_FILES[kind].partition(',')[0]}" in line


@pytest.mark.parametrize("kind", SOME, ids=named)
def test_truth(kind, own):
    path = own / HERE.replace("_test/", "_test_truth/")
    put(kind, path)
    line = refused("score", own / "submission", "--truth", own, "--data.root", own, *SLOTS)
    assert str(path) in line and EVERY[kind] in line


@pytest.fixture
def practice_2021(cities_2021, crevnet):
    """Test cases of 2021 with the truth, in the data's own folder, and a submission of zeros."""
    held = ("--protocol", "2021", "--data.root", cities_2021, "--data.cities", "[BERLIN]")
    crevnet("data", "holdout", *held, "--data.validation_dates", "[2019-01-02]", "--count", "1", "--out", cities_2021)
    path = cities_2021 / "submission" / "BERLIN" / "BERLIN_test_temporal.h5"
    path.parent.mkdir(parents=True)
    with h5py.File(path, "w") as file:
        file["array"] = np.zeros((1, 6, 21, 14, 8), np.uint8)
    return cities_2021


@pytest.mark.parametrize("name", ["temporal", "additional_temporal", "temporal_truth"])
def test_files_of_2021(name, practice_2021):
    """In the place of each of the files that `score` reads."""
    root, path = practice_2021, practice_2021 / "BERLIN" / f"BERLIN_test_{name}.h5"
    good = path.read_bytes()
    for kind in SOME:
        put(kind, path)
        line = refused("score", root / "submission", "--truth", root, "--protocol", "2021")
        assert str(path) in line and EVERY[kind] in line
        path.unlink()
        path.write_bytes(good)


def test_static_files(cities_2021):
    path = cities_2021 / "BERLIN" / "BERLIN_static.h5"
    fit = ("fit", "--protocol", "2021", "--data.root", cities_2021, "--data.validation_dates", "[2019-01-02]")
    good = path.read_bytes()
    for kind in (*SOME, fifo):
        put(kind, path)
        line = refused(*fit, "--out", cities_2021 / "run")
        assert str(path) in line and EVERY[kind] in line
        path.unlink()
        path.write_bytes(good)
    with h5py.File(path, "r+") as file:
        file["array"][0] = 0
    line = refused(*fit, "--out", cities_2021 / "run")
    assert f"{path} has a road map of only zeros, expected roads" in line


@pytest.mark.parametrize("kind", [*SOME, fifo, external_beside, external_link], ids=named)
def test_repack(kind, own, tmp_path):
    """Neither the reader's other files nor what they hold get into the output."""
    pytest.importorskip("hdf5plugin")
    path = own / "Here" / "Here_training" / "20180101_100m_bins.h5"
    put(kind, path)
    line = refused("data", "repack", own / "Here" / "Here_training", tmp_path / "packed")
    assert str(path) in line and EVERY.get(kind, "has external storage") in line
    assert not any(SECRET[:20] in file.read_bytes() for file in (tmp_path / "packed").rglob("*") if file.is_file())


def test_a_link_to_a_day_file_is_followed(own):
    """People keep large files on other disks."""
    path = own / "Here" / "Here_training" / "20180101_100m_bins.h5"
    path.rename(own / "elsewhere.h5")
    path.symlink_to(own / "elsewhere.h5")
    status, ended = run_apart("show", path)
    assert status == 0, ended


def test_a_link_in_a_submission_is_not(own):
    """It may lead to the truth."""
    path = own / "submission" / HERE
    path.rename(own / "elsewhere.h5")
    path.symlink_to(own / "elsewhere.h5")
    [line] = listed(own, own / "submission")
    assert f"{HERE}: cannot be read (it is a symbolic link, expected the file itself" in line


# --- what we write can be told from what has been damaged


def lose_a_chunk(path):
    """As a flipped bit in the index does."""
    with h5py.File(path) as file:
        array = file["array"]
        kept = [array.id.get_chunk_info(number).chunk_offset for number in range(array.id.get_num_chunks())][:-1]
        stored = {place: array.id.read_direct_chunk(place) for place in kept}
        properties, attributes = array.id.get_create_plist(), dict(array.attrs)
        shape, kind = array.shape, array.id.get_type()
    with h5py.File(path, "w") as file:
        made = h5py.h5d.create(file.id, b"array", kind, h5py.h5s.create_simple(shape), properties)
        for place, (mask, content) in stored.items():
            made.write_direct_chunk(place, content, mask)
        file["array"].attrs.update(attributes)


@pytest.mark.parametrize("name", [HERE, "packed"], ids=["holdout", "repack"])
def test_a_chunk_that_is_lost_from_a_file_that_we_wrote(name, own, crevnet):
    path = own / name
    if name == "packed":
        pytest.importorskip("hdf5plugin")
        crevnet("data", "repack", own / "Here" / "Here_training", path)
        path /= "20180101_100m_bins.h5"
    lose_a_chunk(path)
    line = refused("show", path)
    assert str(path) in line and "its chunks are not those that were written" in line


def test_bytes_of_a_chunk_that_have_changed(own, crevnet):
    """Zstandard itself does not notice."""
    pytest.importorskip("hdf5plugin")
    crevnet("data", "repack", own / "Here" / "Here_training", own / "packed")
    path = own / "packed" / "20180101_100m_bins.h5"
    with h5py.File(path) as file:
        chunk = file["array"].id.get_chunk_info(0)
    content = bytearray(path.read_bytes())
    content[chunk.byte_offset + chunk.size // 2] ^= 1
    path.write_bytes(content)
    line = refused("show", path)
    assert f"{path} cannot be read (" in line and "download the file again" in line


def test_a_sealed_file_that_another_program_wrote_anew(own, tmp_path):
    """With other chunks, and with chunks of zeros where there were none; attributes are copied."""
    source = own / HERE
    for number, chunks in enumerate([(1, 21, 14, 3), (4, 21, 14, 3)]):
        path = tmp_path / f"2018010{number + 1}_100m_bins.h5"
        with h5py.File(source) as old, h5py.File(path, "w") as new:
            array = new.create_dataset("array", data=old["array"][()], chunks=chunks)
            array.attrs.update(old["array"].attrs)
        status, ended = run_apart("show", path)
        assert status == 0, ended


def test_a_zip_of_a_version_to_come(own):
    path = zipped(own / "new.zip", (HERE, 0))
    content = bytearray(path.read_bytes())
    content[content.index(b"PK\x01\x02") + 6] = 99
    path.write_bytes(content)
    line = refused("score", path, "--truth", own, *SLOTS)
    assert f"{path} is neither a folder nor a zip (zip file version 9.9); expected the output of crevnet submit" in line
