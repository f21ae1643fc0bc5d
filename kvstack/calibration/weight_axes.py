"""The paper's axes: singular vectors of the key and value projections of a group of layers, no data needed.

    W = [K_0; V_0; K_1; V_1; ...]  (N, d) = U S V^T        keys, values = W h = U_r (S_r V_r^T h) = axes^T z

A latent z can be read off the hidden state h of a layer (z = S_r V_r^T h), or be projected from its keys and values.

Source: CommonKV, arXiv 2508.16134, section 3. Differs from its code: layers come in turn, keys before values; all of S
goes to the side of the hidden state.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..errors import BindError
from ..model.attention import device_of, tensors_of
from ..model.fingerprint import kv_fingerprint, numbers_of
from ..model.probing import observe
from ..types import KV
from .axes import Basis

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ..model.layers import LayerGroups

__all__ = ["WeightAxes", "weight_axes"]

TOLERANCE = 0.05
"""Relative error that weights of 8 bits and bfloat16 may leave."""
NORMS = ("k_norm", "k_layernorm", "key_layernorm", "qk_norm")


_known: weakref.WeakKeyDictionary[Any, dict[tuple[str, str], WeightAxes]] = weakref.WeakKeyDictionary()


def weight_axes(model: PreTrainedModel, groups: LayerGroups) -> WeightAxes:
    """The axes of `model`, made once for all its stacks.

    Raises:
        BindError: its keys and values are not the projections of hidden states that kvstack finds.
    """
    whose = kv_fingerprint(model)
    known, key = _known.setdefault(model, {}), (whose, str(groups.groups))
    if key not in known:
        axes = WeightAxes(model, {i: groups.modules[i] for i in groups.full}, groups.groups)
        axes.fingerprint = f"weights of {whose}"
        ids = torch.arange(1, 33)[None] % model.config.get_text_config(decoder=True).vocab_size
        axes.check(model, observe(model, groups, ids))
        known[key] = axes
    return known[key]


class WeightAxes:
    """Axes of every group of layers, from the projection weights of `modules` (layer -> attention module)."""

    fingerprint = ""

    def __init__(self, model: PreTrainedModel, modules: dict[int, nn.Module], groups: Sequence[Sequence[int]]) -> None:
        self._bases: weakref.WeakValueDictionary[Any, Basis] = weakref.WeakValueDictionary()
        self.singular: dict[tuple[int, ...], tuple[Tensor, Tensor, Tensor, tuple[tuple[int, int, int], ...]]] = {}
        for group in groups:
            weights, biases, shapes = [], [], []
            for layer in group:
                heads, width, pairs = projections(model, modules[layer], layer)
                shapes.append((heads, width, width))
                weights += [weight for weight, _ in pairs]
                biases += [weight.new_zeros(len(weight)) if bias is None else bias for weight, bias in pairs]
            device = weights[0].device
            u, s, v = torch.linalg.svd(torch.cat([w.to(device) for w in weights]), full_matrices=False)
            # singular vectors are defined up to their signs: the largest entry is made positive
            signs = u.gather(0, u.abs().argmax(0, keepdim=True)).sign()
            u, v = u * signs, v * signs.T
            bias = torch.cat([b.to(device) for b in biases])
            self.singular[tuple(group)] = u.T.contiguous(), s[:, None] * v, bias, tuple(shapes)

    def check(self, model: PreTrainedModel, seen: Mapping[int, KV]) -> None:
        """Raise `BindError` where keys or values of the tokens in `seen` are not what the projections make of their
        hidden states: some models scale, clip, or rotate in ways of their own."""
        for layers, (axes, down, bias, shapes) in self.singular.items():
            basis = Basis(axes, bias, None, shapes)
            for slot, layer in enumerate(layers):
                kv = seen[layer]
                assert kv.hidden is not None
                z = kv.hidden[:, 0].to(down.device).float() @ down.T
                for name, rebuilt in (("keys", basis.keys(z, slot)), ("values", basis.values(z, slot))):
                    exact = getattr(kv, name).to(rebuilt)
                    same = rebuilt.shape == exact.shape  # values may have another width than keys
                    if not (same and float((rebuilt - exact).norm()) <= TOLERANCE * float(exact.norm())):
                        raise BindError(
                            f"CommonKV(basis='weights'): {name} of layer {layer} of {type(model).__name__} are not its "
                            "projection of the hidden state. Use basis='calibrated'."
                        )

    def tensors(self, layers: Sequence[int]) -> list[Tensor]:
        """Return the tensors held for the group that is `layers`."""
        return list(self.singular[tuple(layers)][:3])

    @property
    def full_rank(self) -> int:
        return min(len(axes) for axes, *_ in self.singular.values())

    @property
    def numbers(self) -> int:
        """Numbers of keys and values per token in all groups."""
        return sum(axes.shape[1] for axes, *_ in self.singular.values())

    def basis(self, layers: Sequence[int], rank: int, device: torch.device, dtype: torch.dtype) -> Basis:
        key = (tuple(layers), rank, device, dtype)
        made = self._bases.get(key)
        if made is None:
            axes, _, bias, shapes = self.singular[tuple(layers)]
            made = self._bases[key] = Basis(axes[:rank].to(device), bias.to(device), None, shapes, dtype)
        return made

    def down(self, layers: Sequence[int], rank: int, device: torch.device) -> Tensor:
        """(R, d): hidden states to latents."""
        return self.singular[tuple(layers)][1][:rank].to(device)


Pair = tuple[Tensor, Tensor | None]
"""A weight (H*D, d) and its bias (H*D,), float32."""


def projections(model: PreTrainedModel, attention: nn.Module, layer: int) -> tuple[int, int, tuple[Pair, Pair]]:
    """(kv heads, head size, the projections of keys and of values) of one attention module.

    Raises:
        BindError: keys are not a linear function of the hidden state, or the projections are not found.
    """
    name = f"{type(model).__name__}, layer {layer}"
    config: Any = model.config.get_text_config(decoder=True)
    norm = next((n for n in NORMS if isinstance(getattr(attention, n, None), nn.Module)), None)
    if norm or getattr(config, "clip_qkv", None):
        what = f"normalises keys ({norm})" if norm else "clips them (clip_qkv)"
        raise BindError(
            f"CommonKV(basis='weights'): {name} {what} after their projection, so they are not a linear function of "
            "the hidden state. Use basis='calibrated'."
        )
    width = getattr(attention, "head_dim", None) or getattr(attention, "head_size", None)
    width = width or getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    if hasattr(attention, "k_proj") and hasattr(attention, "v_proj"):
        keys, values = matrix(attention.k_proj, config), matrix(attention.v_proj, config)
        return len(keys[0]) // width, width, (keys, values)
    if hasattr(attention, "qkv_proj"):  # one block after the other: queries, keys, values
        weight, bias = matrix(attention.qkv_proj, config)
        sizes = [len(weight) - 2 * heads * width, heads * width, heads * width]
        parts = weight.split(sizes)
        biases = (None, None, None) if bias is None else bias.split(sizes)
        return heads, width, ((parts[1], biases[1]), (parts[2], biases[2]))
    if hasattr(attention, "query_key_value") and "gpt_neox" in sys.modules[type(attention).__module__].__name__:
        weight, bias = matrix(attention.query_key_value, config)  # each head: its query, key and value
        by_head = weight.view(-1, 3, width, weight.shape[1])
        heads, halves = len(by_head), None if bias is None else bias.view(-1, 3, width)
        keys, values = (
            (by_head[:, i].flatten(0, 1), None if halves is None else halves[:, i].flatten()) for i in (1, 2)
        )
        return heads, width, (keys, values)
    raise BindError(
        f"CommonKV(basis='weights'): no projections of keys and values that kvstack knows were found in {name}. "
        "Use basis='calibrated'."
    )


def matrix(linear: Any, config: Any) -> Pair:
    """Weight and bias of a linear layer. One whose weight is no plain matrix (4 or 8 bits, adapters, shards) is asked
    what it does to unit vectors."""
    device, bias = device_of(linear), getattr(linear, "bias", None)
    if type(linear) is nn.Linear and type(linear.weight.data) is Tensor:
        names = ("weight",) if bias is None else ("weight", "bias")
        own = [numbers_of(linear, name, getattr(linear, name)).detach().to(device).float() for name in names]
        return own[0], own[1] if len(own) > 1 else None
    weight = next(tensors_of(linear))
    dtype = weight.dtype if weight.is_floating_point() else getattr(linear, "compute_dtype", None) or torch.float32
    units = torch.eye(config.hidden_size, dtype=dtype, device=device)
    with torch.no_grad():
        constant = linear(torch.zeros_like(units[:1])).float()
        columns = linear(units).float() - constant
    return columns.T.contiguous(), None if bias is None else constant[0]
