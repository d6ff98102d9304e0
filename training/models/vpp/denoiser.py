"""The action denoiser: a diffusion transformer that reads a goal and video tokens (VPP, stage 2).

Shape letters: B clips, Q tokens, V their width, G goal width, P proprioception, S context tokens, K chunk, A action,
D width, L noise levels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, Self

import torch
from torch import nn

from infra.errors import ConfigError
from training.models.common.weights import load_weights
from training.models.vpp.blocks import DecoderBlock, Dropouts, EncoderBlock, Modulation, ScaleNorm, init_transformer
from training.models.vpp.config import ActionDenoiserConfig, SamplerName, SamplingConfig
from training.models.vpp.edm import log_logistic_sigma, precondition
from training.models.vpp.official import denoiser_weights, infer_denoiser_config
from training.models.vpp.sampler import Denoise, noise_levels, run_sampler

EMBEDDING_RATIO = 2  # inner width of the embeddings over `dim`
MAX_PERIOD = 10_000.0


class SigmaCode(nn.Module):
    """Sine and cosine of a time at geometrically falling frequencies, sines first."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.half = width // 2

    def forward(self, times_L: torch.Tensor) -> torch.Tensor:
        """(L,) -> (L, D)."""
        steps = torch.arange(self.half, device=times_L.device, dtype=times_L.dtype)
        angles = times_L[:, None] * torch.exp(steps * -(math.log(MAX_PERIOD) / max(1, self.half - 1)))
        return torch.cat([angles.sin(), angles.cos()], dim=-1)


def _embedding(inputs: int, width: int) -> nn.Sequential:
    hidden = EMBEDDING_RATIO * width
    return nn.Sequential(nn.Linear(inputs, hidden), nn.GELU(), nn.Linear(hidden, width))


class Stack(nn.Module):
    """Blocks and the final norm, as the release names them."""

    def __init__(self, block: Callable[[], nn.Module], depth: int, width: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(block() for _ in range(depth))
        self.ln = ScaleNorm(width)


class ActionDenoiser(nn.Module):
    """Context encoder and noise-conditioned decoder over an action chunk. Actions are normalised."""

    def __init__(self, config: ActionDenoiserConfig) -> None:
        super().__init__()
        self.config = config
        dim, heads = config.dim, config.num_heads
        rates = Dropouts(config.attention_dropout, config.residual_dropout, config.mlp_dropout)
        # Unused, like goal_emb: the release's files hold both.
        self.pos_emb = nn.Parameter(0.02 * torch.randn(1, 1 + config.num_tokens + config.chunk, dim))
        self.tok_emb = nn.Linear(config.token_dim, dim)
        self.goal_emb = _embedding(config.goal_dim, dim)
        self.lang_emb = _embedding(config.goal_dim, dim)
        self.encoder = Stack(lambda: EncoderBlock(dim, heads, rates), config.encoder_layers, dim)
        self.decoder = Stack(lambda: DecoderBlock(dim, heads, rates), config.decoder_layers, dim)
        self.proprio_emb = _embedding(config.proprioception_width, dim)
        hidden = EMBEDDING_RATIO * dim
        self.sigma_emb = nn.Sequential(SigmaCode(dim), nn.Linear(dim, hidden), nn.Mish(), nn.Linear(hidden, dim))
        self.action_emb = nn.Linear(config.action_dim, dim)
        self.action_pred = nn.Linear(dim, config.action_dim)
        self.apply(init_transformer)
        self.pos_emb.requires_grad_(False)
        self.goal_emb.requires_grad_(False)
        self.proprio_emb.requires_grad_(config.train_proprioception and config.proprioception_dim > 0)

    @classmethod
    def from_official(cls, state_dict: Mapping[str, Any], config: ActionDenoiserConfig | None = None) -> Self:
        """From released weights, with or without `[model.]inner_model.` before their names, or a whole checkpoint.

        Without a config sizes are read from the weights (released width only, chunk 10). `InputError` for misfits.
        """
        weights = denoiser_weights(state_dict)
        model = cls(config or infer_denoiser_config(weights))
        load_weights(model, weights)
        return model

    def encode(
        self, tokens_BQV: torch.Tensor, goal: torch.Tensor, proprioception: torch.Tensor | None = None
    ) -> torch.Tensor:
        """The context (B, 1 + Q [+ 1], D): goal (B, 1, G), tokens, proprioception (B, 1, P). Q may be 0."""
        return self._encode(tokens_BQV, goal, proprioception, first=None)

    def sigma_from_uniform(self, uniform: torch.Tensor) -> torch.Tensor:
        """Training noise levels from uniform numbers in [0, 1): truncated log-logistic, float64 within, float32 out."""
        config = self.config
        return log_logistic_sigma(
            uniform, median=config.sigma_data, sigma_min=config.sigma_min, sigma_max=config.sigma_max
        )

    def forward(
        self, tokens_BQV: torch.Tensor, goal: torch.Tensor, actions_BKA: torch.Tensor, **options: Any
    ) -> torch.Tensor:
        """The training loss, so that wrappers for several processes see one call."""
        return self.loss(tokens_BQV, goal, actions_BKA, **options)

    def loss(
        self,
        tokens: torch.Tensor,
        goal: torch.Tensor,
        actions: torch.Tensor,
        *,
        proprioception: torch.Tensor | None = None,
        sigma: torch.Tensor | None = None,
        noise: torch.Tensor | None = None,
        weights: torch.Tensor | None = None,
        mask: torch.Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> torch.Tensor:
        """Mean over clips of `weights` times the squared error of the network's output, over a clip's own actions.

        So a batch's loss is the mean of its parts' losses, however it is split. tokens (B, Q, V), goal (B, 1, G),
        actions (B, K, A); `sigma` one level a clip and `noise` (B, K, A) are drawn where absent, levels first.
        `weights` (A,) or broadcastable to (B, K, A); `mask` (B, K) False behind the end.
        """
        return self.per_sample_loss(
            tokens, goal, actions, proprioception=proprioception, sigma=sigma, noise=noise, weights=weights, mask=mask,
            generator=generator,
        ).mean()  # fmt: skip

    def per_sample_loss(
        self,
        tokens: torch.Tensor,
        goal: torch.Tensor,
        actions: torch.Tensor,
        *,
        proprioception: torch.Tensor | None = None,
        sigma: torch.Tensor | None = None,
        noise: torch.Tensor | None = None,
        weights: torch.Tensor | None = None,
        mask: torch.Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> torch.Tensor:
        """(B,) the loss of each clip, over its own existing elements; 0 for a clip without any."""
        error = self.squared_error(
            tokens, goal, actions, proprioception=proprioception, sigma=sigma, noise=noise, generator=generator
        )
        error, exists = _weigh(error, weights, mask)
        if exists is None:
            return error.flatten(1).mean(dim=1)
        return error.flatten(1).sum(dim=1) / (exists.sum(dim=1) * actions.shape[-1]).clamp(min=1)

    def squared_error(
        self,
        tokens: torch.Tensor,
        goal: torch.Tensor,
        actions: torch.Tensor,
        *,
        proprioception: torch.Tensor | None = None,
        sigma: torch.Tensor | None = None,
        noise: torch.Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> torch.Tensor:
        """(B, K, A) squared error of the network's output against (a - c_skip x) / c_out."""
        self._check(actions, "actions", (self.config.chunk, self.config.action_dim))
        actions = actions.to(torch.promote_types(actions.dtype, torch.float32))
        options: dict[str, Any] = {"generator": generator, "device": actions.device}
        if sigma is None:
            sigma = self.sigma_from_uniform(torch.rand(len(actions), dtype=torch.float64, **options))
        if noise is None:
            noise = torch.randn(actions.shape, dtype=actions.dtype, **options)
        sigma = sigma.reshape(-1).to(actions).expand(len(actions))
        noisy = actions + noise.to(actions) * _per_clip(sigma)
        factors = precondition(sigma, self.config.sigma_data)
        target = (actions - _per_clip(factors.c_skip) * noisy) / _per_clip(factors.c_out)
        context = self._encode(tokens, goal, proprioception, first=self._visible)
        return (self.network(noisy, sigma, context) - target).square()

    def network(self, noisy_BKA: torch.Tensor, sigma_B: torch.Tensor, context_BSD: torch.Tensor) -> torch.Tensor:
        """The network's raw output F (B, K, A) in full precision, for noisy actions at levels (B,).

        `context` may be all of `encode`, or the part of it that the causal cross-attention can see.
        """
        factors = precondition(sigma_B, self.config.sigma_data)
        return self.decode(noisy_BKA * _per_clip(factors.c_in), factors.c_noise, context_BSD)

    def decode(self, scaled_BKA: torch.Tensor, times_B: torch.Tensor, context_BSD: torch.Tensor) -> torch.Tensor:
        """The decoder alone (B, K, A): actions as the network sees them, times ln(sigma) / 4."""
        modulations = [Modulation(*levels.unsqueeze(2).unbind(1)) for levels in self._modulations(times_B)]
        return self._decode(scaled_BKA, modulations, self._memory(context_BSD))

    @torch.no_grad()
    def sample(
        self,
        tokens: torch.Tensor,
        goal: torch.Tensor,
        *,
        proprioception: torch.Tensor | None = None,
        unit_noise: torch.Tensor | None = None,
        sigmas: torch.Tensor | None = None,
        sampler: SamplerName = "ddim",
        step_noise: torch.Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> torch.Tensor:
        """Action chunks (B, K, A), without dropout in any mode.

        `unit_noise` (B, K, A) is standard normal; it is scaled to the first of `sigmas`, which fall and end in 0
        (default: the release's ten). `step_noise` as in `sampler.run_sampler`.
        """
        config = self.config
        sigmas = noise_levels(SamplingConfig()) if sigmas is None else sigmas
        if unit_noise is None:
            shape = (len(tokens), config.chunk, config.action_dim)
            unit_noise = torch.randn(shape, generator=generator, device=tokens.device)
        self._check(unit_noise, "unit_noise", (config.chunk, config.action_dim))
        start = unit_noise * float(sigmas[0])
        training = self.training
        self.eval()
        try:
            denoise = self.denoise_function(tokens, goal, proprioception=proprioception, sigmas=sigmas)
            return run_sampler(sampler, denoise, start, sigmas, step_noise=step_noise, generator=generator)
        finally:
            self.train(training)

    def denoise_function(
        self,
        tokens: torch.Tensor,
        goal: torch.Tensor,
        *,
        proprioception: torch.Tensor | None = None,
        sigmas: torch.Tensor,
    ) -> Denoise:
        """(noisy (B, K, A), level) -> denoised, with all that does not depend on the noisy chunk computed once.

        That is the context, its keys and values, and the modulations of the levels in `sigmas`; others are added.
        """
        memory = self._memory(self._encode(tokens, goal, proprioception, first=self._visible))
        known: dict[float, list[Modulation]] = {}

        def learn(levels: list[float]) -> None:
            times = [math.log(level) / 4 for level in levels]
            layers = self._modulations(torch.tensor(times, dtype=torch.float64, device=tokens.device))
            for place, level in enumerate(levels):
                known[level] = [Modulation(*layer[place].unbind(0)) for layer in layers]

        learn([level for level in sigmas.tolist() if level > 0])

        def denoise(noisy_BKA: torch.Tensor, sigma: float) -> torch.Tensor:
            if sigma not in known:
                learn([sigma])
            variance = sigma**2 + self.config.sigma_data**2
            output = self._decode(noisy_BKA * variance**-0.5, known[sigma], memory)
            data_share = self.config.sigma_data**2 / variance
            return noisy_BKA * data_share + output * (sigma * self.config.sigma_data * variance**-0.5)

        return denoise

    @property
    def _visible(self) -> int | None:
        """How many context tokens the decoder can look at; None: all."""
        return self.config.chunk if self.config.causal_cross_attention else None

    def _encode(
        self, tokens: torch.Tensor, goal: torch.Tensor, proprioception: torch.Tensor | None, *, first: int | None
    ) -> torch.Tensor:
        self._check(goal, "goal", (1, self.config.goal_dim))
        rows = [self.lang_emb(goal.to(self.tok_emb.weight.dtype)), self.tok_emb(tokens)]
        if proprioception is not None:
            self._check(proprioception, "proprioception", (1, self.config.proprioception_width))
            rows.append(self.proprio_emb(proprioception.to(self.tok_emb.weight.dtype)))
        context = torch.cat(rows, dim=1)
        *inner, last = self.encoder.blocks
        for block in inner:
            context = block(context)
        return self.encoder.ln(last(context, first))

    def _memory(self, context_BSD: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Keys and values of every decoder block."""
        visible = context_BSD[:, : self._visible]
        return [block.cross_att.keys_values(visible) for block in self.decoder.blocks]

    def _modulations(self, times_L: torch.Tensor) -> list[torch.Tensor]:
        """For each block (L, 6, D): all levels in one product."""
        embedded = self.sigma_emb(times_L.to(self.action_emb.weight.dtype))
        return [block.adaLN_zero.modulation(embedded).unflatten(-1, (6, -1)) for block in self.decoder.blocks]

    def _decode(
        self,
        scaled_BKA: torch.Tensor,
        modulations: list[Modulation],
        memory: list[tuple[torch.Tensor, torch.Tensor]],
    ) -> torch.Tensor:
        rows = self.action_emb(scaled_BKA.to(self.action_emb.weight.dtype))
        chunk, seen = rows.shape[1], memory[0][0].shape[1]
        square = self.config.causal_cross_attention and chunk == seen
        mask = None
        if self.config.causal_cross_attention and not square:
            mask = torch.ones(chunk, seen, dtype=torch.bool, device=rows.device).tril()
        for block, modulation, keys_values in zip(self.decoder.blocks, modulations, memory, strict=True):
            rows = block(rows, modulation, keys_values, mask_NS=mask, causal=square)
        output = self.action_pred(self.decoder.ln(rows))
        return output.to(torch.promote_types(output.dtype, torch.float32))

    def _check(self, value: torch.Tensor, name: str, wanted: tuple[int, int]) -> None:
        if value.ndim != 3 or tuple(value.shape[1:]) != wanted:
            raise ConfigError(
                f"{name} {tuple(value.shape)} where the denoiser takes (B, {wanted[0]}, {wanted[1]}).",
                remedy="Compare with its config.",
            )


def _weigh(
    error_BKA: torch.Tensor, weights: torch.Tensor | None, mask_BK: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    if weights is not None:
        error_BKA = error_BKA * weights.to(error_BKA)
    if mask_BK is None:
        return error_BKA, None
    exists = mask_BK.to(error_BKA)
    return error_BKA * exists[..., None], exists


def _per_clip(values_B: torch.Tensor) -> torch.Tensor:
    return values_B.view(-1, 1, 1)
