"""Step 5, validate: held-out metrics, scores of generated answers, and comparisons of models."""

from gemma_tune.evaluation.answers import AnswerScore, choose_questions, score_answers, word_f1
from gemma_tune.evaluation.heldout import evaluate_batches

__all__ = ["AnswerScore", "choose_questions", "evaluate_batches", "score_answers", "word_f1"]
