"""Which tokens hold a stretch of a completion's text. Pure."""

from collections.abc import Callable, Sequence

Decode = Callable[[Sequence[int]], str]


def token_span(start: int, end: int, ids: Sequence[int], decode: Decode) -> range:
    """The tokens that hold the characters from `start` up to `end` of `decode(ids)`; half a token counts as whole.

    Args:
        decode: token ids to text, special tokens written out. Cost: called about 2·log2(len(ids)) times.
    """
    return range(_tokens_to(start + 1, ids, decode) - 1, _tokens_to(end, ids, decode))


def _tokens_to(characters: int, ids: Sequence[int], decode: Decode) -> int:
    """The fewest tokens whose text has that many characters."""
    low, high = 1, len(ids)
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if len(decode(ids[:middle])) >= characters else (middle + 1, high)
    return low
