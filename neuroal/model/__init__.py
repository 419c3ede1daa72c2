"""A model or a run on disk: load, stream, save, resume; the only door to `transformers`.

- `pretrained`: configurations, models and tokenizers, loaded and saved by transformers
- `places`: where a model is, and what its folder says before torch is imported
- `structure`: the layout of a model in memory or on disk
- `files`: safetensors files, fingerprints, reports, atomic writes
- `blocks`: a model whose blocks are opened one by one; all of it in memory
- `streaming`: the same with one block in memory at a time
- `lazy_matrix`: matrices outside the blocks that a streamed model reads at every use
- `output`: names of output folders, and the lock that lets one process at a time write there
- `packing`: folders packed and unpacked
- `registration`, `quantizer`: packed folders made known to transformers
- `run_folder`: `OUT.partial`, the journal that `--resume` reads, and its exchange for `OUT`
- `zeros`: zeros of linears, counted in memory or in the saved files
- `memory`: the device of a run, and how much memory is available
"""
