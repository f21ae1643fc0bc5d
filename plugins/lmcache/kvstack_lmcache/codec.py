"""A chunk of keys and values as bytes.

    chunk   [2, layers, tokens, hidden]     as LMCache has it: keys and values, hidden = kv heads * head size
    bytes   | header | first tokens, raw | codes of the others | last tokens, raw |

The first tokens of a chunk, and the last ones where they fill no granule, stay as they are. The header holds where in
the text the chunk begins: CommonKV stores keys without rotary embedding, and they are rotated back when they are read.
LMCache does not say where that is. Then it is looked for: the start whose latents leave the least error. A wrong guess
costs quality and nothing else, since the header says what was guessed.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from kvstack import CommonKV, KVStack, KVStackError, Quant
from kvstack.authoring import KV
from kvstack.model.rotation import Rope
from kvstack.packed import Packed
from kvstack.transform.commonkv import Project

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["ChunkCodec", "ChunkError"]

MAGIC = b"KVS1"
HEADER = struct.Struct("<4sHHIi8s")
"""Magic, dtype, rank, tokens, start (-1: none), digest of the codec."""
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
LATENT_SINKS = 8
PROBE = 32
"""Tokens by which a start is looked for."""


class ChunkError(KVStackError):
    """A chunk cannot be packed, or bytes cannot be read."""


@dataclass(frozen=True)
class _Part:
    """Shape and type of a packed tensor."""

    shape: torch.Size
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return self.shape.numel() * self.dtype.itemsize


class ChunkCodec:
    """Packs chunks of one model.

    Args:
        stack: a spec with `quant`, or `commonkv` and `quant`; without settings of the stack.
        head_dim: channels of a head; not needed with a model.
        model: needed for `commonkv`: how its keys are rotated, and its calibration. It is not kept.
        world_size: processes that share the kv heads (tensor parallelism); each has chunks of its own heads.
        sinks: first tokens of a chunk that stay as they are (default: 8 with `commonkv`, whose granule they fill; none
            with `quant` alone, where 32 tokens are packed together).
        chunk: tokens of a whole chunk (default 256): where chunks may begin.

    Raises:
        ChunkError: the stages cannot pack chunks, or something that they need is missing.
    """

    def __init__(
        self,
        stack: str,
        head_dim: int | None = None,
        model: PreTrainedModel | None = None,
        world_size: int = 1,
        sinks: int | None = None,
        chunk: int = 256,
    ) -> None:
        made = KVStack.from_spec(stack)
        self.stack, self.chunk, self.world_size = made.spec, chunk, world_size
        self.quant = next((stage for stage in made.stages if type(stage) is Quant), None)
        common = next((stage for stage in made.stages if type(stage) is CommonKV), None)
        self.sinks = (LATENT_SINKS if common else 0) if sinks is None else sinks
        others = [stage for stage in made.stages if stage not in (self.quant, common)]
        if others or not made.stages or "@" in made.spec:
            raise ChunkError(
                f"stack={stack!r}: a chunk keeps all its tokens, and has stages that pack numbers. "
                "Use quant:4, or commonkv:0.65+quant:2, without settings behind an @."
            )
        self.head_dim = head_dim
        self.groups: Sequence[Sequence[int]] = ()
        self.codecs: list[list[Project]] = []
        self.ropes: Mapping[int, Rope | None] = {}
        self.longest = 0
        digest = f"{self.stack} {self.sinks} {world_size} {head_dim if common is None else ''}"
        if common is not None:
            if model is None:
                raise ChunkError(f"stack={stack!r} is fitted to a model. Name it: model='FOLDER'.")
            if common.unmerged or common.merge == "mean":
                raise ChunkError(f"{common!r}: chunks have latents alone. Leave out unmerged and merge.")
            digest += self._fit(made, model)
        elif head_dim is None:
            raise ChunkError(f"stack={stack!r} needs the size of a head. Give head_dim=128, or what your model has.")
        self.digest = hashlib.sha256(digest.encode()).digest()[:8]
        self._known: dict[tuple[int, int, int, torch.dtype], list[_Part]] = {}

    def _fit(self, stack: KVStack, model: PreTrainedModel) -> str:
        """Bind to the model, and keep what packs its groups: for every rank a codec for each group."""
        binding = stack.bind(model).binding
        assert binding is not None
        stack.unbind()
        self.groups, self.ropes = binding.groups, dict(binding.ropes)
        every = [layer for group in self.groups for layer in group]
        layers = model.config.get_text_config(decoder=True).num_hidden_layers
        if every != list(range(layers)):
            raise ChunkError(f"CommonKV packs {len(every)} of {layers} layers of this model. Use quant alone.")
        if switched := [i for i, rope in self.ropes.items() if rope is not None and rope.switch is not None]:
            raise ChunkError(
                f"layer {switched[0]} rotates keys by the length of the whole text, which a chunk does not know. "
                "Use quant alone."
            )
        self.longest = int(getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", 0) or 0)
        whole = [codec for codec in binding.plan.codecs if isinstance(codec, Project)]
        runs = len(whole[0].bases)
        if runs % self.world_size:
            numbers = max(sum(basis.rank for basis in codec.bases) for codec in whole)
            raise ChunkError(
                f"world_size={self.world_size}: the axes of this calibration are for {runs} runs of kv heads, and a "
                f"process has only its own. Calibrate for them: kvstack calibrate MODEL --layers {len(self.groups[0])} "
                f"--block NUMBERS --out FILE, with the numbers that a group has in one process ({numbers} axes are "
                "kept now), and use commonkv:0.65,calibration='FILE'+quant:2."
            )
        each = runs // self.world_size
        self.codecs = [[_of_rank(codec, rank * each, each) for codec in whole] for rank in range(self.world_size)]
        return " ".join(str(codec.fingerprint) for codec in whole)

    # ---- sizes

    def nbytes(self, shape: Sequence[int], dtype: torch.dtype) -> int:
        """Bytes of every chunk of this shape; of several ranks, the largest."""
        self._sizes(shape, dtype)
        return max(self._nbytes(rank, shape, dtype) for rank in range(self.world_size if self.codecs else 1))

    def _nbytes(self, rank: int, shape: Sequence[int], dtype: torch.dtype) -> int:
        layers, tokens, hidden = self._sizes(shape, dtype)
        packed = sum(part.nbytes for part in self._parts(rank, layers, tokens, hidden, dtype))
        return HEADER.size + packed + 2 * layers * (tokens - self._sealed(tokens)) * hidden * dtype.itemsize

    def _sizes(self, shape: Sequence[int], dtype: torch.dtype) -> tuple[int, int, int]:
        if len(shape) != 4 or shape[0] != 2:
            raise ChunkError(f"a chunk is [2, layers, tokens, hidden], and this one is {list(shape)}.")
        if dtype not in DTYPES:
            raise ChunkError(f"a chunk of {dtype} cannot be packed. Use one of {', '.join(map(str, DTYPES))}.")
        layers, tokens, hidden = (int(n) for n in shape[1:])
        if self.codecs:
            known = self.codecs[0][0].bases[0].shapes[0]
            wanted = sum(basis.shapes[0][0] for basis in self.codecs[0][0].bases) * known[1]
            count = sum(len(group) for group in self.groups)
            if (layers, hidden) != (count, wanted):
                raise ChunkError(
                    f"a chunk of {layers} layers and {hidden} numbers is not of this model, whose chunks have {count} "
                    f"layers and {wanted} numbers (world_size={self.world_size})."
                )
        elif hidden % (self.head_dim or 1):
            raise ChunkError(f"{hidden} numbers of a chunk are no heads of {self.head_dim}. Give another head_dim.")
        return layers, tokens, hidden

    def _sealed(self, tokens: int) -> int:
        """Tokens that are packed: whole granules of those behind the first ones."""
        middle = max(0, tokens - self.sinks)
        return middle // self._granule * self._granule

    @property
    def _granule(self) -> int:
        if self.quant is None:
            return 1
        if not self.codecs:
            return self.quant.granule(self.head_dim or 0)
        encoders = [encoder for codec in self.codecs[0] for encoder in codec.encoders.values()]
        return max((encoder.granule(1) for encoder in encoders), default=self.quant.granule(1))

    def _parts(self, rank: int, layers: int, tokens: int, hidden: int, dtype: torch.dtype) -> list[_Part]:
        """Shapes and types of the packed tokens of a chunk: found by packing random numbers of that shape."""
        sealed = self._sealed(tokens)
        key = rank, sealed, hidden * layers, dtype
        if key not in self._known:
            draw = torch.Generator().manual_seed(0)
            numbers = torch.randn(2, layers, sealed, hidden, generator=draw).to(dtype)
            parts = self._pack(numbers, 0, rank) if sealed else iter(())
            self._known[key] = [_Part(x.shape, x.dtype) for x in parts]
        return self._known[key]

    # ---- there and back

    @torch.no_grad()
    def encode(self, chunk: Tensor, start: int | None = None, rank: int = 0) -> Tensor:
        """Pack a chunk [2, layers, tokens, hidden] into bytes, (n,) uint8.

        Args:
            start: the position of its first token; None: not known.
            rank: the process whose heads these are.

        Raises:
            ChunkError: it is not of this model, or its numbers are too large to be packed in so many bytes.
        """
        layers, tokens, hidden = self._sizes(chunk.shape, chunk.dtype)
        self._check_rank(rank)
        first, last = self.sinks, self.sinks + self._sealed(tokens)
        if last == first:
            first = last = 0
        if self.codecs and first < last and start is None:
            start = self._find(chunk, rank)
        middle = chunk[:, :, first:last]
        packed = list(self._pack(middle, (start or 0) + first, rank)) if first < last else []
        expected = self._parts(rank, layers, tokens, hidden, chunk.dtype)
        if [_Part(x.shape, x.dtype) for x in packed] != expected:
            raise ChunkError(
                "numbers of this chunk are so large or so small that its scales need 32 bits, and no longer fit. "
                "It is left out."
            )
        code = DTYPES.index(chunk.dtype)
        header = HEADER.pack(MAGIC, code, rank, tokens, -1 if start is None else start, self.digest)
        pieces = [torch.frombuffer(bytearray(header), dtype=torch.uint8), _bytes(chunk[:, :, :first])]
        pieces += [*map(_bytes, packed), _bytes(chunk[:, :, last:])]
        return torch.cat([piece.to(chunk.device) for piece in pieces])

    @torch.no_grad()
    def decode(self, data: Tensor, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """The chunk of a `shape` that `encode` made bytes of, (n,) uint8; what is behind them is ignored.

        Raises:
            ChunkError: the bytes are of another codec, or of a chunk of another shape.
        """
        layers, tokens, hidden = self._sizes(shape, dtype)
        head = bytes(data[: HEADER.size].cpu().tolist())
        if len(head) < HEADER.size or not head.startswith(MAGIC):
            raise ChunkError("these bytes are not a chunk that kvstack packed.")
        _, code, rank, held, start, digest = HEADER.unpack(head)
        if digest != self.digest:
            raise ChunkError(f"these bytes were packed by another stack, model or calibration than {self.stack!r}.")
        if held != tokens or code >= len(DTYPES) or DTYPES[code] != dtype:
            raise ChunkError(f"these bytes hold {held} tokens, and a chunk of {tokens} tokens in {dtype} is asked for.")
        self._check_rank(rank)
        if len(data) < (needed := self._nbytes(rank, shape, dtype)):
            raise ChunkError(f"{len(data)} bytes are too few for this chunk, which takes {needed}.")
        first, last = self.sinks, self.sinks + self._sealed(tokens)
        if last == first:
            first = last = 0
        out = torch.empty(2, layers, tokens, hidden, dtype=dtype, device=data.device)
        at = HEADER.size
        at = _fill(out[:, :, :first], data, at)
        if first < last:
            parts = []
            for part in self._parts(rank, layers, tokens, hidden, dtype):
                parts.append(data[at : at + part.nbytes].clone().view(part.dtype).view(part.shape))
                at += part.nbytes
            out[:, :, first:last] = self._unpack(iter(parts), last - first, max(0, start) + first, rank, out)
        _fill(out[:, :, last:], data, at)
        return out

    def _check_rank(self, rank: int) -> None:
        if not 0 <= rank < self.world_size and self.codecs:
            raise ChunkError(f"rank {rank}: world_size={self.world_size} processes share the heads.")

    # ---- numbers

    def _pack(self, chunk: Tensor, start: int, rank: int) -> Iterator[Tensor]:
        """The tensors that a chunk is packed in, in order."""
        if not self.codecs:
            assert self.quant is not None
            for role, x in zip(("keys", "values"), chunk, strict=True):
                yield from _in_order(self.quant.encode(_heads(x, self.head_dim), role))
            return
        for codec, layers in zip(self.codecs[rank], self.groups, strict=True):
            latents = codec.forward(self._group(codec, chunk, layers, start))
            for name, latent in latents.items():
                encoder = codec.encoders.get(name, self.quant)
                yield from [latent.data] if encoder is None else _in_order(encoder.encode(latent.data, "latent"))

    def _group(self, codec: Project, chunk: Tensor, layers: Sequence[int], start: int) -> list[KV]:
        """Keys without rotary embedding, and values, of a group's layers."""
        found = []
        for slot, layer in enumerate(layers):
            _, width, other = codec.bases[0].shapes[slot]
            keys, values = _heads(chunk[0, layer : layer + 1], width), _heads(chunk[1, layer : layer + 1], other)
            rope = self.ropes.get(layer)
            found.append(KV(keys if rope is None else rope.unrotate(keys, _at(start, keys)), values))
        return found

    def _unpack(self, parts: Iterator[Tensor], tokens: int, start: int, rank: int, like: Tensor) -> Tensor:
        """The chunk [2, layers, tokens, hidden] of the tensors that `_pack` gives."""
        layers, hidden, dtype = like.shape[1], like.shape[3], like.dtype
        if not self.codecs:
            assert self.quant is not None
            width = self.head_dim or 0
            both = []
            for role in ("keys", "values"):
                probe = self._names(role, layers, hidden // width, width, dtype)
                packed = Packed({name: next(parts) for name in probe}, tokens=tokens, width=width, dtype=dtype)
                both.append(self.quant.decode(packed, role).transpose(1, 2).flatten(2))
            return torch.stack(both)
        out = torch.empty(2, layers, tokens, hidden, dtype=dtype, device=like.device)
        for codec, group in zip(self.codecs[rank], self.groups, strict=True):
            latents = {}
            for name, basis in zip(codec.names, codec.bases, strict=True):
                encoder = codec.encoders.get(name, self.quant)
                if encoder is None:
                    latents[name] = next(parts)
                    continue
                probe = sorted(
                    encoder.encode(torch.zeros(1, 1, self._granule, basis.rank, dtype=dtype), "latent").parts
                )
                packed = Packed({one: next(parts) for one in probe}, tokens=tokens, width=basis.rank, dtype=dtype)
                latents[name] = encoder.decode(packed, "latent")
            for slot, layer in enumerate(group):
                kv, rope = codec.inverse(latents, slot), self.ropes.get(layer)
                keys = kv.keys if rope is None else rope.rotate(kv.keys, _at(start, kv.keys))
                out[0, layer], out[1, layer] = (
                    keys[0].transpose(0, 1).flatten(1),
                    kv.values[0].transpose(0, 1).flatten(1),
                )
        return out

    def _names(self, role: str, layers: int, heads: int, width: int, dtype: torch.dtype) -> list[str]:
        assert self.quant is not None
        return sorted(self.quant.encode(torch.zeros(1, 1, self._granule, width, dtype=dtype), role).parts)

    def _find(self, chunk: Tensor, rank: int) -> int:
        """The start, a multiple of a chunk's tokens, whose latents of the first group leave the least error."""
        codec, layers = self.codecs[rank][0], self.groups[0]
        first = self.sinks
        probe = chunk[:, :, first : first + PROBE]
        errors = []
        starts = range(0, max(self.chunk, self.longest), self.chunk)
        for start in starts:
            group = self._group(codec, probe, layers, start + first)
            latents = {name: latent.data for name, latent in codec.forward(group).items()}
            errors.append(
                sum(
                    float((codec.inverse(latents, slot).keys - kv.keys).float().square().sum())
                    for slot, kv in enumerate(group)
                )
            )
        return starts[min(range(len(errors)), key=errors.__getitem__)]


def _of_rank(codec: Project, first: int, count: int) -> Project:
    """The part of a group's codec that is for some runs of kv heads."""
    mine = Project(codec.bases[first : first + count], None)
    theirs = codec.names[first : first + count]
    mine.encoders = {
        own: codec.encoders[name] for own, name in zip(mine.names, theirs, strict=True) if name in codec.encoders
    }
    return mine


def _heads(x: Tensor, width: int | None) -> Tensor:
    """(B, T, hidden) -> (B, H, T, D)."""
    return x.unflatten(-1, (-1, width or x.shape[-1])).transpose(1, 2).contiguous()


def _at(start: int, x: Tensor) -> Tensor:
    """Positions (1, 1, T) of tokens (1, H, T, D)."""
    return torch.arange(start, start + x.shape[2], device=x.device, dtype=torch.int32)[None, None]


def _in_order(packed: Any) -> list[Tensor]:
    return [packed.parts[name] for name in sorted(packed.parts)]


def _bytes(x: Tensor) -> Tensor:
    return x.contiguous().view(-1).view(torch.uint8) if x.numel() else torch.empty(0, dtype=torch.uint8)


def _fill(into: Tensor, data: Tensor, at: int) -> int:
    """Copy raw tokens out of `data` from byte `at` on. Returns where the next bytes are."""
    size = into.numel() * into.element_size()
    if size:
        into.copy_(data[at : at + size].clone().view(into.dtype).view(into.shape))
    return at + size
