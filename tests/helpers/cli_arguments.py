"""Arguments with which a command of the command line takes seconds."""

NUM_STEPS = 6  # Of the run that tests share.
TINY = ["--model=tiny", "--max_length=128", "--batch_size=8"]
FAST = [
    "--config.generation.max_new_tokens=4",
    "--config.training.num_sample_answers=2",
    "--config.training.num_scored_answers=3",
]
