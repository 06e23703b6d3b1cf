"""Where a training state lies on a mesh: the optimizer's with the weights it belongs to, the rest on every device."""

from typing import Any

import jax
import optax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from gemma_tune.models.functional import Params
from gemma_tune.models.sharding.placement import MeshSharding


def optimizer_shardings(optimizer: optax.GradientTransformation, params: Params, sharding: MeshSharding) -> Any:
    """Returns the places of what `optimizer.init(params)` makes.

    Args:
        optimizer: From `make_optimizer`.
        params: Arrays on the mesh, as the optimizer sees them.
        sharding: Of the mesh.
    """
    state = jax.eval_shape(optimizer.init, params)
    return optax.tree.map_params(
        optimizer,
        lambda leaf, param: _like(leaf.shape, param.shape, param.sharding),
        state,
        params,
        transform_non_params=lambda leaf: sharding.replicated,
    )


def _like(shape: tuple[int, ...], of_param: tuple[int, ...], sharding: NamedSharding) -> NamedSharding:
    """Returns the place of an array of a weight's shape, or of that without one axis, as Adafactor's (arXiv:1804.04235)
    sums over rows and columns are.
    """
    spec = (*sharding.spec, *(None,) * (len(of_param) - len(sharding.spec)))
    if shape == of_param:
        return sharding
    for axis in range(len(of_param)):
        if shape == (*of_param[:axis], *of_param[axis + 1 :]):
            return NamedSharding(sharding.mesh, P(*spec[:axis], *spec[axis + 1 :]))
    return NamedSharding(sharding.mesh, P())


def shardings_of(tree: Any) -> Any:
    """Returns the sharding of each array of a tree."""
    return jax.tree.map(lambda leaf: leaf.sharding, tree)
