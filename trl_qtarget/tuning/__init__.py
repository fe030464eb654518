"""Which target suits a model and its data: a search with equal budgets, and a verdict on prompts it never saw."""
