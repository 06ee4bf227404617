"""The loop over steps, on a pipeline of twenty lines: what is counted, saved, cancelled, batched and refused."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pytest
import torch

from vidgen import loop
from vidgen.conditioning import Conditioning
from vidgen.errors import Cancelled, CapacityError, ItemError
from vidgen.loop import Loop, State, groups
from vidgen.sampling.step import Draws, Guidance, History, Sampler, Schedule, Start
from vidgen.text.prompt import Prompt, Text
from vidgen.types import Hooks, Request

SHAPE = (2, 3)
STEPS = 6


class Mock:
    """Predicts a mix of the latents and the prompt's length, and draws fresh noise at every step."""

    device = torch.device("cpu")

    def __init__(self) -> None:
        self.dtypes = {"transformer": torch.bfloat16, "vae": torch.float32}
        self.encoded: list[str] = []
        self.seen: list[torch.Tensor] = []
        self.scales: list[float] = []
        self.decoded = 0
        self.pin: tuple[torch.Tensor, torch.Tensor] | None = None
        self.break_prediction: Any = lambda x: x
        self.break_frames: Any = lambda x: x

    def texts(self, request: Request, media: Conditioning) -> dict[str, Prompt]:
        prompts = {"conditional": Prompt(request.prompt)}
        return prompts | ({"unconditional": Prompt(request.negative_prompt)} if request.guidance_scale > 1 else {})

    def encode_text(self, prompts: Sequence[Prompt]) -> list[Text]:
        self.encoded += [prompt.text for prompt in prompts]
        return [Text(prompt.digest, torch.full((1, 4), float(len(prompt.text))), 1) for prompt in prompts]

    def schedule(self, request: Request) -> Schedule:
        return Schedule.flow([900.0 - i for i in range(STEPS)], [1 - i / STEPS for i in range(STEPS + 1)])

    def begin(
        self,
        requests: Sequence[Request],
        media: Sequence[Conditioning],
        texts: Mapping[str, Sequence[Text]],
        schedule: Schedule,
        draws: Draws,
    ) -> Start:
        conditioning = {
            branch: torch.stack([text.embedding.mean() for text in prompts]) for branch, prompts in texts.items()
        }
        return Start(draws.normal(SHAPE), conditioning, self.pin)

    def guidance(self, request: Request, schedule: Schedule, i: int) -> Guidance:
        branches = ("conditional", "unconditional") if request.guidance_scale > 1 else ("conditional",)
        return Guidance(request.guidance_scale, branches)

    def predict(self, x: torch.Tensor, schedule: Schedule, i: int, conditioning: torch.Tensor, cp: Any) -> torch.Tensor:
        self.seen.append(x)
        return self.break_prediction(torch.sin(x) + conditioning.view(-1, 1, 1) / 50)

    def sampler(self, request: Request, schedule: Schedule) -> Sampler:
        def step(
            x: torch.Tensor, prediction: torch.Tensor, i: int, history: History, draws: Draws
        ) -> tuple[torch.Tensor, History]:
            last = history.get("last", torch.zeros_like(x))
            return x - 0.1 * prediction + 0.05 * last + 0.01 * draws.normal(SHAPE), {"last": prediction}

        return step

    def decode(self, latents: torch.Tensor, request: Request, draws: Draws, ranks: Any) -> Iterator[torch.Tensor]:
        for _ in range(request.num_frames):
            self.decoded += 1
            yield self.break_frames(torch.sigmoid(latents[0, :, :, None]).expand(2, 3, 3)[None])


def request(
    seed: int = 0, guidance: float = 5.0, prompt: str = "a cat", negative: str = "", frames: int = 2
) -> Request:
    return Request("t2v", prompt, negative, seed, 2, 3, frames, 8.0, STEPS, guidance, "x")


def key(request: Request) -> str:
    return str(request.num_frames)


def frames(mock: Mock, *requests: Request, hooks: Hooks | None = None, batch: int | None = None) -> list[np.ndarray]:
    videos = Loop(mock, key).generate(requests, hooks or Hooks(), batch)
    return [np.concatenate(list(video.chunks)) for video in videos]


def last_state(mock: Mock, *requests: Request, hooks: Hooks | None = None) -> State:
    states: list[State] = []
    hooks = hooks or Hooks()
    hooks.save = states.append
    frames(mock, *requests, hooks=hooks)
    return states[-1]


def test_a_batch_of_two_takes_one_forward_a_step_and_branch() -> None:
    mock = Mock()
    videos = list(Loop(mock, key).generate([request(1), request(2)], Hooks()))
    assert len(mock.seen) == 2 * STEPS
    assert all(len(x) == 2 for x in mock.seen)
    for video in videos:
        assert video.batch == 2
        assert video.counts["conditional_forwards"] == video.counts["unconditional_forwards"] == STEPS


def test_a_guidance_scale_of_one_takes_no_unconditional_forward_and_encodes_no_negative_prompt() -> None:
    mock = Mock()
    (video,) = Loop(mock, key).generate([request(guidance=1.0, negative="dog")], Hooks())
    assert len(mock.seen) == STEPS
    assert video.counts == {"conditional_forwards": STEPS, "text_encodes": 1}
    assert mock.encoded == ["a cat"]


def test_each_item_of_a_batch_has_its_own_guidance_scale() -> None:
    together = last_state(Mock(), request(1, 2.0, negative="dogs"), request(1, 9.0, negative="dogs")).latents
    assert torch.allclose(together[0], last_state(Mock(), request(1, 2.0, negative="dogs")).latents[0], atol=1e-6)
    assert torch.allclose(together[1], last_state(Mock(), request(1, 9.0, negative="dogs")).latents[0], atol=1e-6)
    assert not torch.allclose(together[0], together[1], atol=1e-3)


def test_consecutive_requests_of_one_key_are_batched_up_to_the_limit() -> None:
    made = [request(frames=n) for n in (1, 1, 1, 2, 1)]
    assert [len(group) for group in groups(made, key, None)] == [3, 1, 1]
    assert [len(group) for group in groups(made, key, 2)] == [2, 1, 1, 1]
    assert [r for group in groups(made, key, 2) for r in group] == made
    mock = Mock()
    assert [len(f) for f in frames(mock, *made, batch=1)] == [1, 1, 1, 2, 1]
    assert all(len(x) == 1 for x in mock.seen)


def test_each_prompt_is_encoded_once_by_an_engine() -> None:
    mock = Mock()
    engine = Loop(mock, key)
    first = list(engine.generate([request(1, negative="no"), request(2, prompt="a dog", negative="no")], Hooks()))
    again = list(engine.generate([request(3, negative="no"), request(4, prompt="no", negative="no")], Hooks()))
    assert mock.encoded == ["a cat", "no", "a dog"]
    assert [video.counts["text_encodes"] for video in (*first, *again)] == [3, 3, 0, 0]


def test_encoded_prompts_are_let_go_oldest_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "TEXT_CACHE_BYTES", 3 * 16)
    mock = Mock()
    engine = Loop(mock, key)
    for prompt in ("a", "b", "c", "d", "a", "d"):
        list(engine.generate([request(prompt=prompt, negative="no")], Hooks()))
    assert mock.encoded == ["a", "no", "b", "c", "d", "a"]


def test_progress_tells_stage_step_and_steps() -> None:
    told: list[tuple[str, int, int]] = []
    frames(Mock(), request(), hooks=Hooks(progress=lambda *told_: told.append(told_)))
    assert told == [
        *[("encode", i, 1) for i in (0, 1)],
        *[("denoise", i + 1, STEPS) for i in range(STEPS)],
        *[("decode", i + 1, 2) for i in range(2)],
    ]


def test_a_cancel_ends_it_before_the_next_step() -> None:
    mock = Mock()
    with pytest.raises(Cancelled):
        frames(mock, request(guidance=1.0), hooks=Hooks(cancelled=lambda: len(mock.seen) == 3))
    assert len(mock.seen) == 3


@pytest.mark.parametrize("stop", [1, 3, STEPS])
def test_a_resumed_batch_gives_the_bits_of_one_that_was_never_stopped(stop: int) -> None:
    made = (request(1), request(2))
    states: list[bytes] = []
    whole = frames(Mock(), *made, hooks=Hooks(save=lambda state: states.append(state.to_bytes())))
    mock = Mock()
    resumed = frames(mock, *made, hooks=Hooks(resume=lambda requests: State.from_bytes(states[stop - 1])))
    assert len(mock.seen) == 2 * (STEPS - stop)
    for one, other in zip(whole, resumed, strict=True):
        assert np.array_equal(one, other)
    without_generators = frames(Mock(), *made, hooks=Hooks(resume=lambda requests: another_seed(states[stop - 1])))
    assert stop == STEPS or not np.array_equal(whole[0], without_generators[0])


def another_seed(content: bytes) -> State:
    state = State.from_bytes(content)
    return State(state.step, state.latents, state.history, Draws([100, 101]).state())


def test_one_item_of_a_batch_can_go_on_alone() -> None:
    states: list[State] = []
    frames(Mock(), request(1), request(2), hooks=Hooks(save=states.append))
    alone = State.from_bytes(states[2].item(1).to_bytes())
    assert (alone.step, alone.latents.shape[0], alone.history["last"].shape[0]) == (3, 1, 1)
    end = last_state(Mock(), request(2), hooks=Hooks(resume=lambda requests: alone))
    assert torch.allclose(end.latents[0], states[-1].latents[1], atol=1e-6)


def test_a_saved_state_that_is_not_finite_is_ignored() -> None:
    states: list[State] = []
    whole = frames(Mock(), request(), hooks=Hooks(save=states.append))
    broken = State(3, states[2].latents * torch.nan, states[2].history, states[2].generators)
    mock = Mock()
    assert np.array_equal(frames(mock, request(), hooks=Hooks(resume=lambda requests: broken))[0], whole[0])
    assert len(mock.seen) == 2 * STEPS


def test_a_saved_state_of_another_batch_is_refused() -> None:
    state = last_state(Mock(), request(1), request(2))
    with pytest.raises(ValueError, match=r"latents \[2, 2, 3\] after step 6; this batch has \[1, 2, 3\]"):
        frames(Mock(), request(1), hooks=Hooks(resume=lambda requests: state))


@pytest.mark.parametrize("content", [b"", b"no state at all", b"\x02\0\0\0\0\0\0\0{}"])
def test_bytes_that_hold_no_state_are_refused(content: bytes) -> None:
    with pytest.raises(ValueError, match="not a saved state"):
        State.from_bytes(content)


def test_nan_in_the_latents_is_an_item_error_that_names_the_item() -> None:
    def broken(x: torch.Tensor) -> torch.Tensor:
        return torch.cat([x[:1], x[1:] * torch.nan])

    mock = Mock()
    mock.break_prediction = broken
    with pytest.raises(ItemError, match="latents after step 1 of 6 are not finite: seed 2, 'a dog'"):
        frames(mock, request(1), request(2, prompt="a dog"))
    assert len(mock.seen) == 2


def test_nan_in_the_frames_is_an_item_error() -> None:
    mock = Mock()
    mock.break_frames = lambda x: x / 0
    with pytest.raises(ItemError, match="decoded frames are not finite: seed 5"):
        frames(mock, request(5))


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
        MemoryError("9"),
    ],
)
@pytest.mark.parametrize("where", ["break_prediction", "break_frames"])
def test_running_out_of_memory_is_a_capacity_error(error: Exception, where: str) -> None:
    def fail(x: torch.Tensor) -> torch.Tensor:
        raise error

    mock = Mock()
    setattr(mock, where, fail)
    with pytest.raises(CapacityError, match=r"2 frames of 3 x 2: .*9"):
        frames(mock, request())


def test_another_error_is_left_as_it_is() -> None:
    def fail(x: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("shapes differ")

    mock = Mock()
    mock.break_prediction = fail
    with pytest.raises(RuntimeError, match="shapes differ"):
        frames(mock, request())


def test_frames_are_decoded_as_they_are_read() -> None:
    mock = Mock()
    (video,) = Loop(mock, key).generate([request(frames=5)], Hooks())
    assert mock.decoded == 0
    first = next(video.chunks)
    assert (mock.decoded, first.dtype, first.shape) == (1, np.uint8, (1, 2, 3, 3))
    rest = list(video.chunks)
    assert len(rest) == 4
    assert set(video.seconds) == {"encode", "denoise", "decode"}
    assert video.dtype == "transformer bfloat16, vae float32"


def test_a_pin_holds_the_latents_before_each_forward_and_at_the_end() -> None:
    mock = Mock()
    mask = torch.tensor([[[True, False, False], [False, False, False]]])
    mock.pin = (mask, torch.full((1, 1, 1), 7.0))
    decoded: list[torch.Tensor] = []
    mock.break_frames = lambda x: decoded.append(x) or x
    frames(mock, request())
    assert all(bool((x[:, 0, 0] == 7).all()) for x in mock.seen)
    assert not any(bool((x[:, 0, 1] == 7).any()) for x in mock.seen)
    assert torch.allclose(decoded[0][0, 0, 0], torch.sigmoid(torch.tensor(7.0)))


def test_gradients_are_recorded_again_after_generating() -> None:
    for video in Loop(Mock(), key).generate([request()], Hooks()):
        for _ in video.chunks:
            assert torch.is_grad_enabled()
            assert not torch.is_inference_mode_enabled()
    assert torch.is_grad_enabled()


def test_an_engine_that_is_to_spare_memory_keeps_no_text_and_makes_the_same_frames() -> None:
    mock = Mock()
    loop = Loop(mock, key)

    def made(*rungs: str) -> np.ndarray:
        (video,) = loop.generate([request(seed=3, guidance=1.0)], Hooks(rungs=rungs))
        return np.concatenate(list(video.chunks))

    usual, again, spared = made(), made(), made("alone", "caches")
    assert mock.encoded == ["a cat", "a cat"], "once, kept, and once more"
    assert np.array_equal(usual, again) and np.array_equal(usual, spared)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 40 GiB"),
        MemoryError("40 GiB"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 40 GiB"),
    ],
)
def test_every_way_of_running_out_of_memory_is_a_capacity_error_wherever_it_happens(error: Exception) -> None:
    def fail(x: torch.Tensor) -> torch.Tensor:
        raise error

    for stage in ("break_prediction", "break_frames"):
        mock = Mock()
        setattr(mock, stage, fail)
        with pytest.raises(CapacityError, match=r"out of memory with .*40 GiB"):
            frames(mock, request())
