from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from compress import checkpoint
from compress.checkpoint import Writer, index, verify, write_shards
from compress.errors import CompressError

TENSORS = {
    "a.weight": torch.arange(12.0).view(3, 4).half(),
    "a.bias": torch.ones(3).half(),
    "b.weight": torch.arange(8).view(2, 4).to(torch.int32),
    "empty": torch.zeros(0, 4),
    "scalar": torch.tensor(3.5, dtype=torch.bfloat16),
}


@pytest.fixture
def source(tmp_path):
    folder = tmp_path / "source"
    (folder / "1_Pooling").mkdir(parents=True)
    save_file(TENSORS, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text('{"model_type": "llama"}')
    (folder / "tokenizer.json").write_bytes(b'{ "odd":   "spacing\\r\\n" }')
    (folder / "1_Pooling" / "config.json").write_text("{}")
    (folder / "pytorch_model.bin").write_bytes(b"pickle")
    (folder / ".cache").mkdir()
    (folder / ".cache" / "x").write_text("x")
    return folder


def write(source, out, overwrite=False):
    with Writer(source, out, overwrite) as writer:
        writer.block(0, {"a.packed": torch.full((3,), 7, dtype=torch.int32), "a.scale": torch.ones(3, 1).half()})
        files = writer.finish({"a.weight": ["a.packed", "a.scale"]}, {"model_type": "llama", "new": 1}, {"extra.json": "{}"})
        writer.seal(json.dumps({"files": {name: vars(info) for name, info in files.items()}}))


def test_index_is_what_was_saved(source):
    found = index(source)
    assert {name: info.shape for name, info in found.items()} == {name: tuple(t.shape) for name, t in TENSORS.items()}
    assert found["scalar"].dtype == "BF16"
    info = found["b.weight"]
    assert info.file.read_bytes()[info.begin : info.end] == TENSORS["b.weight"].numpy().tobytes()
    assert (info.nbytes, info.numel) == (32, 8)


def test_a_copy_replaces_some_tensors_and_keeps_the_rest_byte_for_byte(source, tmp_path):
    write(source, tmp_path / "out")
    stored = load_file(tmp_path / "out" / "model.safetensors")
    order = [name for name in index(source) for name in (["a.packed", "a.scale"] if name == "a.weight" else [name])]
    assert list(index(tmp_path / "out")) == order
    for name in TENSORS.keys() - {"a.weight"}:
        assert torch.equal(stored[name], TENSORS[name])
    assert stored["a.packed"].tolist() == [7, 7, 7]
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "1_Pooling", "compress_report.json", "config.json", "extra.json", "model.safetensors", "tokenizer.json",
    ]  # fmt: skip
    assert json.loads((tmp_path / "out" / "config.json").read_text())["new"] == 1
    verify(tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "source"]


def test_shards_hold_what_one_file_would(source, tmp_path):
    tensors = index(source)
    (tmp_path / "many").mkdir()
    files = write_shards(tmp_path / "many", tensors, limit=30)
    assert len(files) == 4
    assert index(tmp_path / "many").keys() == TENSORS.keys()
    document = json.loads((tmp_path / "many" / checkpoint.INDEX.format("model")).read_text())
    assert document["metadata"]["total_size"] == sum(t.nbytes for t in TENSORS.values())
    for name, file in document["weight_map"].items():
        assert torch.equal(load_file(tmp_path / "many" / file)[name], TENSORS[name])
    for name, info in files.items():
        path = tmp_path / "many" / name
        assert (path.stat().st_size, checkpoint.checksum(path)) == (info.nbytes, info.crc32)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_nothing_is_left_of_a_run_that_fails(source, tmp_path, error):
    out = tmp_path / "out"

    def fail():
        with Writer(source, out) as writer:
            writer.block(0, {"x": torch.ones(2)})
            raise error

    with pytest.raises(error):
        fail()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["source"]


def test_overwriting_keeps_the_old_folder_until_the_new_one_is_finished(source, tmp_path):
    out = tmp_path / "out"
    write(source, out)
    (out / "mark").write_text("old")
    with pytest.raises(CompressError, match=r"exists and is not empty.*--overwrite"):
        Writer(source, out)
    with pytest.raises(RuntimeError), Writer(source, out, overwrite=True):
        raise RuntimeError
    assert (out / "mark").is_file()
    write(source, out, overwrite=True)
    assert not (out / "mark").exists()


def test_targets_that_must_not_be_replaced(source, tmp_path):
    with pytest.raises(CompressError, match="lies in the source model"):
        Writer(source, source / "small")
    with pytest.raises(CompressError, match="lies in the source model"):
        Writer(source, source, overwrite=True)
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").write_text("meow")
    with pytest.raises(CompressError, match="does not look like a model folder"):
        Writer(source, tmp_path / "photos", overwrite=True)
    (tmp_path / "empty").mkdir()
    write(source, tmp_path / "empty")


def test_a_full_disk_is_named_and_leaves_nothing(source, tmp_path, monkeypatch):
    def full(*_args, **_kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(CompressError, match=r"Cannot write .*out: .*No space left on device"):
        write(source, tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["source"]


def test_too_little_space_is_known_beforehand(source, tmp_path):
    with pytest.raises(CompressError, match="GB free"), Writer(source, tmp_path / "out") as writer:
        writer.check_space(10**18)


@pytest.mark.parametrize("keep", [0, 5, 20, -1])
def test_truncated_files_are_named(source, keep):
    file = source / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(CompressError, match=r"model\.safetensors is (truncated|damaged)"):
        index(source)


def test_a_flipped_bit_anywhere_is_found(source, tmp_path):
    write(source, tmp_path / "out")
    file = tmp_path / "out" / "model.safetensors"
    good = file.read_bytes()
    for at in (3, 12, 40, len(good) // 2, len(good) - 1):
        file.write_bytes(good[:at] + bytes([good[at] ^ 4]) + good[at + 1 :])
        with pytest.raises(CompressError, match=r"model\.safetensors"):
            verify(tmp_path / "out")
    file.write_bytes(good)
    verify(tmp_path / "out")


def test_missing_folders_files_and_shards_are_named(source, tmp_path):
    with pytest.raises(CompressError, match="There is no folder"):
        index(tmp_path / "nowhere")
    with pytest.raises(CompressError, match=r"no \.safetensors"):
        index(source / "1_Pooling")
    (source / "model.safetensors").unlink()
    (source / checkpoint.INDEX.format("model")).write_text(json.dumps({"weight_map": {"a": "model-00001-of-00002.safetensors"}}))
    with pytest.raises(CompressError, match="model-00001-of-00002"):
        index(source)
    (source / checkpoint.INDEX.format("model")).write_text("{")
    with pytest.raises(CompressError, match="is damaged"):
        index(source)
