"""Exports of policies: written here for the Video Prediction Policy, loaded here for every kind.

A behaviour-cloning export holds its encoder. The others name their frozen video model by digest: it may be 6 GB and
serves many policies. At load time the digest is checked; `provider` says where the model lies if it has moved.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from infra.digests import short
from infra.errors import InputError
from training.export_files import Export, ModelReference, model_card, read_export, save_export
from training.models.common.frozen import FrozenEncoder
from training.models.common.images import Preprocessing
from training.models.common.weights import load_weights
from training.models.policies import BehaviourCloningHead, BehaviourCloningPolicy, BehaviourCloningPolicyConfig
from training.protocols import Policy

if TYPE_CHECKING:
    from training.models.vpp import PolicyNetwork, VideoPredictionPolicy, VPPConfig

__all__ = ["POLICY_KINDS", "load_policy", "save_vpp"]

VPP_KIND = "vpp-policy"
POLICY_LOADING = (
    "Use `training.export.load_policy(folder)`; the weights are plain safetensors (`former.*`, `denoiser.*`). The\n"
    "frozen model that makes the features is not in this folder: `config.json` names it by digest. If it has moved,\n"
    "give its place: `load_policy(folder, provider=URL)`."
)


def load_policy(url: str | Path, *, autocast: bool = False, provider: str = "", device: str = "auto") -> Policy:
    """The policy of an export, ready to act; `provider` is where its frozen model lies, if it has moved.

    `device` "auto" is a GPU where there is one. Behaviour cloning, a small encoder and a perceptron, acts on the CPU.
    """
    export = read_export(url)
    if export.kind not in POLICY_KINDS:
        raise InputError(f"{url} is a {export.kind!r} export, not a policy.", remedy="Give a train-policy export.")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return POLICY_KINDS[export.kind](export, autocast, provider, torch.device(device))


def save_vpp(
    folder: str | Path,
    network: PolicyNetwork,
    config: VPPConfig,
    *,
    references: Sequence[ModelReference],
    facts: Mapping[str, object],
    inputs: Sequence[str],
) -> str:
    """Write a Video Prediction Policy's export and return its digest."""
    named = {f"needs {place}": f"{item.digest} (was at {item.url})" for place, item in enumerate(references, 1)}
    card = model_card(
        "Video Prediction Policy",
        summary="A diffusion policy on the predictive features of a frozen video model (VPP, ICML 2025, stage 2).",
        facts={**facts, **named},
        limits="A loss says nothing about success: see the rollouts that name this export's digest. It expects the "
        "cameras, the control rate and the robot of its training episodes.",
        loading=POLICY_LOADING,
    )
    return save_export(
        folder,
        kind=VPP_KIND,
        model_config={**config.to_json(), "references": [item.model_dump() for item in references]},
        weights=network.state_dict(),
        preprocessing=Preprocessing(),
        card=card,
        inputs=inputs,
    )


def _load_vpp(export: Export, autocast: bool, moved: str, device: torch.device) -> VideoPredictionPolicy:
    from training.models.common.text import SentenceEncoder
    from training.models.vpp import VideoPredictionPolicy, VPPConfig
    from training.models.vpp.policy import network_of
    from training.providers import build_provider, check_references, parse_provider, with_url

    model = dict(export.model_config)
    references = [ModelReference(**item) for item in model.pop("references")]
    config = VPPConfig.parse(model)
    provider = None
    if config.provider:
        wanted = parse_provider(config.provider)
        wanted = with_url(wanted, moved) if moved else wanted
        check_references(wanted, references)
        provider = build_provider(wanted, device=device)
        if provider.digest != config.provider_digest:
            raise InputError(
                f"{export.url} was trained on features {config.provider_digest[:12]}, "
                f"{config.provider.get('url', 'its provider')} now gives {provider.digest[:12]}.",
                remedy="Name the model it was trained on with provider.",
            )
    text = SentenceEncoder(config.text)
    if config.text_digest not in ("", text.digest):
        raise InputError(
            f"{export.url} was trained on sentences of encoder {short(config.text_digest)}, "
            f"{config.text.path or 'the packaged one'} is {short(text.digest)}.",
            remedy="Put the sentence encoder back that it was trained with.",
        )
    network = network_of(config, export.weights)
    policy = VideoPredictionPolicy(
        provider, network.former, network.denoiser, config.codec,
        config=config, network=network, text=text, digest=export.digest,
    )  # fmt: skip
    return policy.to(device)


def _load_cloning(export: Export, autocast: bool, moved: str, device: torch.device) -> BehaviourCloningPolicy:
    config = BehaviourCloningPolicyConfig.parse(export.model_config)
    head = BehaviourCloningHead(config.head)
    load_weights(head, _below("head.", export.weights))
    encoder = None
    if config.encoder is not None:
        weights = _below("encoder.", export.weights)
        encoder = FrozenEncoder.stored(
            config.encoder, weights, export.preprocessing, config.encoder_digest, autocast=autocast
        )
    return BehaviourCloningPolicy(head, encoder=encoder, camera=config.camera, digest=export.digest)


def _load_diffusion_policy(export: Export, autocast: bool, moved: str, device: torch.device) -> Policy:
    from training.export_baselines import load_diffusion_policy

    return load_diffusion_policy(export, device=device)


def _load_unipi(export: Export, autocast: bool, moved: str, device: torch.device) -> Policy:
    from training.export_baselines import load_unipi

    return load_unipi(export, video=moved, device=device)


def _load_susie(export: Export, autocast: bool, moved: str, device: torch.device) -> Policy:
    from training.export_baselines import load_susie

    return load_susie(export, video=moved, device=device)


Loader = Callable[[Export, bool, str, torch.device], Policy]
POLICY_KINDS: dict[str, Loader] = {
    "bc-policy": _load_cloning,
    VPP_KIND: _load_vpp,
    "diffusion-policy": _load_diffusion_policy,
    "unipi-policy": _load_unipi,
    "susie-policy": _load_susie,
}


def _below(prefix: str, weights: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    return {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}
