"""Native families through the library: one key changed, the same seed, the same video. Each is the other's oracle."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.models.case import cases
from tests.models.diffusers.conftest import clip, frames, load, picture, png
from vidgen import engine
from vidgen.errors import ConfigError

CASES = cases()
FIELDS = (
    *("height", "width", "num_frames", "fps", "num_inference_steps", "guidance_scale", "negative_prompt", "seed"),
    *("sigmas", "timesteps"),
)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in CASES if "latent-concat" not in name])
def test_a_native_checkpoint_through_the_library_gives_the_native_frames(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    case.write(tmp_path)
    native = engine.load(str(tmp_path), task=case.task)
    through = load(tmp_path, task=case.task, pipeline=case.pipeline)
    asked = {"seed": 3, **case.sampling}
    prompt = str(asked.pop("prompt", "a red circle"))
    height, width = int(asked["height"]), int(asked["width"])
    media: dict[str, Any] = {"image": png(picture(height, width)), "last_image": png(picture(height, width, 9))}
    media["video"] = clip(int(asked["num_frames"]), height, width)[1]
    takes = [field for field, needed in native.spec.TASKS[case.task].items() if needed or field in case.media]
    given = {field: media[field] for field in takes}
    ours = native.request(prompt, **asked, **given)
    params = {key: value for key, value in ours.params if key in through.spec.PARAMS}
    theirs = through.request(prompt, **{field: getattr(ours, field) for field in FIELDS}, params=params, **given)
    made, expected = frames(native, ours)[0], frames(through, theirs)[0]
    assert made.std() > 5, "flat frames would prove nothing"
    # 1e-3 of the range may fall on the two sides of a rounding.
    assert np.abs(made.astype(int) - expected.astype(int)).max() <= 1


def test_a_pipeline_that_returns_fewer_frames_than_asked_is_refused_by_name(tmp_path: Path) -> None:
    case = CASES["hunyuan/i2v-latent-concat"]
    case.write(tmp_path)
    with pytest.raises(ConfigError, match=r"returns 4 frames fewer .* runs it natively"):
        load(tmp_path, task="i2v", pipeline=case.pipeline)
