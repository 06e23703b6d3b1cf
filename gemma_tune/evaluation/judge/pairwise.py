"""Lets a judge compare two models' answers, each pair in both orders."""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

from gemma_tune.evaluation.case import EvalCase
from gemma_tune.evaluation.judge.ask import JudgeQuestion, JudgeReply, ask_judge
from gemma_tune.evaluation.judge.judge import Judge
from gemma_tune.evaluation.judge.prompts import complaint_about_verdict, pair_prompt
from gemma_tune.evaluation.judge.verdicts import read_verdict
from gemma_tune.evaluation.resampling import Interval, mean_interval

_SCORES = {"win": 1.0, "tie": 0.5, "loss": 0.0}
_PLURALS = {"win": "wins", "tie": "ties", "loss": "losses"}
# Whose answer the verdict picks, in the order (answer, other answer) and in the order (other answer, answer).
_PICKS: tuple[dict[object, str], ...] = (
    {"A": "win", "B": "loss", "tie": "tie"},
    {"A": "loss", "B": "win", "tie": "tie"},
)


class PairVerdict(NamedTuple):
    """Verdict on a model's answer beside another model's.

    Attributes:
        outcome: `win`, `tie` or `loss` of the answer; `unreadable` or `unanswered` if a verdict is missing.
        verdicts: `A`, `B` or `tie` with the answer first, then with the other one first; '' for a missing verdict.
            Empty for equal answers, which are a tie that isn't asked.
        reasons: The judge's reasons, in the same order.
    """

    outcome: str
    verdicts: tuple[str, ...]
    reasons: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class PairwiseResult:
    """Verdicts on all answers of a model beside another model's.

    Attributes:
        verdicts: Verdict on each row.
    """

    verdicts: Sequence[PairVerdict]

    def count(self, outcome: str) -> int:
        """Returns the number of rows with an outcome."""
        return sum(verdict.outcome == outcome for verdict in self.verdicts)

    @property
    def win_rate(self) -> float:
        """Returns the share of wins, ties counting half, of all rows with an outcome; NaN without one."""
        scores = self._scores()
        return sum(scores) / len(scores) if scores else float("nan")

    @property
    def interval(self) -> Interval:
        """Returns the confidence interval of the win rate."""
        return mean_interval(self._scores())

    @property
    def p_value(self) -> float:
        """Returns the p-value of the sign test on wins and losses; NaN without either."""
        from scipy import stats

        wins, losses = self.count("win"), self.count("loss")
        return float(stats.binomtest(wins, wins + losses).pvalue) if wins + losses else float("nan")

    @property
    def agreement(self) -> float:
        """Returns the share of rows judged in both orders whose verdicts agree; NaN without such rows.

        A judge that tosses a coin between A and B agrees with itself in half of them.
        """
        judged = [verdict.verdicts for verdict in self.verdicts if verdict.verdicts and all(verdict.verdicts)]
        agreeing = [_PICKS[0][first] == _PICKS[1][second] for first, second in judged]
        return sum(agreeing) / len(agreeing) if agreeing else float("nan")

    @property
    def first_position_share(self) -> float:
        """Returns how often the answer that stood first was preferred, of all verdicts for one; NaN without any.

        It is 0.5 for a judge who doesn't care about the order, as each pair is judged in both.
        """
        judged = [verdict.verdicts for verdict in self.verdicts if verdict.verdicts and all(verdict.verdicts)]
        decided = [each for pair in judged for each in pair if each != "tie"]
        return decided.count("A") / len(decided) if decided else float("nan")

    def to_dict(self) -> dict[str, Any]:
        """Returns plain values for reports; what is not a number is None."""
        figures = {
            "win_rate": self.win_rate,
            "low": self.interval.low,
            "high": self.interval.high,
            "p_value": self.p_value,
            "agreement": self.agreement,
            "first_position_share": self.first_position_share,
        }
        outcomes = (*_SCORES, "unreadable", "unanswered")
        return {
            **{f"num_{_PLURALS.get(outcome, outcome)}": self.count(outcome) for outcome in outcomes},
            **{name: value if value == value else None for name, value in figures.items()},
            "rows": [verdict._asdict() for verdict in self.verdicts],
        }

    def _scores(self) -> list[float]:
        return [_SCORES[verdict.outcome] for verdict in self.verdicts if verdict.outcome in _SCORES]


def judge_pairs(
    judge: Judge, cases: Sequence[EvalCase], answers: Sequence[str], other_answers: Sequence[str]
) -> PairwiseResult:
    """Lets a judge compare each answer with another model's, in both orders. An outcome counts only if both agree.

    Args:
        judge: The judge.
        cases: Questions.
        answers: Answers of the model whose wins are counted.
        other_answers: Answers of the model that it is compared with.

    Raises:
        ConfigError: The package openai isn't installed.
    """
    rows = list(zip(cases, answers, other_answers, strict=True))
    asked = [
        JudgeQuestion(pair_prompt(judge.rubric, case, *pair), read_verdict, complaint_about_verdict())
        for case, answer, other in rows
        if answer.strip() != other.strip()
        for pair in ((answer, other), (other, answer))
    ]
    replies = iter(ask_judge(judge, asked, "judged pairs of answers, in both orders"))
    return PairwiseResult(
        [
            PairVerdict("tie", (), ()) if answer.strip() == other.strip() else _verdict(next(replies), next(replies))
            for _, answer, other in rows
        ]
    )


def _verdict(first: JudgeReply, second: JudgeReply) -> PairVerdict:
    """Returns the verdict on a row from the replies in both orders."""
    replies = (first, second)
    values = tuple(str(reply.verdict.value) if reply.verdict else "" for reply in replies)
    reasons = tuple(reply.verdict.reason if reply.verdict else reply.problem for reply in replies)
    if not all(values):
        was_answered = all(reply.was_answered for reply in replies)
        return PairVerdict("unreadable" if was_answered else "unanswered", values, reasons)
    outcomes = {pick[value] for pick, value in zip(_PICKS, values, strict=True)}
    return PairVerdict(outcomes.pop() if len(outcomes) == 1 else "tie", values, reasons)
