"""Runs kvpress for another process: requests on stdin and replies on stdout, one JSON object a line.

Standalone: it runs in an environment of its own and imports torch, transformers and kvpress, never kvstack.

    python -I kvpress_worker.py FOLDER DTYPE THREADS

The first line it writes holds the versions, once the model is loaded. Requests:

    {"op": "read", "ids": [...], "context": N, "out": PATH}     -> {"share", "simulated"}, log probabilities in PATH
    {"op": "answer", "text": [...], "question": [...], "new": N, "blind": BOOL} -> {"ids", "share", "simulated"}

Both have a `press` too: null, or {"name", "inside", "ratio", "settings"} with a press' class, the class that it wraps
or null, the share of tokens that is dropped, and arguments. A request that fails is answered with {"error": TEXT}.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from typing import Any

import kvpress
import torch
import transformers
from kvpress.presses import kvzip_press
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache


class RawText:
    """A tokenizer without chat template, for KVzip.

    With one it takes it that every text begins with the template's words, does not score as many of the first tokens,
    and so drops them. The texts here are plain.
    """

    @staticmethod
    def from_pretrained(name: str) -> Any:
        tokenizer = AutoTokenizer.from_pretrained(name)
        tokenizer.chat_template = None
        return tokenizer


kvzip_press.AutoTokenizer = RawText


class Reader:
    """One text in one cache, which a press has shortened; every forward is told the true positions."""

    def __init__(self, model: Any, press: Any) -> None:
        self.model, self.press = model, press
        self.cache = DynamicCache(config=model.config)
        self.seen = 0
        for module in self._attentions():
            module.masked_key_indices = None  # of the text before

    def prefill(self, ids: list[int]) -> torch.Tensor:
        """Logits of the last token, (vocabulary,). The press works while or after these tokens are read."""
        with self.press(self.model) if self.press else contextlib.nullcontext():
            return self._forward(ids, logits_to_keep=1)[-1]

    def feed(self, ids: list[int]) -> torch.Tensor:
        """Logits of every token, (tokens, vocabulary)."""
        # a masking press looks for one key that no query of a forward wants; with many queries there may be none
        for size in (len(ids), 16, 1):
            held = self.cache.get_seq_length()
            before = self.seen
            try:
                return torch.cat([self._forward(ids[i : i + size]) for i in range(0, len(ids), size)])
            except ValueError:
                if not self.masked() or size == 1:
                    raise
                self.seen = before
                for layer in self.cache.layers:
                    layer.keys, layer.values = layer.keys[:, :, :held], layer.values[:, :, :held]
        raise AssertionError

    def _forward(self, ids: list[int], **kwargs: Any) -> torch.Tensor:
        positions = torch.arange(self.seen, self.seen + len(ids))[None]
        fed = torch.tensor([ids])
        logits = self.model(input_ids=fed, position_ids=positions, past_key_values=self.cache, **kwargs).logits[0]
        self.seen += len(ids)
        return logits

    def masked(self) -> int:
        """Token and head pairs, over all layers, that the press only hides."""
        hidden = [module.masked_key_indices for module in self._attentions()]
        return sum(len(indices[0]) for indices in hidden if indices is not None)

    def share(self) -> float:
        """Bytes held, as a share of a dense bfloat16 cache's of all tokens seen; what is hidden counts as gone."""
        tensors = [x for layer in self.cache.layers for x in (layer.keys, layer.values)]
        width = self.cache.layers[0].keys.shape[-1]
        heads = self.cache.layers[0].keys.shape[1]
        dense = len(tensors) * heads * self.seen * width * 2
        if masked := self.masked():  # the tensors may be views of larger ones, but their share is a claim anyway
            return (sum(x.numel() for x in tensors) - 2 * width * masked) * 2 / dense
        return sum(bytes_held(x, self.model.dtype) for x in tensors) / dense

    def _attentions(self) -> list[Any]:
        return [layer.self_attn for layer in self.model.model.layers]


def bytes_held(tensor: torch.Tensor, dtype: torch.dtype) -> float:
    size = tensor.untyped_storage().nbytes()
    return size * 2 / dtype.itemsize if tensor.dtype == dtype else size


def made(spec: dict[str, Any] | None) -> Any:
    if spec is None:
        return None
    if spec["inside"] is None:
        return getattr(kvpress, spec["name"])(compression_ratio=spec["ratio"], **spec["settings"])
    inside = getattr(kvpress, spec["inside"])(compression_ratio=spec["ratio"], **spec["settings"])
    return getattr(kvpress, spec["name"])(inside)


def read(model: Any, request: dict[str, Any]) -> dict[str, Any]:
    ids, context = request["ids"], request["context"]
    reader = Reader(model, made(request["press"]))
    reader.prefill(ids[:context])
    reply = {"share": reader.share(), "simulated": reader.masked() > 0}
    log_probs = reader.feed(ids[context:-1]).float().log_softmax(-1)
    save_file({"log_probs": log_probs}, request["out"])
    return reply


def answer(model: Any, request: dict[str, Any]) -> dict[str, Any]:
    text, question = request["text"], request["question"]
    reader = Reader(model, made(request["press"]))
    if request["blind"]:
        reader.prefill(text)
        logits = reader.feed(question)[-1]
    else:
        logits = reader.prefill(text + question)
    ends = model.generation_config.eos_token_id
    ends = ends if isinstance(ends, list) else [ends]
    new = [int(logits.argmax())]
    while len(new) < request["new"] and new[-1] not in ends:
        new.append(int(reader.feed(new[-1:])[-1].argmax()))
    return {"ids": new, "share": reader.share(), "simulated": reader.masked() > 0}


def main(folder: str, dtype: str, threads: str) -> None:
    # whatever a library prints must not mix with the replies
    replies = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    torch.set_num_threads(int(threads))
    torch.set_grad_enabled(False)
    # masking presses work with any attention function but the eager one
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype), attn_implementation="sdpa").eval()
    replies.write(json.dumps({"torch": torch.__version__, "transformers": transformers.__version__}) + "\n")
    for line in sys.stdin:
        request = json.loads(line)
        torch.manual_seed(0)  # for the press that draws
        try:
            reply = {"read": read, "answer": answer}[request["op"]](model, request)
        except Exception as error:  # the next request may be a better one
            reply = {"error": f"{type(error).__name__}: {error}"}
        replies.write(json.dumps(reply) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
