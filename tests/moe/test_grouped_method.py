"""How experts over sorted rows are computed where."""

import pytest

from moe.model.feed_forward.grouped_method import pick

pytestmark = pytest.mark.fast

H100, H200 = "NVIDIA H100 80GB HBM3", "NVIDIA H200"
# Platform, kind of device, dtype, experts, their width and the model's; method, reason.
CHOICES = [
    ("cpu", "cpu", "float32", 8, 512, 512, "blocked", "loops"),
    ("tpu", "TPU v5 lite", "bfloat16", 8, 512, 512, "tpu", "ragged_dot"),
    ("gpu", H100, "bfloat16", 8, 14336, 4096, "hopper", H100),
    ("gpu", H200, "float16", 64, 1024, 2048, "hopper", H200),
    ("gpu", "NVIDIA H100 PCIe", "bfloat16", 1, 128, 128, "hopper", "PCIe"),
    ("gpu", "NVIDIA H20", "bfloat16", 8, 512, 512, "hopper", "H20"),
    ("gpu", "NVIDIA GH200 480GB", "bfloat16", 8, 512, 512, "hopper", "GH200"),
    ("gpu", H100, "float32", 8, 512, 512, "batched", "bfloat16 and float16 only"),
    ("gpu", H100, "bfloat16", 8, 14336 // 64, 4096, "batched", "are 224 wide"),
    ("gpu", H100, "bfloat16", 8, 512, 1000, "batched", "the model 1000"),
    ("gpu", H100, "bfloat16", 65, 512, 512, "batched", "a device has 65"),
    ("gpu", "NVIDIA A100-SXM4-80GB", "bfloat16", 8, 512, 512, "batched", "A100"),
    ("gpu", "Tesla V100-SXM2-16GB", "float16", 8, 512, 512, "batched", "V100"),
    ("gpu", "NVIDIA B200", "bfloat16", 8, 512, 512, "batched", "B200"),
    ("gpu", "NVIDIA GB200", "bfloat16", 8, 512, 512, "batched", "GB200"),
    ("gpu", "AMD Instinct MI300X", "bfloat16", 8, 512, 512, "batched", "MI300X"),
]


@pytest.mark.parametrize("choice", CHOICES)
def test_the_method_follows_from_device_dtype_and_dimensions(choice):
    platform, kind, dtype, e, F, M, wanted, reason = choice
    sizes = {"num_experts": e, "mlp_dim": F, "model_dim": M}
    method, why = pick(platform, kind, dtype, **sizes)
    assert method == wanted
    assert reason in why
