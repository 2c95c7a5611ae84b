"""What benchmarks of quality share: how much calibration text, a float32 copy that all sides compress, and one judge."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from compress import side_files

SAMPLES, SEQ_LEN = 128, 256
KL = "held-out KL to dense"
AT_ONCE = 16  # windows


@dataclass(frozen=True)
class Judged:
    """Mean next-token loss, and mean KL(dense || model), in nats per token."""

    loss: float
    kl: float


class Judge:
    """Compares models with a dense one on fixed windows of token ids, running the dense one only once."""

    def __init__(self, dense: nn.Module, windows: Tensor) -> None:
        self.windows = windows
        self.dense = [_log_probabilities(dense, ids) for ids in windows.split(AT_ONCE)]

    def __call__(self, model: nn.Module) -> Judged:
        """Both measures of a model with the dense one's vocabulary."""
        loss = kl = 0.0
        for ids, log_p in zip(self.windows.split(AT_ONCE), self.dense, strict=True):
            log_q = _log_probabilities(model, ids)
            loss -= log_q[:, :-1].gather(-1, ids[:, 1:, None]).sum().item()
            kl += nn.functional.kl_div(log_q, log_p, reduction="sum", log_target=True).item()
        count, length = self.windows.shape
        return Judged(loss / (count * (length - 1)), kl / (count * length))


@torch.inference_mode()
def _log_probabilities(model: Any, ids: Tensor) -> Tensor:
    logits: Tensor = model(input_ids=ids, use_cache=False).logits
    return logits.float().log_softmax(-1)


def float32_copy(model: Path, copy: Path) -> Path:
    """The model in float32, which all sides run in, with its tokenizer."""
    AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).save_pretrained(copy)
    side_files.copy(model, copy, ("config.json",))
    return copy
