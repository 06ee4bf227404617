"""The parsed JSON files of the published Wan 2.1 checkpoints for text, as far as they are read."""

from __future__ import annotations

from tests.models.wan.configurations import Configs, full_size

CHECKPOINTS: dict[str, Configs] = {"Wan 1.3B": full_size(12, 8960, 30), "Wan 14B": full_size(40, 13824, 40)}
