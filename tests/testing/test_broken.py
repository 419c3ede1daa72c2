"""Every law of the conformance classes is broken by a plugin that breaks just it."""

import dataclasses
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from neuroal import (
    ExporterTraits,
    Generation,
    Importance,
    Proposal,
    PrunedLinear,
    PrunerTraits,
    ReconstructionTraits,
    RowRatiosTraits,
    hookimpl,
    testing,
)
from neuroal.plugins import load
from neuroal.pruning.masks import mask_for
from neuroal.testing import CLASSES, failures

plugin = dataclass(frozen=True, eq=False)
COUNT = itertools.count()
Broken = tuple[str, Any, set[str]]


FOUND: dict[object, dict[str, str]] = {}  # several tests look at one plugin


def found(role: str, instance: Any) -> dict[str, str]:
    """The checks that a plugin fails, with what they say, which is one line."""
    key = role, type(instance), repr(instance)
    if key in FOUND:
        return FOUND[key]
    checks = CLASSES[role]()
    checks.generations = 50  # type: ignore[attr-defined]
    said = dict(failures(load([(role, instance)])[0], checks))
    assert all(text and "\n" not in text for text in said.values())
    FOUND[key] = said
    return said


# Pruners


@plugin
class Scores:
    """A good pruner, and one that is broken in a way of its own."""

    how: str = "good"

    @hookimpl
    def required_statistics(self) -> set[str]:
        twice = self.how == "two requirements" and next(COUNT) % 2
        return {"input_norm", "input_sum"} if twice else {"input_norm"}

    @hookimpl
    def score_weights(self, weight: Any, statistics: Any) -> Any:
        scores = weight.abs() * statistics.input_norm
        match self.how:
            case "squeezed":
                return scores.squeeze(1)
            case "transposed":
                return scores.t()
            case "whole numbers":
                return scores.long()
            case "half":
                return scores.half()
            case "doubled":
                return scores * 2
            case "divided by zero":
                return scores / statistics.input_norm
            case "random":
                return scores * (1 + 1e-6 * torch.rand(()))
            case "counted":
                return scores * (1 + 1e-6 * next(COUNT))
            case "by position":
                return scores * torch.arange(1, len(weight) + 1)[:, None]
            case "numpy":
                weight.numpy()[0, 0] = 7
            case "numpy statistics":
                statistics.input_norm.numpy()[:] = 7
            case "new tensors on the CPU":
                return scores * torch.ones(weight.shape[1])
            case "leaves the device":
                return scores.cpu()
        return scores


@plugin
class Halves(Scores):
    """Its option changes on the way in."""

    power: float = 1.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "power", self.power / 2)


@plugin
class Describes(Scores):
    """Says the same or another thing of itself."""

    what: str = "matrix"

    @hookimpl
    def describe(self) -> Any:
        match self.what:
            case "nothing that there is":
                return PrunerTraits(comparison="column")  # type: ignore[arg-type]
            case "a number":
                return PrunerTraits(patterns=1)  # type: ignore[arg-type]
            case "two things":
                return PrunerTraits("row" if next(COUNT) % 2 else "matrix")
            case "a product":
                return PrunerTraits(magnitude_times="input_norm")
            case "a product of something else":
                return PrunerTraits(magnitude_times="input_sum")
        return PrunerTraits("matrix")


@plugin
class Prunes:
    """A good second-order pruner, and one that is broken in a way of its own."""

    how: str = "good"

    @hookimpl
    def required_statistics(self) -> set[str]:
        return {"input_norm"}

    @hookimpl
    def prune_linear(self, weight: Any, target: Any, statistics: Any, rng: Any) -> Any:
        scores = weight.abs() * statistics.input_norm
        mask = mask_for(scores, self.target(target, weight))
        kept = weight.masked_fill(mask, 0)
        some = bool(mask.any())
        match self.how:
            case "a tuple":
                return kept, mask
            case "pruned weights stay":
                return PrunedLinear(weight.clone(), mask)
            case "float64":
                return PrunedLinear(kept.double(), mask)
            case "infinite":
                return PrunedLinear(kept * 3e38 * 10, mask) if some else PrunedLinear(kept, mask)
            case "moves without need":
                return PrunedLinear(kept * 2, mask)
            case "random":
                return PrunedLinear(kept * (1 + some * torch.rand(())), mask)
            case "numpy":
                statistics.input_norm.numpy()[:] = 7
            case "numpy target":
                target.counts.numpy()[:] = target.counts.numpy()[::-1].copy()
            case "leaves the device":
                return PrunedLinear(kept, mask.cpu())
        return PrunedLinear(kept, mask)

    def target(self, target: Any, weight: Any) -> Any:
        """What it prunes in place of what it was asked to."""
        counts, columns = target.counts, weight.shape[1]
        if self.how == "keeps one" and target.pattern is None:
            if target.comparison == "row" and bool((counts == columns).all()):
                counts = counts - 1
        elif self.how == "keeps one of all" and target.comparison == "matrix":
            counts = counts.clamp(max=weight.numel() - 1)
        elif self.how == "the same in all rows" and int(counts.max() - counts.min()) > 1:
            counts = torch.full_like(counts, int(counts.double().mean()))
        elif self.how == "no groups":
            return dataclasses.replace(target, pattern=None)
        return dataclasses.replace(target, counts=counts)


@plugin
class PrunesTogether:
    """A good pruner of many linears at once, and ones that are broken in ways of their own."""

    how: str = "good"

    @hookimpl
    def prune_linears(self, weights: Any, targets: Any) -> Any:
        pairs = list(zip(weights, targets, strict=True))
        answers = [PrunedLinear(weight, mask_for(weight.abs(), target)) for weight, target in pairs]
        answers = [PrunedLinear(a.weight.masked_fill(a.mask, 0), a.mask) for a in answers]
        match self.how:
            case "in reverse":
                return answers[::-1]
            case "by their mean":
                factor = weights.abs().mean() / pairs[0][0].abs().mean().clamp_min(1e-30)
                return [PrunedLinear(a.weight * factor, a.mask) for a in answers]
            case "writes":
                weights.numpy()[:] = 7
        return answers


PRUNERS: list[Broken] = [
    ("options", Halves(), {"test_options_round_trip"}),
    ("two requirements", Scores("two requirements"), {"test_required_statistics"}),
    *(
        (f"describes {what}", Describes(what=what), {"test_traits"})
        for what in (
            *("nothing that there is", "a number", "two things"),
            "a product of something else",
        )
    ),
    (
        "another product",
        Describes("doubled", what="a product"),
        {"test_scores_are_the_product_they_are_said_to_be"},
    ),
    *(
        (how, Scores(how), {"test_scores"})
        for how in ("squeezed", "whole numbers", "half", "divided by zero")
    ),
    ("random", Scores("random"), {"test_scores_repeat"}),
    ("counted", Scores("counted"), {"test_scores_repeat"}),
    ("numpy", Scores("numpy"), {"test_scores_leave_inputs_alone"}),
    ("numpy statistics", Scores("numpy statistics"), {"test_scores_leave_inputs_alone"}),
    ("by position", Scores("by position"), {"test_scores_follow_their_rows"}),
    ("keeps one", Prunes("keeps one"), {"test_meets_ratios"}),
    ("the same in all rows", Prunes("the same in all rows"), {"test_meets_ratios_per_row"}),
    ("keeps one of all", Prunes("keeps one of all"), {"test_meets_matrix_ratios"}),
    ("no groups", Prunes("no groups"), {"test_meets_patterns"}),
    ("pruned weights stay", Prunes("pruned weights stay"), {"test_pruned_weights"}),
    ("float64", Prunes("float64"), {"test_pruned_weights"}),
    ("moves without need", Prunes("moves without need"), {"test_pruning_nothing"}),
    ("pruning is random", Prunes("random"), {"test_pruning_repeats"}),
    *(
        (f"together {how}", PrunesTogether(how), {"test_pruning_together"})
        for how in ("in reverse", "by their mean")
    ),
    ("together writes", PrunesTogether("writes"), {"test_pruning_leaves_inputs_alone"}),
    ("pruning writes", Prunes("numpy"), {"test_pruning_leaves_inputs_alone"}),
    *(
        (how, Scores(how), {"test_scores_on_other_devices"})
        for how in ("new tensors on the CPU", "leaves the device")
    ),
    (
        "pruning leaves the device",
        Prunes("leaves the device"),
        {"test_meets_ratios_on_other_devices"},
    ),
]


# Metrics


@plugin
class Metric:
    """A good metric of statistics, and one that is broken in a way of its own."""

    how: str = "good"

    @hookimpl
    def required_statistics(self) -> set[str]:
        return {"input_norm"}

    @hookimpl
    def measure_linear(self, dense: Any, pruned: Any) -> Any:
        a, b = dense.input_norm, pruned.input_norm
        value = (a - b).square().mean()
        match self.how:
            case "a vector":
                return value[None]
            case "a number":
                return float(value)
            case "whole numbers":
                return value.long()
            case "relative":
                return value / a.square().mean()
            case "signed":
                return (a - b).mean()
            case "never zero":
                return value + 0.01
            case "blind":
                return 0 * value
            case "random":
                return value * (1 + torch.rand(()))
            case "counted":
                return value * (1 + next(COUNT))
            case "numpy":
                dense.input_norm.numpy()[:] = 7
            case "leaves the device":
                return value.cpu()
        return value


@plugin
class OutputMetric:
    """A good metric of logits, and one that is broken in a way of its own."""

    how: str = "good"

    @hookimpl
    def measure_output(self, dense_logits: Any, pruned_logits: Any) -> Any:
        distance = (dense_logits.float() - pruned_logits.float()).abs()
        if self.how == "half":
            return (dense_logits - pruned_logits).abs().square().sum(dim=-1).mean()
        return distance.mean() * (len(distance) if self.how == "sum" else 1)


METRICS: list[Broken] = [
    ("a vector", Metric("a vector"), {"test_is_a_number"}),
    ("relative", Metric("relative"), {"test_is_a_number"}),
    ("half", OutputMetric("half"), {"test_is_a_number"}),
    ("signed", Metric("signed"), {"test_is_never_negative"}),
    ("never zero", Metric("never zero"), {"test_same_is_zero"}),
    ("blind", Metric("blind"), {"test_tells_apart"}),
    ("sum", OutputMetric("sum"), {"test_averages_windows"}),
    ("random", Metric("random"), {"test_repeats"}),
    ("counted", Metric("counted"), {"test_repeats"}),
    ("numpy", Metric("numpy"), {"test_leaves_inputs_alone"}),
    ("leaves the device", Metric("leaves the device"), {"test_other_devices"}),
]


# Refiners


@plugin
class Refiner:
    """A refiner that changes nothing, and one that is broken in a way of its own."""

    how: str = "good"

    @hookimpl
    def refine_mask(self, weight: Any, mask: Any, scores: Any, target: Any) -> Any:
        rows = target.comparison == "row" and target.pattern is None
        uneven = int(target.counts.max() - target.counts.min()) > 1
        match self.how:
            case "numbers":
                return mask.to(torch.uint8)
            case "grows a whole row" if rows and bool(mask.all()):
                return torch.zeros_like(mask)
            case "other rows" if uneven:
                return mask.flip(0)
            case "one more" if target.comparison == "matrix":
                more = mask.clone()
                more.view(-1)[int((~mask.flatten()).long().argmax())] = True
                return more
            case "across groups" if target.pattern is not None:
                return mask.roll(1, dims=1)
            case "random" if rows:
                return mask[:, torch.randperm(mask.shape[1])]
            case "numpy":
                scores.numpy()[:] = 7
            case "new tensors on the CPU":
                return mask & torch.ones(mask.shape, dtype=torch.bool)
        return mask


REFINERS: list[Broken] = [
    ("numbers", Refiner("numbers"), {"test_is_a_mask"}),
    ("grows a whole row", Refiner("grows a whole row"), {"test_keeps_ratios"}),
    ("other rows", Refiner("other rows"), {"test_keeps_ratios_per_row"}),
    ("one more", Refiner("one more"), {"test_keeps_matrix_ratios"}),
    ("across groups", Refiner("across groups"), {"test_keeps_patterns"}),
    ("random", Refiner("random"), {"test_repeats"}),
    ("numpy", Refiner("numpy"), {"test_leaves_inputs_alone"}),
    ("new tensors on the CPU", Refiner("new tensors on the CPU"), {"test_other_devices"}),
]


# Reconstructions


@plugin
class Values:
    """Every row times a number, and one that is broken in a way of its own."""

    how: str = "good"

    @hookimpl
    def required_statistics(self) -> set[str]:
        return {"gram", "cross_gram"}

    @hookimpl
    def describe(self) -> Any:
        match self.how:
            case "no tokens":
                return ReconstructionTraits(batch_tokens=0)
            case "half a token":
                return ReconstructionTraits(batch_tokens=0.5)  # type: ignore[arg-type]
            case "true tokens":
                return ReconstructionTraits(batch_tokens=True)
            case "two things":
                return ReconstructionTraits(batch_tokens=1 + next(COUNT))
            case "no passes":
                return ReconstructionTraits(passes=None)  # type: ignore[arg-type]
        return ReconstructionTraits()

    @hookimpl
    def reconstruct_linear(self, weight: Any, mask: Any, values: Any, statistics: Any) -> Any:
        cross = statistics["gram"]
        if "cross_gram" in statistics or self.how == "dense inputs":
            cross = statistics["cross_gram"]
        part = (values @ statistics["gram"] * values).sum(1, keepdim=True)  # (out, 1)
        if self.how == "divided by zero":
            part = part.sum()
        wanted = (weight @ cross * values).sum(1, keepdim=True)
        factor = torch.where(part > 0, wanted / part, 1.0)
        match self.how:
            case "a number":
                return float(values.sum())
            case "squeezed":
                return values.squeeze(1)
            case "whole numbers":
                return values.long()
            case "divided by zero":
                factor = wanted / part
            case "untouched values":
                kept = torch.where(mask, 0, weight)
                factor = factor / (kept == values).all()
            case "random":
                return values * factor * (1 + torch.rand(()))
            case "counted":
                return values * factor * (1 + next(COUNT))
            case "numpy":
                statistics["gram"].numpy()[:] = 7
            case "leaves the device":
                return (values * factor).cpu()
        return values * factor


@plugin
class BlockValues:
    """One gradient step of a block, and one that is broken in a way of its own."""

    how: str = "good"

    @hookimpl
    def reconstruct_block(
        self, block: Any, weights: Any, masks: Any, batches: Any, rng: torch.Generator
    ) -> Any:
        values = {n: w.clone().requires_grad_() for n, w in weights.items()}
        index = int(torch.randint(len(batches), (), generator=rng))
        batch = batches[index]
        loss = (batch.run(values) - batch.target).square().mean()
        slopes = torch.autograd.grad(loss, list(values.values()))
        size = torch.stack([slope.norm() for slope in slopes]).norm()
        size = size if self.how == "divided by zero" else size + 1e-6
        new = {n: w - 0.01 * g / size for (n, w), g in zip(values.items(), slopes, strict=True)}
        first = next(iter(new))
        match self.how:
            case "a list":
                return list(new.values())
            case "all linears":
                return {x.name: new.get(x.name, weights[first]) for x in block.linears}
            case "transposed":
                return {n: w.t() for n, w in new.items()}
            case "whole numbers":
                return {n: w.long() for n, w in new.items()}
            case "numbers":
                return dict.fromkeys(new, 0.5)
            case "random":
                return {n: w * (1 + torch.rand(())) for n, w in new.items()}
            case "counted":
                return {n: w * (1 + next(COUNT)) for n, w in new.items()}
            case "numpy":
                weights[first].numpy()[:] = 7
            case "runs more often":
                for other in batches:
                    other.run(values)
            case "numpy target":
                batch.target.numpy()[:] = 7
            case "leaves the device":
                return {n: w.cpu() for n, w in new.items()}
            case "some":
                return {first: new[first]}
        return new


# One answer goes to three checks, which differ in what is given.
VALUES = {"test_values", "test_values_after_updates", "test_values_without_dense_inputs"}
RECONSTRUCTIONS: list[Broken] = [
    *(
        (how, Values(how), {"test_traits"})
        for how in ("no tokens", "half a token", "true tokens", "two things", "no passes")
    ),
    ("dense inputs", Values("dense inputs"), {"test_values_without_dense_inputs"}),
    ("untouched values", Values("untouched values"), {"test_values_after_updates"}),
    *((how, Values(how), VALUES) for how in ("a number", "squeezed", "whole numbers")),
    ("divided by zero", Values("divided by zero"), VALUES),
    ("random", Values("random"), {"test_values_repeat"}),
    ("counted", Values("counted"), {"test_values_repeat"}),
    ("numpy", Values("numpy"), {"test_values_leave_inputs_alone"}),
    *(
        (f"block {how}", BlockValues(how), {"test_block_values"})
        for how in ("a list", "all linears", "transposed", "whole numbers", "numbers")
    ),
    ("block divided by zero", BlockValues("divided by zero"), {"test_block_values"}),
    ("block runs more often", BlockValues("runs more often"), {"test_block_runs"}),
    ("block random", BlockValues("random"), {"test_block_values_repeat"}),
    ("block counted", BlockValues("counted"), {"test_block_values_repeat"}),
    ("block numpy", BlockValues("numpy"), {"test_block_values_leave_inputs_alone"}),
    ("block target", BlockValues("numpy target"), {"test_block_values_leave_inputs_alone"}),
    ("leaves the device", Values("leaves the device"), {"test_values_on_other_devices"}),
    (
        "block leaves the device",
        BlockValues("leaves the device"),
        {"test_block_values_on_other_devices"},
    ),
]


# Strategies


@plugin
class Search:
    """A good grid of block ratios, and one that is broken in a way of its own."""

    how: str = "good"

    @hookimpl
    def measure_block(self, block: Any, weights: Any) -> Any:
        size = weights[block.linears[0].name].abs().mean()
        match self.how:
            case "measures numbers":
                return {"size": float(size)}
            case "measures at random":
                return {"size": size * torch.rand(())}
            case "measures and writes":
                weights[block.linears[0].name].numpy()[:] = 7
            case "measures with the CPU's":
                size = size + torch.ones(1)
        return {"size": size, "spare": torch.zeros(2)}

    @hookimpl
    def propose_block_ratios(
        self, layout: Any, sparsity: float, measurements: Any, rng: Any
    ) -> Iterator[Generation]:
        names, last = list(layout.linears), len(layout.blocks) - 1
        room = 0.2 if self.how == "not clipped" else min(sparsity, 1 - sparsity) / 2

        def proposal(lam: float) -> Proposal:
            shift = {b: lam * room * (2 * b / last - 1) if last else 0.0 for b in range(last + 1)}
            ratios = {n: sparsity + shift[x.block] for n, x in layout.linears.items()}
            return Proposal(ratios, {"lam": lam})

        first = proposal(0.5)
        match self.how:
            case "forgets one":
                first = Proposal(dict.fromkeys(names[1:], sparsity), {"lam": 0.5})
            case "adds one":
                first = Proposal({**first.ratios, "lm_head": 0.0}, {"lam": 0.5})
            case "a string":
                first = Proposal({**first.ratios, names[0]: "0.5"}, {"lam": 0.5})
            case "ratios per column":
                size = layout.linears[names[0]].in_features + 7
                wrong = torch.full((size,), first.ratios[names[0]])
                first = Proposal({**first.ratios, names[0]: wrong}, {"lam": 0.5})
            case "not a number":
                nan = {n: float("nan") for n in names} if sparsity == 0.99 else first.ratios
                first = Proposal(nan, {"lam": 0.5})
            case "over budget":
                first = Proposal({n: min(sparsity + 0.1, 1) for n in names}, {"lam": 0.5})
            case "unflagged probe":
                first = Proposal({**first.ratios, names[0]: 0.0}, {"lam": 0.5})
            case "a tensor":
                first = Proposal(first.ratios, {"lam": torch.tensor(0.5)})
            case "one name for all":
                if last:
                    first = Proposal(proposal(0.7).ratios, {"lam": 1.0})
            case "random":
                first = proposal(float(torch.rand(())))
            case "writes":
                measurements[0]["spare"].numpy()[:] += 7
            case "only probes":
                yield Generation([proposal(0.5)], probe=True)
                return None
        heard = yield Generation([first, proposal(1.0)])
        best = heard[0].misalignment
        while self.how == "endless":
            yield Generation([first])
        while self.how == "until it gets better" and heard[0].misalignment >= best:
            heard = yield Generation([first])
        return None


@plugin
class Rows:
    """A good proposal of row ratios, and one that is broken in a way of its own."""

    how: str = "good"

    @hookimpl
    def required_statistics(self) -> set[str]:
        return {"input_norm"}

    @hookimpl
    def propose_row_ratios(
        self, layout: Any, base: Any, deviation: Any, rng: Any
    ) -> Iterator[Generation]:
        ratios = {}
        for name, x in layout.linears.items():
            rows = torch.linspace(-1, 1, x.out_features) if x.out_features > 1 else torch.zeros(1)
            ratios[name] = base[name] + rows * min(base[name], 1 - base[name]) / 2
            if self.how == "raised":
                ratios[name] = ratios[name].clamp(min=base[name])
            if self.how == "per column":
                ratios[name] = torch.full((x.in_features + 1,), base[name])
            if self.how == "divides":
                x = deviation[name]
                spread = float((x / x.sum()).sum() - 1)  # 0, and NaN where all are zero
                ratios[name] = ratios[name] + spread
            if self.how == "writes":
                deviation[name].numpy()[:] = 7
            if self.how == "expects the CPU":
                ratios[name] = ratios[name] + 0 * deviation[name].numpy().sum()
        ones = {n: Importance(torch.ones(x.out_features)) for n, x in layout.linears.items()}
        weighs = ones if self.how == "weighs rows" else {}
        yield Generation([Proposal(ratios, importance=weighs)])
        return None


@plugin
class Weighs:
    """A good importance of rows, and one that is broken in a way of its own."""

    how: str = "good"

    @hookimpl
    def measure_block(self, block: Any, weights: Any) -> Any:
        norms = {n: w.norm(dim=1) for n, w in weights.items()}
        return {n: float(x[0]) for n, x in norms.items()} if self.how == "numbers" else norms

    @hookimpl
    def describe(self) -> RowRatiosTraits:
        return RowRatiosTraits(weighs_rows=True)

    @hookimpl
    def propose_row_ratios(
        self, layout: Any, base: Any, measurements: Any, weighs_inputs: bool
    ) -> Any:
        given = {n: x for found in measurements for n, x in found.items()}
        norms = {n: torch.as_tensor(x, dtype=torch.float64) for n, x in given.items()}
        if self.how == "numbers":
            norms = {n: torch.ones(x.out_features) for n, x in layout.linears.items()}

        def proposal(power: float) -> Proposal:
            importance = {n: (1 + x) ** power for n, x in norms.items()}
            match self.how:
                case "raw norms":  # zero in dead blocks
                    importance = dict(norms)
                case "far apart":
                    importance = {n: x ** (40 * power) for n, x in norms.items() if x.all()}
                case "one for all":
                    importance = {n: x[:1].repeat(len(x) + 1) for n, x in importance.items()}
                case "a list":
                    importance = {n: x.tolist() for n, x in importance.items()}
                case "whole numbers":
                    importance = {n: x.ceil().long() for n, x in importance.items()}
                case "of the head":
                    importance["lm_head"] = torch.ones(4)
            told = 0.0 if self.how == "one name" else power
            ratios = dict(base)
            if self.how == "other ratios":  # by which as much goes
                ratios = dict.fromkeys(base, sum(base.values()) / len(base))
            weighed = {n: Importance(x, inputs(n, power)) for n, x in importance.items()}
            return Proposal(ratios, {"power": told}, importance=weighed)

        def inputs(name: str, power: float) -> torch.Tensor | None:
            if name not in layout.linears or not (weighs_inputs or self.how == "inputs always"):
                return None
            rising = torch.arange(1.0, layout.linears[name].in_features + 1) ** power
            return rising[1:] if self.how == "inputs too few" else rising

        yield Generation([proposal(power) for power in (0.0, 0.5, 1.0)])


BLOCK_RATIOS: list[Broken] = [
    ("forgets one", Search("forgets one"), {"test_proposals_cover_every_linear"}),
    ("adds one", Search("adds one"), {"test_proposals_cover_every_linear"}),
    ("not clipped", Search("not clipped"), {"test_ratios_are_ratios"}),
    ("not a number", Search("not a number"), {"test_ratios_are_ratios"}),
    ("ratios per column", Search("ratios per column"), {"test_ratios_are_ratios"}),
    ("over budget", Search("over budget"), {"test_proposals_keep_the_budget"}),
    ("unflagged probe", Search("unflagged probe"), {"test_proposals_keep_the_budget"}),
    ("a tensor", Search("a tensor"), {"test_parameters_identify"}),
    ("one name for all", Search("one name for all"), {"test_parameters_identify"}),
    ("only probes", Search("only probes"), {"test_something_can_win"}),
    ("endless", Search("endless"), {"test_search_ends"}),
    ("until it gets better", Search("until it gets better"), {"test_search_ends"}),
    ("random", Search("random"), {"test_search_repeats"}),
    ("writes", Search("writes"), {"test_search_leaves_inputs_alone"}),
    ("measures numbers", Search("measures numbers"), {"test_block_measurements"}),
    ("measures at random", Search("measures at random"), {"test_block_measurements"}),
    (
        "measures and writes",
        Search("measures and writes"),
        {"test_block_measurements_leave_inputs_alone"},
    ),
    (
        "measures with the CPU's",
        Search("measures with the CPU's"),
        {"test_block_measurements_on_other_devices"},
    ),
]
ROW_RATIOS: list[Broken] = [
    ("raised", Rows("raised"), {"test_proposals_keep_the_budget"}),
    ("per column", Rows("per column"), {"test_ratios_are_ratios"}),
    ("divides", Rows("divides"), {"test_ratios_are_ratios"}),
    ("writes", Rows("writes"), {"test_search_leaves_inputs_alone"}),
    ("expects the CPU", Rows("expects the CPU"), {"test_deviation_on_other_devices"}),
    ("weighs rows", Rows("weighs rows"), {"test_importance"}),
    ("raw norms", Weighs("raw norms"), {"test_importance"}),
    ("far apart", Weighs("far apart"), {"test_importance"}),
    ("one for all", Weighs("one for all"), {"test_importance"}),
    ("a list", Weighs("a list"), {"test_importance"}),
    ("whole numbers", Weighs("whole numbers"), {"test_importance"}),
    ("of the head", Weighs("of the head"), {"test_importance"}),
    ("other ratios", Weighs("other ratios"), {"test_importance"}),
    ("inputs always", Weighs("inputs always"), {"test_importance"}),
    ("inputs too few", Weighs("inputs too few"), {"test_importance"}),
    ("one name", Weighs("one name"), {"test_parameters_identify"}),
    ("numbers", Weighs("numbers"), {"test_block_measurements"}),
]
# Exporters


@plugin
class Exports:
    """The bits of the masks, and one that is broken in a way of its own."""

    how: str = "good"

    @hookimpl
    def describe(self) -> Any:
        match self.how:
            case "perhaps":
                return ExporterTraits(reads_dense=None)  # type: ignore[arg-type]
            case "two things":
                return ExporterTraits(reads_dense=next(COUNT) % 2 == 0)
        return ExporterTraits()

    @hookimpl
    def export_run(self, run: Any, folder: Any, rng: torch.Generator) -> Any:
        bits = b"".join((x.weight == 0).numpy().tobytes() for x in run.linears())
        drawn = torch.rand((), generator=None if self.how == "random" else rng)
        if self.how != "no file":
            (folder / "masks.bin").write_bytes(bits + drawn.numpy().tobytes())
        match self.how:
            case "beside":
                (run.folder / "masks.bin").write_bytes(bits)
            case "a list":
                return [len(bits)]
            case "a tensor":
                return {"bits": torch.tensor(len(bits))}
        return {"bits": len(bits)}


EXPORTERS = [
    ("perhaps", Exports("perhaps"), {"test_traits"}),
    ("two things", Exports("two things"), {"test_traits"}),
    ("no file", Exports("no file"), {"test_export"}),
    ("a list", Exports("a list"), {"test_export"}),
    ("a tensor", Exports("a tensor"), {"test_export"}),
    ("random", Exports("random"), {"test_export_repeats"}),
    ("beside", Exports("beside"), {"test_export_leaves_the_run_alone"}),
]
BROKEN = {
    "pruner": PRUNERS,
    "alignment": METRICS,
    "refiner": REFINERS,
    "reconstruction": RECONSTRUCTIONS,
    "exporter": EXPORTERS,
    "block_ratios": BLOCK_RATIOS,
    "row_ratios": ROW_RATIOS,
}
GOOD = [
    ("pruner", Scores()),
    ("pruner", Describes()),
    ("pruner", Describes(what="a product")),
    ("pruner", Prunes()),
    ("pruner", PrunesTogether()),
    ("alignment", Metric()),
    ("alignment", OutputMetric()),
    ("refiner", Refiner()),
    ("reconstruction", Values()),
    ("reconstruction", BlockValues()),
    ("reconstruction", BlockValues("some")),
    ("exporter", Exports()),
    ("block_ratios", Search()),
    ("row_ratios", Rows()),
    ("row_ratios", Weighs()),
]


@pytest.mark.parametrize(("role", "instance"), GOOD, ids=[type(x).__name__ for _, x in GOOD])
def test_good_plugin_passes(role: str, instance: Any) -> None:
    assert found(role, instance) == {}


@pytest.mark.parametrize(
    ("role", "instance", "laws"),
    [(role, x, laws) for role, broken in BROKEN.items() for _, x, laws in broken],
    ids=[f"{role}-{name}" for role, broken in BROKEN.items() for name, _, _ in broken],
)
def test_broken_plugin_breaks_one_law(role: str, instance: Any, laws: set[str]) -> None:
    # What writes through NumPy, say, does not get so far on another device.
    others = {name for name in dir(CLASSES[role]) if "other_devices" in name}
    assert set(found(role, instance)) - (others - laws) == laws


@pytest.mark.parametrize("role", CLASSES)
def test_every_law_is_broken_by_some_plugin(role: str) -> None:
    laws = {name for name in dir(CLASSES[role]) if name.startswith("test_")}
    strategies = [*BLOCK_RATIOS, *ROW_RATIOS] if role == "row_ratios" else []
    broken = set().union(*(x[2] for x in (*BROKEN[role], *strategies)))
    everywhere = {"test_contract", "test_options_round_trip", "test_required_statistics"}
    assert laws - broken <= everywhere


@pytest.mark.parametrize(
    ("role", "instance", "law", "said"),
    [
        ("pruner", Scores("transposed"), "test_scores", "scores have shape"),
        ("pruner", Prunes("a tuple"), "test_pruned_weights", "returned tuple, not PrunedLinear"),
        ("pruner", Prunes("infinite"), "test_pruned_weights", "NaN or infinite"),
        ("pruner", Prunes("numpy target"), "test_pruning_leaves_inputs_alone", "changes its"),
        ("alignment", Metric("a number"), "test_is_a_number", "returned float, not a tensor"),
        ("alignment", Metric("whole numbers"), "test_is_a_number", "not floating"),
        ("reconstruction", Values("a number"), "test_values", "returned float, not a tensor"),
        ("reconstruction", Values("divided by zero"), "test_values", "NaN or infinite"),
        ("reconstruction", BlockValues("a list"), "test_block_values", "list, not a mapping"),
        (
            *("reconstruction", BlockValues("all linears"), "test_block_values"),
            "returned values of 'blocks.0.o', which is not pruned",
        ),
        ("exporter", Exports("a tensor"), "test_export", "returned what is no JSON"),
        ("block_ratios", Search("a string"), "test_ratios_are_ratios", "is str, neither"),
        ("row_ratios", Weighs("raw norms"), "test_importance", "not positive and finite"),
        ("row_ratios", Weighs("a list"), "test_importance", "is list, not a tensor"),
        ("row_ratios", Weighs("far apart"), "test_importance", "apart than a factor of 1e+12"),
        ("row_ratios", Weighs("inputs always"), "test_importance", "weighs_inputs is False"),
        ("row_ratios", Weighs("of the head"), "test_importance", "what is not a linear"),
        ("row_ratios", Weighs("other ratios"), "test_importance", "other ratios than it was given"),
    ],
    ids=lambda x: getattr(x, "how", None),
)
def test_what_is_said(role: str, instance: Any, law: str, said: str) -> None:
    assert said in found(role, instance)[law]


@dataclass(frozen=True)
class ByValue(Scores):
    """Compares by value."""


@plugin
class Unknown(Scores):
    """Asks for a statistic that nobody collects."""

    @hookimpl
    def required_statistics(self) -> set[str]:
        return {"input_nrom"}


def test_broken_contract_fails_every_check() -> None:
    checks = CLASSES["pruner"]()
    with pytest.raises(Exception, match="compares by value"):
        checks.test_contract(ByValue())


def test_unknown_statistic() -> None:
    said = found("pruner", Unknown())["test_required_statistics"]
    assert "did you mean 'input_norm'" in said


def test_classes_are_public() -> None:
    for kind in CLASSES.values():
        assert getattr(testing, kind.__name__) is kind
