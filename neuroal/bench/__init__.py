"""What the zeros of a finished run gain on this machine, measured.

forms     the forms of a pruned model that may be faster or smaller, a function each
speed     seconds of one prefill and decode; bytes in memory
measuring `bench`: every form that fits, in turn, against the dense model
"""

from neuroal.bench.measuring import bench

__all__ = ["bench"]
