"""Running the blocks of a model one by one: the only place that does.

How the state of one candidate moves through the blocks:

    token ids (windows, tokens)
        |  the model's own embeddings
        v
    input of block 0: hidden state (windows, tokens, hidden)
        |
        |----> dense run of block 0 ----> statistics of each linear's input ----> the metric
        |                                      |  the pruner                         ^
        |                                      v                                     |
        |                                 pruned weights of block 0                  |
        |                                      |                                     |
        '----> pruned run of block 0 <---------'                                     |
                   |          '---------> statistics of the same inputs -------------'
                   v
    state before block 1: the outputs of the candidate's own pruned blocks that are still read (the
    hidden state, and what else blocks pass on); and so on, to the head if the metric reads logits

The model's own weights never change here: pruned weights are laid over them for one run. The dense
run ends at the last linear's input, since nobody reads its output. The first linears of a block
(q, k, v) see the same input in both runs, so that their statistics are collected once, unless the
metric compares token by token.

walker           `Walker`: runs one block on one state
states           `Inputs`, `CandidateState`, `BlockRun`: what goes in and what comes out
observer         reads the linears' inputs while a block runs
block_arguments  what the model passes to its blocks, and from block to block
stubs            the model with stubs in place of its blocks, which shows what it passes to them
all_experts      statistics of experts over all tokens
unchecked        what is looked at in one wait for the device
activations      activations between blocks, in memory or in a file
statistics       running sums over the inputs of a linear
"""

from neuroal.walk.states import BlockRun, CandidateState, Inputs
from neuroal.walk.statistics import Statistics
from neuroal.walk.walker import Walker, batch_size

__all__ = ["BlockRun", "CandidateState", "Inputs", "Statistics", "Walker", "batch_size"]
