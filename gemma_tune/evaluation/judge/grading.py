"""Makes a judge's grades a metric: each answer alone, from 1 to 5, against the reference answer."""

from collections.abc import Sequence

import numpy as np

from gemma_tune.evaluation.case import EvalCase
from gemma_tune.evaluation.judge.ask import JudgeQuestion, ask_judge
from gemma_tune.evaluation.judge.judge import Judge
from gemma_tune.evaluation.judge.prompts import complaint_about_grade, grade_prompt
from gemma_tune.evaluation.judge.verdicts import read_grade
from gemma_tune.evaluation.metrics.metric import Metric, mean_statistics

JUDGE_GRADE = "judge_grade"


def judge_metric(judge: Judge) -> Metric:
    """Returns the metric `judge_grade`: the mean grade. Answers without a readable grade don't count.

    Args:
        judge: The judge. It is asked whenever the metric is computed, but nothing twice if it has a cache.
    """

    def statistics(cases: Sequence[EvalCase], answers: Sequence[str]) -> np.ndarray:
        asked = [
            JudgeQuestion(grade_prompt(judge.rubric, case, answer), read_grade, complaint_about_grade())
            for case, answer in zip(cases, answers, strict=True)
        ]
        replies = ask_judge(judge, asked, "graded answers")
        return mean_statistics([float(reply.verdict.value) if reply.verdict else None for reply in replies])

    return Metric(JUDGE_GRADE, f"mean grade by {judge.model}, from 1 to 5", statistics)
