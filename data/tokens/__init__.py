"""Text to token ids and back: byte-level BPE, sentencepiece, the frames of chat models, and
rows of unequal length."""
