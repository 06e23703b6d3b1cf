"""Shardings of a training state on a mesh: optimizer state like its weights, the rest replicated."""

from typing import Any

import jax
import optax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from gemma_tune.models.functional import Params
from gemma_tune.models.sharding.placement import MeshSharding


def optimizer_shardings(optimizer: optax.GradientTransformation, params: Params, sharding: MeshSharding) -> Any:
    """Returns the shardings of the state that `optimizer.init(params)` makes.

    Args:
        optimizer: From `make_optimizer`.
        params: Parameters on the mesh.
        sharding: Mesh sharding of the model.
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
    """Returns the sharding of an array of a weight's shape, or of that shape without one axis.

    Adafactor's (arXiv:1804.04235) sums over rows and columns have the latter.
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
