"""Which linears a pattern means, in models of several structures."""

import pytest
import torch

from neuroal import UsageError
from neuroal.layout import Block, Layout, Linear, find, kept_linears, selected
from neuroal.testing import STRUCTURES, tiny_model


@pytest.fixture(scope="module")
def llama() -> Layout:
    return find(tiny_model("llama", blocks=3))


def local(layout: Layout, names: frozenset[str]) -> set[tuple[int, str]]:
    return {(layout.linears[n].block, n.rpartition(".")[2]) for n in names}


ALL = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
ATTENTION = {"q_proj", "k_proj", "v_proj", "o_proj"}


@pytest.mark.parametrize(
    ("pattern", "blocks", "names"),
    [
        ("model.layers.1.self_attn.o_proj", {1}, {"o_proj"}),
        ("model.layers.1.self_attn", {1}, ATTENTION),
        ("model.layers.1", {1}, ALL),
        ("model.layers", {0, 1, 2}, ALL),
        ("*.o_proj", {0, 1, 2}, {"o_proj"}),
        ("*.self_attn", {0, 1, 2}, ATTENTION),
        ("*.self_attn.*", {0, 1, 2}, ATTENTION),
        ("*.layers.[02].mlp.up_proj", {0, 2}, {"up_proj"}),
        ("*_proj", {0, 1, 2}, ALL),
        ("attention", {0, 1, 2}, ATTENTION),
        ("mlp", {0, 1, 2}, ALL - ATTENTION),
        ("first:1", {0}, ALL),
        ("first:2", {0, 1}, ALL),
        ("last:1", {2}, ALL),
        ("last:3", {0, 1, 2}, ALL),
    ],
)
def test_a_pattern(llama: Layout, pattern: str, blocks: set[int], names: set[str]) -> None:
    expected = {(b, n) for b in blocks for n in names}
    assert local(llama, selected(llama, [pattern], "--keep")) == expected


def test_a_name_ends_at_a_dot() -> None:
    blocks = tuple(Block(i, f"h.{i}", (Linear(f"h.{i}.a", i, 2, 2, 0, None),)) for i in range(12))
    assert selected(Layout(blocks), ["h.1"], "--keep") == {"h.1.a"}
    assert selected(Layout(blocks), ["last:2"], "--keep") == {"h.10.a", "h.11.a"}


@pytest.mark.parametrize("structure", STRUCTURES)
def test_attention_and_mlp_are_told_apart_by_structure(structure: str) -> None:
    layout = find(tiny_model(structure))
    attention = selected(layout, ["attention"], "--keep")
    mlp = selected(layout, ["mlp"], "--keep")
    assert attention | mlp == layout.linears.keys() and not attention & mlp
    for block in layout.blocks:
        with_values = [x for x in block.linears if any(r.name in "qkv" for r in x.rows)]
        read = {x.fed.linear for x in with_values if x.fed is not None}
        assert {x.name for x in with_values} | read == attention & {x.name for x in block.linears}


@pytest.mark.parametrize(
    ("pattern", "hint"),
    [
        ("o_proj", r"did you mean '\*\.o_proj'\?"),
        ("*.o_porj", r"did you mean '\*\.o_proj'\?"),
        ("*.self_atn", r"did you mean '\*\.self_attn'\?"),
        ("model.layers.1.self_attn.oproj", r"did you mean 'model\.layers\.1\.self_attn\.o_proj'\?"),
        ("model.layers.3", "did you mean"),
        ("atention", r"did you mean 'attention'\?"),
        ("frist:1", r"did you mean 'first:1'\?"),
        ("lm_head", r"\(no others are pruned\): choose from \*\.down_proj, .*, attention, first:1"),
    ],
)
def test_an_unknown_pattern_gets_the_nearest(llama: Layout, pattern: str, hint: str) -> None:
    with pytest.raises(UsageError, match=f"^--only .* means no linear of a block .*{hint}"):
        selected(llama, [pattern], "--only")


@pytest.mark.parametrize("pattern", ["first:0", "last:4"])
def test_there_are_no_such_blocks(llama: Layout, pattern: str) -> None:
    with pytest.raises(UsageError, match=f"^--keep {pattern} is not one of the 3 blocks$"):
        selected(llama, [pattern], "--keep")


def test_keep_is_stronger_than_only(llama: Layout) -> None:
    kept = kept_linears(llama, ["first:1", "*.up_proj"], ["mlp"])
    pruned = llama.linears.keys() - kept
    assert local(llama, frozenset(pruned)) == {
        (b, n) for b in (1, 2) for n in ("gate_proj", "down_proj")
    }
    assert kept_linears(llama, [], []) == frozenset()


@pytest.mark.parametrize(("keep", "only"), [(["attention", "mlp"], []), (["mlp"], ["mlp"])])
def test_something_has_to_be_left(llama: Layout, keep: list[str], only: list[str]) -> None:
    with pytest.raises(UsageError, match="leave no linear to prune"):
        kept_linears(llama, keep, only)


def test_a_layout_without_some_linears(llama: Layout) -> None:
    kept = selected(llama, ["model.layers.1", "*.o_proj"], "--keep")
    left = llama.without(kept)
    assert [b.name for b in left.blocks] == ["model.layers.0", "model.layers.2"]
    assert [b.index for b in left.blocks] == [0, 1]
    assert left.linears.keys() == llama.linears.keys() - kept
    for block in left.blocks:
        assert {x.block for x in block.linears} == {block.index}
    values = left.linears["model.layers.0.self_attn.v_proj"]
    assert llama.linears[values.name].paired == "model.layers.0.self_attn.o_proj"
    assert values.paired is None and values.fed is None
    for x in left.linears.values():
        assert x.paired is None or x.paired in left.linears
    assert llama.without(()) == llama


class Bare(torch.nn.Module):
    """Attention whose linears are children of the block, after a first linear of another child."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (torch.nn.Linear(8, 8, bias=False) for _ in range(4))
        self.up, self.down = torch.nn.Linear(8, 16, bias=False), torch.nn.Linear(16, 8, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (
            linear(x).view(*x.shape[:-1], 2, 4).transpose(1, 2)
            for linear in (self.q, self.k, self.v)
        )
        mixed = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.o(mixed.transpose(1, 2).reshape(x.shape))
        return x + self.down(torch.relu(self.up(x)))


class Model(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(16, 8)
        self.blocks = torch.nn.ModuleList(Bare() for _ in range(2))

    def get_input_embeddings(self) -> torch.nn.Module:
        return self.embed

    def forward(self, input_ids: torch.Tensor, **_: object) -> torch.Tensor:
        x = self.embed(input_ids)
        for block in self.blocks:
            x = block(x)
        return x


def test_attention_needs_no_module_of_its_own() -> None:
    layout = find(Model())
    names = {n.rpartition(".")[2] for n in selected(layout, ["attention"], "--keep")}
    assert names == {"q", "k", "v", "o"}
