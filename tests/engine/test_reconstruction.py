"""New values for surviving weights: what a plugin is given, what is kept of its answer."""

import copy
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import neuroal
from neuroal import (
    Block,
    BlockBatch,
    Linear,
    PluginError,
    Recipe,
    ReconstructionTraits,
    Statistics,
    hookimpl,
)
from neuroal.layout import find
from neuroal.model.blocks import InMemory
from neuroal.run.reconstruction import stages
from neuroal.testing import tiny_model

Tensors = dict[str, Tensor]


@dataclass(frozen=True, eq=False)
class Halves:
    """Halves every value, pruned or not, and remembers what it was given."""

    seen: Any = field(default=None, init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "seen", [])

    @hookimpl
    def required_statistics(self) -> frozenset[str]:
        return frozenset({"gram", "cross_gram"})

    @hookimpl
    def reconstruct_linear(
        self, weight: Tensor, mask: Tensor, values: Tensor, statistics: Statistics, linear: Linear
    ) -> Tensor:
        self.seen.append((linear.name, weight, mask, values, statistics))
        return values / 2 + 1  # 1 where it is pruned: the engine holds the mask


@pytest.fixture
def uniform(recipe: Recipe) -> Recipe:
    return dataclasses.replace(recipe, top_up="uniform", options={})


def inputs_of(model: nn.Module, ids: Tensor, names: Sequence[str]) -> Tensors:
    """The input `(windows, tokens, in)` of linears in the model's own forward."""
    seen: Tensors = {}

    def keep(name: str) -> Callable[..., None]:
        return lambda module, args: seen.__setitem__(name, args[0].detach())

    hooks = [model.get_submodule(n).register_forward_pre_hook(keep(n)) for n in names]
    with torch.no_grad():
        model(input_ids=ids, use_cache=False)
    for hook in hooks:
        hook.remove()
    return seen


@pytest.mark.parametrize("structure", ["llama", "opt", "phi"])
def test_it_sees_the_inputs_that_its_weights_will_have(
    structure: str, uniform: Recipe, windows: Tensor
) -> None:
    """H and C of every linear, from the saved model's own forward with what comes before it."""
    dense = tiny_model(structure).eval()
    model, plugin = copy.deepcopy(dense), Halves()
    neuroal.prune(model, None, dataclasses.replace(uniform, reconstruction=plugin), windows=windows)
    names = [name for name, *_ in plugin.seen]
    assert names == list(find(dense).linears)
    now = copy.deepcopy(dense)
    near = {"rtol": 1e-3, "atol": 1e-4}
    for name, weight, mask, values, statistics in plugin.seen:
        x, y = (inputs_of(m, windows, [name])[name].flatten(0, -2) for m in (dense, now))
        count = len(windows)
        torch.testing.assert_close(statistics.gram, 2 / count * y.t() @ y, **near)
        torch.testing.assert_close(statistics.cross_gram, 2 / count * x.t() @ y, **near)
        assert torch.equal(weight, dense.get_submodule(name).weight)
        assert torch.equal(mask, values == 0)
        new = model.get_submodule(name).weight
        assert torch.equal(new, torch.where(mask, torch.zeros(()), values / 2 + 1))
        with torch.no_grad():
            now.get_submodule(name).weight.copy_(new)


def test_linears_that_run_together_are_a_stage() -> None:
    """q, k and v; then the output; gate and up; down. The first linears of all experts."""
    (first, *_) = find(tiny_model("llama")).blocks
    ends = [[x.name.rpartition(".")[2] for x in stage] for stage in stages(first)]
    assert ends == [["q_proj", "k_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"],
                    ["down_proj"]]  # fmt: skip
    names = ("router_in", "a.up", "a.down", "b.up", "b.down")
    experts = (None, 0, 0, 1, 1)
    linears = tuple(
        Linear(name, 0, 4, 4, group, None, expert=expert)
        for group, (name, expert) in enumerate(zip(names, experts, strict=True))
    )
    found = [[x.name for x in stage] for stage in stages(Block(0, "block", linears))]
    assert found == [["router_in"], ["a.up", "b.up"], ["a.down", "b.down"]]


@dataclass(frozen=True, eq=False)
class Looks:
    """Looks at every batch of a block; leaves the weights as they are."""

    tokens: int | None = None
    seen: Any = field(default=None, init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "seen", {})

    @hookimpl
    def describe(self) -> ReconstructionTraits:
        return ReconstructionTraits(batch_tokens=self.tokens)

    @hookimpl
    def reconstruct_block(
        self, block: Block, weights: Mapping[str, Tensor], batches: Sequence[BlockBatch]
    ) -> Mapping[str, Tensor]:
        leaves = {name: w.clone().requires_grad_(True) for name, w in weights.items()}
        outputs = [batch.run(leaves) for batch in batches]
        loss = sum((x - b.target).square().sum() for x, b in zip(outputs, batches, strict=True))
        gradients = torch.autograd.grad(loss, list(leaves.values()))
        self.seen[block.index] = (
            torch.cat([x.detach() for x in outputs]),
            torch.cat([b.target for b in batches]),
            dict(zip(leaves, gradients, strict=True)),
            [b.windows for b in batches],
        )
        return {}


@pytest.mark.parametrize("structure", ["llama", "opt", "phi"])
def test_a_block_is_a_function_of_its_weights(
    structure: str, uniform: Recipe, windows: Tensor
) -> None:
    """Output, target and gradient are those of the model's own blocks."""
    dense = tiny_model(structure).eval()
    model, plugin = copy.deepcopy(dense), Looks()
    neuroal.prune(model, None, dataclasses.replace(uniform, reconstruction=plugin), windows=windows)
    blocks = [b.name for b in find(dense).blocks]
    for index, name in enumerate(blocks):
        outputs, targets, gradients, _ = plugin.seen[index]
        ours, theirs = (output_of(m, windows, name) for m in (model, dense))
        torch.testing.assert_close(outputs, ours.detach())
        torch.testing.assert_close(targets, theirs.detach())
        loss = (ours - theirs.detach()).square().sum()
        for linear, gradient in gradients.items():
            (expected,) = torch.autograd.grad(
                loss, model.get_submodule(linear).weight, retain_graph=True
            )
            torch.testing.assert_close(gradient, expected, rtol=1e-3, atol=1e-5)
    assert all(p.grad is None for p in model.parameters())


def output_of(model: nn.Module, ids: Tensor, name: str) -> Tensor:
    """What a block returns in the model's own forward."""
    seen: list[Tensor] = []

    def keep(module: nn.Module, args: object, result: Any) -> None:
        seen.append(result[0] if isinstance(result, tuple) else result)

    hook = model.get_submodule(name).register_forward_hook(keep)
    model(input_ids=ids, use_cache=False)
    hook.remove()
    return seen[0]


def test_batches_are_as_large_as_asked(uniform: Recipe, windows: Tensor) -> None:
    """40 tokens are two windows of 16; a batch has a window even if that is too large."""
    for tokens, wanted in ((40, [2, 2, 2]), (1, [1] * 6), (None, [6])):
        plugin = Looks(tokens)
        recipe = dataclasses.replace(uniform, reconstruction=plugin)
        neuroal.prune(tiny_model("llama"), None, recipe, windows=windows)
        assert plugin.seen[0][3] == wanted


def answers(linear: Any = None, block: Any = None) -> Any:
    """A plugin that answers its hooks with what functions make of values and weights."""

    @dataclass(frozen=True, eq=False)
    class Answers:
        @hookimpl
        def reconstruct_linear(self, values: Tensor) -> Any:
            return linear(values) if linear else values

        @hookimpl
        def reconstruct_block(self, weights: Mapping[str, Tensor]) -> Any:
            return block(weights) if block else {}

    return Answers()


@pytest.mark.parametrize(
    ("plugin", "message"),
    [
        (answers(lambda v: v * torch.nan), "reconstruct_linear: returned NaN or infinity for"),
        (answers(lambda v: v[:1]), "reconstruct_linear: returned shape"),
        (answers(lambda v: "no"), "reconstruct_linear: returned str, not a floating tensor"),
        (answers(block=lambda w: {n: x / 0 for n, x in w.items()}), "reconstruct_block: returned"),
        (answers(block=lambda w: {"nobody": torch.zeros(1)}), "reconstruct_block: named 'nobody'"),
        (answers(block=lambda w: [1]), "reconstruct_block: returned list, not a mapping"),
    ],
)
def test_wrong_answers_bear_the_name_of_the_plugin(
    plugin: Any, message: str, uniform: Recipe, windows: Tensor
) -> None:
    recipe = dataclasses.replace(uniform, reconstruction=plugin)
    with pytest.raises(PluginError, match=f"reconstruction 'answers' .*{message}"):
        neuroal.prune(tiny_model("llama"), None, recipe, windows=windows)


def test_values_that_stay_leave_the_run_as_it_is(
    uniform: Recipe, windows: Tensor, weights_of: Callable[..., Tensors], same: Callable[..., bool]
) -> None:
    """A reconstruction that changes nothing ends in the same bits, in bfloat16 too."""
    for dtype in (torch.float32, torch.bfloat16):
        plain, other = (tiny_model("llama").to(dtype) for _ in range(2))
        neuroal.prune(plain, None, uniform, windows=windows)
        recipe = dataclasses.replace(uniform, reconstruction=answers())
        neuroal.prune(other, None, recipe, windows=windows)
        assert same(weights_of(plain), weights_of(other))


def test_zeros_stay_zero_and_the_rest_is_the_answer(
    uniform: Recipe, windows: Tensor, linears: Callable[[nn.Module], Tensors]
) -> None:
    """Of a plugin that answers 1 everywhere, N:M included, what is pruned stays 0."""
    ones = answers(torch.ones_like)
    for pattern in ("unstructured", "2:4"):
        plain, model = tiny_model("llama"), tiny_model("llama")
        recipe = dataclasses.replace(uniform, pattern=pattern, sparsity=None)
        neuroal.prune(plain, None, recipe, windows=windows)
        report = neuroal.prune(
            model, None, dataclasses.replace(recipe, reconstruction=ones), windows=windows
        )
        assert report.sparsity["achieved"] == pytest.approx(0.5, abs=1e-6)
        # Blocks behind the first see other inputs, and may prune other weights.
        first = {n: w for n, w in linears(plain).items() if ".layers.0." in n}
        for name, weight in first.items():
            assert torch.equal(linears(model)[name], (weight != 0).float())


@pytest.mark.parametrize("name", ["refit", "block"])
@pytest.mark.parametrize("way", ["streamed", "spilled", "resumed"])
def test_every_way_ends_in_the_same_bytes(
    name: str,
    way: str,
    from_file: Recipe,
    models: Mapping[str, Path],
    read: Callable[[Path], Tensors],
    same: Callable[[Tensors, Tensors], bool],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
) -> None:
    if way == "streamed":
        request.getfixturevalue("streaming")
    recipe = dataclasses.replace(from_file, top_up="uniform", options={}, reconstruction=name)
    model = models["llama"]
    neuroal.prune(model, None, recipe, out=tmp_path / "plain")
    out = tmp_path / "other"
    if way == "resumed":
        keep = InMemory.keep

        def interrupted(self: Any, block: Block, *rest: Any) -> None:
            if block.index == 2:
                raise KeyboardInterrupt
            keep(self, block, *rest)

        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(InMemory, "keep", interrupted)
            neuroal.prune(model, None, recipe, out=out)
        neuroal.prune(model, None, recipe, out=out, resume=True)
    else:
        neuroal.prune(
            model, None, recipe, out=out, stream=way == "streamed", spill=way == "spilled"
        )
    assert same(read(out), read(tmp_path / "plain"))


def test_without_calibration_there_is_nothing_to_reconstruct_from(
    uniform: Recipe, models: Mapping[str, Path], tmp_path: Path
) -> None:
    recipe = dataclasses.replace(uniform, pruner="magnitude", reconstruction=answers())
    with pytest.raises(neuroal.UsageError, match="needs calibration"):
        neuroal.prune(models["llama"], None, recipe, out=tmp_path / "out")
    assert not list(tmp_path.iterdir())
