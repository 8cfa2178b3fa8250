"""Token ids that two models share, or do not: log-probabilities of other tokens mean nothing."""

from accelerate.logging import get_logger
from transformers import AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerBase


logger = get_logger(__name__)


def text_tokenizer(processing_class) -> PreTrainedTokenizerBase:
    """The tokenizer itself, or the one inside a processor."""
    return getattr(processing_class, "tokenizer", processing_class)


def different_ids(ours: dict[str, int], theirs: dict[str, int]) -> list[tuple[str, int, int | str]]:
    """(token, our id, their id of it or their token of our id), for tokens that two vocabularies do not agree on.

    A token that only we have is no conflict as long as its id means nothing to them: padding that was added.
    """
    tokens = {id_: token for token, id_ in theirs.items()}
    conflicts = []
    for token, id_ in sorted(ours.items(), key=lambda item: item[1]):
        if theirs.get(token, id_) != id_:
            conflicts.append((token, id_, theirs[token]))
        elif token not in theirs and id_ in tokens:
            conflicts.append((token, id_, repr(tokens[id_])))
    return conflicts


def check_token_ids(field: str, config: PreTrainedConfig, processing_class, highest: int, **options) -> None:
    """Check that every token of the policy is the same one to another model; with a warning where that is unknown.

    Args:
        field: where the other model was named, for the message.
        config: of the other model; its `name_or_path` is where its tokenizer is looked for.
        processing_class: the policy's; `None` if there is none to compare with.
        highest: the largest token id that the other model has to know. Its embedding may be padded to any size.
        options: for loading its tokenizer, such as `revision`.

    Raises:
        ValueError: if it does not know so many ids, or some token has another id.
    """
    name, size = config.name_or_path, config.get_text_config().vocab_size
    if highest >= size:
        raise ValueError(
            f"{field}={name!r} knows {size} token ids, but the policy's tokens go up to {highest}; choose a model of "
            f"the same family."
        )
    ours = {} if processing_class is None else text_tokenizer(processing_class).get_vocab()
    loaded = load_tokenizer(name, **options)
    theirs = {} if loaded is None else text_tokenizer(loaded).get_vocab()
    # without its files, transformers makes up a tokenizer of a token or two
    if not ours.keys() & theirs.keys():
        logger.warning(f"{field}={name!r} has no tokenizer to compare token ids with; they are taken as equal.")
        return
    different = different_ids(ours, theirs)
    if different:
        token, id_, other = different[0]
        raise ValueError(
            f"{field}={name!r} has another tokenizer than the policy ({len(different)} tokens differ): {token!r} is "
            f"{id_} to the policy, and {other} here. Choose a model of the same family."
        )


def load_tokenizer(name: str, **options):
    """The tokenizer that comes with a model, or `None`: a model built in memory has no name, or no files."""
    try:
        return AutoTokenizer.from_pretrained(name, **options)
    except (OSError, ValueError):
        return None
