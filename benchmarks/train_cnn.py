"""Train a small ResNet or MobileNetV2 on the handwritten digits that scikit-learn carries, enlarged from 8 x 8 to 32 x 32.

    python -m benchmarks.train_cnn resnet --out FOLDER

Needs scikit-learn. Takes a minute or two on two cores. Beside the model lie the pixel values and labels of the digits that it
was trained on, train.npz, and of those it never saw, held_out.npz.
"""

from __future__ import annotations

import os

os.environ.setdefault("GOMP_SPINCOUNT", "2000")

import argparse
import json
import time
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from transformers import (
    MobileNetV2Config,
    MobileNetV2ForImageClassification,
    PreTrainedModel,
    ResNetConfig,
    ResNetForImageClassification,
)

Family = Literal["resnet", "mobilenet"]
FAMILIES: tuple[Family, ...] = get_args(Family)
SIDE, DIGIT_SIDE, CLASSES, BRIGHTEST = 32, 8, 10, 16
HELD_OUT = 500
MEAN, STD = 0.5, 0.5
SMOOTHING = 0.1  # of labels: without it predictions saturate, and only a few images make up a divergence
TRAIN, TEST = "train.npz", "held_out.npz"
PREPROCESSOR = {
    "image_processor_type": "ViTImageProcessor",
    "do_resize": True,
    "size": {"height": SIDE, "width": SIDE},
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": [MEAN] * 3,
    "image_std": [STD] * 3,
}


def untrained(family: Family) -> PreTrainedModel:
    """The ResNet has 3 stages of 2 basic blocks and 0.7 million weights, the MobileNetV2 half of the usual channels."""
    if family == "resnet":
        config = ResNetConfig(
            embedding_size=32, hidden_sizes=[32, 64, 128], depths=[2, 2, 2], layer_type="basic", num_labels=CLASSES
        )
        return ResNetForImageClassification(config)
    return MobileNetV2ForImageClassification(MobileNetV2Config(image_size=SIDE, depth_multiplier=0.5, num_labels=CLASSES))


def digits(seed: int = 0) -> tuple[Float[Tensor, "n C H W"], Int64[Tensor, "n"]]:
    """All digits in an order drawn from `seed`, as a processor makes them, and what they show."""
    from sklearn.datasets import load_digits

    found = load_digits()
    order = torch.randperm(len(found.target), generator=torch.Generator().manual_seed(seed))
    grey = torch.from_numpy(found.data).float().view(-1, 1, DIGIT_SIDE, DIGIT_SIDE) / BRIGHTEST
    enlarged = nn.functional.interpolate(grey, size=(SIDE, SIDE), mode="bilinear", align_corners=False)
    return ((enlarged - MEAN) / STD).expand(-1, 3, -1, -1)[order].contiguous(), torch.from_numpy(found.target)[order]


@torch.inference_mode()
def accuracy(model: PreTrainedModel, pixels: Float[Tensor, "n C H W"], labels: Int64[Tensor, "n"]) -> float:
    """The fraction of the digits that a model in evaluation mode reads right."""
    predicted = torch.cat([model(pixel_values=batch).logits.argmax(-1) for batch in pixels.split(128)])
    return (predicted == labels).float().mean().item()


def train(family: Family, out: Path, *, epochs: int = 30, batch: int = 64, lr: float = 3e-3, seed: int = 0) -> dict[str, float]:
    """Save a trained model, its processor and both parts of the data to `out`; its accuracies and the seconds it took."""
    torch.manual_seed(seed)
    pixels, labels = digits(seed)
    held_out, data = (pixels[:HELD_OUT], labels[:HELD_OUT]), (pixels[HELD_OUT:], labels[HELD_OUT:])
    model = untrained(family).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.05)
    steps, start = epochs * (len(data[0]) // batch), time.time()
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=0.2)
    order = torch.empty(0, dtype=torch.long)
    for step in range(steps):
        if len(order) < batch:
            order = torch.randperm(len(data[0]))
        taken, order = order[:batch], order[batch:]
        optimizer.zero_grad(set_to_none=True)
        logits = model(pixel_values=_moved(data[0][taken])).logits
        loss = nn.functional.cross_entropy(logits, data[1][taken], label_smoothing=SMOOTHING)
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 100 == 99:
            print(f"step {step + 1} of {steps}, loss {loss.item():.3f}, {time.time() - start:.0f} s", flush=True)
    model.eval()
    model.save_pretrained(out)
    (out / "preprocessor_config.json").write_text(json.dumps(PREPROCESSOR), encoding="utf-8")
    for name, (values, shown) in {TRAIN: data, TEST: held_out}.items():
        np.savez(out / name, pixel_values=values.numpy(), labels=shown.numpy())
    return {"train": accuracy(model, *data), "held out": accuracy(model, *held_out), "seconds": time.time() - start}


def _moved(pixels: Float[Tensor, "B C H W"]) -> Float[Tensor, "B C H W"]:
    """Every image by up to two pixels to each side."""
    padded = nn.functional.pad(pixels, (2, 2, 2, 2), value=-MEAN / STD)
    across, down = torch.randint(5, (2, len(pixels))).tolist()
    return torch.stack([one[:, y : y + SIDE, x : x + SIDE] for one, x, y in zip(padded, across, down, strict=True)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("family", choices=FAMILIES)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    print(json.dumps(train(args.family, args.out, seed=args.seed)))


if __name__ == "__main__":
    main()
