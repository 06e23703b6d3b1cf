"""Step 5: validate. Held-out loss, and written answers against wanted ones."""

from gemma_tune.evaluation.answers import AnswerScore, choose_questions, score_answers, word_f1
from gemma_tune.evaluation.heldout import evaluate_batches

__all__ = ["AnswerScore", "choose_questions", "evaluate_batches", "score_answers", "word_f1"]
