"""Text in, text out."""

import pytest

import gemma_tune
from gemma_tune.data import Turn
from gemma_tune.errors import ModelError
from gemma_tune.models.sources.tokenizer import tokenizer_of
from gemma_tune.serving.prompt_encoder import prompt_encoder_of

QUESTIONS = ["How do I reset it?", "Where is the menu with all the settings for the camera of my phone, please?", "Hi"]


def test_the_stream_is_the_answer_in_parts(shared_model):
    for question in QUESTIONS:
        parts = list(gemma_tune.stream(shared_model, question, max_new_tokens=20))
        assert "".join(parts) == gemma_tune.generate(shared_model, question, max_new_tokens=20)
        assert len(parts) > 3


def test_a_stream_decodes_no_token_often(shared_model, monkeypatch):
    """However long the answer is, each token costs the same."""
    tokenizer, num_decoded = tokenizer_of(shared_model), []
    decode = tokenizer.decode
    monkeypatch.setattr(tokenizer, "decode", lambda ids: num_decoded.append(len(ids)) or decode(ids))
    assert list(gemma_tune.stream(shared_model, QUESTIONS[0], max_new_tokens=60))
    # Twice for each token: with the few before it, whose text is known, and without. All of them at once would be 60.
    assert len(num_decoded) <= 2 * 61 and max(num_decoded) < 20


def test_a_batch_answers_as_each_question_alone(shared_model):
    together = gemma_tune.generate(shared_model, QUESTIONS * 4, max_new_tokens=8)
    assert together == [gemma_tune.generate(shared_model, question, max_new_tokens=8) for question in QUESTIONS] * 4


@pytest.mark.parametrize("family", ["gemma3", "gemma4"])
def test_the_prompt_is_the_rendered_conversation(tiny, family):
    model = tiny(family)
    tokenizer = tokenizer_of(model)
    turns = [Turn("system", "S"), Turn("user", "Q"), Turn("model", "A"), Turn("user", "R")]
    ids = prompt_encoder_of(model).encode(turns)
    start, end = ("<|turn>", "<turn|>") if family == "gemma4" else ("<start_of_turn>", "<end_of_turn>")
    system = f"{start}system\nS{end}\n{start}user\nQ" if family == "gemma4" else f"{start}user\nS\n\nQ"
    wanted = f"{system}{end}\n{start}model\nA{end}\n{start}user\nR{end}\n{start}model\n"
    assert ids == [tokenizer.bos_id, *tokenizer.encode(wanted)]


def test_a_trained_model_stops_at_the_end_of_its_turn(tiny):
    """A model that has learnt one short answer by heart gives it and stops."""
    import jax.numpy as jnp

    from gemma_tune.data import Example, make_batch, template_for
    from gemma_tune.data.tokenize import tokenize_examples
    from gemma_tune.models.functional import assign, parameters
    from gemma_tune.training.optimizer import make_optimizer, make_schedule
    from gemma_tune.training.state import init_state
    from gemma_tune.training.step.train_step import make_train_step

    model = tiny("gemma3")
    example = Example((Turn("user", "How do I reset it?"), Turn("model", "Go to Settings.")))
    tokens = tokenize_examples([example], template_for("gemma3"), tokenizer_of(model), 32, "error").examples[0]
    batch = make_batch([[tokens]], 1, 32)
    optimizer = make_optimizer(
        "adamw", make_schedule("constant", 1e-2, 0, 60), weight_decay=0.0, b1=0.9, b2=0.99, epsilon=1e-8, clip_norm=1.0
    )
    step, state = make_train_step(model, optimizer, 32, 1), init_state(model, optimizer)
    for _ in range(60):
        state, metrics = step(state, parameters(model).frozen, batch)
    assert float(metrics.loss) < 0.05
    assign(model, {path: jnp.asarray(value) for path, value in state.trainable.items()})
    assert gemma_tune.generate(model, "How do I reset it?", max_new_tokens=30) == "Go to Settings."


def test_a_model_without_a_tokenizer_is_refused(tiny):
    model = tiny()
    model.preprocessor = None
    with pytest.raises(ModelError, match="has no preprocessor, hence no tokenizer"):
        gemma_tune.generate(model, "Q")
