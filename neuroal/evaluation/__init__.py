"""Looking at finished runs: every number comes with the protocol that it was measured by.

- `evaluate`: a model measured on a text, on tasks, or both
- `compare`: two runs, or allocations, read, measured and put side by side
- `perplexity`: perplexity on consecutive windows of a text
- `zero_shot`: accuracy on tasks, through lm-eval
- `tasks`: the tasks of lm-eval; the only door to it with `zero_shot`
- `text_overlap`: whether calibration and evaluation share text
- `comparison`: the numbers of two sides
- `mask_overlap`: how far two masks agree
"""
