"""A conversation's answers against `generate`'s."""

import pytest

import gemma_tune
from gemma_tune.data import Turn
from gemma_tune.errors import ConfigError
from gemma_tune.serving.conversation import Conversation
from gemma_tune.serving.sampling import GREEDY


@pytest.mark.nightly
def test_each_turn_is_answered_as_generate_does_and_old_turns_are_dropped(shared_model):
    model = shared_model
    turns, wanted = [Turn("system", "Be brief.")], []
    for question in ("How do I reset it?", "And the camera?", "Thanks!"):
        turns.append(Turn("user", question))
        wanted.append(gemma_tune.generate(model, [turns], max_new_tokens=12)[0])
        turns.append(Turn("model", wanted[-1]))
    conversation = Conversation(model, 320, 12, GREEDY)
    for index, answer in enumerate(wanted):
        asked = turns[: 2 + 2 * index]
        assert conversation.trim(asked) == asked
        assert "".join(conversation.answer(asked, seed=0)) == answer
    long = [turns[0], *turns[1:-1] * 20, turns[-2]]
    kept = conversation.trim(long)
    assert kept[0] == turns[0] and kept[1].role == "user" and len(kept) < len(long)
    assert kept[1:] == long[-len(kept) + 1 :]
    assert "".join(conversation.answer(kept, seed=0)) == gemma_tune.generate(model, [kept], max_new_tokens=12)[0]
    with pytest.raises(ConfigError, match="exceed max_length=320"):
        list(conversation.answer(conversation.trim([Turn("user", "long " * 400)]), seed=0))
    conversation.close()


def test_an_answer_longer_than_the_conversation_is_refused(shared_model):
    with pytest.raises(ConfigError, match="must be below 64 in a chat, got 64"):
        Conversation(shared_model, 64, 64, GREEDY)
