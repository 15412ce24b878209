"""How sure: label-conditional sets, and the check that a file is of a labelled recipe and size."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch

import dsire

SIZES = (1, 4, 16)


def made_up(
    micro_datasets: int, seed: int = 0, factor: float = 1.0, recipe: str = "", voters: int = 6
) -> dsire.Spectra:
    """Norms that shrink with the size, times a factor of the recipe, under a noise of the model's own."""
    draw = torch.Generator().manual_seed(seed)
    sizes = torch.tensor(SIZES * micro_datasets)
    names = [number for number in range(micro_datasets) for _ in SIZES]
    noise = 0.1 * torch.randn(voters, len(sizes), 1, generator=draw, dtype=torch.float64)
    spectrum = torch.tensor([2.0, 1.0], dtype=torch.float64)
    values = factor * spectrum * sizes.double()[:, None] ** -0.3 * noise.exp()
    order = [dsire.Voter(f"layer_{row // 3}", dsire.MATRICES[row % 3]) for row in range(voters)]
    shapes = {voter.layer: [3, 3, 2] for voter in order}
    return dsire.Spectra(values, sizes, names, order, shapes, recipes=[recipe] * len(names) if recipe else [])


def together(*parts: dsire.Spectra) -> dsire.Spectra:
    return dsire.join_shards(list(parts), ["part"] * len(parts))


# ---------------------------------------------------------------------------------------------------------------------
# Sets


def test_the_p_value_of_a_size_in_exact_fractions() -> None:
    """Three units; the new model's shares of size 1 at the turns are 1/2, 1/4 and 3/4, of size 2 1/2, 3/4 and 1/4.

    Size 1: unit 0 has one model (share 1/4: not above 1/2, so it counts), unit 1 two (1/4 and 1/2: half of them count
    against 1/4), unit 2 none; p = (1 + 1 + 1/2) / 3. Size 2: one model each, 3/4 (not), 3/4 (as large: counts), 0
    (counts): p = (1 + 0 + 1 + 1) / 4.
    """
    sizes, units = torch.tensor([1, 1, 1, 2, 2, 2]), torch.tensor([0, 1, 1, 0, 1, 2])
    true = torch.tensor([1 / 4, 1 / 4, 1 / 2, 3 / 4, 3 / 4, 0], dtype=torch.float64)
    turns = torch.tensor([[[1 / 2, 1 / 2]], [[1 / 4, 3 / 4]], [[3 / 4, 1 / 4]]], dtype=torch.float64)
    none = dsire.Prediction(sizes, torch.tensor([1, 2]), torch.zeros(6, 2))
    p = dsire.conformal_p(sizes, units, dsire.LeftOut(none, true, torch.tensor([1, 2]), turns, units))
    assert p.tolist() == [[pytest.approx(float(Fraction(5, 6))), pytest.approx(float(Fraction(3, 4)))]]


def test_a_size_that_is_not_labelled_is_compared_with_the_nearest_one_that_is() -> None:
    """Of 1 and 16, 3 is nearer to 1 and 5 to 16 (in log), whatever conforms."""
    sizes, units = torch.tensor([1, 16, 1, 16]), torch.tensor([0, 0, 1, 1])
    true = torch.tensor([-1.0, 0, -1, 0], dtype=torch.float64)  # those of size 1 conform badly, those of 16 perfectly
    candidates = torch.tensor([3, 5])
    none = dsire.Prediction(sizes, torch.tensor([1, 16]), torch.zeros(4, 2))
    left_out = dsire.LeftOut(none, true, candidates, torch.full((2, 1, 2), -0.5, dtype=torch.float64), units)
    assert dsire.conformal_p(sizes, units, left_out).tolist() == [[1, pytest.approx(1 / 3)]]


@pytest.mark.parametrize("predictor", ["dsire", "log-ridge", "log-regression"])
def test_every_size_is_covered(predictor: str) -> None:
    """Ten times 20 micro-datasets to label and 10 more to ask, all exchangeable.

    With 20 models of a size the share that is held has a standard deviation of 6.5 % (a beta distribution of 19 and 2),
    beside that of ten new ones, 9.5 %: over ten draws 3.6 %.
    """
    held: dict[int, list[bool]] = {size: [] for size in SIZES}
    right = asked = 0
    for turn in range(10):
        fitted, new = made_up(20, seed=100 + turn), made_up(10, seed=200 + turn)
        found = dsire.estimates(fitted, [new.of_models(torch.tensor([row])) for row in range(30)], predictor, 0.9)
        for one, size in zip(found, new.sizes.tolist(), strict=True):
            held[size].append(one.holds(size))
            right, asked = right + one.alike[3], asked + one.alike[2]
    for its in held.values():
        assert sum(its) / 100 >= 0.9 - 3 * 0.036
    if predictor == "log-regression":  # right means within the interval
        assert right / asked == pytest.approx(0.9, abs=0.05)
        assert all(len(one.confidence_set) in (0, 2) for one in found)


def test_few_micro_datasets_are_said() -> None:
    four = made_up(4)
    (note,) = dsire.what_can_be_supported(four.sizes, four.micro_datasets, 0.9, "micro-dataset")
    assert "4 micro-datasets" in note
    assert "80%" in note
    assert "9 or more" in note
    assert dsire.what_can_be_supported(made_up(9).sizes, made_up(9).micro_datasets, 0.9, "micro-dataset") == []


# ---------------------------------------------------------------------------------------------------------------------
# The check


def p_of(fitted: dsire.Spectra, new: dsire.Spectra) -> torch.Tensor:
    return dsire.check_recipe(fitted, new, fitted.micro_datasets).p


def test_p_is_uniform_for_one_more_of_the_labelled() -> None:
    """200 new models: p is at or below a bound about as often as the bound says (three standard errors)."""
    new = torch.cat([p_of(made_up(12, seed=2 * turn), made_up(4, seed=2 * turn + 1)) for turn in range(16)])
    for bound in (0.05, 0.1, 0.25, 0.5):
        share, error = float((new <= bound).double().mean()), (bound * (1 - bound) / len(new)) ** 0.5
        assert share <= bound + 3 * error
        assert share >= bound - 4 * error - 1 / 37


@pytest.mark.parametrize("factor", [2, 1 / 2, 1e30, 1e-30])
@pytest.mark.parametrize("matrix", ["A", "B", "BA"])
def test_one_kind_of_matrix_alone_is_seen_and_named(matrix: str, factor: float) -> None:
    fitted, new = made_up(12), made_up(1, seed=5)
    rows = torch.tensor([voter.matrix == matrix for voter in new.voters])
    wrong = dsire.replace(new, values=torch.where(rows[:, None, None], factor, 1) * new.values)
    files = [wrong.of_models(torch.tensor([row])) for row in range(3)]
    for one in dsire.estimates(fitted, files, "log-ridge", 0.9):
        assert one.recipe_p <= 0.05
        assert "not comparable" in one.first[0]
        if not 0.1 < factor < 10:
            assert f"{matrix} is " in one.first[1]
            assert ("another alpha" in one.first[1]) == (matrix == "BA")


def test_one_layer_alone_is_seen() -> None:
    fitted, new = made_up(12), made_up(1, seed=5)
    values = new.values.clone()
    values[0] *= 1e30
    assert (p_of(fitted, dsire.replace(new, values=values)) <= 0.05).all()


def test_the_nearest_recipe_and_size_are_told() -> None:
    """Recipes a and b differ by a factor of 3; a file of b's is b's, and as known as one of a's."""
    both = together(made_up(8, 0, 1.0, "a"), made_up(8, 1, 3.0, "b"))
    for factor, recipe in ((1.0, "a"), (3.0, "b")):
        new = made_up(4, 7, factor)
        check = dsire.check_recipe(both, new, both.micro_datasets)
        assert [both.recipes[model] for model in check.nearest.tolist()] == [recipe] * 12
        assert float((check.p > 0.05).double().mean()) > 0.8
    assert (p_of(both, made_up(4, 7, 30.0)) <= 0.05).all()


def test_one_concept_under_two_recipes_is_never_on_both_sides() -> None:
    both = together(made_up(6, 0, 1.0, "a"), made_up(6, 1, 3.0, "b"))
    for run in dsire.splits(both.micro_datasets, dsire.Protocol(5, 3, 0)):
        train, test = both.of_models(run.train), both.of_models(run.test)
        assert not set(train.names) & set(test.names)
        assert set(train.recipes) == set(test.recipes) == {"a", "b"}


def test_this_very_model_is_named() -> None:
    fitted = made_up(12)
    copy = fitted.of_models(torch.tensor([7]))
    (one,) = dsire.estimates(fitted, [copy], "log-ridge", 0.9)
    assert any("this very model" in warning and "2 of 4 images" in warning for warning in one.warnings)
    for change in (1 + 1e-3, 1e300):
        values = copy.values.clone()
        values[0] *= change
        (one,) = dsire.estimates(fitted, [dsire.replace(copy, values=values)], "log-ridge", 0.9)
        assert not any("this very model" in warning for warning in one.warnings)


def test_models_alike_are_all_that_are_tied() -> None:
    """Of 240 with the same share, 216 right and the 24 wrong ones first: none is cut."""
    shares, right = torch.ones(240, dtype=torch.float64), torch.arange(240) >= 24
    assert dsire.models_alike(1.0, shares, right) == [1, 1, 240, 216]
    assert dsire.models_alike(1.0, torch.linspace(0.57, 0.84, 24, dtype=torch.float64), right[:24])[2] == 0


@pytest.mark.parametrize(("micro_datasets", "with_last"), [(12, 2), (3, 3), (2, 2)])
def test_few_models_of_a_size_do_not_make_false_alarms(micro_datasets: int, with_last: int) -> None:
    """The largest size is in the first few micro-datasets only. Half of 120 files have it: 5 % and four errors."""
    flagged = []
    for turn in range(10):
        whole = made_up(micro_datasets, seed=10 + turn)
        fitted = whole.of_models((whole.sizes < SIZES[-1]) | (whole.micro_datasets < with_last))
        new = made_up(6, seed=100 + turn)
        flagged.append(p_of(fitted, new.of_models(new.sizes != SIZES[1])) <= 0.05)
    assert float(torch.cat(flagged).double().mean()) <= 0.13


def test_what_cannot_be_compared_is_not_flagged() -> None:
    """Two models of two sizes: nothing is left to compare either of them with."""
    two = made_up(2).of_models(torch.tensor([0, 4]))
    assert p_of(two, made_up(1, seed=3)).tolist() == [1, 1, 1]


def test_recipes_can_be_what_is_left_out() -> None:
    """Nine recipes, each a little larger than the one before; one of their kind, and one 30 times as large."""
    parts = [made_up(2, seed=turn, factor=1.02**turn, recipe=f"recipe {turn}") for turn in range(9)]
    new = made_up(4, seed=50, factor=1.02**4.5)
    files = [new.of_models(torch.tensor([row])) for row in range(12)]
    found = dsire.estimates(together(*parts), files, "log-ridge", 0.9, leave_out_recipes=True)
    assert sum(one.holds(size) for one, size in zip(found, new.sizes.tolist(), strict=True)) >= 9
    assert sum(one.recipe_p > 0.05 for one in found) >= 9
    assert {one.recipe for one in found} == {""}
    far = dsire.replace(new, values=30 * new.values).of_models(torch.tensor([0]))
    assert dsire.estimates(together(*parts), [far], "log-ridge", 0.9, leave_out_recipes=True)[0].first


def test_recipes_of_different_micro_datasets_are_compared() -> None:
    """What can't be told is NaN and breaks nothing: a run may have no training model of a recipe."""
    one, other = made_up(6, 0, 1.0, "a"), made_up(6, 1, 3.0, "b")
    other = dsire.replace(other, names=[name + 6 for name in other.names])
    comparison = dsire.compare(together(one, other), dsire.Protocol(2, 4, 0))
    assert comparison.recipes["pairs"].shape == (2, 2, 4)
    assert dsire.recipe_lines(together(one, other), comparison.recipes)


def test_recipes_and_sizes_of_one_model_each_do_not_make_all_answers_the_same() -> None:
    """Nothing is known of the spread within them: what is far is then judged by the spread of all."""
    parts = [made_up(1, seed=number, factor=1.1**number, recipe=f"recipe {number}") for number in range(8)]
    parts = [dsire.replace(part, names=[number] * len(SIZES)) for number, part in enumerate(parts)]
    new = made_up(4, seed=99, factor=1.1**3)
    fit = dsire.LogRidge.fit(together(*parts), new)
    of_size = [float(fit.answers[new.sizes == size].mean()) for size in SIZES]
    assert of_size[0] + 0.5 < of_size[1] < of_size[2] - 0.5


def test_one_micro_dataset_under_several_recipes_is_fitted_by_recipe() -> None:
    """Nothing can be left out then, but recipes count all the same."""
    parts = [made_up(1, seed=number, factor=2.0**number, recipe=f"recipe {number}") for number in range(6)]
    fitted, new = together(*parts), made_up(1, seed=50, factor=4.0)
    found = dsire.estimates(fitted, [new.of_models(torch.tensor([row])) for row in range(3)], "log-ridge", 0.9)
    answers = dsire.LogRidge.fit(fitted, new).prediction(dsire.LogRidge.fit(fitted, new).answers)
    assert [one.estimate for one in found] == answers.sizes.tolist()
    assert not any("can't be told by 0" in warning for one in found for warning in one.warnings)


def test_a_kind_of_matrix_that_never_varies_flags_nothing_by_its_rounding() -> None:
    """A is frozen, the same in all models but for its last digit."""
    fitted, new = made_up(12, seed=1), made_up(6, seed=2)
    for spectra, factor in ((fitted, 1.0), (new, 1 + 1e-13)):
        spectra.values[[voter.matrix == "A" for voter in spectra.voters]] = factor
    p = dsire.check_recipe(fitted, new, fitted.micro_datasets).p
    assert (p <= dsire.NOT_COMPARABLE).double().mean() <= 0.25  # a few of 18 by chance


@pytest.mark.parametrize("predictor", ["log-ridge", "log-regression"])
def test_where_nothing_is_known_no_set_leaves_a_size_out_by_rounding(predictor: str) -> None:
    """All spectra are equal, so that all models are answered alike, left out or new."""
    fitted, new = made_up(12, seed=1), made_up(1, seed=2)
    for spectra in (fitted, new):
        spectra.values[:] = torch.tensor([2.0, 1.0], dtype=torch.float64)
    (one,) = dsire.estimates(fitted, [new.of_models(torch.tensor([0]))], predictor, 0.9)
    assert all(one.holds(size) for size in SIZES)


def shared() -> tuple[dsire.Spectra, dsire.Spectra]:
    """Three recipes of the same four micro-datasets, and new models."""
    parts = [made_up(4, seed=number, factor=1.5**number, recipe=f"recipe {number}") for number in range(3)]
    return together(*parts), made_up(2, seed=9, factor=1.5**3)


def test_a_recipe_is_left_out_with_what_others_have_of_the_same_images() -> None:
    """Of 36 models in order of recipe, micro-dataset and size, model 4 is the first recipe's of micro-dataset 1."""
    fitted, _ = shared()
    at, out = dsire.turns_of(fitted, fitted.of_recipe)
    expected = {*range(12), *range(12 + 3, 12 + 6), *range(24 + 3, 24 + 6)}
    assert set(out[at[4]].nonzero().flatten().tolist()) == expected
    assert (at == at[4]).nonzero().flatten().tolist() == [3, 4, 5]
    one = dsire.turns_of(fitted, fitted.micro_datasets)  # a micro-dataset of all recipes
    assert torch.equal(one.out, torch.arange(4)[:, None] == fitted.micro_datasets)
    alone = dsire.turns_of(dsire.replace(fitted, names=[0] * 36), fitted.of_recipe)  # else no model would be left
    assert torch.equal(alone.out, torch.arange(3)[:, None] == fitted.of_recipe)


@pytest.mark.parametrize("predictor", ["dsire", "log-ridge"])
def test_what_is_said_with_recipes_left_out_is_what_a_new_fit_says(predictor: str) -> None:
    """For the vote by a fit of its own at each turn; for the ridge by its equations, with the same kernel."""
    fitted, new = shared()
    _, left_out = dsire.leave_out(fitted, new, dsire.PREDICTORS[predictor], fitted.of_recipe)
    at, out = dsire.turns_of(fitted, fitted.of_recipe)
    assert torch.equal(left_out.at, at)
    if predictor == "dsire":
        both = dsire.join_shards([fitted, dsire.replace(new, recipes=["new"] * 6)], ["a", "b"])
        for turn, mask in enumerate(out):
            judged = (at == turn).nonzero().flatten()
            asked = torch.cat([judged, torch.arange(36, 42)])
            (found,) = dsire.dsire(both, [dsire.Split((~mask).nonzero().flatten(), asked)])
            assert torch.equal(left_out.held_out.sizes[judged], found.sizes[: len(judged)])
            assert torch.equal(left_out.turns[turn], found.shares[len(judged) :])
        return
    x, z = dsire.log_features(fitted, new)
    kernel, cross, y = x @ x.T / x.shape[1], z @ x.T / x.shape[1], fitted.sizes.double().log()
    folds = [(mask.nonzero().flatten(), at[mask] == turn) for turn, mask in enumerate(out)]
    _, held_out, turns = dsire.left_out_ridge(kernel, cross, y, folds)

    def refitted(penalty: float) -> tuple[torch.Tensor, torch.Tensor]:
        own, others = torch.zeros_like(y), torch.zeros_like(turns)
        for turn, mask in enumerate(out):
            rest = (~mask).nonzero().flatten()
            border = torch.ones(len(rest), 1, dtype=torch.float64)
            ridge = kernel[rest][:, rest] + penalty * torch.eye(len(rest), dtype=torch.float64)
            system = torch.cat([torch.cat([ridge, border], 1), torch.cat([border.T, torch.zeros(1, 1)], 1)])
            *weights, intercept = torch.linalg.solve(system, torch.cat([y[rest], torch.zeros(1)]))
            known, asked = (side[:, rest] @ torch.stack(weights) + intercept for side in (kernel, cross))
            own[at == turn], others[:, turn] = known[at == turn], asked
        return own, others

    best = min(dsire.PENALTIES, key=lambda penalty: float((refitted(penalty)[0] - y).square().mean()))
    for its, expected in zip((held_out, turns), refitted(best), strict=True):
        torch.testing.assert_close(its, expected, rtol=0, atol=1e-7)
