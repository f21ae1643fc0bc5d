"""The model type for lm-evaluation-harness: the numbers of its `hf` without compression, a plain loop's with it."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from kvstack import Evict, KVStack, Quant
from kvstack.errors import KVStackError, UseError
from tests import tiny

ROOT = Path(__file__).parent.parent
LOSSY = {"stack": "quant:2+evict:0.3", "window": 8}


def text(length: int, seed: int) -> str:
    return " ".join(f"w{i}" for i in tiny.tokens(1, length, seed)[0].tolist())


# contexts of several lengths, two of them asked several times; continuations of one token and of more than a chunk
CONTEXTS = [text(60, 0), text(60, 0), text(60, 0), text(90, 1), text(31, 2), text(90, 1)]
CONTINUATIONS = [" " + text(n, 10 + n) for n in (1, 5, 40, 3, 1, 2)]


def test_without_the_harness_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.setitem(sys.modules, "lm_eval.api.registry", None)
    monkeypatch.delitem(sys.modules, "kvstack.lm_eval", raising=False)
    with pytest.raises(
        KVStackError, match=r"needs lm_eval.*, which is not installed.*pip install 'kvstack\[lm-eval\]'"
    ):
        importlib.import_module("kvstack.lm_eval")


@pytest.fixture(scope="module")
def door():
    pytest.importorskip("lm_eval", reason="needs the extra lm-eval")
    return importlib.import_module("kvstack.lm_eval")


@pytest.fixture(scope="module")
def tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {"<pad>": 0, "<s>": 1, "</s>": 2} | {f"w{i}": i for i in range(3, tiny.VOCABULARY)}
    plain = Tokenizer(models.WordLevel(words, unk_token="</s>"))
    plain.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=plain, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


@pytest.fixture
def make(door, tokenizer):
    def make(**settings):
        return door.KVStackLM(tiny.model(), tokenizer=tokenizer, **settings)

    return make


@pytest.fixture
def plain(door, tokenizer):
    return door.HFLM(tiny.model(), tokenizer=tokenizer, batch_size=3, max_length=150)


def ask(lm, kind, arguments):
    from lm_eval.api.instance import Instance

    requests = [Instance(request_type=kind, doc={}, arguments=x, idx=i) for i, x in enumerate(arguments)]
    return getattr(lm, kind)(requests, disable_tqdm=True)


def choices(lm):
    return ask(lm, "loglikelihood", list(zip(CONTEXTS, CONTINUATIONS, strict=True)))


def documents(lm):
    return ask(lm, "loglikelihood_rolling", [(text(400, 3),), (text(37, 4),)])


def generations(lm):
    wish = {"until": ["w5"], "max_gen_toks": 12}
    return ask(lm, "generate_until", [(context, wish) for context in CONTEXTS])


# ---- without compression


@pytest.mark.parametrize("batch_size", [1, 4])
@pytest.mark.parametrize("stack", ["dense", ""])
def test_dense_choices_are_those_of_hf(make, plain, stack, batch_size):
    own = choices(make(stack=stack, batch_size=batch_size, chunk=16))
    wanted = choices(plain)
    assert [score for score, _ in own] == pytest.approx([score for score, _ in wanted], rel=1e-5)
    assert [greedy for _, greedy in own] == [greedy for _, greedy in wanted]


def test_greedy_continuations_are_known(make, plain):
    [continuation] = ask(plain, "generate_until", [(CONTEXTS[0], {"until": [], "max_gen_toks": 5})])
    for lm in (plain, make(chunk=2)):
        assert ask(lm, "loglikelihood", [(CONTEXTS[0], " " + continuation)])[0][1]


def test_dense_documents_are_those_of_hf(make, plain):
    own = documents(make(batch_size=2, max_length=150, chunk=16))
    assert own == pytest.approx(documents(plain), rel=1e-5)


def test_dense_generations_are_those_of_hf(make, plain):
    assert generations(make(batch_size=3)) == generations(plain)


def test_a_long_context_is_cut_as_hf_cuts_it(make, door, tokenizer):
    short = door.HFLM(tiny.model(), tokenizer=tokenizer, max_length=50)
    own = choices(make(max_length=50, batch_size=3))
    assert [score for score, _ in own] == pytest.approx([score for score, _ in choices(short)], rel=1e-5)


# ---- with compression


def ids(words):
    return [int(word[1:]) for word in words.split()]


def by_hand(context, continuation, chunk):
    """One request alone: prefill, then the true tokens a chunk at a time."""
    model, stack, total = tiny.model(), KVStack([Quant(2), Evict(0.3)], window=8), 0.0
    logits = model(torch.tensor([context]), past_key_values=stack).logits[0, -1:]
    for start in range(0, len(continuation), chunk):
        some = continuation[start : start + chunk]
        following = model(torch.tensor([some]), past_key_values=stack).logits[0]
        rows = torch.cat([logits, following[:-1]]).log_softmax(-1)
        total += sum(float(row[token]) for row, token in zip(rows, some, strict=True))
        logits = following[-1:]
    return total


@pytest.mark.parametrize("batch_size", [1, 4])
@pytest.mark.parametrize("chunk", [16, 128])
def test_choices_read_the_compressed_context(make, chunk, batch_size):
    lm = make(**LOSSY, chunk=chunk, batch_size=batch_size)
    wanted = [by_hand(ids(one), ids(two), chunk) for one, two in zip(CONTEXTS, CONTINUATIONS, strict=True)]
    assert [score for score, _ in choices(lm)] == pytest.approx(wanted, rel=1e-4)


def test_padding_does_not_shift_positions(make):
    # keys are stored without rotary embedding, which is taken off by true positions
    alone, together = (choices(make(stack="commonkv:0.5,basis=weights", window=8, batch_size=size)) for size in (1, 4))
    assert [score for score, _ in together] == pytest.approx([score for score, _ in alone], rel=1e-5)


def test_documents_read_their_beginning_compressed(make):
    lm = make(**LOSSY, chunk=16)
    whole = text(200, 3)
    assert ask(lm, "loglikelihood_rolling", [(whole,)]) == pytest.approx([by_hand([1], ids(whole), 16)], rel=1e-4)


def test_documents_do_not_depend_on_the_batch_size(make):
    stack = {"stack": "quant:4+evict:0.5", "window": 8, "chunk": 16}  # sealed tokens are dropped, alike in all rows
    alone, together = (
        ask(make(**stack, batch_size=size), "loglikelihood_rolling", [(text(300, i),) for i in range(4)])
        for size in (1, 4)
    )
    assert together == pytest.approx(alone, rel=1e-6)


def test_generations_are_those_of_generate(make, tokenizer):
    lm = make(**LOSSY)
    inputs = tokenizer(CONTEXTS[0], return_tensors="pt", return_token_type_ids=False)
    stack = KVStack([Quant(2), Evict(0.3)], window=8)
    out = tiny.model().generate(**inputs, past_key_values=stack, max_new_tokens=12, do_sample=False)
    [own] = ask(lm, "generate_until", [(CONTEXTS[0], {"until": [], "max_gen_toks": 12})])
    assert own == tokenizer.decode(out[0, 60:])


@pytest.mark.parametrize("task", [choices, documents, generations])
def test_a_lossy_stack_changes_the_results_and_holds_less(make, task):
    dense, lossy = make(batch_size=3), make(**LOSSY, batch_size=3)
    assert task(dense) != task(lossy)
    full, share = (lm.get_model_info()["kvstack_share_of_dense_bytes"] for lm in (dense, lossy))
    assert share < 0.6
    assert full >= 1


def test_the_report_names_the_stack(make):
    info = make(**LOSSY).get_model_info()
    assert info["kvstack"] == "KVStack([Quant(bits=2), Evict(keep=0.3)], window=8)"
    assert info["kvstack_share_of_dense_bytes"] is None  # nothing was read yet


def test_requests_with_one_context_share_its_prefill(make):
    lm = make(**LOSSY)
    lengths = []
    handle = lm.model.register_forward_pre_hook(
        lambda module, args, kwargs: lengths.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    ask(lm, "loglikelihood", [(CONTEXTS[0], " w7"), (CONTEXTS[0], " w8"), (CONTEXTS[0], " w7 w9 w11")])
    handle.remove()
    assert lengths == [60, 2]


# ---- errors


def test_chunk_of_nothing(make):
    with pytest.raises(KVStackError, match=r"chunk=0: chunk is a number of tokens, 1 or more"):
        make(chunk=0)


def test_a_batch_size_is_a_number(make):
    with pytest.raises(KVStackError, match=r"batch_size='auto' is tried out with a dense cache.*Give a number"):
        make(batch_size="auto:4")


def test_a_continuation_that_does_not_fit(make):
    with pytest.raises(UseError, match=r"a continuation of 40 tokens is longer than max_length=30"):
        choices(make(max_length=30))


# ---- the command

TASKS = {
    "choices": {
        "output_type": "multiple_choice",
        "doc_to_text": "{{context}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{label}}",
        "metric_list": [{"metric": "acc"}],
    },
    "documents": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{context}}",
        "metric_list": [{"metric": "word_perplexity"}],
    },
    "answers": {
        "output_type": "generate_until",
        "doc_to_text": "{{context}}",
        "doc_to_target": "w7",
        "generation_kwargs": {"until": ["w5"], "max_gen_toks": 8},
        "metric_list": [{"metric": "exact_match"}],
    },
}


def test_the_command_evaluates_local_tasks(door, tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path / "model")
    tiny.model().save_pretrained(tmp_path / "model")
    rows = [{"context": text(100 + i, i), "choices": ["w7", "w8 w9"], "label": i % 2} for i in range(3)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    data = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(tmp_path / "rows.jsonl")}}}
    for name, task in TASKS.items():
        (tmp_path / f"{name}.yaml").write_text(json.dumps({"task": name, "test_split": "test", **data, **task}))
    command = [sys.executable, "-m", "kvstack.lm_eval", "--model", "kvstack", "--device", "cpu"]
    command += ["--model_args", f"pretrained={tmp_path / 'model'},stack=quant:4+evict:0.5,window=8"]
    command += ["--include_path", str(tmp_path), "--tasks", ",".join(TASKS), "--output_path", str(tmp_path / "out")]
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(tmp_path / "home")}
    ran = subprocess.run(command, cwd=ROOT, env=os.environ | offline, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    [file] = (tmp_path / "out").rglob("results*.json")
    found = json.loads(file.read_text())
    assert set(found["results"]) == set(TASKS)
    assert found["config"]["kvstack"] == "KVStack([Quant(bits=4), Evict(keep=0.5)], window=8)"
    assert found["config"]["kvstack_share_of_dense_bytes"] < 0.6
