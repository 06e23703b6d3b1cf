"""Equations of linear layers, parsed."""

import numpy as np
import pytest

from gemma_tune.models.einsum import EinsumAxes, parse_einsum

EQUATIONS = {
    "btd,df->btf": ("d", "f", "bt", (0,), (1,)),
    "btf,fd->btd": ("f", "d", "bt", (0,), (1,)),
    "btd,ndh->btnh": ("d", "nh", "bt", (1,), (0, 2)),
    "bsd,kdh->bskh": ("d", "kh", "bs", (1,), (0, 2)),
    "btnh,nhd->btd": ("nh", "d", "bt", (0, 1), (2,)),
}


@pytest.mark.parametrize(("equation", "expected"), EQUATIONS.items())
def test_axes_of_kerashubs_equations(equation, expected):
    axes = parse_einsum(equation)
    assert (axes.summed, axes.kept, axes.batch, axes.summed_indices, axes.kept_indices) == expected
    assert f"{axes.inputs},{axes.kernel}->{axes.outputs}" == equation
    assert axes.batch + axes.kept == axes.outputs and set(axes.batch + axes.summed) == set(axes.inputs)


@pytest.mark.parametrize("equation", EQUATIONS)
def test_a_product_by_the_named_axes_is_the_einsum(equation):
    axes, rng = parse_einsum(equation), np.random.default_rng(0)
    sizes = dict(zip(sorted(set(axes.inputs + axes.kernel)), range(2, 9), strict=False))
    x, kernel = (rng.integers(-9, 9, [sizes[letter] for letter in letters]) for letters in (axes.inputs, axes.kernel))
    matrix = kernel.transpose(axes.summed_indices + axes.kept_indices)
    flat = x.reshape(*x.shape[:2], -1) @ matrix.reshape(x[0, 0].size, -1)
    np.testing.assert_array_equal(
        flat.reshape(*x.shape[:2], *matrix.shape[len(axes.summed) :]), np.einsum(equation, x, kernel)
    )


def test_spaces_and_an_ellipsis():
    assert parse_einsum("btd, df -> btf") == EinsumAxes("btd", "df", "btf")
    axes = parse_einsum("...d,df->...f")
    assert (axes.inputs, axes.kernel, axes.batch, axes.summed, axes.kept) == ("...d", "df", "...", "d", "f")


@pytest.mark.parametrize("equation", ["", "...", "btd,df", "btd->btd", "btd,df,fg->btg", "btd,df->"])
def test_another_form_is_refused(equation):
    with pytest.raises(ValueError, match="is not an einsum equation of inputs and a kernel"):
        parse_einsum(equation)
