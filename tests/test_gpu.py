"What a GPU computes is what a processor computes, up to rounding; and its own ways, the fused loss and the graphs of generation, are true."

import shutil
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import course, fine
from torch.nn import functional as F

from llm_course.attention import causal_attention
from llm_course.config import ModelConfig, load_config
from llm_course.decoding import GraphEngine, fast_engine
from llm_course.generation import PlainEngine, generate
from llm_course.gpt import GPT
from llm_course.kernels import LinearCrossEntropy
from llm_course.pipeline import start_run, train
from llm_course.runs import read_log

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
GPU = "cuda"


def model(seq_len: int = 600) -> GPT:
    torch.manual_seed(0)
    made = GPT(
        ModelConfig(
            n_layers=3,
            d_model=128,
            n_heads=4,
            n_kv_heads=2,
            d_ff=352,
            vocab_size=500,
            seq_len=seq_len,
        )
    )
    with torch.no_grad():
        for weight in made.parameters():
            weight.mul_(3 if weight.ndim == 2 else 1)
    return made.eval()


@pytest.mark.parametrize("precision, tolerance", [("fp32", 1e-4), ("bf16", 0.1), ("fp16", 0.02)])
@pytest.mark.parametrize("batch", [1, 3])
def test_a_recorded_token_is_the_models(precision, tolerance, batch):
    "Over three powers of two, from a prompt on, and once more from the beginning: a recording serves every position and every text."
    plain, ids = (
        model(),
        torch.randint(500, (batch, 600), generator=torch.Generator().manual_seed(1)),
    )
    decoder = fast_engine(plain.to(GPU), batch, precision)
    assert type(decoder) is GraphEngine
    for shift in (0, 7):
        text = ids.roll(shift, 1).to(GPU)
        decoder.reset()
        decoder.read(text[:, :250])
        found = {at: decoder.read(text[:, at : at + 1]).clone() for at in range(250, 600)}
        with torch.no_grad():
            exact = plain(text)
        for at in (250, 255, 256, 257, 511, 512, 599):
            assert (found[at] - exact[:, at]).pow(2).mean().sqrt() <= tolerance * exact[
                :, at
            ].std(), at
    assert list(decoder.recorded) == [256, 512, 600]


def test_a_gpu_writes_what_a_processor_writes():
    "Past the context, several samples, greedy and drawn: in fp32 the same tokens, by the fast engine, the plain one, and without a cache."
    plain, prompt = model(seq_len=64), [3, 1, 4, 1, 5]
    for options in (
        {"temperature": 0},
        {"temperature": 0.8, "top_k": 40, "seed": 3},
        {"repetition_penalty": 1.3, "seed": 4},
    ):
        here = generate(plain.cpu(), prompt, 150, n_samples=3, **options)
        plain.to(GPU)
        for engine in (fast_engine, PlainEngine, partial(PlainEngine, use_cache=False)):
            assert generate(plain, prompt, 150, n_samples=3, engine=engine, **options) == here


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("fused", [False, True])
def test_the_loss_on_a_gpu(dtype, tolerance, fused):
    "Value and gradients beside F.cross_entropy in float64; one target is left out."
    torch.manual_seed(0)
    x, head, targets = torch.randn(700, 96), torch.randn(1003, 96), torch.randint(1003, (700,))
    targets[5] = -100
    given = [t.to(GPU, dtype).requires_grad_() for t in (x, head)]
    wide = [t.detach().double().requires_grad_() for t in given]
    found = LinearCrossEntropy.apply(*given, targets.to(GPU), fused)
    exact = F.cross_entropy(wide[0] @ wide[1].T, targets.to(GPU))
    assert found.item() == pytest.approx(
        exact.item(), rel=1e-2 if dtype == torch.bfloat16 else 1e-5
    )
    for ours, true in zip(torch.autograd.grad(found, given), torch.autograd.grad(exact, wide)):
        assert (ours - true).norm() <= tolerance * true.norm()


@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (6, 1)])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_attention_on_a_gpu(heads, dtype, tolerance):
    "Of every position at once, and of the last ones alone, beside a processor in float64."
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, n, 80, 64).to(GPU, dtype) for n in (heads[0], heads[1], heads[1]))
    for newest in (80, 7, 1):
        exact = causal_attention(*(t.cpu().double() for t in (q[:, :, -newest:], k, v)))
        assert (
            causal_attention(q[:, :, -newest:], k, v).cpu() - exact
        ).norm() <= tolerance * exact.norm()


@pytest.mark.parametrize("compile", [False, True])
@pytest.mark.parametrize("muon_lr_scale", [0.0, 10.0])
def test_a_gpu_learns_as_a_processor_does(trained: Path, compile, muon_lr_scale):
    "Ten steps of the same run in fp32: the same losses, up to rounding; and in bf16 nearly."
    losses = {}
    for device, precision in (("cpu", "fp32"), (GPU, "fp32"), (GPU, "bf16")):
        config = load_config(
            "tiny",
            {
                "precision": precision,
                "max_steps": 10,
                "warmup_steps": 2,
                "muon_lr_scale": muon_lr_scale,
                "compile": compile and device == GPU,
                "seq_len": 64,
            },
        )
        run = start_run(
            config, trained / "data/shards", torch.device(device), log=lambda text: None
        ).trainer
        losses[device, precision] = [run.step() or run.loss for _ in range(10)]
    assert losses[GPU, "fp32"] == pytest.approx(losses["cpu", "fp32"], rel=2e-4)
    assert losses[GPU, "bf16"] == pytest.approx(losses["cpu", "fp32"], rel=2e-2)


def test_a_run_on_a_gpu_resumes_bit_for_bit(trained: Path, tmp_path: Path):
    "Stopped after half of its steps and resumed, it ends with the weights of the run that went through."
    shards, weights = trained / "data/shards", {}
    config = load_config("tiny", {"max_steps": 12, "save_every": 6, "seq_len": 64})
    for name in ("through", "stopped"):
        train(config, shards, tmp_path / name, progress=False, log=lambda text: None)
        if name == "stopped":
            shutil.rmtree(max((tmp_path / name).glob("step*")))
            train(
                config, shards, tmp_path / name, resume=True, progress=False, log=lambda text: None
            )
        weights[name] = (max((tmp_path / name).glob("step*")) / "model.safetensors").read_bytes()
    assert weights["through"] == weights["stopped"]
    assert read_log(tmp_path / "through")


def test_the_command_line_finds_the_gpu(trained: Path, tmp_path: Path):
    "train, evaluate and generate without a flag."
    data = trained / "data/shards"
    told = fine(
        course(
            "train",
            "--config",
            "tiny",
            "--data",
            data,
            "--max_steps",
            "4",
            "--seq_len",
            "64",
            "--compile",
            "true",
            cwd=tmp_path,
        )
    )
    assert "cuda" in told and "bfloat16" in told
    fine(course("eval", "--input", trained / "data/raw/val.txt", cwd=tmp_path))
    for precision in ("fp32", "bf16", "fp16"):
        assert fine(
            course(
                "generate",
                "--prompt",
                "Once",
                "--max_new_tokens",
                "20",
                "--precision",
                precision,
                cwd=tmp_path,
            )
        )


def test_a_plan_for_the_gpu_here():
    from llm_course.planner import plan

    made = plan(load_config("tiny"), device="cuda")
    assert made.device.source == "measured" and made.fits and made.seconds > 0
