"""Triton kernels, one file per op; imported as `fastdit.kernels` and only when a GPU op needs them."""
