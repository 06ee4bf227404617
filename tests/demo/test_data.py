"""What the demo's world is: its prompts, its clips, its tokenizer, its dataset, and the judge that reads them back."""

from __future__ import annotations

from collections import Counter
from itertools import combinations
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from vidgen import media
from vidgen.demo import data, dataset, tokenizer
from vidgen.demo.measure import Result, judge

ROOT = Path(__file__).parents[2]


def true_clips(combinations: list[data.Combination], seed: int) -> torch.Tensor:
    """uint8 [B, F, H, W, 3] straight from the generator, no model involved."""
    video = data.clips(combinations, torch.Generator().manual_seed(seed))
    return ((video + 1) * 127.5).round().byte().permute(0, 2, 3, 4, 1)


def test_a_quarter_of_the_combinations_is_never_drawn_for_training() -> None:
    assert len(data.COMBINATIONS) == 96
    assert len(data.HELD_OUT) == 24
    drawn = set(data.draw(4000, torch.Generator().manual_seed(0)))
    assert drawn == set(data.TRAINED)  # 4000 draws miss one of 72 with a chance of e**-51
    assert not drawn & set(data.HELD_OUT)


def test_training_sees_every_pair_of_words_that_a_held_out_prompt_is_made_of() -> None:
    trained = {pair for c in data.TRAINED for pair in combinations((c.colour, c.shape, c.direction), 2)}
    held_out = {pair for c in data.HELD_OUT for pair in combinations((c.colour, c.shape, c.direction), 2)}
    assert held_out <= trained


def test_held_out_prompts_cover_every_word() -> None:
    words = Counter(word for c in data.HELD_OUT for word in (c.colour, c.shape, c.direction))
    assert set(words) == {*data.COLOURS, *data.SHAPES, *data.DIRECTIONS}


def test_a_clip_is_black_around_a_shape_that_stays_inside_the_picture() -> None:
    video = data.clips(list(data.COMBINATIONS), torch.Generator().manual_seed(1))
    assert video.shape == (96, 3, data.FRAMES, data.SIZE, data.SIZE)
    border = torch.ones(data.SIZE, data.SIZE, dtype=torch.bool)
    border[1:-1, 1:-1] = False
    assert (video[..., border] == -1).all()
    lit = (video.amax(1) > -0.9).float().mean((2, 3))  # share of each frame that is not black
    assert lit.min() > 0.04
    assert lit.max() < 0.16


def test_a_stretch_of_a_clip_has_the_frames_that_were_asked_for() -> None:
    assert data.clips(list(data.TRAINED[:3]), torch.Generator().manual_seed(2), frames=5).shape[2] == 5


def test_equal_seeds_draw_equal_clips_and_other_seeds_draw_other_ones() -> None:
    chosen = list(data.TRAINED[:4])
    assert torch.equal(true_clips(chosen, 3), true_clips(chosen, 3))
    assert not torch.equal(true_clips(chosen, 3), true_clips(chosen, 4))


def test_the_judge_reads_every_combination_right_from_a_true_clip() -> None:
    for combination, frames in zip(data.COMBINATIONS, true_clips(list(data.COMBINATIONS), 5), strict=True):
        assert all(Result(combination, 5, judge(frames.numpy())).right), combination


def test_the_judge_reads_a_true_clip_right_after_mp4(tmp_path: Path) -> None:
    chosen = [c for c in data.COMBINATIONS if c.direction == "left"][::4]
    for combination, frames in zip(chosen, true_clips(chosen, 6), strict=True):
        encoder = media.start(tmp_path / "clip.mp4", (data.SIZE, data.SIZE), data.FPS)
        encoder.frames(frames.numpy())
        encoder.finish()
        assert all(Result(combination, 6, judge(media.read_frames(tmp_path / "clip.mp4"))).right), combination


@pytest.mark.parametrize("what", ["black", "noise", "still"])
def test_the_judge_sees_no_motion_where_there_is_none(what: str) -> None:
    frames = true_clips([data.TRAINED[0]], 7)[0].numpy()
    if what == "black":
        frames = frames * 0
    elif what == "noise":
        frames = torch.randint(0, 256, frames.shape, generator=torch.Generator().manual_seed(8)).byte().numpy()
    else:
        frames[:] = frames[:1]
    assert judge(frames).direction == "unclear"


def test_a_reversed_clip_goes_the_other_way() -> None:
    (red_left,) = (c for c in data.COMBINATIONS if c.prompt == "a red circle moving left")
    seen = judge(true_clips([red_left], 9)[0].numpy()[::-1])
    assert (seen.colour, seen.shape, seen.direction) == ("red", "circle", "right")


def test_a_prompt_of_the_demo_has_no_unknown_word_and_a_known_length() -> None:
    words = tokenizer.build()
    for combination in data.COMBINATIONS:
        encoded = words.encode(combination.prompt)
        assert tokenizer.UNKNOWN not in encoded.tokens
        assert len(encoded.ids) == tokenizer.PROMPT_TOKENS
        assert encoded.tokens[-1] == tokenizer.EOS


@pytest.mark.parametrize(
    "text", ["", "A man, walking -- slowly?", "красный круг 🟥 \n\t", "</s> <pad> circle", "x" * 5000]
)
def test_any_text_is_tokenized_alike_by_both_libraries(text: str, tmp_path: Path) -> None:
    tokenizer.save(tmp_path)
    plain = Tokenizer.from_file(str(tmp_path / "tokenizer.json")).encode(text).ids
    assert AutoTokenizer.from_pretrained(tmp_path, local_files_only=True)(text)["input_ids"] == plain
    assert plain[-1] == tokenizer.WORDS.index(tokenizer.EOS)


def test_the_shipped_dataset_is_the_one_the_code_writes() -> None:
    shipped = pq.read_table(ROOT / "configs" / "demo.parquet")
    assert shipped.equals(dataset.table())


def test_the_dataset_has_fixed_seeds_open_seeds_and_held_out_prompts() -> None:
    rows = dataset.table().to_pylist()
    assert len(rows) >= 24
    assert len({row["prompt"] for row in rows}) == len(rows)
    assert {row["seed"] is None for row in rows} == {True, False}
    assert sum(row["held_out"] for row in rows) >= 5
    known = {c.prompt for c in data.COMBINATIONS}
    assert all(row["prompt"] in known for row in rows)
