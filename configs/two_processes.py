"""Two processes that train one tiny Gemma 3 together, on one machine: what a pod or a cluster does, to try it out.

    export XLA_FLAGS=--xla_force_host_platform_device_count=4
    gemma-tune train --config=configs/two_processes.py --distributed=127.0.0.1:1234,2,0 &
    gemma-tune train --config=configs/two_processes.py --distributed=127.0.0.1:1234,2,1

The tests start two and four processes with it.
"""

from gemma_tune import Config


def get_config() -> Config:
    return Config().replace(
        {
            "workdir": "runs/two_processes",
            "model.source": "tiny",
            "data.max_length": 64,
            "optimizer.learning_rate": 5e-3,
            "training.mesh": "auto",
            "training.program": "whole",
            "training.batch_size": 8,
            "training.num_train_steps": 10,
            "training.eval_every_steps": 5,
            "training.checkpoint_every_steps": 2,
            "training.num_sample_answers": 1,
            "training.num_scored_answers": 1,
            "generation.max_new_tokens": 2,
        }
    )
