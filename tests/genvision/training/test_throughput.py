"""What a device can do by its name, and what a training sample costs by the formula of its network."""

import pytest
import torch
from torch import nn

from genvision.models.llamagen import LlamaGen
from genvision.training.throughput import count_flops, mfu, peak_flops, peak_of, training_flops


@pytest.mark.parametrize(
    ("name", "precision", "teraflops"),
    [
        ("NVIDIA A100-SXM4-80GB", "bf16", 312),
        ("NVIDIA A100-PCIE-40GB", "tf32", 156),
        ("NVIDIA H100 80GB HBM3", "bf16", 989.5),
        ("NVIDIA H100 PCIe", "bf16", 756.5),
        ("NVIDIA H100 NVL", "fp16", 835.5),
        ("NVIDIA H200", "fp32", 67),
        ("NVIDIA B200", "bf16", 2250),
        ("NVIDIA L40S", "bf16", 362.05),
        ("NVIDIA L4", "bf16", 121),
        ("NVIDIA A10G", "bf16", 70),
        ("NVIDIA A10", "bf16", 125),
        ("Tesla V100-SXM2-16GB", "fp16", 125),
        ("Tesla V100-PCIE-32GB", "fp16", 112),
        ("NVIDIA GeForce RTX 4090", "tf32", 82.6),
        ("AMD Instinct MI250X/MI250", "bf16", 191.5),
        ("AMD Instinct MI300X", "bf16", 1307.4),
    ],
)
def test_the_peak_of_a_device_by_the_name_that_torch_gives(name, precision, teraflops):
    assert peak_of(name, precision) == pytest.approx(teraflops * 1e12)


@pytest.mark.parametrize(
    ("name", "precision"),
    [
        ("Tesla V100-SXM2-16GB", "bf16"),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", "bf16"),
        ("NVIDIA GeForce RTX 3090 Ti", "bf16"),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", "bf16"),
        ("NVIDIA L400", "bf16"),
        ("", "fp32"),
    ],
)
def test_nothing_is_said_of_other_devices(name, precision):
    assert peak_of(name, precision) is None


def test_a_cpu_has_no_peak():
    assert peak_flops(torch.device("cpu"), "bf16") is None


def test_utilisation_is_of_all_devices():
    assert mfu(flops_per_second=3e12, peak=2e12, num_devices=3) == pytest.approx(0.5)


@pytest.mark.parametrize("num_kv_heads", [None, 2])
def test_a_llamagen_costs_what_the_formula_says_however_it_is_checkpointed(num_kv_heads):
    num_tokens, depth, width, batch = 16, 2, 32, 2
    size = {"codebook_size": 32, "grid_size": 4, "num_classes": 10, "mlp_multiple_of": 8}
    model = LlamaGen(hidden_dim=width, depth=depth, num_heads=4, num_kv_heads=num_kv_heads, **size)
    codes, labels = torch.zeros(batch, num_tokens - 1, dtype=torch.int64), torch.zeros(batch, dtype=torch.int64)
    weights = sum(module.weight.numel() for module in model.modules() if isinstance(module, nn.Linear))
    formula = (6 * weights + 12 * depth * width * num_tokens) * num_tokens * batch  # the papers' 6 N + 12 L C T, a token

    def forward():
        return model(codes, labels)

    def both():
        forward().sum().backward()

    before = torch.get_rng_state()
    assert training_flops(forward) == pytest.approx(formula, rel=0.01)
    assert torch.equal(torch.get_rng_state(), before)  # dropout has drawn, and left no trace
    assert count_flops(both) == pytest.approx(formula, rel=0.01)
    model.enable_gradient_checkpointing()
    assert count_flops(both) > 1.2 * formula
    assert training_flops(forward) == pytest.approx(formula, rel=0.01)
