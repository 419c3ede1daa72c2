"""Looking at finished runs: every number comes with the protocol that it was measured by.

- `perplexity`: perplexity on consecutive windows of a text
- `zero_shot`: accuracy on tasks, through lm-eval
- `tasks`: the tasks of lm-eval; the only door to it with `zero_shot`
- `text_overlap`: whether calibration and evaluation share text
- `comparison`: two runs, or allocations, side by side
- `mask_overlap`: how far two masks agree
"""
