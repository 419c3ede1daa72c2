"""Fine-tuning a run's model with its zeros kept; what comes out is a run like any other.

settings  `FineTuning`: what was asked for
cost      memory and time, before anything is trained
trainer   the Trainer of transformers, with a loss of its own and checkpoints of what is trained
tuning    `finetune`: from the folder of a run to another
"""

from neuroal.finetune.settings import FineTuning
from neuroal.finetune.tuning import finetune

__all__ = ["FineTuning", "finetune"]
