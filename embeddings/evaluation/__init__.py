"""From models and tasks to a table of scores with intervals."""
