"""Inductor's CUDA code, generated without CUDA. Private parts of PyTorch: one version only."""

import pytest
import torch
import torch.nn.functional as F

from fastdit.testing.inductor import inductor_code

pytestmark = pytest.mark.skipif(
    not torch.__version__.startswith("2.13"), reason="reaches into private parts of PyTorch 2.13"
)


def test_a_linear_layer_and_its_activation():
    torch.compile(torch.neg, backend="aot_eager")(torch.ones(2))  # asks for a GPU: there is none
    found = inductor_code(
        lambda x, w: F.gelu(F.linear(x, w)),
        [((64, 128), torch.float32), ((256, 128), torch.float32)],
    )
    assert len(found.kernels) == 1
    assert found.bytes == (2 * 64 * 256 * 4,)
    assert found.extern == ("extern_kernels.mm",)
    assert found.launches == 2
    with pytest.raises(ValueError, match="NVIDIA"):
        inductor_code(torch.neg, [((4,), torch.float32)], arch="gfx942")
