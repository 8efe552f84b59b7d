"""What comes in and goes out, in rooms: README.md has a line on each. Here is what they all share."""


class InputError(ValueError):
    """What the user gave cannot be used: one sentence that names it and says what to do."""


class Refused(ValueError):
    """What is wrong with a record or a conversation, in words that follow "it"."""


IGNORE_INDEX = -100  # the target of a token that is not in the loss
