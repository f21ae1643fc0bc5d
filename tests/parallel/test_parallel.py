"""Two processes that share a model (tensor parallelism) choose and answer as one process does, each with half the
bytes; what they cannot do is refused.

The processes are started once. They do all of `JOBS` in turn; a test looks at what came out of one of them."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GraniteSWAConfig, GraniteSWAForCausalLM, MiniCPM3Config, MiniCPM3ForCausalLM

from kvstack import KVStack, UseError, calibrate
from kvstack.calibration import keep
from kvstack.calibration.calibrate import default_path
from tests import tiny

from .jobs import BY_DEFAULT, CALIBRATED, JOBS, NONE, OTHERS, SAME, model_in

pytestmark = pytest.mark.skipif(
    not torch.distributed.is_available() or not torch.distributed.is_gloo_available(), reason="needs gloo"
)
ROOT = Path(__file__).parent.parent.parent
SIZE, TIMEOUT = 2, 400
MORE: dict[str, Any] = {
    "granite_swa": (GraniteSWAForCausalLM, GraniteSWAConfig(**tiny.SHAPE)),
    "minicpm3": (
        MiniCPM3ForCausalLM,
        MiniCPM3Config(
            **tiny.SHAPE | {"num_key_value_heads": 4},
            q_lora_rank=32, kv_lora_rank=16, qk_nope_head_dim=16, qk_rope_head_dim=8, v_head_dim=16,
        ),
    ),
}  # fmt: skip


def write_models(folder: Path) -> None:
    for name in ("llama", "phi3", "qwen2"):
        tiny.model(name).save_pretrained(folder / name)
    for name, (kind, config) in MORE.items():
        torch.manual_seed(0)
        kind(config).eval().save_pretrained(folder / name)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Models, and what one process has made for the others."""
    folder = tmp_path_factory.mktemp("parallel")
    write_models(folder)
    model = model_in(folder, "llama")
    calibrate(model, tokens=300, layers=2).save(folder / "joint.safetensors")
    calibrate(model, tokens=300, layers=2, block=64).save(folder / "runs.safetensors")
    calibrate(model, tokens=300, metric="variance", keep_axes=1.0, bits=16).save(folder / "kvtc.safetensors")
    for metric in ("fisher", "variance"):
        found = calibrate(model, tokens=700, layers=4, metric=metric)
        found.save(folder / "cache" / "calibrations" / default_path(model, 4, metric).name)
    whole = model_in(folder, "phi3")
    made = calibrate(whole, tokens=700)
    made.save(folder / "cache" / "calibrations" / default_path(whole, made.layers).name)
    kvsharer = pytest.importorskip("kvstack_kvsharer")
    with torch.no_grad():
        kvsharer.search(model, share=0.5, threshold=-1.0).save(folder / "strategy.json")
    return folder


@pytest.fixture(scope="module")
def ranks(folder):
    """Job -> what came out of it in each process."""
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "KVSTACK_CACHE": str(folder / "cache"),
        "GLOO_SOCKET_IFNAME": "lo",
        "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), *sys.path])),
    }
    command = [sys.executable, "-m", "tests.parallel.worker"]
    logs = [folder / f"log-{rank}" for rank in range(SIZE)]
    processes = []
    for rank, path in enumerate(logs):
        with path.open("wb") as log:
            settings: dict[str, Any] = {"env": environment, "cwd": ROOT, "stdout": log, "stderr": subprocess.STDOUT}
            processes.append(subprocess.Popen([*command, str(rank), str(SIZE), str(folder)], **settings))
    try:
        codes = [process.wait(TIMEOUT) for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    told = "\n".join(f"process {rank}: {path.read_text()[-3000:]}" for rank, path in enumerate(logs))
    assert codes == [0] * SIZE, told
    return {
        job: [torch.load(folder / f"{number}-{rank}.pt", weights_only=False) for rank in range(SIZE)]
        for number, job in enumerate(JOBS)
    }


@pytest.fixture(scope="module")
def alone(folder):
    """What comes out of a job in one process, with the whole model."""
    model = model_in(folder, "llama")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(keep, "folder", lambda: folder / "cache" / "calibrations")
        yield functools.cache(lambda job: JOBS[job](model, folder))


def by_head(positions: torch.Tensor, rank: int, whole: torch.Tensor) -> torch.Tensor:
    """Of the positions of all heads, those of the heads of a process; where heads share theirs, all of them."""
    return whole if whole.shape[0] == positions.shape[0] else whole.chunk(SIZE)[rank]


def check_same(ranks: list[Any], one: dict[str, Any]) -> None:
    """Tokens and choices are those of one process."""
    for rank, out in enumerate(ranks):
        assert isinstance(out, dict), out
        assert (out["seen"], out["held"]) == (one["seen"], one["held"])
        for rows, whole in zip(out["positions"], one["positions"], strict=True):
            for mine, every in zip(rows, whole, strict=True):
                assert torch.equal(mine, by_head(mine, rank, every))
        assert "tokens" not in one or torch.equal(out["tokens"], one["tokens"])


def test_heads_are_split(ranks):
    assert [(heads.rank, heads.size, heads.whole) for heads in ranks["heads"]] == [
        (0, 2, frozenset()),
        (1, 2, frozenset()),
    ]


def test_the_model_itself_is_the_same(ranks, alone):
    one = alone("dense")
    for out in ranks["dense"]:
        assert torch.equal(out["tokens"], one["tokens"])
        assert out["nbytes"] * SIZE == one["nbytes"]


@pytest.mark.parametrize("spec", SAME)
def test_tokens_and_choices_are_those_of_one_process(ranks, alone, spec):
    check_same(ranks[spec], alone(spec))


@pytest.mark.parametrize("spec", [spec for spec in SAME if not spec.startswith(("xkv", "commonkv"))])
def test_each_process_holds_half_the_bytes(ranks, alone, spec):
    """Positions that heads share are in each process."""
    one = alone(spec)
    shared = sum(4 * rows[0].numel() for rows in one["positions"] if rows[0].shape[0] == 1)
    for out in ranks[spec]:
        assert one["nbytes"] / SIZE <= out["nbytes"] <= (one["nbytes"] + shared) / SIZE


def test_rows_of_several_lengths(ranks, alone):
    check_same(ranks["padded"], alone("padded"))


def test_a_crop_leaves_equally_many_tokens_in_all_processes(ranks, alone):
    one = alone("cropped")
    for when in ("before", "after"):
        check_same([out[when] for out in ranks["cropped"]], one[when])
    for out in ranks["cropped"]:
        torch.testing.assert_close(out["logits"], one["logits"], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("name", "spec"), OTHERS.items(), ids=OTHERS)
def test_other_plans(ranks, alone, name, spec):
    job = f"{name}: {spec}"
    check_same(ranks[job], alone(job))


def test_fingerprints_are_those_of_the_whole_model(ranks, alone):
    assert ranks["fingerprints"] == [alone("fingerprints")] * SIZE


def test_each_process_saves_its_heads(ranks):
    files = ["conversation-0-of-2.safetensors", "conversation-1-of-2.safetensors"]
    for out in ranks["saved"]:
        assert isinstance(out, dict), out
        assert out["same"]
        assert out["files"] == files
    told = ranks["saved"][1]["told"]
    assert "does not hold the heads of process 1 of 2. Load the model in as many processes as it was in" in told


@pytest.mark.usefixtures("ranks")
def test_one_process_does_not_load_a_part(folder):
    with pytest.raises(UseError, match="does not hold the heads of process 0 of 1"):
        KVStack.load(folder / "conversation-0-of-2.safetensors", model=model_in(folder, "llama"))


# ---- calibrated axes


@pytest.mark.parametrize("job", [*CALIBRATED, *(f"default {spec}" for spec in BY_DEFAULT)])
def test_two_processes_are_one_that_cuts_its_calibration(ranks, alone, job):
    """One budget, and each stores its own heads: tokens, choices, what is read, and bytes."""
    one = alone(job)
    check_same(ranks[job], one)
    for layer, whole in enumerate(one["read"]):
        for kind in ("keys", "values"):
            every = torch.cat([getattr(out["read"][layer], kind) for out in ranks[job]], 1)
            expected = getattr(whole, kind)
            assert float((every - expected).norm() / expected.norm()) < 1e-2
    assert sum(out["nbytes"] - out["shared"] for out in ranks[job]) == one["nbytes"] - one["shared"]


@pytest.mark.parametrize("job", CALIBRATED)
def test_a_process_stores_its_heads_as_if_these_were_all(ranks, alone, job):
    for out in ranks[job]:
        names = {name for store in out["latents"] for name in store}
        assert names == ({"keys", "values"} if "kvtc" in job else names & {"unmerged", "places"} | {"latent"})
    assert any("latent 1" in store or "values 1" in store for store in alone(job)["latents"])


def test_axes_of_other_heads_are_told_apart(ranks):
    one, two = ranks["saved axes"]
    assert one["same"]
    assert two["same"]
    assert all(x != y for x, y in zip(one["fingerprints"], two["fingerprints"], strict=True))


# ---- KVSharer


def test_a_strategy_is_the_same_in_all_processes(ranks, alone):
    one = alone("sharer")
    assert len(one["shares"]) == 2
    assert ranks["sharer"] == [one] * SIZE


def test_a_strategy_of_one_process_serves_all(ranks, alone):
    job = "strategy of one process"
    check_same(ranks[job], alone(job))


def test_a_strategy_is_made_together_and_kept_once(ranks, alone):
    job = "sharer by default"
    one = alone(job)
    check_same(ranks[job], one)
    for out in [*ranks[job], one]:
        assert (out["files"], out["found again"]) == (1, True)


# ---- what is refused


@pytest.mark.parametrize("spec", NONE)
def test_a_calibration_that_nobody_made_is_asked_for(ranks, spec, folder):
    for told in ranks[f"none is made {spec}"]:
        assert told.startswith("CalibrationError: ")
        assert "needs a calibration. One process makes it of a whole model, and this LlamaForCausalLM is split" in told
        assert f"2 processes, which do not all find one in {folder}" in told
        assert f"kvstack.calibrate(model, layers={spec[-1]}, metric=" in told
    assert "calibrates itself" not in (folder / "log-0").read_text()


@pytest.mark.parametrize("metric", ["fisher", "variance"])
def test_nothing_is_calibrated_on_a_part_of_the_heads(ranks, metric):
    for told in ranks[f"calibrate {metric}"]:
        assert told.startswith("CalibrationError: calibration is for a whole model, and this LlamaForCausalLM is split")


def test_processes_with_different_settings_are_refused(ranks):
    for told in ranks["disagreeing"]:
        assert told.startswith("BindError: KVStack([Evict(keep=0.")
        assert "Give every process the same stages and settings." in told
