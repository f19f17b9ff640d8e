"""Reading all images of a small set once, before a training starts on them."""

from __future__ import annotations

import os
from functools import partial
from multiprocessing.pool import ThreadPool

from lqkd.data.encoded import EncodedImages
from lqkd.errors import UsageError
from lqkd.utils.progress import track

_MOST_NAMED = 10  # damaged images
_MOST_CHECKED = 5000  # images that are decoded before the training, which takes seconds


def refuse_unreadable(images: EncodedImages, complaint: str) -> bool:
    """Decode every image of a set of at most 5,000; larger ones are not looked at.

    Args:
        images: the set.
        complaint: what follows after "3 of 100" in the message.

    Returns:
        Whether they were looked at.

    Raises:
        UsageError: naming those that cannot be read, and why.
    """
    count = images.shape[0]
    if count > _MOST_CHECKED:
        return False
    with ThreadPool(os.cpu_count()) as pool:  # decoders release the GIL
        checked = pool.imap(partial(_damage, images), range(count), chunksize=16)
        damaged = [text for text in track(checked, "checking images", count) if text is not None]
    if damaged:
        more = f"; and {len(damaged) - _MOST_NAMED} more" if len(damaged) > _MOST_NAMED else ""
        raise UsageError(
            f"{len(damaged)} of {count} {complaint}: "
            f"{'; '.join(text.rstrip('.') for text in damaged[:_MOST_NAMED])}{more}."
        )
    return True


def _damage(images: EncodedImages, index: int) -> str | None:
    """What keeps an image from being read; None when nothing does."""
    try:
        images.read(index)
    except UsageError as error:
        return str(error)
    return None
