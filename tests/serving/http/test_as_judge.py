"""Our own server as the judge of an evaluation."""

from gemma_tune.data import Turn
from gemma_tune.evaluation.case import EvalCase
from gemma_tune.evaluation.judge.judge import Judge
from gemma_tune.evaluation.judge.pairwise import judge_pairs
from gemma_tune.serving.engine.request import AnswerDelta


def test_verdicts_of_our_own_server(scripted, listen):
    """It takes the request as it is: temperature, seed and length. Its model always prefers the first answer."""
    client = scripted(max_length=8192)
    submit = client.engine.submit

    def submit_and_answer(request, deliver):
        handle = submit(request, deliver)
        deliver(AnswerDelta('{"reason": "It is", "verdict"', (1,)))
        deliver(AnswerDelta(': "A"}', (2,), finish_reason="stop"))
        return handle

    client.engine.submit = submit_and_answer
    cases = [EvalCase((Turn("user", f"question {i}"),), "", {}) for i in range(3)]
    with listen(client.asgi) as url:
        result = judge_pairs(Judge(f"{url}/v1", "m", num_tries=1), cases, list("abc"), list("xyz"))
    assert [row.verdicts for row in result.verdicts] == [("A", "A")] * 3
    assert (result.count("tie"), result.agreement, result.first_position_share) == (3, 0, 1)
    assert result.verdicts[0].reasons == ("It is", "It is")
    assert len(client.engine.asked) == 6
    assert {request.sampling.temperature for request, _, _ in client.engine.asked} == {0}
