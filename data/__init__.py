"""Text to token ids and back: the tokenizers, and one file a task."""
