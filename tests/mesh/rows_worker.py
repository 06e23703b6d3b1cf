"""One of several processes: makes a batch on the devices of all, and prints the rows that it was asked for.

python rows_worker.py HOST:PORT,NUM_PROCESSES,INDEX
"""

import json
import sys

import numpy as np

from gemma_tune.runtime import processes

processes.initialize_distributed(sys.argv[1])

import jax  # noqa: E402  (the other processes first)

from gemma_tune.models.sharding.placement import make_mesh_sharding  # noqa: E402
from gemma_tune.training.batches import OnMesh  # noqa: E402


class Recorded:
    """Batches whose row r holds r."""

    batch_size = 8

    def __init__(self):
        self.parts = []

    def __len__(self):
        return 1

    def part(self, index, start, stop):
        self.parts.append((start, stop))
        return {"rows": np.arange(start, stop, dtype=np.int32)[:, None].repeat(3, axis=1)}


batches = Recorded()
made = OnMesh(batches, make_mesh_sharding("data:2,fsdp:2,model:2", 8))[0]["rows"]
whole = processes.fetch_to_host(jax.jit(lambda rows: rows + 0)(made))
print(json.dumps({"parts": batches.parts, "whole": whole[:, 0].tolist(), "sum": int(jax.numpy.sum(made))}))
processes.shutdown_distributed(0)
