"""How sure: label-conditional sets, the check that a file is of a labelled recipe and size, and what is said of it."""

from collections import defaultdict
from fractions import Fraction

import pytest
import torch
from conftest import spectra_of
from torch import Tensor

import dsire

SIZES = (1, 4, 16)


def made_up(count: int, seed: int = 0, factor: float = 1.0, recipe: str = "", voters: int = 6) -> dsire.Spectra:
    """Norms that shrink with the size, times a factor of the recipe, under a noise of the model's own."""
    draw = torch.Generator().manual_seed(seed)
    sizes = torch.tensor(SIZES * count)
    names = [number for number in range(count) for _ in SIZES]
    noise = 0.1 * torch.randn(voters, len(sizes), 1, generator=draw, dtype=torch.float64)
    spectrum = torch.tensor([2.0, 1.0], dtype=torch.float64)
    values = factor * spectrum * sizes.double()[:, None] ** -0.3 * noise.exp()
    return dsire.replace(spectra_of(values, sizes.tolist(), names), recipes=[recipe] * len(names) if recipe else [])


def together(*parts: dsire.Spectra) -> dsire.Spectra:
    return dsire.join(list(parts), [f"part {number}" for number in range(len(parts))])


def files_of(spectra: dsire.Spectra) -> list[dsire.Spectra]:
    """Each model as a file that states no size."""
    models = [spectra.of_models(torch.tensor([row])) for row in range(len(spectra.names))]
    return [dsire.replace(its, sizes=torch.zeros_like(its.sizes), recipes=[]) for its in models]


def p_of(fitted: dsire.Spectra, new: dsire.Spectra) -> torch.Tensor:
    return dsire.check_recipe(fitted, new)[0]


def holds(one: dsire.Estimate, size: int, predictor: str) -> bool:
    ends = one.confidence_set
    return bool(ends) and ends[0] <= size <= ends[-1] if predictor == "log-regression" else size in ends


# Sets
def vote_shares(train: dsire.Spectra, values: Tensor) -> dict[int, Fraction]:
    """Size -> share of the voters whose nearest training model has it; values [voters, r] of one model."""
    far = torch.linalg.vector_norm(train.values - values[:, None], dim=-1)
    votes = train.sizes[far.argmin(1)].tolist()
    return {size: Fraction(votes.count(size), len(votes)) for size in SIZES}


def p_by_the_book(fitted: dsire.Spectra, values: Tensor) -> dict[int, Fraction]:
    """Size -> p: the share of micro-datasets that are no less strange; one counts with the share of its models."""
    new, strange = vote_shares(fitted, values), {size: defaultdict(list) for size in SIZES}
    for model, (name, size) in enumerate(zip(fitted.names, fitted.sizes.tolist(), strict=True)):
        rest = fitted.of_models(torch.tensor([its != name for its in fitted.names]))
        strange[size][name].append(vote_shares(rest, fitted.values[:, model])[size] <= new[size])
    shares = {size: [Fraction(sum(its), len(its)) for its in units.values()] for size, units in strange.items()}
    return {size: (1 + sum(its)) / Fraction(len(its) + 1) for size, its in shares.items()}


# one size in one micro-dataset, while which is left out nobody votes for it; another micro-dataset has each size twice
WHOLE = made_up(5)
UNEVEN = WHOLE.of_models((WHOLE.sizes < SIZES[-1]) | (WHOLE.micro_datasets == 2))
UNEVEN = dsire.replace(UNEVEN, names=[max(name, 1) for name in UNEVEN.names])
FITTED = [*map(made_up, (2, 3, 6, 9)), UNEVEN]


@pytest.mark.parametrize("fitted", FITTED, ids=lambda its: f"{its.count} of {len(its.names)}")
def test_a_set_is_that_of_its_formula_in_exact_fractions(fitted: dsire.Spectra) -> None:
    new = made_up(2, seed=1)
    expected = [p_by_the_book(fitted, values) for values in new.values.unbind(1)]
    for confidence in ("0.4", "0.5", "0.75", "0.8", "0.9"):
        found = dsire.estimates(fitted, files_of(new), "dsire", float(confidence))
        sets = [[size for size, its_p in p.items() if its_p > 1 - Fraction(confidence)] for p in expected]
        assert [one.confidence_set for one in found] == sets


def test_a_size_that_is_not_labelled_is_compared_with_the_nearest_one_that_is() -> None:
    """Of 1 and 16, 3 is nearer to 1 and 5 to 16 (in log). Left-out models of 1 were told 8, those of 16 16."""
    sizes, labelled = torch.tensor([1, 16, 1, 16]), torch.tensor([1, 16])
    fitted = spectra_of(torch.ones(1, 4, 1), sizes.tolist(), [0, 0, 1, 1])
    left_out = dsire.Prediction(sizes, labelled, torch.zeros(4, 2), torch.tensor([8.0, 16, 8, 16], dtype=torch.float64))
    new = dsire.Prediction(sizes[:1], labelled, torch.zeros(1, 2), torch.tensor([4.0], dtype=torch.float64))
    assert dsire.conformal_p(fitted, left_out, new, torch.tensor([3, 5])).tolist() == [[1, pytest.approx(1 / 3)]]


@pytest.mark.parametrize("predictor", ["dsire", "log-ridge", "log-regression"])
def test_every_size_is_covered(predictor: str) -> None:
    """A draw deviates by 6.5 % (a beta distribution of 19 and 2), the ten models asked by 9.5 %: ten draws by 3.6 %."""
    held: dict[int, list[bool]] = {size: [] for size in SIZES}
    for turn in range(10):
        fitted, new = made_up(20, seed=100 + turn), made_up(10, seed=200 + turn)
        found = dsire.estimates(fitted, files_of(new), predictor, 0.9)
        for one, size in zip(found, new.sizes.tolist(), strict=True):
            held[size].append(holds(one, size, predictor))
            assert 0 <= one.right <= one.told <= 60
    for its in held.values():
        assert sum(its) / 100 >= 0.9 - 3 * 0.036


@pytest.mark.parametrize("predictor", ["dsire", "dsire-average", "log-ridge", "log-regression"])
def test_told_and_right_are_counted_over_fits_without_each_micro_dataset(predictor: str) -> None:
    """By asking the predictor itself, for each micro-dataset; what a regression says is moved to a labelled size."""

    def nearest(said: int) -> int:
        return min(SIZES, key=lambda n: abs(n / said - said / n))

    fitted = made_up(8)
    folds = [dsire.split_by(fitted.micro_datasets != number) for number in range(8)]
    told = torch.zeros_like(fitted.sizes)
    for fold, its in zip(folds, dsire.PREDICTORS[predictor](fitted, folds), strict=True):
        told[fold.test] = torch.tensor([nearest(said) for said in its.sizes.tolist()])
    for one in dsire.estimates(fitted, files_of(made_up(2, seed=3)), predictor, 0.9):
        answer = nearest(one.answer)
        assert one.told == int((told == answer).sum())
        assert one.right == int(((told == answer) & (fitted.sizes == answer)).sum())


def test_sets_and_check_on_left_out_shipped_models(shipped: dsire.Spectra) -> None:
    """Sets cover 90 %, less two standard errors over micro-datasets, and are no trivial ones; few aren't comparable."""
    held, members, flagged = [], [], []
    for number in range(0, shipped.count, 2):
        asked = shipped.micro_datasets == number
        found = dsire.estimates(shipped.of_models(~asked), files_of(shipped.of_models(asked)), "dsire", 0.9)
        sizes = shipped.sizes[asked].tolist()
        held.append([float(size in one.confidence_set) for size, one in zip(sizes, found, strict=True)])
        members += [float(len(one.confidence_set)) for one in found]
        flagged += [float(bool(one.first)) for one in found]
    shares = torch.tensor(held)
    assert shares.numel() == 120
    assert shares.mean() >= max(0.88, 0.9 - 2 * float(shares.mean(1).std()) / len(held) ** 0.5)
    assert sum(members) / 120 < 4
    assert sum(flagged) / 120 <= 0.06


def test_few_micro_datasets_are_said() -> None:
    said = {count: dsire.what_can_be_supported(made_up(count), 0.9) for count in (1, 2, 3, 4, 9)}
    sets, check = said[4]
    assert all(part in sets for part in ("4 micro-datasets", "80%", "9 or more"))
    assert "19 models or more" in check
    assert said[9] == []
    assert "one micro-dataset only" in said[1][0]
    assert not any("by 0" in text for number in (1, 2, 3) for text in said[number])


@pytest.mark.parametrize("predictor", ["log-ridge", "log-regression"])
def test_where_nothing_is_known_no_set_leaves_a_size_out_by_rounding(predictor: str) -> None:
    """All spectra are equal, so that all models are answered alike, left out or new."""
    fitted, new = made_up(12, seed=1), made_up(1, seed=2)
    for spectra in (fitted, new):
        spectra.values[:] = torch.tensor([2.0, 1.0], dtype=torch.float64)
    one = dsire.estimates(fitted, files_of(new), predictor, 0.9)[0]
    assert all(holds(one, size, predictor) for size in SIZES)
    assert one.recipe_p == 1


# The check
def test_p_is_not_too_small_for_one_more_of_the_labelled() -> None:
    """200 new models: p is at or below a bound no more often than the bound says (three standard errors)."""
    new = torch.cat([p_of(made_up(12, seed=2 * turn), made_up(4, seed=2 * turn + 1)) for turn in range(16)])
    for bound in (0.05, 0.1, 0.25, 0.5):
        share, error = float((new <= bound).double().mean()), (bound * (1 - bound) / len(new)) ** 0.5
        assert bound / 4 <= share <= bound + 3 * error


@pytest.mark.parametrize("factor", [2, 1 / 2, 1e30, 1e-30, 0])
@pytest.mark.parametrize("matrix", ["A", "B", "BA"])
def test_one_kind_of_matrix_alone_is_seen_and_named(matrix: str, factor: float) -> None:
    fitted, new = made_up(12), made_up(1, seed=5)
    rows = torch.tensor([voter.matrix == matrix for voter in new.voters])
    wrong = dsire.replace(new, values=torch.where(rows[:, None, None], factor, 1) * new.values)
    for one in dsire.estimates(fitted, files_of(wrong), "log-ridge", 0.9):
        assert one.status == "not comparable"
        assert one.recipe_p <= 0.05
        assert "not comparable" in one.first[0]
        if not 0.1 < factor < 10:
            how = "is larger than" if factor > 1 else "is smaller than" if factor else "is zero in 2 of 2 layers"
            assert f"{matrix} {how}" in one.first[1]
            assert ("another alpha" in one.first[1]) == (matrix == "BA")


def test_layers_of_zeros_are_counted_and_one_layer_alone_is_named() -> None:
    there = "is zero in all labelled models, and not here, in 3 "
    for zero_there, zero_here, said in ((0, 4, "is zero in 4 of 10 layers"), (3, 0, there), (3, 3, "")):
        fitted, new = made_up(12, voters=30), made_up(1, seed=5, voters=30)
        rows = range(1, 30, 3)  # of B
        fitted.values[rows[:zero_there]], new.values[rows[:zero_here]] = 0, 0
        one = dsire.estimates(fitted, files_of(new), "dsire", 0.9)[0]
        assert [said in text for text in one.first if "zero" in text] == [True] * bool(said)
    fitted, new = made_up(12, voters=30), made_up(1, seed=5, voters=30)
    new.values[4] *= 1e30
    for one in dsire.estimates(fitted, files_of(new), "dsire", 0.9):
        assert one.first[1].startswith("B is larger than any labelled model's")
        assert one.first[1].endswith(", in layer_1")


def test_the_nearest_recipe_and_size_are_told() -> None:
    """Recipes a and b differ by a factor of 3; a file of b's is b's, and as known as one of a's."""
    both = together(made_up(8, 0, 1.0, "a"), made_up(8, 1, 3.0, "b"))
    for factor, recipe in ((1.0, "a"), (3.0, "b")):
        found = dsire.estimates(both, files_of(made_up(4, 7, factor)), "log-ridge", 0.9)
        assert {one.recipe for one in found} == {recipe}
        assert sum(one.status == "ok" for one in found) > 0.8 * 12
    assert (p_of(both, made_up(4, 7, 30.0)) <= 0.05).all()


def test_this_very_model_is_the_first_note_and_comparable() -> None:
    fitted = made_up(12)
    fitted.values[:, 7] *= 30  # unlike all others
    copy = fitted.of_models(torch.tensor([7]))
    (one,) = dsire.estimates(fitted, [dsire.replace(copy, notes=["another"])], "log-ridge", 0.9)
    assert (one.status, one.first) == ("ok", [])
    assert one.notes[:2] == ["this very model is among the labelled ones: 2 of 4 images", "another"]
    for change in (1 + 1e-3, 1e300):
        values = copy.values.clone()
        values[0] *= change
        (one,) = dsire.estimates(fitted, [dsire.replace(copy, values=values)], "log-ridge", 0.9)
        assert not any("this very model" in note for note in one.notes)


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


@pytest.mark.parametrize("labelled", [[0, 4], [0], [0, 1, 2]])
def test_what_cannot_be_compared_is_not_flagged(labelled: list[int]) -> None:
    """Two models of two sizes, one, or one micro-dataset: nothing is left to compare any of them with."""
    few = made_up(2).of_models(torch.tensor(labelled))
    assert p_of(few, made_up(1, seed=3)).tolist() == [1, 1, 1]
    for one in dsire.estimates(few, files_of(made_up(1, seed=3)), "log-ridge", 0.9):
        assert one.recipe_p is None
        assert bool(one.confidence_set) == (len(labelled) == 2)


@pytest.mark.parametrize("value", [1.0, 0.0])
def test_a_kind_of_matrix_that_never_varies_flags_nothing_by_its_rounding(value: float) -> None:
    """A is frozen, the same in all models but for its last digit; or zero in all."""
    fitted, new = made_up(12, seed=1), made_up(6, seed=2)
    for spectra, factor in ((fitted, 1.0), (new, 1 + 1e-13)):
        spectra.values[[voter.matrix == "A" for voter in spectra.voters]] = factor * value
    assert (p_of(fitted, new) <= dsire.NOT_COMPARABLE).double().mean() <= 0.25  # a few of 18 by chance


# Several recipes
def test_recipes_of_different_micro_datasets_are_compared() -> None:
    """What can't be told is blank and breaks nothing: a run may have no training model of a recipe."""
    one, other = made_up(6, 0, 1.0, "a"), made_up(6, 1, 3.0, "b")
    other = dsire.replace(other, names=[name + 6 for name in other.names])
    tables, _ = dsire.compare(together(one, other), dsire.Protocol(2, 4, 0), {})
    of_recipes = [table for table in tables if table.heads[0] == "recipe"]
    assert len(of_recipes) == 3
    assert all([row[0] for row in table.rows] == ["a", "b", "mean"] for table in of_recipes)
    cells = [cell for table in of_recipes for row in table.rows for cell in row[1:]]
    assert all(isinstance(cell, float) or cell is None for cell in cells)


def test_recipes_and_sizes_of_one_model_each_do_not_make_all_answers_the_same() -> None:
    """Nothing is known of the spread within them: what is far is then judged by the spread of all."""
    parts = [made_up(1, seed=number, factor=1.1**number, recipe=f"recipe {number}") for number in range(8)]
    parts = [dsire.replace(part, names=[number] * len(SIZES)) for number, part in enumerate(parts)]
    new = made_up(4, seed=99, factor=1.1**3)
    answers = dsire.fitted_ridge(together(*parts), new)[0].answers
    of_size = [float(answers[new.sizes == size].log().mean()) for size in SIZES]
    assert of_size[0] + 0.5 < of_size[1] < of_size[2] - 0.5


def test_one_micro_dataset_under_several_recipes_is_fitted_by_recipe() -> None:
    """Nothing can be left out then, but recipes count all the same."""
    parts = [made_up(1, seed=number, factor=2.0**number, recipe=f"recipe {number}") for number in range(6)]
    fitted, new = together(*parts), made_up(1, seed=50, factor=4.0)
    found = dsire.estimates(fitted, files_of(new), "log-ridge", 0.9)
    assert [one.answer for one in found] == dsire.fitted_ridge(fitted, new)[0].sizes.tolist()
    assert all(one.recipe and (one.told, one.confidence_set, one.recipe_p) == (0, [], None) for one in found)
