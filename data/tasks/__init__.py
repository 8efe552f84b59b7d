"""What a model learns and is scored by: one file a task, and what they share."""
