"""From ratios to counts, from counts to masks, from masks to new weights.

- `allocation`: ratios of linears and rows, or their importance, and `allocation.safetensors`
- `budget`: projection of ratios on a sparsity, rounding to whole counts
- `targets`: how many weights every linear and row loses
- `masks`: the weights of smallest score, chosen and set to zero
- `kernels`: the same on CUDA devices
- `hooks`: the hooks of pruners and refiners, called and checked
- `pruner`: a base pruner and its refiner on the linears of a block
"""
