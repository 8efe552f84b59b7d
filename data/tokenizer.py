"""Text to token ids and back, with the tokenizer that lies in a model's folder."""

from pathlib import Path

from quant import InputError


class Tokenizer:
    """What every tokenizer can do: `encode`, `decode`, `bos_id`, `eos_id`, `vocab_size`."""

    def stream(self, ids):
        """Decode ids as they come: yield pieces of text that together are `decode` of all ids."""
        seen, done = [], 0
        for id in ids:
            seen.append(id)
            text = self.decode(seen)
            if not text.endswith("\ufffd"):  # the bytes so far end within a character
                yield text[done:]
                done = len(text)
        yield self.decode(seen)[done:]


class SentencePiece(Tokenizer):
    """LLaMA's tokenizer.model. `encode` adds neither bos nor eos."""

    def __init__(self, path):
        import sentencepiece

        try:
            self.model = sentencepiece.SentencePieceProcessor(model_file=str(path))
        except (OSError, RuntimeError):
            raise InputError(f"{path} is not a sentencepiece model.") from None
        self.bos_id, self.eos_id = self.model.bos_id(), self.model.eos_id()
        self.vocab_size = self.model.vocab_size()

    def encode(self, text):
        return self.model.encode(text)

    def decode(self, ids):
        return self.model.decode([int(id) for id in ids if id not in (self.bos_id, self.eos_id)])


def load_tokenizer(folder):
    """Choose the tokenizer by the files in a model's folder."""
    path = Path(folder) / "tokenizer.model"
    if path.exists():
        return SentencePiece(path)
    if not Path(folder).is_dir():
        raise InputError(f"{folder} is not a folder: give one in Hugging Face's layout.")
    raise InputError(
        f"{folder} has no tokenizer.model (sentencepiece), the one kind that can be read so far."
    )
