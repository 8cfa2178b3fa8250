"""A reward: called with the completions and every column of the data by name; returns one number a response."""


def exact(completions, result, **columns):
    texts = [c if isinstance(c, str) else c[0]["content"] for c in completions]
    # `None` where a response cannot be judged: it then does not count
    return [None if r is None else float(text.strip().endswith(str(r))) for text, r in zip(texts, result, strict=True)]
