"""What a recommender would earn if it were shown: evaluation and selection of policies from logged feedback."""
