from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from compress.calib import data
from compress.errors import CompressError

PREPROCESSOR = {
    "image_processor_type": "ViTImageProcessor",
    "do_resize": True,
    "size": {"height": 8, "width": 8},
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
}


@pytest.fixture(name="pictures")
def _pictures(tmp_path: Path) -> Path:
    from PIL import Image

    folder = tmp_path / "pictures"
    folder.mkdir()
    for i, suffix in enumerate(["png", "jpg", "webp", "bmp", "jpeg", "PNG"]):
        Image.new("RGB", (20 + i, 12), (40 * i, 40 * i, 40 * i)).save(folder / f"{i}.{suffix}")
    Image.new("L", (9, 9), 255).save(folder / "grey.png")
    (folder / "notes.md").write_text("not a picture")
    return folder


@pytest.fixture(name="image_model")
def _image_model(tmp_path: Path) -> Path:
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(PREPROCESSOR))
    return tmp_path


def test_a_folder_of_pictures_goes_through_the_models_processor(pictures: Path, image_model: Path) -> None:
    calibration = data.images(pictures, image_model, samples=7)
    pixels = calibration.inputs["pixel_values"]
    assert pixels.shape == (7, 3, 8, 8)
    expected = torch.tensor([0, 40, 80, 120, 160, 200, 255]) / 255 * 2 - 1  # in file order; grey.png is last
    assert torch.allclose(pixels.mean((1, 2, 3)), expected, atol=0.02)
    assert calibration.source == f"{pictures}, 7 images, seed 0"


def test_pictures_are_drawn_by_the_seed(pictures: Path, image_model: Path) -> None:
    drawn = [
        data.images(pictures, image_model, samples=3, seed=seed).inputs["pixel_values"].mean((1, 2, 3)) for seed in (0, 0, 1)
    ]
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


def test_npz(tmp_path: Path) -> None:
    stored = np.arange(5 * 3 * 4 * 4, dtype=np.float64).reshape(5, 3, 4, 4)
    np.savez(tmp_path / "a.npz", pixel_values=stored)
    pixels = data.images(tmp_path / "a.npz", tmp_path, samples=5).inputs["pixel_values"]
    assert pixels.dtype == torch.float32
    assert np.array_equal(pixels.numpy(), stored)
    assert data.images(tmp_path / "a.npz", tmp_path, samples=2).samples == 2


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        (
            {"pixel_values": np.zeros((2, 3, 4), np.float32)},
            r"pixel_values is float32 \[2, 3, 4\]; expected floats \[n, C, H, W\]",
        ),
        ({"pixel_values": np.zeros((2, 3, 4, 4), np.uint8)}, "pixel_values is uint8"),
        ({"pixel_values": np.full((2, 3, 4, 4), np.nan)}, "NaN or infinite"),
        ({"pixel_values": np.full((2, 3, 4, 4), np.inf)}, "NaN or infinite"),
        ({"images": np.zeros((2, 3, 4, 4))}, "no array pixel_values; it has images"),
        ({"pixel_values": np.zeros((1, 3, 4, 4))}, r"has 1 images, but 2 were asked for\. Use --samples 1"),
        ({"pixel_values": np.array([{}], dtype=object)}, "Cannot read"),  # a pickle: never loaded
    ],
)
def test_bad_npz(tmp_path: Path, arrays: dict[str, Any], message: str) -> None:
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(CompressError, match=message):
        data.images(tmp_path / "a.npz", tmp_path, samples=2)


@pytest.mark.parametrize("content", [b"", b"not a zip", b"PK\x03\x04broken"])
def test_npz_that_is_none(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.npz").write_bytes(content)
    with pytest.raises(CompressError, match=r"Cannot read .*a\.npz"):
        data.images(tmp_path / "a.npz", tmp_path, samples=1)


def test_bad_image_sources(tmp_path: Path, pictures: Path, image_model: Path) -> None:
    with pytest.raises(CompressError, match="An image model needs --calib"):
        data.images(None, image_model, samples=1)
    with pytest.raises(CompressError, match="does not exist"):
        data.images(tmp_path / "nowhere", image_model, samples=1)
    (tmp_path / "a.tar").write_bytes(b"x")
    with pytest.raises(CompressError, match="unknown suffix"):
        data.images(tmp_path / "a.tar", image_model, samples=1)
    with pytest.raises(CompressError, match=r"has 7 images, but 8 were asked for\. Use --samples 7"):
        data.images(pictures, image_model, samples=8)
    (tmp_path / "empty").mkdir()
    with pytest.raises(CompressError, match=r"has 0 images, but 1 were asked for\. Pictures are"):
        data.images(tmp_path / "empty", image_model, samples=1)
    with pytest.raises(CompressError, match="no image processor"):
        data.images(pictures, tmp_path / "empty", samples=1)


def test_a_picture_that_is_none(pictures: Path, image_model: Path) -> None:
    (pictures / "0.png").write_bytes(b"not a picture")
    with pytest.raises(CompressError, match=r"0\.png is not a picture"):
        data.images(pictures, image_model, samples=7)


def test_no_torchvision_is_needed(pictures: Path, image_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    used: list[Any] = []
    load = transformers.AutoImageProcessor.from_pretrained
    monkeypatch.setattr(data.AutoImageProcessor, "from_pretrained", lambda *a, **k: used.append(load(*a, **k)) or used[-1])
    data.images(pictures, image_model, samples=1)
    assert type(used[0]).__name__.endswith("Pil")
