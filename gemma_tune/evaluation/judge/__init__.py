"""A large language model as the judge of answers: pairwise in both orders, or by a grade. Needs the extra `judge`."""
