"""A started engine, and its answers to several requests at once."""

from gemma_tune.serving.engine.engine import Engine


def started(model, max_concurrent=4, max_tokens_in_flight=1024, max_length=320, max_queued=64, adapters=None):
    engine = Engine(
        model,
        adapters=adapters,
        max_concurrent=max_concurrent,
        max_tokens_in_flight=max_tokens_in_flight,
        max_length=max_length,
        max_queued=max_queued,
    )
    engine.start()
    return engine


def answers(engine, requests):
    """Submits all requests at once; returns the deltas of each."""
    deltas = [[] for _ in requests]
    handles = [engine.submit(request, each.append) for request, each in zip(requests, deltas, strict=True)]
    for handle in handles:
        assert handle.done.wait(60)
    return deltas


def tokens(deltas):
    return tuple(token for delta in deltas for token in delta.token_ids)


def text(deltas):
    return "".join(delta.text for delta in deltas)
