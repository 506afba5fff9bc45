"""What only a GPU can show: every runtime on it computes what eager PyTorch computes on the CPU."""

from __future__ import annotations

import copy
import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._triton import has_triton

from tests.deploy.conftest import TGT_LEN, Exports
from tests.support import build_model, random_ids, small_config
from tests.train.test_trainer import make_trainer, weights_of
from txl_deploy.parity.rollout import compare, random_segments
from txl_deploy.runtimes.eager import EagerRuntime
from txl_deploy.runtimes.registry import eager_from_checkpoint, open_artifact
from txl_train.checkpoint import load_checkpoint, save_checkpoint
from txl_train.config import HeadKind, ModelConfig
from txl_train.model.adaptive import cluster_rows
from txl_train.model.graphed import GraphedDecoder
from txl_train.optim.lamb import Lamb
from txl_train.parallel import LossModule
from txl_train.trainer import Trainer

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")]

CONFIG = small_config(cutoffs=(5, 9, 16), div_val=2)


def test_eager_on_the_gpu_equals_the_cpu(exports: Exports) -> None:
    reference, _ = eager_from_checkpoint(exports.checkpoint, device="cpu")
    candidate, _ = eager_from_checkpoint(exports.checkpoint, device="cuda")
    assert candidate.info.device == "cuda:0"
    assert compare(reference, candidate, random_segments(CONFIG, tgt_len=TGT_LEN)).passed


@pytest.mark.parametrize("name", ["torchscript", "onnx"])
def test_an_artifact_exported_on_a_cpu_runs_on_the_gpu(exports: Exports, name: str) -> None:
    if name == "onnx" and (importlib.util.find_spec("onnxruntime") is None or not _has_cuda_provider()):
        pytest.skip("needs onnxruntime-gpu")
    reference, _ = eager_from_checkpoint(exports.checkpoint, device="cpu")
    candidate = open_artifact(getattr(exports, name), device="cuda")
    assert compare(reference, candidate, random_segments(CONFIG, tgt_len=TGT_LEN)).passed


def _has_cuda_provider() -> bool:
    import onnxruntime

    return "CUDAExecutionProvider" in onnxruntime.get_available_providers()


def runtimes(config: ModelConfig, dtype: str = "fp32", tgt_len: int = 8) -> tuple[EagerRuntime, EagerRuntime]:
    """The same model on the GPU in plain operations, and as a CUDA graph of kernels."""
    if torch.cuda.get_device_capability() < (8, 0) or not has_triton():
        pytest.skip("the kernels need a GPU of compute capability 8.0 or newer, and Triton")
    model = build_model(config).cuda().eval()
    plain, graphed = EagerRuntime(model, tgt_len=tgt_len, dtype=dtype, packed=False), EagerRuntime(model, tgt_len=tgt_len, dtype=dtype)
    assert (plain.info.provider, graphed.info.provider) == ("eager", "cuda-graph")
    return plain, graphed


@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
@pytest.mark.parametrize(
    ("changes", "tgt_len", "batch_size"),
    [
        ({"cutoffs": (5, 9, 16), "div_val": 2, "pre_lnorm": True}, 8, 3),
        # several blocks of queries, keys and words in every kernel, far keys, and blocks for many streams
        ({"vocab_size": 700, "cutoffs": (50, 200, 400), "n_head": 8, "mem_len": 320, "clamp_len": 40, "same_length": True}, 64, 16),
    ],
    ids=["small", "blocks"],
)
def test_the_graph_of_kernels_computes_what_plain_operations_do(changes: dict[str, Any], tgt_len: int, batch_size: int, dtype: str) -> None:
    config = small_config(**{"d_head": 16, "d_model": 32, "mem_len": 24, **changes})
    exact, graphed = runtimes(config, "fp32", tgt_len)
    compared = [exact, graphed] if dtype == "fp32" else [exact, *runtimes(config, dtype, tgt_len)]
    generator = torch.Generator().manual_seed(1)
    # two chains of memories that take turns, longer than a ring has room for: each is captured, and each replayed
    chains = [[runtime.initial_memory(batch_size) for runtime in compared] for _ in range(2)]
    errors = [0.0, 0.0]
    for step in range(24):
        inputs, targets = (torch.randint(0, config.vocab_size, (batch_size, tgt_len), generator=generator).cuda() for _ in range(2))
        chain = chains[step % 2 if step < 12 else 0]
        found = [runtime.step(inputs, targets, memory) for runtime, memory in zip(compared, chain, strict=True)]
        chain[:] = [output.memory for output in found]
        assert torch.equal(found[-1].memory.length_B, found[0].memory.length_B)
        if dtype == "fp32":
            torch.testing.assert_close(found[1].nll_BT, found[0].nll_BT, rtol=5e-5, atol=5e-5)
        else:
            errors = [error + float((output.nll_BT - found[0].nll_BT).abs().mean()) for error, output in zip(errors, found[1:])]
    assert errors[1] <= 1.5 * errors[0]  # in fp16, kernels are as near to fp32 as plain operations are


@pytest.mark.parametrize("head", ["logits", "log_probs"])
def test_the_graph_of_kernels_scores_next_words_too(head: HeadKind) -> None:
    if torch.cuda.get_device_capability() < (8, 0) or not has_triton():
        pytest.skip("the kernels need a GPU of compute capability 8.0 or newer, and Triton")
    config = small_config(cutoffs=(5, 9), mem_len=12)
    model = build_model(config).cuda().eval()
    pair = [EagerRuntime(model, tgt_len=1, head=head, packed=packed) for packed in (False, True)]
    memories = [runtime.initial_memory(2) for runtime in pair]
    for step in range(30):
        inputs = torch.tensor([[step % 23], [(3 * step) % 23]], device="cuda")
        found = [runtime.next_token(inputs, memory) for runtime, memory in zip(pair, memories, strict=True)]
        memories = [output.memory for output in found]
        torch.testing.assert_close(found[1].scores_BV, found[0].scores_BV, rtol=0, atol=2e-5)


def test_lamb_in_kernels_moves_weights_as_lamb_in_plain_operations() -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = [(5,), (300, 401), (1 << 16,), (3, 3), (1,)]
    plain = [torch.nn.Parameter(torch.randn(shape, generator=generator).cuda()) for shape in shapes]
    own = copy.deepcopy(plain)
    optimizers = [Lamb(plain, lr=0.1, foreach=True, weight_decay=0.01), Lamb(own, lr=0.1, weight_decay=0.01)]
    for _ in range(4):
        for weight, twin in zip(plain, own, strict=True):
            weight.grad = torch.randn(weight.shape, generator=generator).cuda()
            twin.grad = weight.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    for weight, twin in zip(plain, own, strict=True):
        torch.testing.assert_close(twin, weight, rtol=1e-5, atol=1e-6)


@pytest.mark.filterwarnings("ignore")  # PyTorch's compiler warns of itself, and of TF32, which is off on purpose
def test_compiled_training_on_the_gpu_has_the_gradients_of_plain_training() -> None:
    config = small_config(cutoffs=(5, 9, 16), d_model=32, d_head=16, dropout=0.0)
    model = build_model(config).cuda().train()
    inputs, targets = (torch.from_numpy(random_ids(config, 4, 8)).cuda() for _ in range(2))
    gradients = []
    for compiled in (False, True):
        model.zero_grad(set_to_none=True)
        rows = cluster_rows(targets.reshape(-1), model.head.cluster_ends)
        counted = torch.ones_like(targets, dtype=torch.bool)
        loss, _ = LossModule(model, compiled=compiled)(inputs, targets, counted, rows, model.initial_memory(4))
        loss.backward()
        gradients.append({name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-3, atol=1e-4 * float(gradient.abs().max()))


@pytest.mark.filterwarnings("ignore")
def test_compiled_training_in_half_precision_is_as_near_to_fp32_as_plain_training_however_large_the_scores_are() -> None:
    # PyTorch 2.11 took the softmax of rounded scores with the total of others: see `attention.for_exact_sums`
    config = small_config(vocab_size=300, cutoffs=(50, 100), n_head=2, d_head=32, d_model=64, d_inner=128, mem_len=192, dropout=0.0)
    model = build_model(config).cuda().train()
    with torch.no_grad():
        for layer in model.decoder_layers():
            layer.attention.qkv.weight.mul_(4 / float(layer.attention.qkv.weight.std() * config.d_model**0.5))
    inputs, targets = (torch.from_numpy(random_ids(config, 4, 192, seed=seed)).cuda() for seed in (1, 2))
    rows = cluster_rows(targets.reshape(-1), model.head.cluster_ends)
    gradients = []
    for compiled, enabled in ((False, False), (False, True), (True, True)):
        module, memory = LossModule(model, compiled=compiled), model.initial_memory(4)
        for _ in range(2):  # the second with a full memory
            model.zero_grad(set_to_none=True)
            with torch.autocast("cuda", dtype=torch.bfloat16, enabled=enabled):
                loss, memory = module(inputs, targets, torch.ones_like(targets, dtype=torch.bool), rows, memory)
            loss.backward()
        gradients.append(torch.cat([weight.grad.reshape(-1) for weight in model.parameters() if weight.grad is not None]))
    errors = [float((half - gradients[0]).norm() / gradients[0].norm()) for half in gradients[1:]]
    assert errors[0] < 0.5  # the scores are not so large that half precision means nothing
    assert errors[1] <= 1.25 * errors[0]


def graphed(trainer: Trainer) -> GraphedDecoder:
    (twin,) = trainer.engine._copies[0]._compiled
    assert isinstance(twin.decoder, GraphedDecoder)
    return twin.decoder


@pytest.mark.filterwarnings("ignore")
def test_a_compiled_run_replays_its_layers_and_moves_the_weights_as_a_plain_one() -> None:
    model = {"dropout": 0.0, "dropatt": 0.0}
    compiled, plain = (make_trainer(model=model, device="cuda", compile=compile_it, max_step=8) for compile_it in (True, False))
    for trainer in (compiled, plain):
        trainer.run()
    assert graphed(compiled).replays == 8
    for name, weight in weights_of(plain).items():
        torch.testing.assert_close(weights_of(compiled)[name], weight, rtol=1e-3, atol=1e-5)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("settings", [{}, {"batch_chunk": 2}, {"dtype": "bf16"}, {"dtype": "fp16"}], ids=str)
def test_graphs_drop_and_train_as_the_same_kernels_without_them(settings: dict[str, Any]) -> None:
    with_graphs, without = (make_trainer(device="cuda", compile=True, max_step=8, **settings) for _ in range(2))
    graphed(without)._refuse("this test wants none")
    for trainer in (with_graphs, without):
        torch.manual_seed(5)
        trainer.run()
    assert graphed(with_graphs).replays == 8 * settings.get("batch_chunk", 1)
    for name, weight in weights_of(without).items():
        torch.testing.assert_close(weights_of(with_graphs)[name], weight, rtol=1e-3, atol=1e-5)


@pytest.mark.filterwarnings("ignore")
def test_a_compiled_run_that_is_continued_drops_what_it_would_have_dropped(tmp_path: Path) -> None:
    whole = make_trainer(device="cuda", compile=True, max_step=6)
    while whole.progress.step < 3:
        whole.step()
    save_checkpoint(whole.checkpoint(training=True), tmp_path / "half.pt")
    continued = make_trainer(device="cuda", compile=True, max_step=6)
    continued.restore(load_checkpoint(tmp_path / "half.pt"))
    random_numbers = torch.cuda.get_rng_state()
    for trainer in (continued, whole):
        torch.cuda.set_rng_state(random_numbers)  # both trainers are in one process
        while trainer.progress.step < 6:
            trainer.step()
        assert graphed(trainer).replays >= 2
    for name, weight in weights_of(whole).items():
        torch.testing.assert_close(weights_of(continued)[name], weight, rtol=1e-4, atol=1e-6)
