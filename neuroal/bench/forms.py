"""Forms of a pruned model that may be faster or smaller for its zeros: a function each.

Each takes the pruned model and the names of its pruned linears. It returns the model in its form,
which shares all other weights with the given one, or a text: why there is none.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.sparse import (
    SparseSemiStructuredTensor,
    SparseSemiStructuredTensorCUSPARSELT,
    SparseSemiStructuredTensorCUTLASS,
)

from neuroal.model.memory import available_memory
from neuroal.units import size

ROWS, COLUMNS = 32, 64  # what torch's 2:4 kernels divide matrices by, in half precision
_CAPABILITY = (8, 0)  # of the first GPUs with sparse tensor cores


@dataclass(frozen=True)
class Form:
    """A model in one form, and how many of its linears are in it."""

    model: nn.Module
    linears: int


class CsrLinear(nn.Module):
    """A linear whose weight `(out, in)` is a CSR matrix with indices of 32 bits.

    Weights of 16 bits become float32, for which alone torch has the product on a CPU; outputs have
    the dtype of the inputs.
    """

    weight: Tensor

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        dense = linear.weight.detach()
        found = (dense.float() if dense.itemsize < 4 else dense).to_sparse_csr()
        indices = found.crow_indices().int(), found.col_indices().int()
        weight = torch.sparse_csr_tensor(
            *indices, found.values(), found.shape, check_invariants=True
        )
        self.register_buffer("weight", weight, persistent=False)
        self.bias = linear.bias

    def forward(self, inputs: Tensor) -> Tensor:
        """Return the product `(…, out)` with inputs `(…, in)`."""
        columns = inputs.reshape(-1, inputs.shape[-1]).T.to(self.weight.dtype)  # (in, tokens)
        outputs = (self.weight @ columns).T.to(inputs.dtype)
        outputs = outputs.reshape(*inputs.shape[:-1], -1)
        return outputs if self.bias is None else outputs + self.bias


def csr(model: nn.Module, names: Sequence[str]) -> Form | str:
    """The product of torch's CSR matrices, on the CPU."""
    linears = _modules(model, names)
    if not linears:
        return "no pruned linear is a torch.nn.Linear"
    if next(iter(linears.values())).weight.device.type != "cpu":
        return "measured with --device cpu"
    kept = sum(int(x.weight.count_nonzero()) for x in linears.values())
    needed, free = 8 * kept, available_memory()  # an index of 32 bits and a value of as many
    if free is not None and needed > free:
        return f"needs {size(needed)} of memory, {size(free)} are available"
    return _shared(model, {name: CsrLinear(x) for name, x in linears.items()})


def semi_structured(
    kind: type[SparseSemiStructuredTensor], model: nn.Module, names: Sequence[str]
) -> Form | str:
    """The 2:4 matrices of torch's sparse tensor cores (`to_sparse_semi_structured`)."""
    linears = {name: x for name, x in _modules(model, names).items() if is_24(x.weight)}
    if not linears:
        return (
            f"no pruned linear has at most two weights in every four, rows by {ROWS} and columns "
            f"by {COLUMNS}: prune with --pattern 2:4"
        )
    weight = next(iter(linears.values())).weight
    if weight.device.type != "cuda" or torch.version.hip is not None:
        return f"needs an NVIDIA GPU: measured on {weight.device.type}"
    if torch.cuda.get_device_capability(weight.device) < _CAPABILITY:
        return "needs an NVIDIA GPU of compute capability 8.0 (Ampere) or later"
    if weight.itemsize != 2:
        return "needs --dtype float16 or bfloat16"

    def of(linear: nn.Linear) -> nn.Linear:
        form = copy.copy(linear)
        form._parameters = dict(linear._parameters)
        sparse = kind.from_dense(linear.weight.detach())
        form.weight = nn.Parameter(sparse, requires_grad=False)
        return form

    return _shared(model, {name: of(x) for name, x in linears.items()})


def openvino(model: nn.Module, names: Sequence[str]) -> Form | str:
    """OpenVINO's sparse weights, which no model of floating numbers can have."""
    return (
        "decompresses sparse weights only with AMX, weights and activations of 8 bits and "
        "dimensions that 64 divides: convert the run with optimum-intel and NNCF, then time it "
        "by OpenVINO's benchmark_app with CPU_SPARSE_WEIGHTS_DECOMPRESSION_RATE"
    )


FORMS: Mapping[str, Callable[[nn.Module, Sequence[str]], Form | str]] = {
    "torch CSR": csr,
    "torch 2:4, CUTLASS": partial(semi_structured, SparseSemiStructuredTensorCUTLASS),
    "torch 2:4, cuSPARSELt": partial(semi_structured, SparseSemiStructuredTensorCUSPARSELT),
    "OpenVINO": openvino,
}


def is_24(weight: Tensor) -> bool:
    """Return whether torch has a 2:4 kernel for a weight `(out, in)`, and would lose none of it."""
    rows, columns = weight.shape
    if rows % ROWS or columns % COLUMNS:
        return False
    return int((weight != 0).view(rows, -1, 4).sum(2).max()) <= 2


def _modules(model: nn.Module, names: Sequence[str]) -> dict[str, nn.Linear]:
    """Return the linears that are modules of their own; slices and transposed ones are not."""
    modules = dict(model.named_modules())
    return {x: found for x in names if isinstance(found := modules.get(x), nn.Linear)}


def _shared(model: nn.Module, modules: Mapping[str, nn.Module]) -> Form:
    """Return a copy of a model with other modules in it, which shares the other weights."""
    memo = {id(x): x for x in (*model.parameters(), *model.buffers())}
    copied = copy.deepcopy(model, memo)
    for name, module in modules.items():
        parent, _, child = name.rpartition(".")
        setattr(copied.get_submodule(parent), child, module)
    return Form(copied, len(modules))
