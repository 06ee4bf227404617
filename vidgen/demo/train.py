"""How the demo checkpoint was made: `python -m vidgen.demo.train --out DIR` makes it again, from nothing but a seed.

Three stages, each resumable from DIR-training: the autoencoder (single frames, then stretches, then whole clips), a
bank of encoded clips, the transformer with its text encoder. Then the folder is written (`publish`) and measured
(`measure`). About 70 minutes of one core with bf16 instructions (OMP_NUM_THREADS=1), and the same
again up to that core's rounding. Refuses to know about Ray, plans and stores.

Letters: B batch, F frames, H W height width, z latent channels, f h w latent frames, height, width, L text tokens.
"""

from __future__ import annotations

import argparse
import logging
import math
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from vidgen import engine
from vidgen.demo import data, tokenizer
from vidgen.demo.measure import measure, table
from vidgen.demo.publish import MAX_TEXT_TOKENS, SHIFT, describe, publish
from vidgen.models.wan.params import TransformerParams, VAEParams
from vidgen.models.wan.transformer import WanTransformer3DModel
from vidgen.models.wan.vae import WanVAE
from vidgen.text.t5 import ENCODERS

log = logging.getLogger("vidgen.demo.train")


@dataclass(frozen=True, slots=True)
class Recipe:
    """Every number of the training run; the defaults made the checkpoint that ships."""

    seed: int = 0
    vae_stages: tuple[tuple[int, int, int], ...] = ((1, 32, 500), (5, 8, 400), (17, 4, 1300))
    """(frames, clips a step, steps)"""
    vae_rate: float = 2e-3
    foreground: float = 8.0
    """How much more a pixel on or near the shape weighs than black."""
    latent_penalty: float = 1e-3
    latent_noise: float = 0.1
    """Standard deviation of what is added to latents before decoding, so that the decoder forgives the transformer."""
    bank: int = 8192
    """Clips that are encoded once for the transformer to learn from, each with its own size, place and speed."""
    steps: int = 6500
    batch: int = 24
    rate: float = 1e-3
    unconditional: float = 0.1
    """Share of clips that are shown with the empty prompt, for guidance."""
    average: float = 0.998
    """Decay of the moving average of the weights, which is what is published."""


TRANSFORMER = TransformerParams(
    patch_size=(1, 2, 2),  # 5 x 4 x 4 = 80 tokens
    num_attention_heads=4,
    attention_head_dim=48,
    in_channels=16,
    out_channels=16,
    text_dim=64,
    freq_dim=128,
    ffn_dim=768,
    num_layers=6,
    cross_attn_norm=True,
    eps=1e-6,
    rope_max_seq_len=64,
)
TEXT: dict[str, Any] = {
    "vocab_size": 32,
    "d_model": 64,
    "d_kv": 16,
    "d_ff": 128,
    "num_layers": 2,
    "num_heads": 4,
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 16,
    "dropout_rate": 0.0,
    "feed_forward_proj": "gated-gelu",
    "pad_token_id": tokenizer.WORDS.index(tokenizer.PAD),
    "eos_token_id": tokenizer.WORDS.index(tokenizer.EOS),
}


def vae_sizes(mean: tuple[float, ...] = (0.0,) * 16, std: tuple[float, ...] = (1.0,) * 16) -> VAEParams:
    """8x in space (2 by pixel unshuffle), 4x in time, 16 channels: 17 x 64 x 64 pixels become 5 x 8 x 8 latents."""
    return VAEParams(
        base_dim=32,
        decoder_base_dim=32,
        z_dim=16,
        dim_mult=(1, 2, 2),
        num_res_blocks=1,
        attn_scales=(),
        temperal_downsample=(True, True),
        latents_mean=mean,
        latents_std=std,
        in_channels=12,
        out_channels=12,
        patch_size=2,
    )


def rate(step: int, steps: int, peak: float, warmup: int = 100) -> float:
    """Learning rate: linear warm-up, then a cosine down to a fiftieth of the peak."""
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup))))


def descend(
    loss: Tensor, optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter], learning_rate: float
) -> None:
    """One clipped step of the optimizer."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    nn.utils.clip_grad_norm_(parameters, 1.0)
    optimizer.step()


def vae_loss(vae: WanVAE, video: Tensor, recipe: Recipe, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """(loss, mean squared error of the shape's surroundings) of reconstructing video [B, 3, F, H, W]."""
    with torch.autocast("cpu", dtype=torch.bfloat16):
        latents, _ = vae.encode(video)
        noise = torch.randn(latents.shape, generator=generator)
        again, _ = vae.decode(latents + recipe.latent_noise * noise, clamp=False)
    lit = ((video.amax(1, keepdim=True) + 1) / 2 > 0.02).float()
    near = F.max_pool3d(lit, (1, 5, 5), stride=1, padding=(0, 2, 2))
    weight = 1 + recipe.foreground * near
    error = again.float() - video
    loss = (weight * (error.abs() + error.square())).mean() / weight.mean()
    squared = (near * error.detach().square()).sum() / near.sum() / 3
    return loss + recipe.latent_penalty * latents.float().square().mean(), squared


def train_vae(recipe: Recipe, path: Path) -> WanVAE:
    """Trains the autoencoder, or takes up where `path` stopped."""
    torch.manual_seed(recipe.seed)
    vae = WanVAE(vae_sizes())
    for module in vae.modules():
        if isinstance(module, nn.Conv3d):
            # Twice as fast with bf16 instructions.
            module.weight.data = module.weight.data.contiguous(memory_format=torch.channels_last_3d)
    parameters = list(vae.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=recipe.vae_rate, betas=(0.9, 0.98), weight_decay=1e-4)
    generator = torch.Generator().manual_seed(recipe.seed)
    schedule = [(frames, batch) for frames, batch, steps in recipe.vae_stages for _ in range(steps)]
    done = resume(path, vae, optimizer, generator)
    started = time.monotonic()
    for step in range(done, len(schedule)):
        frames, batch = schedule[step]
        video = data.clips(data.draw(batch, generator), generator, frames)
        loss, squared = vae_loss(vae, video, recipe, generator)
        descend(loss, optimizer, parameters, rate(step, len(schedule), recipe.vae_rate))
        if (step + 1) % 50 == 0:
            spent = time.monotonic() - started
            decibel = 10 * math.log10(4 / squared.item())
            log.info(
                "vae %d/%d frames %d loss %.4f near %.1f dB %.0f s",
                step + 1,
                len(schedule),
                frames,
                loss,
                decibel,
                spent,
            )
        if (step + 1) % 100 == 0 or step + 1 == len(schedule):
            save(path, step + 1, vae, optimizer, generator)
    # Latents are deterministic: the variance was never trained, so it is set to next to nothing.
    channels = vae.params.z_dim
    state = vae.quant_conv.state_dict()
    state["weight"][channels:] = 0.0
    state["bias"][channels:] = -20.0
    return vae.eval().requires_grad_(False)


@dataclass(frozen=True, slots=True)
class Bank:
    """Normalised latents [n, z, f, h, w] in bf16, the token ids [n, L] of their prompts, and what normalised them."""

    latents: Tensor
    tokens: Tensor
    sizes: VAEParams


def encode_bank(recipe: Recipe, vae: WanVAE, path: Path) -> Bank:
    """Encodes `recipe.bank` clips of trained combinations, or reads them back from `path`."""
    if not path.exists():
        generator = torch.Generator().manual_seed(recipe.seed + 1)
        words = tokenizer.build()
        latents, ids = [], []
        for _ in range(0, recipe.bank, 32):
            combinations = data.draw(32, generator)
            with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
                latents.append(vae.encode(data.clips(combinations, generator))[0].float())
            ids += [words.encode(c.prompt).ids for c in combinations]
        torch.save({"latents": torch.cat(latents), "tokens": torch.tensor(ids)}, path)
        log.info("bank of %d clips encoded", len(ids))
    state = torch.load(path)
    latent = state["latents"]
    mean, std = latent.mean((0, 2, 3, 4)), latent.std((0, 2, 3, 4))
    sizes = vae_sizes(tuple(mean.tolist()), tuple(std.tolist()))
    normal = (latent - mean[:, None, None, None]) / std[:, None, None, None]
    return Bank(normal.to(torch.bfloat16), state["tokens"], sizes)


class ShortAttention(TorchFunctionMode):
    """Attention as two matrix products: at 80 tokens in bf16 a fifth of the time of the fused CPU kernel.

    Where the keys are a text's, the last one stands for all the zeros that pad the text to MAX_TEXT_TOKENS: they have
    one key, and n equal keys weigh as one whose score is higher by log n. So training sees what inference sees.
    """

    def __init__(self, text_keys: int) -> None:
        super().__init__()
        self.text_keys = text_keys
        self.bonus = torch.zeros(text_keys)
        self.bonus[-1] = math.log(MAX_TEXT_TOKENS - text_keys + 1)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {name: value for name, value in (kwargs or {}).items() if value is not None}
        if func is not F.scaled_dot_product_attention or given:
            return func(*args, **(kwargs or {}))
        query, key, value = args
        scores = (query @ key.transpose(-1, -2)).float() * query.shape[-1] ** -0.5
        if key.shape[-2] == self.text_keys:
            scores = scores + self.bonus
        return scores.softmax(-1).to(value.dtype) @ value


class Denoiser(nn.Module):
    """The transformer and the text encoder, which learn together."""

    def __init__(self) -> None:
        super().__init__()
        self.transformer = WanTransformer3DModel(TRANSFORMER)
        nn.init.zeros_(self.transformer.proj_out.weight)
        encoder: Any = ENCODERS["umt5"]
        self.text_encoder = encoder(encoder.config_class(**TEXT))

    def forward(self, latents: Tensor, sigma: Tensor, tokens: Tensor) -> Tensor:
        """latents [B, z, f, h, w], sigma [B], token ids [B, L] of prompts, padded to L -> velocity."""
        mask = (tokens != tokenizer.WORDS.index(tokenizer.PAD)).long()
        text = self.text_encoder(input_ids=tokens, attention_mask=mask).last_hidden_state * mask[..., None]
        with ShortAttention(tokens.shape[1] + 1):
            context = self.transformer.text_context(F.pad(text, (0, 0, 0, 1)))
            return self.transformer(latents, sigma * 1000, context)


def flow_loss(model: Denoiser, clean: Tensor, tokens: Tensor, recipe: Recipe, generator: torch.Generator) -> Tensor:
    """Flow matching (arXiv 2209.03003): predict noise - clean from (1 - sigma) clean + sigma noise, at logit-normal
    times (arXiv 2403.03206, section 3.1) shifted as the sampler shifts them."""
    batch = len(clean)
    noise = torch.randn(clean.shape, generator=generator)
    sigma = torch.sigmoid(torch.randn(batch, generator=generator))
    sigma = SHIFT * sigma / (1 + (SHIFT - 1) * sigma)
    empty = torch.tensor([tokenizer.WORDS.index(tokenizer.EOS)] + [0] * (tokens.shape[1] - 1))
    drop = torch.rand(batch, generator=generator) < recipe.unconditional
    tokens = torch.where(drop[:, None], empty, tokens)
    mix = sigma[:, None, None, None, None]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        velocity = model((1 - mix) * clean + mix * noise, sigma, tokens)
    return (velocity.float() - (noise - clean)).square().mean()


def train_denoiser(recipe: Recipe, bank: Bank, path: Path) -> Denoiser:
    """Trains transformer and text encoder, or takes up where `path` stopped; returns the averaged weights."""
    torch.manual_seed(recipe.seed + 2)
    model, averaged = Denoiser(), Denoiser().requires_grad_(False)
    both = nn.ModuleList([model, averaged])
    averaged.load_state_dict(model.state_dict())
    parameters = list(model.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=recipe.rate, betas=(0.9, 0.98), weight_decay=0.01)
    generator = torch.Generator().manual_seed(recipe.seed + 3)
    done = resume(path, both, optimizer, generator)
    started, losses = time.monotonic(), 0.0
    for step in range(done, recipe.steps):
        pick = torch.randint(len(bank.latents), (recipe.batch,), generator=generator)
        loss = flow_loss(model, bank.latents[pick].float(), bank.tokens[pick], recipe, generator)
        descend(loss, optimizer, parameters, rate(step, recipe.steps, recipe.rate))
        decay = min(recipe.average, (1 + step) / (10 + step))
        with torch.no_grad():
            for mean, value in zip(averaged.parameters(), parameters, strict=True):
                mean.lerp_(value, 1 - decay)
        losses += loss.item()
        if (step + 1) % 50 == 0:
            spent = time.monotonic() - started
            log.info("denoiser %d/%d loss %.4f %.0f s", step + 1, recipe.steps, losses / 50, spent)
            losses = 0.0
        if (step + 1) % 200 == 0 or step + 1 == recipe.steps:
            save(path, step + 1, both, optimizer, generator)
    return averaged.eval()


def save(path: Path, step: int, model: nn.Module, optimizer: torch.optim.Optimizer, generator: torch.Generator) -> None:
    """Everything a stage needs to go on, put in place in one rename."""
    state = {
        "step": step,
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "generator": generator.get_state(),
    }
    torch.save(state, path.with_suffix(".tmp"))
    path.with_suffix(".tmp").replace(path)


def resume(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, generator: torch.Generator) -> int:
    """Restores what `save` wrote; returns the steps done, 0 without a file."""
    if not path.exists():
        return 0
    state = torch.load(path)
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    generator.set_state(state["generator"])
    log.info("%s: going on after step %d", path.name, state["step"])
    return int(state["step"])


def make(recipe: Recipe, out: Path) -> None:
    """All stages: the checkpoint folder `out`, with the state of the training beside it."""
    state = out.with_name(f"{out.name}-training")
    state.mkdir(parents=True, exist_ok=True)
    vae = train_vae(recipe, state / "vae.pt")
    bank = encode_bank(recipe, vae, state / "bank.pt")
    model = train_denoiser(recipe, bank, state / "denoiser.pt")
    publish(out, vae, bank.sizes, model.transformer, TRANSFORMER, model.text_encoder, TEXT)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="the checkpoint; DIR-training keeps the state")
    out = parser.parse_args().out
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    make(Recipe(), out)
    with tempfile.TemporaryDirectory() as clips:
        results = list(measure(engine.load(str(out)), data.COMBINATIONS, 1_000_000, Path(clips)))
    print(table(results))
    describe(out, table(results))


if __name__ == "__main__":
    main()
