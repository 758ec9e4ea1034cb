"""Triton kernels, one file per op, imported as `fastdit.kernels` when a GPU op first needs them."""
