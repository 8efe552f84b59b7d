"""From a model to text: the next token again and again, and conversations."""
