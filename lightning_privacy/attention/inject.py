"""Finds the attention layers of a model, noises the chosen ones, and takes the noise away again."""

from __future__ import annotations

from contextlib import ExitStack
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import nn

from lightning_privacy.attention import modules, transformers
from lightning_privacy.errors import ConfigurationError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from lightning_privacy.attention.realisation import Injection, LayerNoise


class Site(NamedTuple):
    """An attention layer: its name, the module, and how noise gets there (None: not at all)."""

    name: str
    module: nn.Module
    kind: str | None


def find(root: nn.Module) -> list[Site]:
    """All attention layers, in the order of the model.

    Args:
        root: the model.

    Returns:
        Layers that noise can reach; and, of kind None, modules that are called attention, have no
        such layer inside, and show no way for noise.
    """
    sites = [Site(name, module, _kind(module)) for name, module in root.named_modules()]
    reached = [site.name for site in sites if site.kind]
    return [
        site
        for site in sites
        if site.kind
        or (
            "attention" in type(site.module).__name__.lower()
            and any(True for _ in site.module.parameters())
            and not any(name.startswith(f"{site.name}.") for name in reached)
            and not any(site.name.startswith(f"{name}.") for name in reached)
        )
    ]


def _kind(module: nn.Module) -> str | None:
    if isinstance(module, modules.NoisyAttention):
        return "own"
    if isinstance(module, nn.MultiheadAttention):
        return "multihead"
    if transformers.calls_interface(module):
        return "transformers"
    if transformers.mentions(module, "scaled_dot_product_attention"):
        return "kernel"
    return None


def choose(sites: Sequence[Site], layers: Sequence[int | str] | None) -> list[Site]:
    """The layers that a user asks for.

    Args:
        sites: from `find`.
        layers: numbers into the reachable layers, negative ones from the end, or patterns of
            names; None for all.

    Returns:
        The chosen ones.

    Raises:
        ConfigurationError: nothing is chosen, or noise cannot reach what is.
    """
    reachable = [site for site in sites if site.kind]
    if layers is None:
        chosen = list(sites)
    else:
        numbers = [_within(n, len(reachable)) for n in layers if isinstance(n, int)]
        by_number = {id(reachable[n].module) for n in numbers}
        patterns = [p for p in layers if isinstance(p, str)]
        chosen = [
            site
            for site in sites
            if id(site.module) in by_number or any(fnmatchcase(site.name, p) for p in patterns)
        ]
    blind = [f"{site.name} ({type(site.module).__name__})" for site in chosen if not site.kind]
    if blind or not chosen:
        names = ", ".join(site.name for site in reachable) or "none"
        raise ConfigurationError(
            must="every attention layer that is to be noised calls transformers' attention "
            "interface or F.scaled_dot_product_attention, is an nn.MultiheadAttention, or has an "
            "attribute attention_noise",
            found=", ".join(blind) or f"no such layer is chosen; reachable are: {names}",
            cost="the model would silently train without noise there",
            remedy="choose others by layers=, or give an own module the attribute "
            "attention_noise = None (see lightning_privacy.attention.NoisyAttention)",
        )
    return chosen


def _within(layer: int, count: int) -> int:
    if not -count <= layer < count:
        raise ConfigurationError(
            must=f"a number in layers= is one of the {count} attention layers of the model",
            found=str(layer),
            cost="another layer would be noised than meant, or none",
            remedy="count from 0, or from the end with -1",
        )
    return layer % count


def inject(
    root: nn.Module, injection: Injection, layers: Sequence[int | str] | None = None
) -> Callable[[], None]:
    """Noise the chosen attention layers of a model from now on.

    Args:
        root: the model.
        injection: what the layers share; gets one `LayerNoise` for each of them.
        layers: as in `choose`.

    Returns:
        What restores the model; may be called at any time, and again.

    Raises:
        ConfigurationError: noise cannot reach a chosen layer, or has reached the model already.
    """
    sites = choose(find(root), layers)
    _require_gpu_for_flex(root, injection)
    undo = ExitStack()
    try:
        ours: dict[nn.Module, LayerNoise] = {}
        for site in sites:
            _require_clean(site)
            noise = injection.layer(site.name)
            if site.kind == "own":
                undo.callback(modules.give_own(site.module, noise))  # type: ignore[arg-type]
            elif site.kind == "transformers":
                ours[site.module] = noise
            else:
                forward = modules.multihead if site.kind == "multihead" else modules.kernel_user
                undo.callback(modules.wrap(site.module, forward, noise))
        if injection.at_inference and any(site.kind == "multihead" for site in sites):
            # Torch's fast path for evaluation calls no attention module.
            before = torch.backends.mha.get_fastpath_enabled()
            undo.callback(torch.backends.mha.set_fastpath_enabled, before)
            torch.backends.mha.set_fastpath_enabled(False)
        if ours:
            undo.callback(transformers.switch(root, ours, injection))
    except BaseException:
        undo.close()
        raise
    undo.callback(injection.layers.clear)
    return undo.close


def _require_gpu_for_flex(root: nn.Module, injection: Injection) -> None:
    device = next((p.device for p in root.parameters()), torch.device("cpu"))
    if injection.method == "flex" and device.type != "cuda":
        raise ConfigurationError(
            must="method='flex' has a GPU",
            found=f"a model on {device}",
            cost="flex attention has no backward there",
            remedy="method='auto', which takes a dense matrix on the CPU",
        )


def _require_clean(site: Site) -> None:
    held = getattr(site.module, "attention_noise", None) is not None
    if held or transformers.is_noised(site.module) or modules.is_wrapped(site.module):
        raise ConfigurationError(
            must="an attention layer has one source of noise",
            found=f"{site.name} has one already",
            cost="noise of another size than configured",
            remedy="give the trainer one AttentionNoise callback",
        )
