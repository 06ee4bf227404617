"""Llama's tokens and CLIP's vector for a prompt, from transformers; and Llava's, which has seen a picture too.

The prompt is put into a template, whose beginning is cut off again. Prompts are encoded alone and at their true length:
both encoders read in one direction only, so padding behind a prompt would change nothing. Refuses to know what a video
is, how prompts are cached, and the network: everything is read from a local folder.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import (
    CLIPImageProcessorPil,
    CLIPTextModel,
    LlamaModel,
    LlavaForConditionalGeneration,
    PreTrainedTokenizerBase,
)
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from vidgen.checkpoint.folder import CheckpointFolder
from vidgen.checkpoint.load import load_weights
from vidgen.errors import CheckpointError
from vidgen.text.configs import load_config
from vidgen.text.prompt import Prompt, Text
from vidgen.text.tokenizers import load_tokenizer

_ASPECTS = (
    "1. The main content and theme of the video."
    "2. The color, shape, size, texture, quantity, text, and spatial relationships of the objects."
    "3. Actions, events, behaviors temporal relationships, physical movement changes of the objects."
    "4. background environment, light, style and atmosphere."
    "5. camera angles, movements, and transitions used in the video:<|eot_id|>"
)
TEMPLATE = (
    "<|start_header_id|>system<|end_header_id|>\n\nDescribe the video by detailing the following aspects: "
    f"{_ASPECTS}<|start_header_id|>user<|end_header_id|>\n\n{{}}<|eot_id|>"
)
PICTURE_TEMPLATE = (
    "<|start_header_id|>system<|end_header_id|>\n\n<image>\nDescribe the video by detailing the following aspects "
    f"according to the reference image: {_ASPECTS}\n\n<|start_header_id|>user<|end_header_id|>\n\n{{}}<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n"
)
CUT, PICTURE_CUT = 95, 103
"""Tokens of the templates before the prompt, the opening one included and `<image>` counted once."""
HEADER_END = "<|end_header_id|>"
HEADERS = 3
"""Of these the picture's template has so many; the last is the assistant's, in its last tokens but one."""
HEADER_TOKENS = 4
"""Tokens that close the prompt and open the assistant's answer: they are cut out, what follows them is kept."""
SKIPPED_LAYERS = 2
"""Llama's last layers, whose results the transformer was not trained on."""
CLIP_TOKENS = 77
PROCESSOR_FILES = frozenset({"preprocessor_config.json", "processor_config.json"})


@dataclass(frozen=True, slots=True, eq=False)
class PicturePrompt(Prompt):
    """A prompt with a picture of whose tokens every `interleave`-th is kept."""

    interleave: int = 1

    @property
    def digest(self) -> str:
        """Equal for equal prompts, the interleave included."""
        return f"{super(PicturePrompt, self).digest}/{self.interleave}"


@dataclass(frozen=True, slots=True)
class Pictures:
    """How a Llava takes pictures: made fit by `processor`, they stand where `token` does, as `count` tokens. The
    processor is the one that works on PIL pictures, whatever else is installed, so that its pixels are the same
    everywhere."""

    processor: CLIPImageProcessorPil
    token: int
    count: int


@dataclass
class LlamaClipEncoder:
    """Llama without its last layers, alone or within a Llava (then there are `pictures`), and CLIP. `max_tokens` are
    the most that follow the template's beginning."""

    llama: nn.Module
    clip: nn.Module
    tokenizer: PreTrainedTokenizerBase
    clip_tokenizer: PreTrainedTokenizerBase
    max_tokens: int
    pictures: Pictures | None = None

    @torch.inference_mode()
    def encode(self, prompt: Prompt) -> Text:
        """Llama's states [L, D] of the prompt's tokens, behind those of the picture if there is one, and CLIP's pooled
        vector [P], in the encoders' dtypes."""
        hidden = self._read(prompt.text) if self.pictures is None else self._read_with_picture(prompt, self.pictures)
        return Text(prompt.digest, hidden, len(hidden), self._pooled(prompt.text))

    def _read(self, text: str) -> torch.Tensor:
        ids = self._ids(TEMPLATE.format(text), CUT + self.max_tokens)
        return self._states(input_ids=ids)[CUT:]

    def _read_with_picture(self, prompt: Prompt, pictures: Pictures) -> torch.Tensor:
        """The picture's tokens stand where `<image>` does, which is one token of the text; they come first."""
        assert prompt.image is not None and isinstance(prompt, PicturePrompt)
        longest = PICTURE_CUT + self.max_tokens
        ids = self._ids(PICTURE_TEMPLATE.format(prompt.text), longest)[0].tolist()
        place = ids.index(pictures.token)
        headers = [i for i, token in enumerate(ids) if token == self.tokenizer.convert_tokens_to_ids(HEADER_END)]
        # A prompt that fills the template's room has lost the assistant's header: as many tokens go from its end.
        last = longest - 1 if len(headers) == HEADERS - 1 else headers[-1]

        device = next(self.llama.parameters()).device
        pixels = pictures.processor(images=prompt.image, return_tensors="pt")["pixel_values"].to(device)
        expanded = [*ids[:place], *[pictures.token] * pictures.count, *ids[place + 1 :]]
        states = self._states(input_ids=torch.tensor([expanded], device=device), pixel_values=pixels)
        end = place + pictures.count
        picture, after = states[place:end], states[end:]
        begin, stop, start = (index - place - 1 for index in (PICTURE_CUT, last + 1 - HEADER_TOKENS, last + 1))
        return torch.cat([picture[:: prompt.interleave], after[begin:stop], after[start:]])

    def _ids(self, text: str, longest: int) -> torch.Tensor:
        """[1, L] ids of a text, without padding, cut off at `longest` tokens."""
        ids = self.tokenizer(text, truncation=True, max_length=longest)["input_ids"]
        return torch.tensor([ids], device=next(self.llama.parameters()).device)

    def _states(self, **inputs: torch.Tensor) -> torch.Tensor:
        """[L, D] hidden states after the last layer that was kept."""
        attended = torch.ones_like(inputs["input_ids"])
        return self.llama(**inputs, attention_mask=attended, use_cache=False).last_hidden_state[0]

    def _pooled(self, text: str) -> torch.Tensor:
        """[P], CLIP's state at the closing token."""
        ids = self.clip_tokenizer(text, truncation=True, max_length=CLIP_TOKENS)["input_ids"]
        return self.clip(torch.tensor([ids], device=next(self.clip.parameters()).device)).pooler_output[0]


def load_llama_clip(
    folder: CheckpointFolder,
    *,
    max_tokens: int,
    dtypes: Mapping[str, torch.dtype],
    device: torch.device | str = "cpu",
) -> LlamaClipEncoder:
    """The encoders of a local checkpoint: text_encoder (a Llama, or a Llava with an image_processor), text_encoder_2
    (CLIP), tokenizer and tokenizer_2. `dtypes` by component. CheckpointError names what is missing, extra or
    unsupported."""
    assert folder.local is not None, "text encoders are loaded from a local folder"
    tokenizer, clip_tokenizer = load_tokenizer(folder, "tokenizer"), load_tokenizer(folder, "tokenizer_2")
    config = load_config(folder, "text_encoder", ("llama", "llava"))
    clip = _load_clip(folder, dtypes["text_encoder_2"], device)
    if config.model_type == "llama":
        llama = _load_llama(folder, config, dtypes["text_encoder"], device)
        return LlamaClipEncoder(llama, clip, tokenizer, clip_tokenizer, max_tokens)
    if not {path.rpartition("/")[2] for path in folder.files("image_processor")} & PROCESSOR_FILES:
        shown = ", ".join(sorted(PROCESSOR_FILES))
        raise CheckpointError(f"{folder.resolved.name}: image_processor has none of {shown}")
    processor = CLIPImageProcessorPil.from_pretrained(folder.local / "image_processor", local_files_only=True)
    llava = _load_llava(folder, config, dtypes["text_encoder"], device)
    tower = config.vision_config
    pictures = Pictures(processor, config.image_token_index, (tower.image_size // tower.patch_size) ** 2)
    return LlamaClipEncoder(llava, clip, tokenizer, clip_tokenizer, max_tokens, pictures)


def _load_clip(folder: CheckpointFolder, dtype: torch.dtype, device: torch.device | str) -> nn.Module:
    component = "text_encoder_2"
    config = load_config(folder, component, ("clip_text_model",))
    with torch.device("meta"):
        model = CLIPTextModel(config)
    # Computed, not stored.
    positions = torch.arange(config.max_position_embeddings, device=device).unsqueeze(0)
    model.embeddings.position_ids = nn.Buffer(positions, persistent=False)
    stored = _as_stored(folder, component, {"text_model": (model, ("text_model", ""))})
    load_weights(stored, folder, component, dtype=dtype, device=device)
    return model.eval()


def _load_llama(folder: CheckpointFolder, config: Any, dtype: torch.dtype, device: torch.device | str) -> nn.Module:
    with torch.device("meta"):
        model = LlamaModel(config)
    _compute_rope(model, device)
    stored = _as_stored(folder, "text_encoder", {"llama": (model, ("model", ""))})
    load_weights(stored, folder, "text_encoder", dtype=dtype, device=device)
    return _shortened(model)


def _load_llava(folder: CheckpointFolder, config: Any, dtype: torch.dtype, device: torch.device | str) -> nn.Module:
    """The language head is read, because it is in the files, and let go."""
    with torch.device("meta"):
        whole = LlavaForConditionalGeneration(config)
    llava = whole.model
    tower, language = llava.vision_tower, llava.language_model
    positions = torch.arange(tower.embeddings.num_positions, device=device).unsqueeze(0)
    tower.embeddings.position_ids = nn.Buffer(positions, persistent=False)
    _compute_rope(language, device)
    # transformers has put these in other places over time; published checkpoints have the first of each.
    parts = {
        "language": (language, ("language_model.model", "model.language_model")),
        "head": (whole.lm_head, ("language_model.lm_head", "lm_head")),
        "projector": (llava.multi_modal_projector, ("multi_modal_projector", "model.multi_modal_projector")),
        "tower": (
            tower,
            ("vision_tower.vision_model", "model.vision_tower.vision_model", "vision_tower", "model.vision_tower"),
        ),
    }
    load_weights(_as_stored(folder, "text_encoder", parts), folder, "text_encoder", dtype=dtype, device=device)
    _shortened(language)
    return llava.eval()


def _compute_rope(language: LlamaModel, device: torch.device | str) -> None:
    """Rotary frequencies are computed, not stored, and in fp32 whatever the weights are."""
    language.rotary_emb = LlamaRotaryEmbedding(config=language.config).to(device)


def _shortened(language: LlamaModel) -> LlamaModel:
    """A Llama that ends where the transformer looks: before its last layers, and without the final norm."""
    language.layers = language.layers[:-SKIPPED_LAYERS]
    language.norm = nn.Identity()  # type: ignore[assignment]
    return language.eval()


def _as_stored(
    folder: CheckpointFolder, component: str, parts: Mapping[str, tuple[nn.Module, tuple[str, ...]]]
) -> nn.Module:
    """A module that holds the `parts` under the first of their possible places in which the component's files have any
    tensor (none has: the first), so that its keys are those of the files."""
    keys: Collection[str] = folder.tensors(component)
    root = nn.Module()
    for module, places in parts.values():
        place = next((p for p in places if any(key.startswith(f"{p}." if p else "") for key in keys)), places[0])
        if not place:
            return module
        *outer, name = place.split(".")
        holder = root
        for step in outer:
            if not hasattr(holder, step):
                setattr(holder, step, nn.Module())
            holder = getattr(holder, step)
        setattr(holder, name, module)
    return root
