"""The model that is measured, and what is done with it."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor
from transformers import Cache

from ... import models
from ...errors import KVStackError
from ...model.fingerprint import fingerprint
from ...pypi_models import quiet
from ..peers.kvpress import KvPress, find
from ..terminal import working
from .run import Run
from .texts import documentation

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["SHAPES", "Letters", "Subject", "opened", "prefill", "rotated", "shaped", "step", "wait"]

T = TypeVar("T")


@dataclass(frozen=True)
class Subject:
    """The model that is measured."""

    name: str
    model: PreTrainedModel
    tokenizer: Any
    """A tokenizer of transformers, or `Letters` of the tiny model."""
    kvpress: KvPress | None = None
    """The same model in a process with kvpress, which starts when it is asked."""
    identity: str | None = None
    """Fingerprint of the weights."""

    def tokens(self, length: int) -> Tensor:
        """The first (1, length) tokens of Python's documentation."""
        return self.encode(documentation(), length)

    def encode(self, text: str, length: int) -> Tensor:
        """The first `length` tokens of `text`, (1, length)."""
        # no tokenizer makes more than some 12 characters of ordinary text into one token
        ids: Tensor = self.tokenizer(text[: 12 * length], return_tensors="pt")["input_ids"]
        if ids.shape[1] < length:
            raise KVStackError(f"a text has {ids.shape[1]:,} tokens and {length:,} are needed. Use a longer one.")
        return ids[:, :length]

    def ids(self, text: str, first: bool = False) -> Tensor:
        """All tokens of `text`, (1, T), behind the token that begins a text where it comes `first` and there is one."""
        ids: Tensor = self.tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
        return torch.cat([self.begin, ids], dim=1) if first else ids

    @property
    def begin(self) -> Tensor:
        """The token that the tokenizer puts before a text, (1, 1), or (1, 0) where there is none."""
        token = getattr(self.tokenizer, "bos_token_id", None)
        begins = token is not None and self.tokenizer("a")["input_ids"][:1] == [token]
        return torch.tensor([[token]] if begins else [[]], dtype=torch.long)

    def check(self, tokens: int) -> None:
        """Raise where so many tokens are more than the model was made for."""
        longest = getattr(self.model.config.get_text_config(decoder=True), "max_position_embeddings", None)
        if longest and tokens > longest:
            raise KVStackError(
                f"{self.name} reads {longest:,} tokens, and {tokens:,} are needed. Use shorter --contexts."
            )

    def count(self, text: str) -> int:
        """Tokens of `text`."""
        return len(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def words(self, ids: Tensor | Sequence[int]) -> str:
        """The text of `ids` (T,)."""
        return str(self.tokenizer.decode(ids, skip_special_tokens=True))

    def answer(self, ids: Tensor, cache: Cache, limit: int) -> Tensor:
        """Generate up to `limit` tokens after `ids` (1, T), greedily; `cache` may hold the first ids. Return (1, N)."""
        ids = ids.to(self.model.device)
        generated: Tensor = self.model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            past_key_values=cache,
            max_new_tokens=limit,
            do_sample=False,
            # a model's own settings may ask for these, and a peer in another process does not know them
            repetition_penalty=1.0,
            no_repeat_ngram_size=0,
        )
        return generated[:, ids.shape[1] :].cpu()


class Letters:
    """A token for every character: the tokenizer of a random model, so that it goes the way of a real one."""

    vocab_size = 128

    def __call__(self, text: str, return_tensors: str | None = None, **unused: Any) -> dict[str, Any]:
        ids = list(text.encode("ascii", errors="replace"))
        return {"input_ids": torch.tensor([ids]) if return_tensors else ids}

    def decode(self, ids: Sequence[int] | Tensor, **unused: Any) -> str:
        return bytes(torch.as_tensor(ids).tolist()).decode("ascii", errors="replace")


SHAPES: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "small": ("llama", {
        "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": 512,
    }),
    "135m": ("llama", {
        "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
        "num_key_value_heads": 3, "vocab_size": 49152,
    }),
    "1b": ("llama", {
        "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32,
        "num_key_value_heads": 8, "vocab_size": 128256, "head_dim": 64,
    }),
    "8b": ("llama", {
        "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 8, "vocab_size": 128256,
    }),
    "7b": ("llama", {
        "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 32, "vocab_size": 32000,
    }),
    "70b": ("llama", {
        "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64,
        "num_key_value_heads": 8, "vocab_size": 128256,
    }),
    "qwen3-1.7b": ("qwen3", {
        "hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 28, "num_attention_heads": 16,
        "num_key_value_heads": 8, "vocab_size": 151936, "head_dim": 128,
    }),
    "deepseek-1b": ("deepseek_v3", {
        "hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 16, "num_attention_heads": 16,
        "num_key_value_heads": 16, "vocab_size": 102400, "q_lora_rank": None, "kv_lora_rank": 512,
        "qk_rope_head_dim": 64, "qk_nope_head_dim": 128, "v_head_dim": 128, "first_k_dense_replace": 16,
    }),
}  # fmt: skip
"""Architectures and sizes of a small model, of SmolLM2 135M, Llama 3.2 1B, Llama 3 8B, Llama 2 7B (as many kv heads as
query heads), Llama 3 70B and Qwen3 1.7B, for random ones: what they cost does not depend on what they have learned. No
DeepSeek is so small: the last one has the attention of DeepSeek V2 Lite, whose latents are cached, in sixteen layers
without experts."""


@contextmanager
def opened(run: Run, shape: str | None = None) -> Iterator[Subject]:
    """The run's model, with the run's number of threads and without gradients; or a random one of a `shape`.

    Without cuDNN's attention: for every new length of a text it makes a plan, which costs a dense cache more than all
    the rest of a step (on an H100, torch 2.11), and would make stacks look up to three times as fast as they are.
    """
    threads, planned = torch.get_num_threads(), torch.backends.cuda.cudnn_sdp_enabled()
    torch.set_num_threads(run.threads)
    torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        with torch.no_grad(), ExitStack() as ends:
            yield _tiny(run, ends) if run.tiny else shaped(run, shape) if shape else _loaded(run, ends)
    finally:
        torch.set_num_threads(threads)
        torch.backends.cuda.enable_cudnn_sdp(planned)


def _loaded(run: Run, ends: ExitStack) -> Subject:
    with working("loading the model"):
        model, tokenizer = models.load(run.model, dtype=getattr(torch, run.dtype))
        model.to(run.device)
    outside = _outside(run, models.source(run.model), ends)
    return Subject(run.model or models.DEFAULT_MODEL, model, tokenizer, outside, fingerprint(model))


def _outside(run: Run, folder: str, ends: ExitStack) -> KvPress | None:
    python = find()
    return ends.enter_context(KvPress(python, folder, run.dtype, run.threads)) if python else None


def _tiny(run: Run, ends: ExitStack) -> Subject:
    """A random llama of a few thousand weights, so that a benchmark itself can be tested."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=Letters.vocab_size,
        hidden_size=128,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=8192,
        initializer_range=0.2,  # with the default 0.02 a random model is nearly indifferent to its cache
    )
    with torch.random.fork_rng():
        torch.manual_seed(run.seed)
        model = LlamaForCausalLM(config).eval().to(getattr(torch, run.dtype))
    folder = ends.enter_context(tempfile.TemporaryDirectory())
    if find():
        with quiet():
            model.save_pretrained(folder)
    return Subject("tiny random llama", model, Letters(), _outside(run, folder, ends))


def shaped(run: Run, shape: str) -> Subject:
    """A random model, made where it runs."""
    from transformers import AutoConfig, AutoModelForCausalLM

    family, sizes = SHAPES[shape]
    rope = {"rope_type": "default", "rope_theta": 500000.0}
    config = AutoConfig.for_model(family, **sizes, max_position_embeddings=131072, rope_parameters=rope)
    config.dtype = getattr(torch, run.dtype)
    with working(f"drawing the weights of a model like {shape}"), torch.random.fork_rng(), torch.device(run.device):
        torch.manual_seed(run.seed)
        model = AutoModelForCausalLM.from_config(config, dtype=config.dtype).eval()
    return Subject(f"random {family}, {shape}", model, Letters())


def prefill(model: PreTrainedModel, ids: Tensor, cache: Cache) -> Tensor:
    """Feed `ids` (1, T); the next token, (1, 1)."""
    # logits of all tokens would cost more memory than most caches
    logits = model(input_ids=ids.to(model.device), past_key_values=cache, use_cache=True, logits_to_keep=1).logits
    return logits[:, -1:].argmax(-1)


def step(model: PreTrainedModel, token: Tensor, cache: Cache) -> Tensor:
    """Decode greedily: the token after `token` (1, 1)."""
    return model(input_ids=token, past_key_values=cache, use_cache=True).logits[:, -1:].argmax(-1)


def wait(model: PreTrainedModel) -> None:
    """Until the model's device has done what it was asked: a GPU answers before."""
    if model.device.type != "cpu":
        torch.accelerator.synchronize(model.device)


def rotated(items: Sequence[T], by: int) -> list[T]:
    """`items` from number `by` on, then the others: in each round another one goes first."""
    start = by % len(items)
    return [*items[start:], *items[:start]]
