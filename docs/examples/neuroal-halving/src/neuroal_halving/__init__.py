"""Block ratios by successive halving, and the correlation matrix distance to search by."""

from neuroal import TopUp
from neuroal_halving.metric import CorrelationDistance
from neuroal_halving.search import SuccessiveHalving

HALVING = TopUp(
    block_ratios=("successive_halving",),
    alignment="correlation_distance",
    help="random block ratios, halved on more and more windows",
)

__all__ = ["HALVING", "CorrelationDistance", "SuccessiveHalving"]
