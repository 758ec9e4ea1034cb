"""fastdit's Triton kernels: one module per op, with its launchers and its table of heuristics.

Importing a module here imports Triton; `import fastdit` does not. `registry` puts the kernels
behind the ops of `fastdit.ops`.
"""
