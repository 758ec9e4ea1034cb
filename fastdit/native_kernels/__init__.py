"""The ops of the compiled library, as kernels of `fastdit.backends`.

Each op's module lists its `KERNELS`, of any device. They are imported when the library is loaded,
so `torch.ops.fastdit_native` has its ops, and registered in this order, the fastest first.
"""

MODULES: tuple[str, ...] = ("diffusion_step", "rows", "glu", "patch_embed", "unpatchify")
