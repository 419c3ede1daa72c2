"""The parts of one run, which `neuroal.engine` puts together.

- `mistakes`: what is wrong with a recipe, as far as it is known before torch is imported
- `setup`: the plugins of a recipe, checked against each other
- `reuse`: the allocation of an earlier run, or the report of the same run
- `given`: ratios that are given in place of a search
- `windows`: the calibration windows
- `search`: the dense walk of `measure_block`, the block step and the row step
- `kept_zeros`: the zeros that the dense model has already, which stay
- `marks`: how far each walk has come, in the journal
- `commit`: the final pruning, block by block
- `report`: what happened, the content of `neuroal.json`; seconds and peak memory of every phase
- `model_card`: the README of a pruned checkpoint
- `save`: everything into the output folder
- `masks`: the masks of a run, noted while it prunes
- `apply`: an earlier run's masks on a model
- `pack`: a run or a model packed into a folder of its own, and back
- `verify`: whether a run's zeros are still zero
"""
