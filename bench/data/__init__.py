"""The evaluation data and how other sets are loaded."""
