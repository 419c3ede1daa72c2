"""The walk is the model's own forward, leaves the model alone, and refuses what it cannot do."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from neuroal import NeuroalError
from neuroal.layout import Block, find
from neuroal.testing import STRUCTURES, tiny_model, windows
from neuroal.walk import CandidateState, Inputs, Walker
from neuroal.walk.statistics import Collector, resolve

each_structure = pytest.mark.parametrize("structure", STRUCTURES)
Weights = dict[str, Tensor]


def walker(model: nn.Module) -> Walker:
    return Walker(model, find(model))


def through(walk: Walker, inputs: Inputs, weights: Weights | None = None) -> CandidateState:
    """All blocks, with `weights` over the model's own."""
    state = CandidateState.start(inputs)
    for block in walk.layout.blocks:
        own = {x.name: weights[x.name] for x in block.linears if weights and x.name in weights}
        with walk.block(block) as module:
            after = walk.run(block, module, inputs, state, weights=own).state
        assert after is not None
        state = after
    return state


def assert_law(model: nn.Module, batch: int) -> None:
    """A walk, dense or pruned, ends where the model's own forward does, and leaves no trace."""
    ids = windows(4, 12)
    model.eval()
    before = snapshot(model)
    walk = walker(model)
    inputs = walk.inputs(ids, batch)
    dense = forward(model, ids, batch)
    assert all(a.equal(b) for a, b in zip(logits(walk, inputs), dense, strict=True))
    weights = halved(model, walk)
    result = logits(walk, inputs, weights)
    assert_same_state(before, snapshot(model))
    with pruned(model, weights):
        expected = forward(model, ids, batch)
    assert all(a.equal(b) for a, b in zip(result, expected, strict=True))
    assert not any(a.equal(b) for a, b in zip(result, dense, strict=True))


def logits(walk: Walker, inputs: Inputs, weights: Weights | None = None) -> list[Tensor]:
    state = through(walk, inputs, weights)
    pairs = zip(inputs.batches, state.outputs, strict=True)
    return [walk.logits(batch, outputs, state.weights) for batch, outputs in pairs]


def forward(model: nn.Module, ids: Tensor, batch: int) -> list[Tensor]:
    with torch.no_grad():
        return [model(input_ids=part).logits for part in torch.split(ids, batch)]


def halved(model: nn.Module, walk: Walker) -> Weights:
    """Every linear's weight with its smaller half zero."""
    made = {}
    for name in walk.layout.linears:
        weight = model.get_parameter(f"{name}.weight").detach()
        made[name] = weight.masked_fill(weight.abs() < weight.abs().median(), 0)
    return made


@contextmanager
def pruned(model: nn.Module, weights: Weights) -> Iterator[None]:
    """The model with these weights in place of its own."""
    own = {k: v.clone() for k, v in model.state_dict().items()}
    model.load_state_dict({f"{name}.weight": w for name, w in weights.items()}, strict=False)
    yield
    model.load_state_dict(own)


def snapshot(model: nn.Module) -> tuple[Any, ...]:
    """Everything of a model that a walk might leave changed, to be compared."""
    return (
        {k: (v.clone(), v.data_ptr()) for k, v in model.state_dict().items()},
        [sorted(vars(m)) for m in model.modules()],
        [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()],
        [id(p) for p in model.parameters()],
    )


def assert_same_state(before: tuple[Any, ...], after: tuple[Any, ...]) -> None:
    for name, (tensor, place) in before[0].items():
        assert tensor.equal(after[0][name][0]) and place == after[0][name][1], name
    assert before[1:] == after[1:]


# -- equal to the model's own forward --------------------------------------------------------


@each_structure
@pytest.mark.parametrize("batch", [1, 2, 5])
def test_dense_walk_is_the_models_own_forward(structure: str, batch: int) -> None:
    model, ids = tiny_model(structure), windows(5)
    walk = walker(model)
    result = logits(walk, walk.inputs(ids, batch))
    expected = forward(model, ids, batch)
    assert [len(x) for x in result] == [len(x) for x in expected]
    assert all(a.equal(b) for a, b in zip(result, expected, strict=True))


@each_structure
@pytest.mark.parametrize("batch", [1, 5])
def test_pruned_walk_is_the_pruned_models_own_forward(structure: str, batch: int) -> None:
    model, ids = tiny_model(structure), windows(5)
    walk = walker(model)
    weights = halved(model, walk)
    result = logits(walk, walk.inputs(ids, batch), weights)
    dense = forward(model, ids, batch)
    with pruned(model, weights):
        expected = forward(model, ids, batch)
    assert all(a.equal(b) for a, b in zip(result, expected, strict=True))
    assert not any(a.equal(b) for a, b in zip(result, dense, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype) -> None:
    model, ids = tiny_model("llama").to(dtype), windows(3)
    walk = walker(model)
    weights = halved(model, walk)
    result = logits(walk, walk.inputs(ids, 3), weights)
    with pruned(model, weights):
        assert result[0].equal(forward(model, ids, 3)[0])


@each_structure
def test_masks_are_the_models_own(structure: str) -> None:
    """Eager attention is given its mask as a tensor of the batch's shape."""
    model: Any = tiny_model(structure)
    model.set_attn_implementation("eager")
    ids = windows(3)
    walk = walker(model)
    result = logits(walk, walk.inputs(ids, 2))
    expected = forward(model, ids, 2)
    assert all(a.equal(b) for a, b in zip(result, expected, strict=True))


@pytest.mark.parametrize(("length", "expected"), [(16, [100]), (64, [32, 32, 32, 4])])
def test_batches_have_a_number_of_tokens(length: int, expected: list[int]) -> None:
    walk = walker(tiny_model("llama", blocks=1))
    inputs = walk.inputs(windows(100, length))
    assert [ids.shape[0] for ids in inputs.batches] == expected
    assert inputs.windows == 100


def test_one_block() -> None:
    model, ids = tiny_model("opt", blocks=1), windows(2)
    walk = walker(model)
    assert logits(walk, walk.inputs(ids, 2))[0].equal(forward(model, ids, 2)[0])


# -- statistics ------------------------------------------------------------------------------


@each_structure
def test_statistics_are_those_of_the_models_own_forward(structure: str) -> None:
    model, ids = tiny_model(structure), windows(4)
    walk = walker(model)
    accumulators = resolve(["input_norm", "gram"])
    expected = {n: Collector(accumulators, x.in_features) for n, x in walk.layout.linears.items()}
    handles = [
        model.get_submodule(name).register_forward_pre_hook(
            # OPT flattens windows and tokens before its MLP.
            lambda _, args, collector=collector: collector.update(args[0].reshape(2, 16, -1))
        )
        for name, collector in expected.items()
    ]
    forward(model, ids, 2)
    for handle in handles:
        handle.remove()
    inputs = walk.inputs(ids, 2)
    state = CandidateState.start(inputs)
    for block in walk.layout.blocks:
        with walk.block(block) as module:
            result = walk.run(block, module, inputs, state, accumulators)
        assert set(result.statistics) == {x.name for x in block.linears}
        for name, made in result.statistics.items():
            for key, value in expected[name].statistics().tensors().items():
                assert made[key].equal(value), (name, key)
            assert (made.windows, made.tokens) == (4, 4 * 16)
        assert result.state is not None
        state = result.state


def test_linears_of_a_group_share_their_statistics() -> None:
    walk = walker(tiny_model("llama"))
    inputs, block = walk.inputs(windows(2)), walk.layout.blocks[0]
    with walk.block(block) as module:
        made = walk.run(
            block, module, inputs, CandidateState.start(inputs), resolve(["input_norm"])
        ).statistics
    q, k, v, o, gate, up, down = made.values()
    assert q is k is v and gate is up
    assert len({id(x) for x in (q, o, gate, down)}) == 4


def test_the_pruned_run_shares_the_first_groups_statistics_with_the_dense_run() -> None:
    model = tiny_model("llama")
    walk = walker(model)
    inputs, block = walk.inputs(windows(2)), walk.layout.blocks[0]
    start, accumulators = CandidateState.start(inputs), resolve(["input_norm"])
    weights = {x.name: halved(model, walk)[x.name] for x in block.linears}
    with walk.block(block) as module:
        dense = walk.run(block, module, inputs, start, accumulators, output=False)
        after = walk.run(
            block, module, inputs, start, accumulators, weights=weights, dense=dense
        ).statistics
    for x in block.linears:
        shared = after[x.name] is dense.statistics[x.name]
        assert shared == (x.group == 0)
        assert after[x.name].input_norm.equal(dense.statistics[x.name].input_norm) == (x.group == 0)


def test_the_input_error_is_that_of_the_same_tokens() -> None:
    model = tiny_model("llama")
    walk = walker(model)
    inputs, block = walk.inputs(windows(3), batch=2), walk.layout.blocks[0]
    start, error = CandidateState.start(inputs), resolve(["input_error"])
    weights = {x.name: halved(model, walk)[x.name] for x in block.linears}
    with walk.block(block) as module:
        dense = walk.run(block, module, inputs, start, error, keep_inputs=True)
        after = walk.run(
            block, module, inputs, start, error, weights=weights, dense=dense, keep_inputs=True
        )
        again = walk.run(block, module, inputs, start, error, dense=dense)
    assert all("input_error" not in s for s in dense.statistics.values())
    for x in block.linears:
        a = torch.cat([kept[x.group][0] for kept in dense.inputs]).double()
        b = torch.cat([kept[x.group][0] for kept in after.inputs]).double()
        expected = (a - b).square().sum(dim=(0, 1)) / 3
        made = after.statistics[x.name].input_error.double()
        torch.testing.assert_close(made, expected, rtol=1e-5, atol=1e-6)
        assert expected.any() == (x.group > 0)
        assert not again.statistics[x.name].input_error.any()


# -- what is run -----------------------------------------------------------------------------


def test_block_runs_count_windows() -> None:
    walk = walker(tiny_model("llama"))
    inputs = walk.inputs(windows(5), batch=2)
    assert walk.block_runs == 0
    through(walk, inputs)
    assert walk.block_runs == 3 * 5


@each_structure
def test_without_an_output_the_block_ends_at_its_last_linears_input(structure: str) -> None:
    model = tiny_model(structure)
    walk = walker(model)
    inputs, block = walk.inputs(windows(3), batch=1), walk.layout.blocks[1]
    ran: list[str] = []
    for name in walk.layout.linears:
        model.get_submodule(name).register_forward_hook(lambda *_, name=name: ran.append(name))
    state = CandidateState.start(inputs)
    with walk.block(walk.layout.blocks[0]) as module:
        after = walk.run(walk.layout.blocks[0], module, inputs, state).state
    assert after is not None
    ran.clear()
    with walk.block(block) as module:
        result = walk.run(block, module, inputs, after, resolve(["input_norm"]), output=False)
    assert ran == [x.name for x in block.linears[:-1]] * 3
    assert result.state is None
    assert set(result.statistics) == {x.name for x in block.linears}


def test_nothing_is_collected_that_was_not_asked_for() -> None:
    walk = walker(tiny_model("llama"))
    inputs, block = walk.inputs(windows(2)), walk.layout.blocks[0]
    with walk.block(block) as module:
        result = walk.run(block, module, inputs, CandidateState.start(inputs))
    assert result.statistics == {} and result.inputs == []


def test_blocks_are_opened_one_at_a_time() -> None:
    model = tiny_model("llama")
    opened: list[str] = []

    @contextmanager
    def open_block(block: Block) -> Iterator[nn.Module]:
        opened.append(f"+{block.index}")
        yield model.get_submodule(block.name)
        opened.append(f"-{block.index}")

    walk = Walker(model, find(model), open_block)
    one_by_one = ["+0", "-0", "+1", "-1", "+2", "-2"]
    assert opened == one_by_one  # to see once what blocks return
    through(walk, walk.inputs(windows(1)))
    assert opened == 2 * one_by_one


# -- the model is left alone -----------------------------------------------------------------


@each_structure
def test_a_walk_leaves_the_model_as_it_was(structure: str) -> None:
    model = tiny_model(structure)
    before = snapshot(model)
    walk = walker(model)
    inputs = walk.inputs(windows(3), batch=2)
    through(walk, inputs)
    logits(walk, inputs, halved(model, walk))
    assert_same_state(before, snapshot(model))


def test_a_state_is_not_changed() -> None:
    model = tiny_model("llama")
    walk = walker(model)
    inputs, block = walk.inputs(windows(2)), walk.layout.blocks[0]
    start = CandidateState.start(inputs)
    with walk.block(block) as module:
        first = walk.run(block, module, inputs, start).state
        second = walk.run(block, module, inputs, start).state
    assert start.outputs == [{}]
    assert first is not None and second is not None
    assert first.outputs[0][0, 0].equal(second.outputs[0][0, 0])


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("where", ["inputs", "run", "logits"])
def test_an_error_inside_the_model_leaves_it_as_it_was(
    where: str, error: type[BaseException]
) -> None:
    model: Any = tiny_model("llama")
    walk = walker(model)
    inputs = walk.inputs(windows(2))
    state, weights = through(walk, inputs), halved(model, walk)
    block = walk.layout.blocks[1]
    places = {"inputs": model.model.norm, "run": model.model.layers[1].mlp.act_fn}
    handle = places.get(where, model.lm_head).register_forward_pre_hook(lambda *_: fail(error))
    before = snapshot(model)
    with pytest.raises(error):
        if where == "inputs":
            walk.inputs(windows(2))
        elif where == "logits":
            walk.logits(inputs.batches[0], state.outputs[0])
        else:
            own = {x.name: weights[x.name] for x in block.linears}
            with walk.block(block) as module:
                after = through_first(walk, inputs)
                walk.run(block, module, inputs, after, weights=own)
    assert_same_state(before, snapshot(model))
    handle.remove()
    assert logits(walk, inputs)[0].equal(forward(model, windows(2), 2)[0])


def fail(error: type[BaseException]) -> None:
    raise error("in the middle")


def through_first(walk: Walker, inputs: Inputs) -> CandidateState:
    block = walk.layout.blocks[0]
    with walk.block(block) as module:
        after = walk.run(block, module, inputs, CandidateState.start(inputs)).state
    assert after is not None
    return after


def test_a_forward_of_the_blocks_own_is_put_back() -> None:
    """Hooks of other libraries replace `forward` on the instance."""
    model: Any = tiny_model("llama")
    block = model.model.layers[1]
    wrapped = block.forward
    block.forward = lambda *args, **kwargs: wrapped(*args, **kwargs)
    own = block.forward
    walk = walker(model)
    walk.inputs(windows(2))
    assert vars(block)["forward"] is own
    assert logits(walk, walk.inputs(windows(2)))[0].equal(forward(model, windows(2), 2)[0])


# -- what blocks pass to one another with the hidden state -----------------------------------


class Mlp(nn.Module):
    """hidden -> hidden + down(tanh(up(hidden)))."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(4, 6), nn.Linear(6, 4)

    def forward(self, hidden: Tensor) -> Any:
        return hidden + self.down(torch.tanh(self.up(hidden)))


class Sharing(Mlp):
    """The first block makes keys that the later ones read; the second passes them on."""

    def forward(self, hidden: Tensor, shared: Any = None) -> Any:
        if shared is None:
            keys = torch.tanh(self.up(hidden))
            return hidden + self.down(keys), {"keys": (keys, 2 * keys)}
        first, second = shared["keys"]
        inner = torch.tanh(self.up(hidden)) * first + second
        return hidden + self.down(inner), shared


class Toy(nn.Module):
    """A causal language model of any blocks; `between` is what it does around them."""

    def __init__(self, blocks: list[nn.Module], between: Callable[..., Tensor]) -> None:
        super().__init__()
        self.embed = nn.Embedding(97, 4)
        self.blocks = nn.ModuleList(blocks)
        self.head = nn.Linear(4, 97)
        self.between = between

    def forward(self, input_ids: Tensor, use_cache: bool = False) -> SimpleNamespace:
        hidden = self.between(self.blocks, self.embed(input_ids))
        return SimpleNamespace(logits=self.head(hidden))


def plain(blocks: nn.ModuleList, hidden: Tensor) -> Tensor:
    for block in blocks:
        hidden = block(hidden)
    return hidden


def sharing(blocks: nn.ModuleList, hidden: Tensor) -> Tensor:
    shared = None
    for block in blocks:
        hidden, shared = block(hidden, shared)
    return hidden


def first_for_all(blocks: nn.ModuleList, hidden: Tensor) -> Tensor:
    """Every later block reads what the first one made."""
    hidden, shared = blocks[0](hidden)
    for block in blocks[1:]:
        hidden, _ = block(hidden, shared=shared)
    return hidden


def embeddings_for_all(blocks: nn.ModuleList, hidden: Tensor) -> Tensor:
    """Every block reads the embeddings as well."""
    start = hidden
    for block in blocks:
        hidden = block(hidden, start)
    return hidden


class Residual(Mlp):
    def forward(self, hidden: Tensor, start: Tensor) -> Any:  # type: ignore[override]
        return super().forward(hidden) + start


@pytest.mark.parametrize(
    ("kind", "between"),
    [
        (Mlp, plain),
        (Sharing, sharing),
        (Sharing, first_for_all),
        (Residual, embeddings_for_all),
    ],
)
@pytest.mark.parametrize("batch", [1, 4])
def test_what_blocks_share_is_carried_per_candidate(
    kind: type[nn.Module], between: Callable[..., Tensor], batch: int
) -> None:
    assert_law(Toy([kind() for _ in range(4)], between), batch)


def test_only_what_a_later_block_reads_is_carried() -> None:
    model = Toy([Sharing() for _ in range(4)], first_for_all).eval()
    walk = walker(model)
    inputs = walk.inputs(windows(2))
    kept = []
    state = CandidateState.start(inputs)
    for block in walk.layout.blocks:
        with walk.block(block) as module:
            after = walk.run(block, module, inputs, state).state
        assert after is not None
        state = after
        kept.append(sorted(state.outputs[0]))
    shared = [(0, 1), (0, 2)]
    assert kept == [[(0, 0), *shared], [*shared, (1, 0)], [*shared, (2, 0)], [(3, 0)]]


# -- what the model computes between its blocks ---------------------------------------------


def scaled(blocks: nn.ModuleList, hidden: Tensor) -> Tensor:
    for block in blocks:
        hidden = block(hidden) * 2
    return hidden


def scaled_first(blocks: nn.ModuleList, hidden: Tensor) -> Tensor:
    for block in blocks:
        hidden = block(hidden * 2)
    return hidden


def scaled_extra(blocks: nn.ModuleList, hidden: Tensor) -> Tensor:
    """The hidden state is passed on unchanged, the rest is not."""
    hidden, shared = blocks[0](hidden)
    for block in blocks[1:]:
        a, b = shared["keys"]
        hidden, shared = block(hidden, {"keys": (a, b * 0.5)})
    return hidden


def scaled_hidden_with_an_extra(blocks: nn.ModuleList, hidden: Tensor) -> Tensor:
    hidden, shared = blocks[0](hidden)
    for block in blocks[1:]:
        hidden, shared = block(hidden * 2, shared)
    return hidden


def embeddings_only(blocks: nn.ModuleList, hidden: Tensor) -> Tensor:
    """Blocks side by side: none reads what another returns."""
    return torch.stack([block(hidden) for block in blocks]).sum(dim=0)


@pytest.mark.parametrize(
    ("kind", "between"),
    [
        (Mlp, scaled),
        (Mlp, scaled_first),
        (Sharing, scaled_extra),
        (Sharing, scaled_hidden_with_an_extra),
        (Mlp, embeddings_only),
    ],
)
@pytest.mark.parametrize("batch", [1, 4])
def test_what_the_model_computes_between_blocks_it_computes_again(
    kind: type[nn.Module], between: Callable[..., Tensor], batch: int
) -> None:
    assert_law(Toy([kind() for _ in range(3)], between), batch)


class IntoContainer(Mlp):
    """Writes its hidden state into a mapping, where later blocks find it."""

    def forward(self, hidden: Tensor, shared: dict[str, Any]) -> Any:  # type: ignore[override]
        hidden = super().forward(hidden + shared.get("last", (0,))[0])
        shared["last"] = (torch.tanh(hidden),)
        return hidden


def with_container(blocks: nn.ModuleList, hidden: Tensor) -> Tensor:
    shared: dict[str, Any] = {}
    for block in blocks:
        hidden = block(hidden, shared)
    return hidden


def twice(blocks: nn.ModuleList, hidden: Tensor) -> Tensor:
    """All blocks run again, as in a recurrent stack."""
    return plain(blocks, plain(blocks, hidden))


def skipping(blocks: nn.ModuleList, hidden: Tensor) -> Tensor:
    """The head reads what every block returned."""
    made = [hidden]
    for block in blocks:
        made.append(block(made[-1]))
    return torch.stack(made).mean(dim=0)


@pytest.mark.parametrize(
    ("kind", "between"), [(IntoContainer, with_container), (Mlp, twice), (Mlp, skipping)]
)
@pytest.mark.parametrize("batch", [1, 4])
def test_mappings_loops_and_skips_are_carried(
    kind: type[nn.Module], between: Callable[..., Tensor], batch: int
) -> None:
    assert_law(Toy([kind() for _ in range(3)], between), batch)


def test_a_weight_that_blocks_share_is_pruned_in_all_of_them() -> None:
    blocks: list[Any] = [Mlp() for _ in range(3)]
    blocks[2].down.weight = blocks[0].down.weight
    model = Toy(blocks, plain)
    assert len(walker(model).layout.linears) == 5
    assert_law(model, 2)


# -- refused ---------------------------------------------------------------------------------


class InPlace(Mlp):
    def forward(self, hidden: Tensor) -> Any:
        return hidden.add_(super().forward(hidden))


def test_a_block_that_writes_to_its_arguments_is_refused() -> None:
    model = Toy([InPlace(), InPlace()], plain).eval()
    before = snapshot(model)
    with pytest.raises(NeuroalError, match=r"block blocks\.0 writes to its arguments"):
        walker(model)
    assert_same_state(before, snapshot(model))


def test_blocks_count_in_the_order_they_run() -> None:
    def backwards(blocks: nn.ModuleList, hidden: Tensor) -> Tensor:
        return plain(blocks[::-1], hidden)

    model = Toy([Mlp() for _ in range(3)], backwards).eval()
    walk = walker(model)
    assert [b.name for b in walk.layout.blocks] == ["blocks.2", "blocks.1", "blocks.0"]
    ids = windows(3)
    result = logits(walk, walk.inputs(ids, 3))
    assert result[0].equal(forward(model, ids, 3)[0])
